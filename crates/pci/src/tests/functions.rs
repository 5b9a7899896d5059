//! Functions on a bus, as a guest and as a migration see them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::prelude::*;
use vfio_migration_device::{ConfigRules, IrqRouter, MsiMessage, PciError, PciFunction, PciRegion, PciState};
use vfio_migration_types::{Gpa, Range};

use super::fakes::{ECAM, FakeHardware, FakeIrq, FakeMapper, HIGH, fake_host, mailbox};
use crate::*;

const LOW: u64 = 0xc000_0000;

pub(super) struct Machine {
    pub(super) bus: PciBus,
    pub(super) irq: Arc<FakeIrq>,
    pub(super) mapper: Arc<FakeMapper>,
    pub(super) devices: Vec<Arc<FakeHardware>>,
}

impl Machine {
    pub(super) fn new(devices: u8) -> Self {
        Self::of((1..=devices).map(|slot| FakeHardware::new(&format!("dev{slot}"))).collect())
    }

    pub(super) fn of(devices: Vec<Arc<FakeHardware>>) -> Self {
        let (host, irq, mapper) = fake_host();
        let bus = PciBus::new(Arc::clone(&host), Gpa(ECAM));
        let devices = (1u8..)
            .zip(devices)
            .map(|(slot, device)| {
                bus.add(Arc::new(
                    VfioPciFunction::new(Devfn::in_slot(slot), device.clone(), Arc::clone(&host)).unwrap(),
                ));
                device
            })
            .collect();
        bus.place_bars().unwrap();
        Self { bus, irq, mapper, devices }
    }

    /// One whose guest has turned memory decode on.
    pub(super) fn running(devices: u8) -> Self {
        let machine = Self::new(devices);
        for slot in 1..=devices {
            machine.config_write(slot, 4, &[6, 0]);
        }
        machine.devices.iter().for_each(|device| drop(device.log()));
        machine
    }

    pub(super) fn config_read(&self, slot: u8, register: u16, into: &mut [u8]) {
        self.select(slot, register);
        self.bus.pio_read(0xcfc + (register & 3), into);
    }

    pub(super) fn config_write(&self, slot: u8, register: u16, from: &[u8]) {
        self.select(slot, register);
        self.bus.pio_write(0xcfc + (register & 3), from);
    }

    pub(super) fn select(&self, slot: u8, register: u16) {
        let address = 0x8000_0000 | u32::from(slot) << 11 | u32::from(register & 0xfc);
        self.bus.pio_write(0xcf8, &address.to_le_bytes());
    }

    /// What a migration reads of the first function.
    pub(super) fn save(&self) -> Result<PciState, PciError> {
        let function = self.function();
        function.save_interrupts(function.save_config()?)
    }

    pub(super) fn dword(&self, slot: u8, register: u16) -> u32 {
        let mut out = [0; 4];
        self.config_read(slot, register, &mut out);
        u32::from_le_bytes(out)
    }

    pub(super) fn load(&self, gpa: u64) -> u32 {
        let mut out = [0; 4];
        self.bus.mmio_read(Gpa(gpa), &mut out);
        u32::from_le_bytes(out)
    }

    pub(super) fn store(&self, gpa: u64, value: u32) {
        self.bus.mmio_write(Gpa(gpa), &value.to_le_bytes());
    }

    pub(super) fn vector(&self, vector: u64, message: MsiMessage, masked: bool) {
        let at = LOW + 0x2000 + 16 * vector;
        self.store(at + 12, 1);
        self.bus.mmio_write(Gpa(at), &message.address.to_le_bytes());
        self.store(at + 8, message.data);
        self.store(at + 12, masked.into());
    }

    pub(super) fn msix(&self, enabled: bool, all_masked: bool) {
        let control = u16::from(enabled) << 15 | u16::from(all_masked) << 14;
        self.config_write(1, 0x42, &control.to_le_bytes());
    }

    pub(super) fn function(&self) -> Arc<VfioPciFunction> {
        Arc::clone(&self.bus.functions()[0])
    }

    pub(super) fn restore(&self, state: &PciState) -> Result<u32, PciError> {
        let function = self.function();
        function.restore_config(state, &ConfigRules::default())?;
        function.stage_interrupts(state)?;
        self.bus.host().router().commit().unwrap();
        function.connect_interrupts(state)
    }
}

