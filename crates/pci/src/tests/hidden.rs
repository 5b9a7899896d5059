//! Capabilities that a function cannot serve are not shown to the guest.

use std::sync::Arc;

use super::fakes::{FakeHardware, legacy_config, mailbox};
use super::functions::Machine;

/// A machine whose device has `config`, and so many interrupts of each kind.
fn machine(config: Vec<u8>, irqs: [u32; 3]) -> Machine {
    let mut device = FakeHardware::with("dev1", mailbox(), 0, &|_| {});
    device.set_irq_counts(irqs);
    device.state.get_mut().unwrap().config = config;
    Machine::of(vec![Arc::new(device)])
}

/// The ids of the capabilities that a guest finds.
fn found(machine: &Machine) -> Vec<u32> {
    let mut next = machine.dword(1, 0x34) & 0xff;
    let mut ids = Vec::new();
    while next != 0 {
        let header = machine.dword(1, u16::try_from(next).unwrap());
        ids.push(header & 0xff);
        next = header >> 8 & 0xff;
        assert!(ids.len() < 10, "a loop");
    }
    ids
}

fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut config = legacy_config();
    config[at..at + bytes.len()].copy_from_slice(bytes);
    config
}

#[test]
fn msix_that_cannot_be_served_is_hidden() {
    assert_eq!(found(&machine(legacy_config(), [1, 4, 2])), [0x11, 0x09, 0x05]);
    let table_beyond = changed(0x44, &[0, 0x40, 0, 0]);
    let pending_across = changed(0x48, &[0xf8, 0x3f, 0, 0]);
    assert_eq!(found(&machine(pending_across.clone(), [1, 4, 2])), [0x11, 0x09, 0x05], "its last byte fits");
    let pending_beyond = changed(0x48, &[0, 0x40, 0, 0]);
    let no_such_bar = changed(0x44, &[3, 0x20, 0, 0]);
    let unnamed_bar = changed(0x44, &[7, 0x20, 0, 0]);
    for config in [table_beyond, pending_beyond, no_such_bar, unnamed_bar] {
        assert_eq!(found(&machine(config, [1, 4, 2])), [0x09, 0x05]);
    }
    for offered in [0, 1] {
        let machine = machine(legacy_config(), [1, 4, offered]);
        assert_eq!(found(&machine), [0x09, 0x05], "{offered} of 2 vectors");
        // A guest that writes where it was changes nothing.
        machine.config_write(1, 0x42, &[0, 0x80]);
        assert!(!machine.devices[0].log().iter().any(|line| line.starts_with("irqs")));
        assert!(!machine.save().unwrap().msix);
    }
}

#[test]
fn a_hidden_capability_leaves_the_list_whole_wherever_it_is() {
    // In the middle, at the end, alone.
    let middle = [(0x34, 0x50), (0x51, 0x40), (0x41, 0x60), (0x61, 0)];
    let end = [(0x34, 0x60), (0x61, 0x50), (0x51, 0x40), (0x41, 0)];
    let alone = [(0x34, 0x40), (0x41, 0)];
    let cases = [(&middle[..], vec![0x09, 0x05]), (&end, vec![0x05, 0x09]), (&alone, vec![])];
    for (pointers, wanted) in cases {
        let mut config = legacy_config();
        pointers.iter().for_each(|(at, value)| config[*at] = *value);
        let machine = machine(config, [1, 4, 0]);
        assert_eq!(found(&machine), wanted);
        let state = machine.save().unwrap();
        machine.restore(&state).unwrap();
    }
}

#[test]
fn msi_asks_for_no_more_than_the_host_serves() {
    assert_eq!(found(&machine(legacy_config(), [1, 0, 2])), [0x11, 0x09], "none");
    for (offered, code) in [(1, 0), (2, 1), (3, 1), (4, 2), (9, 2)] {
        let machine = machine(legacy_config(), [1, offered, 2]);
        assert_eq!(machine.dword(1, 0x60) >> 17 & 7, code, "{offered}");
        machine.config_write(1, 0x70, &[0xff; 4]);
        assert_eq!(machine.dword(1, 0x70), (1 << (1 << code)) - 1, "masks of {offered}");
    }
}
