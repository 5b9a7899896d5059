//! Registers of the device that a guest sets: put back, left, or refused.

use std::sync::Arc;

use vfio_migration_device::{ConfigRule, ConfigRules, PciError, PciFunction, PciState};

use super::fakes::{ECAM, FakeHardware, mailbox, sample_config};
use super::functions::Machine;

/// PCI Express at 0x80 (version 2), power management at 0xc0; beyond the first 256 bytes error reporting, resizable BARs
/// and latencies.
fn config() -> Vec<u8> {
    let mut config = sample_config();
    config.resize(4096, 0);
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x51, &[0x80]);
    put(0x80, &[0x10, 0xc0, 2, 0]);
    put(0x88, &[0x10, 0x28]);
    put(0xc0, &[0x01, 0, 3, 0]);
    put(0x100, &[0x01, 0, 0x02, 0x14]);
    put(0x140, &[0x15, 0, 0x01, 0x18]);
    put(0x180, &[0x18, 0, 0x01, 0]);
    config
}

/// A machine whose device takes writes to all of these bytes.
fn machine(writable: std::ops::Range<u64>) -> Machine {
    let whole = |regions: &mut Vec<vfio_migration_device::PciRegion>| regions[2].size = 4096;
    let mut device = FakeHardware::with("dev1", mailbox(), 0, &whole);
    let state = device.state.get_mut().unwrap();
    (state.config, state.writable) = (config(), writable.collect());
    Machine::of(vec![Arc::new(device)])
}

fn own(machine: &Machine, at: usize) -> u32 {
    let state = machine.devices[0].state.lock().unwrap();
    u32::from_le_bytes(state.config[at..at + 4].try_into().unwrap())
}

/// Writes to config space by its memory window, which reaches all of it.
fn write(machine: &Machine, at: u64, value: u32) {
    machine.store(ECAM + (1 << 15) + at, value);
}

fn saved(machine: &Machine) -> PciState {
    PciState::decode(&machine.save().unwrap().encode().unwrap()).unwrap()
}

#[test]
fn what_a_guest_set_is_there_after_a_move() {
    let source = machine(0x50..0x1000);
    // Not read back by the guest: a save tells it all the same.
    source.config_write(1, 0x88, &0x5810u16.to_le_bytes());
    source.config_write(1, 0xa8, &0x0406u16.to_le_bytes());
    let extended =
        [(0x108, 0x0040_0000), (0x10c, 0x0006_2011), (0x114, 0x2000), (0x118, 0x140), (0x184, 0x1001_1003)];
    extended.iter().for_each(|(at, value)| write(&source, *at, *value));
    let state = saved(&source);
    let destination = machine(0x50..0x1000);
    destination.restore(&state).unwrap();
    assert_eq!((own(&destination, 0x88) & 0xffff, own(&destination, 0xa8) & 0xffff), (0x5810, 0x0406));
    for (at, value) in extended {
        assert_eq!(own(&destination, usize::try_from(at).unwrap()), value, "{at:#x}");
    }
    assert_eq!(destination.dword(1, 0x88) & 0xffff, 0x5810);
    // From there it moves on.
    let third = machine(0x50..0x1000);
    third.restore(&saved(&destination)).unwrap();
    assert_eq!(own(&third, 0x88) & 0xffff, 0x5810);
}

#[test]
fn what_the_host_sets_and_what_tells_of_the_device_is_left() {
    let source = machine(0x50..0x1000);
    // Largest payload; device status; link control; power state.
    source.config_write(1, 0x88, &0x28f0u16.to_le_bytes());
    for (register, value) in [(0x8a, 0xfu16), (0x90, 0x43), (0xc4, 0x103)] {
        source.config_write(1, register, &value.to_le_bytes());
    }
    let destination = machine(0x50..0x1000);
    destination.devices[0].log();
    destination.restore(&saved(&source)).unwrap();
    let writes = destination.devices[0].log().into_iter().filter(|line| line.starts_with("write 7"));
    assert_eq!(writes.collect::<Vec<_>>(), ["write 7 0x4 [0, 0]"], "nothing of it");
}

#[test]
fn a_device_that_does_not_take_a_register_refuses_the_move() {
    let source = machine(0x50..0x1000);
    source.config_write(1, 0x88, &0x5810u16.to_le_bytes());
    let state = saved(&source);
    let destination = machine(0..0);
    let refused = destination.restore(&state).unwrap_err();
    assert!(
        matches!(
            refused,
            PciError::ConfigMismatch { offset: 0x89, source_byte: 0x58, destination_byte: 0x28, .. }
        ),
        "{refused}"
    );
    destination.function().undo().unwrap();
    let exempt = ConfigRules { rules: vec![ConfigRule { offset: 0x88, len: 2, compare: false }] };
    destination.function().restore_config(&state, &exempt).unwrap();

    // A BAR of another size.
    let mut state = state;
    state.config[0x149] ^= 7;
    let refused = machine(0x50..0x1000).restore(&state).unwrap_err();
    assert!(matches!(refused, PciError::ConfigMismatch { offset: 0x149, .. }), "{refused}");
}