pub(super) fn message(data: u32) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000, data }
}

#[test]
fn a_slot_with_several_functions_says_so_and_one_with_one_does_not() {
    let (host, _, _) = fake_host();
    let bus = PciBus::new(Arc::clone(&host), Gpa(ECAM));
    let places = [Devfn::in_slot(1), Devfn::new(1, 7), Devfn::in_slot(2)];
    for (index, place) in places.into_iter().enumerate() {
        let device = FakeHardware::new(&format!("dev{index}"));
        bus.add(Arc::new(VfioPciFunction::new(place, device, Arc::clone(&host)).unwrap()));
    }
    bus.place_bars().unwrap();
    let read = |devfn: Devfn, register: u64, into: &mut [u8]| {
        let place = u64::from(devfn.slot()) << 15 | u64::from(devfn.function()) << 12;
        bus.mmio_read(Gpa(ECAM + place + register), into);
    };
    for (place, bit) in places.into_iter().zip([0x80, 0x80, 0]) {
        // As a byte, and in the dword and the qword around it.
        let (mut byte, mut dword, mut qword) = ([0; 1], [0; 4], [0; 8]);
        read(place, 0x0e, &mut byte);
        read(place, 0x0c, &mut dword);
        read(place, 0x08, &mut qword);
        assert_eq!((byte[0], dword[2], qword[6]), (bit, bit, bit), "{place}");
        let mut id = [0; 4];
        read(place, 0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x4d53_5646, "{place}");
    }
    let mut none = [0; 4];
    for place in [Devfn::new(1, 1), Devfn::new(2, 1), Devfn::new(0, 1)] {
        read(place, 0, &mut none);
        assert_eq!(none, [0xff; 4], "{place}");
    }
}

#[test]
fn a_guest_finds_its_devices_both_ways() {
    let machine = Machine::new(2);
    assert_eq!(machine.dword(0, 0), 0x4842_5646);
    assert_eq!((machine.dword(0, 8), machine.dword(0, 0x10)), (0x0600_0000, 0));
    for slot in [1, 2] {
        assert_eq!(machine.dword(slot, 0), 0x4d53_5646);
        assert_eq!(machine.load(ECAM + (u64::from(slot) << 15)), 0x4d53_5646);
    }
    assert_eq!(machine.dword(3, 0), u32::MAX);
    let mut byte = [0];
    machine.config_read(1, 0x0b, &mut byte);
    assert_eq!(byte, [0xff]);
    let mut word = [0; 2];
    machine.config_read(1, 0x2e, &mut word);
    assert_eq!(word, [1, 0]);
    machine.select(1, 0);
    let mut across = [0; 4];
    machine.bus.pio_read(0xcfd, &mut across);
    assert_eq!(across, [0xff; 4], "an access does not leave its dword");
    machine.bus.pio_write(0xcf8, &0x0000_0800u32.to_le_bytes());
    machine.bus.pio_read(0xcfc, &mut across);
    assert_eq!(across, [0xff; 4], "not enabled");
    let mut qword = [0; 8];
    machine.bus.mmio_read(Gpa(ECAM + (1 << 15)), &mut qword);
    assert_eq!(qword, [0x46, 0x56, 0x53, 0x4d, 0, 0, 0x10, 0]);
    machine.bus.mmio_read(Gpa(ECAM + (1 << 15) + 256), &mut qword);
    assert_eq!(qword, [0xff; 8], "256 bytes are all it has");
}

