//! The pin, MSI and I/O BARs of functions, as a guest and as a migration see them.

use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vfio_migration_device::{IrqIndex, MsiMessage, PciError, PciFunction, PciRegion, PciState};

use super::fakes::{FakeHardware, fake_host, mailbox};
use super::functions::{Machine, message};
use crate::{Devfn, VfioPciFunction};

/// The IOAPIC pin of slot 1.
const LINE: u32 = 17;
const MSI: u16 = 0x60;

fn machine(resamples: bool) -> Machine {
    Machine::of(vec![FakeHardware::legacy("dev1", resamples)])
}

/// One whose guest has turned decode and bus mastering on.
fn running() -> Machine {
    let machine = machine(true);
    machine.config_write(1, 4, &[7, 0]);
    machine.devices[0].log();
    machine
}

fn moved(state: &PciState) -> PciState {
    PciState::decode(&state.encode().unwrap()).unwrap()
}

impl Machine {
    fn command(&self, command: u16) {
        self.config_write(1, 4, &command.to_le_bytes());
    }

    pub(super) fn msi(&self, control: u16, message: MsiMessage, masks: u32) {
        self.config_write(1, MSI + 4, &message.address.to_le_bytes()[..4]);
        self.config_write(1, MSI + 8, &message.address.to_le_bytes()[4..]);
        self.config_write(1, MSI + 12, &message.data.to_le_bytes()[..2]);
        self.config_write(1, MSI + 16, &masks.to_le_bytes());
        self.config_write(1, MSI + 2, &control.to_le_bytes());
    }

    fn raise_msi(&self, vector: u32) -> bool {
        self.devices[0].raise_as(IrqIndex::Msi, vector)
    }
}

#[test]
fn a_pin_is_raised_ended_and_raised_again_while_its_cause_lasts() {
    let machine = machine(true);
    let device = &machine.devices[0];
    device.drive(true);
    assert_eq!(machine.dword(1, 0x3c) & 0xffff, 0x100 | LINE, "firmware tells the line");
    assert!(!machine.irq.level(LINE), "a function that is off is not connected");
    machine.command(7);
    assert!(machine.irq.level(LINE));
    assert!(!device.resampled(), "not before the guest ends it");
    machine.irq.end(LINE);
    assert!(!machine.irq.level(LINE));
    assert!(device.resampled());
    assert!(machine.irq.level(LINE), "its cause lasts");
    device.drive(false);
    machine.irq.end(LINE);
    assert!(device.resampled());
    assert!(!machine.irq.level(LINE));
    assert_eq!(machine.function().errors(), 0);
}

#[test]
fn a_masked_pin_remembers() {
    let machine = running();
    let device = &machine.devices[0];
    // Raised, and not ended when the guest masks it: the level goes, the cause does not.
    device.drive(true);
    assert!(machine.irq.level(LINE));
    machine.command(0x407);
    assert!(!machine.irq.level(LINE));
    assert!(device.resampled());
    machine.command(7);
    assert!(machine.irq.level(LINE));
    device.drive(false);
    machine.irq.end(LINE);
    assert!(device.resampled());
    // Without a cause nothing comes back.
    machine.command(0x407);
    device.resampled();
    machine.command(7);
    assert!(!machine.irq.level(LINE));
    // Raised while it is masked.
    machine.command(0x407);
    device.drive(true);
    assert!(!machine.irq.level(LINE));
    machine.command(7);
    assert!(machine.irq.level(LINE));
    assert_eq!(device.log().iter().filter(|line| line.starts_with("irqs")).count(), 0, "connected all along");
}

#[test]
fn a_function_that_is_turned_off_has_no_pin() {
    let machine = running();
    machine.devices[0].drive(true);
    machine.command(0);
    assert!(machine.devices[0].log().contains(&"irqs 0 off".to_owned()));
    assert!(machine.irq.pins.lock().unwrap().is_empty());
    assert!(!machine.save().unwrap().intx_pending);
    machine.devices[0].drive(false);
    machine.command(7);
    assert!(!machine.irq.level(LINE), "what was raised before is forgotten");
}