#[test]
fn bars_are_sized_moved_and_decoded() {
    let machine = Machine::new(1);
    assert_eq!(u64::from(machine.dword(1, 0x10)), LOW);
    assert_eq!((machine.dword(1, 0x18), machine.dword(1, 0x1c)), (0xc, 0x40));
    assert_eq!(machine.load(LOW), u32::MAX, "decode is off");

    machine.config_write(1, 0x10, &[0xff; 4]);
    assert_eq!(machine.dword(1, 0x10), 0xffff_c000);
    machine.config_write(1, 0x10, &0xc001_0000u32.to_le_bytes());
    machine.config_write(1, 4, &[2, 0]);
    assert_eq!(machine.mapper.mapped.lock().unwrap().get(&Gpa(HIGH)), Some(&0x10_0000));
    assert!(machine.mapper.doorbells.lock().unwrap().contains(&Gpa(0xc001_1000)));
    machine.store(0xc001_0008, 0x1234);
    assert_eq!(machine.load(0xc001_0008), 0x1234);
    assert_eq!(machine.load(LOW + 8), u32::MAX);

    // Sized while it is decoded: it goes away, and comes back.
    machine.config_write(1, 0x1c, &[0xff; 4]);
    assert!(machine.mapper.mapped.lock().unwrap().is_empty());
    machine.config_write(1, 0x1c, &[0x40, 0, 0, 0]);
    assert_eq!(machine.mapper.mapped.lock().unwrap().len(), 1);
    machine.config_write(1, 4, &[0, 0]);
    assert!(
        machine.mapper.mapped.lock().unwrap().is_empty()
            && machine.mapper.doorbells.lock().unwrap().is_empty()
    );
    assert_eq!(machine.load(0xc001_0008), u32::MAX);
    let commands: Vec<_> =
        machine.devices[0].log().into_iter().filter(|line| line.contains("7 0x4")).collect();
    assert_eq!(commands, ["write 7 0x4 [2, 0]", "write 7 0x4 [0, 0]"]);
    assert_eq!(machine.function().errors(), 0);
}

#[test]
fn an_overlapping_bar_is_not_decoded_and_is_counted() {
    let machine = Machine::running(2);
    let second = machine.dword(2, 0x10);
    machine.config_write(1, 0x10, &second.to_le_bytes());
    assert_eq!(machine.function().errors(), 1);
    machine.config_write(1, 0x10, &0xc100_0000u32.to_le_bytes());
    machine.store(0xc100_0008, 7);
    assert_eq!(machine.load(0xc100_0008), 7);
    assert_eq!(machine.load(u64::from(second) + 8), 0);
}

#[test]
fn peers_reach_each_others_memory_where_it_is() {
    let machine = Machine::running(3);
    let ranges = |device: usize| {
        let state = machine.devices[device].state.lock().unwrap();
        state.dma.iter().map(|range| range.start().0).collect::<Vec<_>>()
    };
    assert_eq!(ranges(0), [HIGH + 0x10_0000, HIGH + 0x20_0000]);
    assert_eq!(ranges(1), [HIGH, HIGH + 0x20_0000]);
    machine.config_write(1, 0x18, &0x0080_0000u32.to_le_bytes());
    assert_eq!(ranges(1), [HIGH + 0x20_0000, HIGH + 0x80_0000]);
    machine.config_write(1, 4, &[0, 0]);
    assert_eq!(ranges(1), [HIGH + 0x20_0000]);
    machine.bus.functions()[2].release().unwrap();
    assert_eq!((ranges(0), ranges(1), ranges(2)), (vec![HIGH + 0x10_0000], vec![], vec![]));
}

#[test]
fn devices_that_are_closed_together_take_back_their_own_mappings() {
    let unmapped = |machine: &Machine| {
        let lines = machine.devices.iter().flat_map(|device| device.log());
        lines.filter(|line| line.starts_with("unmap")).count()
    };
    let release = |machine: &Machine| {
        machine.bus.functions().iter().for_each(|function| function.release().unwrap());
    };
    // Each alone: a request for each pair of devices.
    let machine = Machine::running(4);
    release(&machine);
    assert_eq!(unmapped(&machine), 4 * 3);
    let machine = Machine::running(4);
    machine.bus.host().dissolve_peers();
    release(&machine);
    assert_eq!(unmapped(&machine), 0);
    // A function that stays by a mistake shares nothing any more.
    machine.config_write(1, 4, &[2, 0]);
    assert_eq!((unmapped(&machine), machine.function().errors()), (0, 0));
}

#[test]
fn a_peer_that_cannot_map_fails_the_placing_whole() {
    let machine = Machine::new(3);
    machine.devices[2].state.lock().unwrap().fail = true;
    machine.config_write(1, 4, &[2, 0]);
    assert_eq!(machine.function().errors(), 1);
    assert!(machine.mapper.mapped.lock().unwrap().is_empty());
    assert!(machine.devices[1].state.lock().unwrap().dma.is_empty());
    assert_eq!(machine.load(LOW), 0, "the other BAR is there");
}