#[test]
fn a_device_that_takes_no_resample_is_unmasked_by_hand() {
    let machine = machine(false);
    let device = &machine.devices[0];
    machine.command(7);
    device.drive(true);
    for _ in 0..3 {
        assert!(machine.irq.level(LINE));
        machine.irq.end(LINE);
        let mut fds = [PollFd::new(&device.unmasked, PollFlags::IN)];
        let patience = Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut fds, Some(&patience)).unwrap(), 1, "the pin stays masked");
        assert!(device.unmasked.drain());
    }
    machine.command(0);
    assert!(!machine.irq.level(LINE));
}

#[test]
fn a_raised_pin_moves() {
    let source = running();
    source.devices[0].drive(true);
    assert!(source.irq.level(LINE), "the guest was given it, and has not ended it");
    source.bus.host().gate().close();
    let state = moved(&source.save().unwrap());
    assert!(state.intx_pending);

    let destination = machine(true);
    assert_eq!(destination.restore(&state).unwrap(), 1);
    assert!(destination.irq.level(LINE));
    destination.irq.end(LINE);
    assert!(destination.devices[0].resampled() && !destination.irq.level(LINE));
    destination.function().undo().unwrap();
    assert!(destination.irq.pins.lock().unwrap().is_empty());

    // The source goes on instead: its pin is as it was.
    source.bus.host().gate().open();
    source.function().deliver_pending().unwrap();
    assert!(source.irq.level(LINE));
    source.irq.end(LINE);
    assert!(source.devices[0].resampled());
}

#[test]
fn a_masked_pin_moves_with_what_it_remembers_and_nothing_else() {
    for raised in [true, false] {
        let source = running();
        source.command(0x407);
        source.devices[0].drive(raised);
        let state = moved(&source.save().unwrap());
        assert_eq!(state.intx_pending, raised);
        assert_eq!(source.save().unwrap(), state, "a save takes nothing away");
        let destination = machine(true);
        destination.restore(&state).unwrap();
        assert!(!destination.irq.level(LINE));
        destination.command(7);
        assert_eq!(destination.irq.level(LINE), raised);
        source.command(7);
        assert_eq!(source.irq.level(LINE), raised);
    }
    let pinless = Machine::new(1);
    let mut state = pinless.save().unwrap();
    state.intx_pending = true;
    assert!(matches!(pinless.restore(&state), Err(PciError::Unfit { .. })));
}

#[test]
fn msi_vectors_deliver_mask_and_remember() {
    let machine = running();
    let pending = || machine.dword(1, MSI + 20);
    let base = MsiMessage { address: 0x1_fee0_1000, data: 0x40 };
    let nth = |n: u32| MsiMessage { data: base.data + n, ..base };
    assert!(!machine.raise_msi(0), "not before it is enabled");
    machine.msi(0x21, base, 0b0100);
    assert_eq!(machine.devices[0].log(), ["irqs 0 off", "irqs 1 0+4"], "the pin goes first");
    assert!((0..4).all(|n| machine.raise_msi(n)));
    assert_eq!(machine.irq.take(), [nth(0), nth(1), nth(3)]);
    assert_eq!(pending(), 0b0100);
    machine.config_write(1, MSI + 16, &[0]);
    assert_eq!(machine.irq.take(), [nth(2)]);
    assert_eq!(pending(), 0);
    // The guest can change no pending bit, and what is no vector no mask bit.
    machine.config_write(1, MSI + 20, &[0xff; 4]);
    machine.config_write(1, MSI + 16, &[0xff; 4]);
    assert_eq!((pending(), machine.dword(1, MSI + 16)), (0, 0b1111));
    machine.config_write(1, MSI + 16, &[0]);
    // Fewer of them, and another message.
    machine.msi(0x01, message(0x71), 0);
    assert_eq!(machine.devices[0].log(), ["irqs 1 off", "irqs 1 0+1"]);
    assert!(machine.raise_msi(0) && !machine.raise_msi(1));
    assert_eq!(machine.irq.take(), [message(0x71)]);
    machine.raise_msi(0);
    machine.msi(0, message(0x71), 0);
    assert_eq!(machine.devices[0].log(), ["irqs 1 off", "irqs 0 0+1"], "the pin is back");
    assert!(machine.irq.take().is_empty() && machine.irq.routes.lock().unwrap().is_empty());
    assert_eq!(machine.function().errors(), 0);
}

#[test]
fn msi_moves_with_what_was_pending() {
    let source = running();
    source.msi(0x21, message(0x40), 0b0001);
    source.bus.host().gate().close();
    source.raise_msi(0);
    source.raise_msi(3);
    let state = moved(&source.save().unwrap());
    assert_eq!((state.msi_pending, state.intx_pending), (0b1001, false));

    let destination = machine(true);
    destination.devices[0].log();
    assert_eq!(destination.restore(&state).unwrap(), 4);
    assert_eq!(destination.devices[0].log(), ["write 7 0x4 [7, 0]", "irqs 1 0+4"]);
    assert_eq!(destination.irq.take(), [message(0x43)]);
    assert_eq!(destination.dword(1, MSI + 20), 1);
    destination.config_write(1, MSI + 16, &[0]);
    assert_eq!(destination.irq.take(), [message(0x40)]);
    assert_eq!(destination.save().unwrap().msi_pending, 0);
    destination.function().undo().unwrap();
    assert!(destination.irq.attached.lock().unwrap().is_empty());
    assert_eq!(destination.devices[0].log(), ["irqs 1 off", "write 7 0x4 [0, 0]"]);

    source.bus.host().gate().open();
    source.function().deliver_pending().unwrap();
    assert_eq!(source.irq.take(), [message(0x43)]);
    assert_eq!(source.dword(1, MSI + 20), 1);

    let bad = PciState { msi_pending: 0x10, ..state.clone() };
    assert!(matches!(machine(true).restore(&bad), Err(PciError::Unfit { .. })));
    let none = PciState { msi_pending: 0, ..state };
    let destination = machine(true);
    destination.restore(&none).unwrap();
    assert_eq!(destination.irq.take(), [], "nothing comes that was not pending");
}

#[test]
fn one_kind_is_connected_at_a_time() {
    let machine = running();
    let log = || machine.devices[0].log();
    machine.vector(0, message(0x41), false);
    machine.msix(true, false);
    assert_eq!(log(), ["irqs 0 off", "irqs 2 0+1"]);
    machine.msi(1, message(0x51), 0);
    assert_eq!(log(), [""; 0], "MSI-X is in force");
    machine.msix(false, false);
    assert_eq!(log(), ["irqs 2 off", "irqs 1 0+1"]);
    machine.raise_msi(0);
    assert_eq!(machine.irq.take(), [message(0x51)]);
    machine.msix(true, false);
    assert_eq!(log(), ["irqs 1 off", "irqs 2 0+1"]);
    machine.devices[0].raise(0);
    assert_eq!(machine.irq.take(), [message(0x41)]);
}

#[test]
fn ports_are_sized_moved_and_decoded() {
    let machine = machine(true);
    let load = |port: u16| {
        let mut byte = [0];
        machine.bus.pio_read(port, &mut byte);
        byte[0]
    };
    let first = u16::try_from(machine.dword(1, 0x20) & !3).unwrap();
    assert_eq!((machine.dword(1, 0x20) & 3, first), (1, 0x1000));
    machine.bus.pio_write(first + 2, &[7]);
    assert_eq!(load(first + 2), 0xff, "decode is off");
    machine.command(2);
    assert_eq!(load(first + 2), 0xff, "memory decode is not that of ports");
    machine.command(1);
    machine.bus.pio_write(first + 2, &[7]);
    assert_eq!((load(first + 2), load(first + 8)), (7, 0xff));
    machine.config_write(1, 0x20, &[0xff; 4]);
    assert_eq!(machine.dword(1, 0x20), 0xffff_fff9);
    assert_eq!(load(first + 2), 0xff);
    machine.config_write(1, 0x20, &0xc001u32.to_le_bytes());
    assert_eq!(load(0xc002), 7);
    let state = moved(&machine.save().unwrap());
    assert_eq!(state.bars[4], 0xc000);
    let destination = self::machine(true);
    destination.restore(&state).unwrap();
    destination.bus.pio_write(0xc003, &[9]);
    let mut byte = [0];
    destination.bus.pio_read(0xc003, &mut byte);
    assert_eq!(byte, [9]);
    // The machine's own ports are no place for a BAR.
    machine.config_write(1, 0x20, &0x3f9u32.to_le_bytes());
    assert_eq!(machine.function().errors(), 0);
    assert_eq!(load(0x3fa), 0xff);
}

#[test]
fn functions_share_a_pin() {
    let devices: Vec<_> = (1..=9).map(|n| FakeHardware::legacy(&format!("dev{n}"), true)).collect();
    let machine = Machine::of(devices);
    for slot in [1, 9] {
        machine.config_write(slot, 4, &[7, 0]);
        assert_eq!(machine.dword(slot, 0x3c) & 0xff, LINE);
    }
    machine.devices[8].drive(true);
    assert!(machine.irq.level(LINE));
    machine.devices[8].drive(false);
    machine.irq.end(LINE);
    assert!(machine.devices[0].resampled() && machine.devices[8].resampled());
}