#[test]
fn a_peer_whose_iommu_takes_no_bar_goes_without() {
    let machine = Machine::new(3);
    let reached = |device: usize| machine.devices[device].state.lock().unwrap().dma.len();
    machine.devices[1].state.lock().unwrap().no_peer_dma = true;
    for slot in 1..=3 {
        machine.config_write(slot, 4, &[6, 0]);
    }
    assert_eq!([reached(0), reached(1), reached(2)], [2, 0, 2]);
    assert_eq!(machine.load(HIGH + 8), 0, "the guest reaches it all the same");
    // What was not mapped is not taken away: the fake would panic.
    machine.config_write(1, 4, &[0, 0]);
    machine.bus.functions()[1].release().unwrap();
    assert_eq!([reached(0), reached(1), reached(2)], [1, 0, 0]);
    assert!(machine.bus.functions().iter().all(|function| function.errors() == 0));
}

#[test]
fn what_cannot_be_mapped_is_trapped_and_the_bar_is_there() {
    let machine = Machine::new(2);
    machine.mapper.refuse.store(true, Ordering::Relaxed);
    machine.config_write(1, 4, &[2, 0]);
    machine.store(LOW + 8, 7);
    assert_eq!(machine.load(LOW + 8), 7);
    assert_eq!(machine.load(HIGH + 8), 7, "both BARs reach the device");
    assert!(machine.mapper.doorbells.lock().unwrap().is_empty());
    machine.store(LOW + 0x1000, 1);
    assert!(machine.devices[0].log().contains(&"write 0 0x1000 [1, 0, 0, 0]".to_owned()));
    // What failed to come is not taken away.
    machine.config_write(1, 4, &[0, 0]);
    assert_eq!(machine.function().errors(), 0);
}

#[test]
fn memory_that_is_not_safe_to_map_is_trapped() {
    let sealed = || {
        let mailbox = mailbox();
        rustix::fs::fcntl_add_seals(&mailbox, rustix::fs::SealFlags::SHRINK).unwrap();
        mailbox
    };
    let one = |mailbox, offset, change: &dyn Fn(&mut Vec<PciRegion>)| {
        let device = Arc::new(FakeHardware::with("dev1", mailbox, offset, change));
        let machine = Machine::of(vec![device, FakeHardware::new("dev2")]);
        machine.config_write(1, 4, &[2, 0]);
        assert_eq!(machine.function().errors(), 0);
        assert_eq!(machine.load(HIGH + 8), 0, "the BAR is there");
        let mapped = machine.mapper.mapped.lock().unwrap().clone();
        let shared = machine.devices[1].state.lock().unwrap().dma.len();
        assert_eq!(mapped.len(), shared, "its peers reach as much as the guest");
        mapped.into_iter().collect::<Vec<_>>()
    };
    let same = |_: &mut Vec<PciRegion>| {};
    assert_eq!(one(sealed(), 0, &same), [(Gpa(HIGH), 0x10_0000)]);
    assert_eq!(one(sealed(), 0x1000, &same), [(Gpa(HIGH), 0x10_0000)]);
    assert_eq!(one(sealed(), 0x800, &same), [], "not at a page of its file");
    assert_eq!(one(sealed(), u64::MAX, &same), []);
    assert_eq!(one(mailbox(), 0, &same), [], "it may be made shorter");
    assert_eq!(one(sealed(), 0, &|regions| regions[1].writable = false), []);
    assert_eq!(one(sealed(), 0, &|regions| regions[1].readable = false), []);
    let two = |regions: &mut Vec<PciRegion>| {
        let range = |start, len| Range::new(start, len).unwrap();
        regions[1].mappable = vec![range(0, 0x1000), range(0x10_0000, 0x4000)];
    };
    assert_eq!(one(sealed(), 0, &two), [(Gpa(HIGH), 0x1000)], "one bad area does not take the other along");
}

#[test]
fn a_failed_save_loses_no_interrupt() {
    let machine = Machine::running(1);
    machine.vector(0, message(0x41), false);
    machine.vector(1, message(0x42), false);
    machine.msix(true, false);
    machine.devices[0].raise(0);
    machine.irq.refuse.store(true, Ordering::Relaxed);
    machine.save().unwrap_err();
    machine.devices[0].raise(1);
    machine.irq.refuse.store(false, Ordering::Relaxed);
    machine.function().deliver_pending().unwrap();
    assert_eq!(machine.irq.take(), [message(0x41), message(0x42)]);
    machine.devices[0].raise(0);
    assert_eq!(machine.irq.take(), [message(0x41)]);
}

#[test]
fn a_closed_gate_keeps_the_guest_from_the_device() {
    let machine = Machine::running(1);
    machine.store(LOW + 8, 1);
    machine.bus.host().gate().close();
    machine.store(LOW + 8, 2);
    machine.config_write(1, 4, &[0, 0]);
    assert_eq!(machine.load(LOW + 8), u32::MAX);
    assert_eq!(machine.bus.host().gate().violations(), 3);
    machine.bus.host().gate().open();
    assert_eq!(machine.load(LOW + 8), 1);
    assert_eq!(machine.devices[0].log(), ["write 0 0x8 [1, 0, 0, 0]"]);
}

#[test]
fn vectors_deliver_mask_and_remember() {
    let machine = Machine::running(1);
    let device = &machine.devices[0];
    let pending = || machine.load(LOW + 0x3000);
    machine.vector(0, message(0x41), false);
    machine.vector(1, message(0x42), true);
    assert!(!device.raise(0), "nothing is connected before MSI-X is enabled");
    machine.msix(true, false);
    assert_eq!(device.log(), ["irqs 2 0+1"], "one call for all that are unmasked");
    device.raise(0);
    device.raise(1);
    assert_eq!(machine.irq.take(), [message(0x41)]);
    assert_eq!(pending(), 0, "it is in the device's own pending bits");
    machine.store(LOW + 0x201c, 0);
    assert_eq!(device.log(), ["irqs 2 1+1"]);
    assert_eq!(machine.irq.take(), [message(0x42)]);
    machine.store(LOW + 0x201c, 1);
    device.raise(1);
    assert_eq!(machine.irq.take(), []);
    assert_eq!(pending(), 2);
    assert_eq!(pending(), 2, "reading does not take it away");
    machine.store(LOW + 0x201c, 0);
    assert_eq!(machine.irq.take(), [message(0x42)]);
    assert_eq!(pending(), 0);

    machine.msix(true, true);
    device.raise(0);
    device.raise(0);
    assert_eq!(machine.irq.take(), []);
    assert_eq!(pending(), 1);
    machine.vector(0, message(0x51), false);
    machine.msix(true, false);
    assert_eq!(machine.irq.take(), [message(0x51)], "by the message it has now, and once");
    assert_eq!(device.log(), [""; 0], "masking does not bother the device");

    machine.store(LOW + 0x2008, 0x61);
    device.raise(0);
    assert_eq!(machine.irq.take(), [message(0x61)]);
    machine.msix(false, false);
    assert_eq!(device.log(), ["irqs 2 off"]);
    assert!(machine.irq.attached.lock().unwrap().is_empty() && machine.irq.routes.lock().unwrap().is_empty());
}