#[test]
fn a_config_space_that_ends_early_is_read_no_further() {
    let with = |size: u64| {
        let short = |regions: &mut Vec<PciRegion>| regions[2].size = size;
        let device = FakeHardware::with("dev1", mailbox(), 0, &short);
        device.state.lock().unwrap().config[0xfe..].copy_from_slice(&[7, 9]);
        device
    };
    let machine = Machine::of(vec![Arc::new(with(255))]);
    assert_eq!(machine.dword(1, 0xfc), 0x0007_0000);
    machine.config_write(1, 0xff, &[1]);
    assert_eq!(machine.devices[0].log(), [""; 0]);
    assert_eq!(machine.function().errors(), 0);
    let (host, ..) = fake_host();
    let short = VfioPciFunction::new(Devfn::in_slot(1), Arc::new(with(63)), host);
    assert!(matches!(short, Err(PciError::Unfit { .. })));
}

/// An express capability at 0x80 and one of advanced features at 0xc0, both of which can reset the function or not.
fn resettable(can: bool) -> Machine {
    let device = FakeHardware::legacy("dev1", true);
    let mut state = device.state.lock().unwrap();
    let mut put = |at: usize, bytes: &[u8]| state.config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x61, &[0x80]);
    put(0x80, &[0x10, 0xc0, 2, 0, 0, 0, 0, u8::from(can) << 4]);
    put(0xc0, &[0x13, 0, 6, 1 | u8::from(can) << 1]);
    drop(state);
    let machine = Machine::of(vec![device]);
    machine.command(7);
    machine
}

#[test]
fn a_reset_that_the_guest_asks_for_resets_what_is_emulated() {
    for (register, value) in [(0x88u16, 0x8000u16), (0xc4, 1)] {
        let machine = resettable(true);
        let device = &machine.devices[0];
        machine.msi(0x21, message(1), 0);
        assert!(machine.raise_msi(0));
        let place = machine.dword(1, 0x10);
        device.log();
        machine.config_write(1, register, &value.to_le_bytes());
        let log = device.log();
        let [low, high] = value.to_le_bytes();
        assert_eq!(log[0], format!("write 7 {register:#x} [{low:x}, {high:x}]"), "first the device");
        assert!(log.contains(&"write 7 0x4 [0, 0]".to_owned()), "{log:?}");
        assert!(device.state.lock().unwrap().events.is_empty(), "no interrupt is connected");
        assert!(!machine.raise_msi(0) && machine.irq.attached.lock().unwrap().is_empty());
        let control = machine.dword(1, MSI) >> 16;
        assert_eq!((machine.dword(1, 4) & 0xffff, control & 0x71), (0, 0));
        assert_eq!((machine.dword(1, 0x10), machine.dword(1, MSI + 4)), (0, 0));
        assert_eq!(machine.load(u64::from(place)), u32::MAX, "no BAR is decoded");
        // The guest puts its BAR back, and turns the pin on again.
        machine.config_write(1, 0x10, &place.to_le_bytes());
        machine.command(7);
        device.drive(true);
        assert!(machine.irq.level(LINE));
        assert_eq!((machine.load(u64::from(place)), machine.function().errors()), (0, 0));
    }
}

#[test]
fn what_is_no_reset_resets_nothing() {
    let kept = |machine: &Machine, register: u16, from: &[u8]| {
        machine.config_write(1, register, from);
        machine.dword(1, 4) & 0xffff == 7
    };
    let able = resettable(true);
    assert!(kept(&able, 0x88, &[0xff, 0x7f]), "all of the register but that bit");
    assert!(kept(&able, 0xc4, &[0xfe]));
    assert!(kept(&able, 0x8a, &[0, 0x80]), "the register after it");
    let unable = resettable(false);
    assert!(kept(&unable, 0x88, &[0, 0x80]) && kept(&unable, 0xc4, &[1]));
    // A device that cannot be told is as it was.
    able.devices[0].state.lock().unwrap().fail = true;
    assert!(kept(&able, 0x88, &[0, 0x80]));
    assert_eq!(able.function().errors(), 1);
}