#[test]
fn a_second_function_takes_over_with_what_was_pending() {
    let source = Machine::running(1);
    source.vector(0, message(0x41), false);
    source.vector(1, message(0x42), false);
    source.config_write(1, 0x3c, &[11]);
    source.msix(true, false);
    source.store(LOW + 0x201c, 1);
    source.store(LOW + 8, 9);
    source.bus.host().gate().close();
    // Raised after the vCPUs stopped: one would go to the guest at once, the other is masked.
    source.devices[0].raise(0);
    source.devices[0].raise(1);
    let state = source.save().unwrap();
    assert!(state.vectors.iter().all(|vector| vector.pending));
    let state = PciState::decode(&state.encode().unwrap()).unwrap();

    let destination = Machine::new(1);
    destination.devices[0].state.lock().unwrap().config[0x55] ^= 0xff;
    let before = *destination.irq.commits.lock().unwrap();
    destination.devices[0].log();
    assert_eq!(destination.restore(&state).unwrap(), 1, "the other is masked");
    assert_eq!(*destination.irq.commits.lock().unwrap(), before + 1, "one commit");
    assert_eq!(
        destination.devices[0].log(),
        ["write 7 0x4 [6, 0]", "irqs 2 0+1"],
        "decode first, one SET_IRQS"
    );
    assert_eq!(destination.mapper.mapped.lock().unwrap().len(), 1);
    assert_eq!(destination.irq.take(), [message(0x41)]);
    assert_eq!(destination.load(LOW + 0x3000), 2);
    assert_eq!(destination.dword(1, 0x3c) & 0xff, 11);
    destination.store(LOW + 0x201c, 0);
    assert_eq!(destination.irq.take(), [message(0x42)]);
    let again = destination.save().unwrap();
    assert!(again.vectors.iter().all(|vector| !vector.pending));
    assert_eq!((again.bars, again.config[4]), (state.bars, 6));

    // The source goes on instead: nothing of it is lost, and nothing comes twice.
    source.bus.host().gate().open();
    source.function().deliver_pending().unwrap();
    assert_eq!(source.irq.take(), [message(0x41)]);
    assert_eq!(source.load(LOW + 0x3000), 2);
}

#[test]
fn a_table_written_before_msix_is_enabled_moves_too() {
    let source = Machine::running(1);
    source.vector(0, message(0x41), false);
    let destination = Machine::new(1);
    assert_eq!(destination.restore(&source.save().unwrap()).unwrap(), 0);
    destination.msix(true, false);
    destination.devices[0].raise(0);
    assert_eq!(destination.irq.take(), [message(0x41)]);
}

#[test]
fn what_does_not_fit_is_refused_and_undone() {
    let source = Machine::running(1);
    source.vector(0, message(0x41), false);
    source.msix(true, false);
    let good = source.save().unwrap();
    let destination = Machine::new(1);
    let bad = |change: &dyn Fn(&mut PciState)| {
        let mut state = good.clone();
        change(&mut state);
        destination.restore(&state).unwrap_err()
    };
    assert!(matches!(bad(&|state| state.config[0] ^= 1), PciError::ConfigMismatch { offset: 0, .. }));
    assert!(matches!(bad(&|state| state.config.truncate(64)), PciError::Unfit { .. }));
    assert!(matches!(bad(&|state| state.vectors.truncate(1)), PciError::Unfit { .. }));
    assert!(matches!(bad(&|state| state.msix = false), PciError::Unfit { .. }));
    assert!(matches!(bad(&|state| state.intx_pending = true), PciError::Unfit { .. }));
    assert!(matches!(bad(&|state| state.bars[0] += 0x4000), PciError::Unfit { .. }));
    assert!(matches!(bad(&|state| state.bars[1] = 1), PciError::Unfit { .. }));

    destination.function().undo().unwrap();
    destination.restore(&good).unwrap();
    destination.devices[0].log();
    destination.function().undo().unwrap();
    assert_eq!(destination.devices[0].log(), ["irqs 2 off", "write 7 0x4 [0, 0]"]);
    assert!(destination.mapper.mapped.lock().unwrap().is_empty());
    assert!(destination.irq.attached.lock().unwrap().is_empty());
    destination.function().undo().unwrap();
    assert_eq!(destination.devices[0].log(), [""; 0], "nothing is left to undo");
    assert_eq!(destination.restore(&good).unwrap(), 1, "and it may be tried again");
}

#[derive(Clone, Debug)]
enum Step {
    Enable(bool, bool),
    Mask(u8, bool),
    Message(u8, u8),
    Raise(u8),
    Guest,
    Pending,
    Migrate,
    Abort,
}

fn step() -> impl Strategy<Value = Step> {
    let vector = 0u8..2;
    prop_oneof![
        1 => (any::<bool>(), any::<bool>()).prop_map(|(on, all)| Step::Enable(on, all)),
        2 => Just(Step::Enable(true, false)),
        3 => (vector.clone(), any::<bool>()).prop_map(|(n, masked)| Step::Mask(n, masked)),
        1 => (vector.clone(), any::<u8>()).prop_map(|(n, data)| Step::Message(n, data)),
        5 => vector.prop_map(Step::Raise),
        3 => Just(Step::Guest),
        2 => Just(Step::Pending),
        1 => Just(Step::Migrate),
        1 => Just(Step::Abort),
    ]
}

/// What the rules of MSI-X say, with nothing of how it is done.
#[derive(Default)]
struct Model {
    enabled: bool,
    all: bool,
    masked: [bool; 2],
    data: [u32; 2],
    raised: [bool; 2],
    /// In use since the kind was enabled, or since the last move. What is raised before is in the device's own bits, which
    /// a move takes along in the device's state.
    used: [bool; 2],
    unsent: [bool; 2],
}

impl Model {
    fn raise(&mut self, n: usize) {
        let bits = if self.used[n] { &mut self.raised } else { &mut self.unsent };
        bits[n] |= self.enabled;
    }

    fn settle(&mut self) {
        for n in 0..2 {
            self.used[n] = self.enabled && (self.used[n] || !self.masked[n]);
            if !self.enabled {
                (self.raised[n], self.unsent[n]) = (false, false);
            }
            if self.used[n] {
                self.raised[n] |= std::mem::take(&mut self.unsent[n]);
            }
        }
    }

    fn open(&self, n: usize) -> bool {
        self.enabled && !self.all && !self.masked[n]
    }

    fn deliver(&mut self) -> Vec<u32> {
        let open = [self.open(0), self.open(1)];
        let taken = (0..2).filter(|n| open[*n] && std::mem::take(&mut self.raised[*n]));
        let mut taken: Vec<u32> = taken.map(|n| self.data[n]).collect();
        taken.sort_unstable();
        taken
    }
}

/// The data of what reaches the guest, in rising order: which line is served first is nobody's promise.
fn taken(machine: &Machine) -> Vec<u32> {
    let mut data: Vec<u32> = machine.irq.take().iter().map(|message| message.data).collect();
    data.sort_unstable();
    data
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is done in whatever order: every raise reaches the guest by the message in force, or waits in its
    /// pending bit; also across any number of moves to another function.
    #[test]
    fn no_raise_is_lost_or_doubled(steps in proptest::collection::vec(step(), 1..60)) {
        let mut machine = Machine::running(1);
        let mut model = Model { masked: [true; 2], ..Model::default() };
        for step in steps {
            // The guest takes its interrupts before it changes the vectors, as one does on hardware that is quick.
            if !matches!(step, Step::Raise(_) | Step::Migrate | Step::Abort) {
                prop_assert_eq!(taken(&machine), model.deliver());
            }
            match step {
                Step::Enable(enabled, all) => {
                    machine.msix(enabled, all);
                    (model.enabled, model.all) = (enabled, all);
                    model.settle();
                }
                Step::Mask(n, masked) => {
                    machine.store(LOW + 0x200c + 16 * u64::from(n), masked.into());
                    model.masked[usize::from(n)] = masked;
                    model.settle();
                }
                Step::Message(n, data) => {
                    machine.store(LOW + 0x2008 + 16 * u64::from(n), data.into());
                    model.data[usize::from(n)] = data.into();
                }
                Step::Raise(n) => {
                    prop_assert_eq!(machine.devices[0].raise(n.into()), model.used[usize::from(n)]);
                    model.raise(n.into());
                }
                Step::Guest => {}
                Step::Pending => {
                    let bits = (0..2).filter(|n| model.raised[*n]).fold(0, |bits, n| bits | 1 << n);
                    prop_assert_eq!(machine.load(LOW + 0x3000), bits);
                }
                Step::Migrate => {
                    let state = machine.save().unwrap();
                    let unsent = std::mem::take(&mut machine.devices[0].state.lock().unwrap().unsent);
                    let next = Machine::new(1);
                    next.devices[0].state.lock().unwrap().unsent = unsent;
                    model.used = [false; 2];
                    model.settle();
                    let used = model.used.iter().filter(|used| **used).count();
                    prop_assert_eq!(next.restore(&state).unwrap() as usize, used);
                    machine = next;
                }
                Step::Abort => {
                    machine.save().unwrap();
                    machine.function().deliver_pending().unwrap();
                }
            }
            prop_assert_eq!(machine.function().errors(), 0);
        }
        prop_assert_eq!(taken(&machine), model.deliver());
    }
}
