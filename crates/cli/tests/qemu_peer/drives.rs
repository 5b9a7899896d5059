//! What QEMU does with the sample device, from realize to quit.

use vfio_migration_guest_driver::Flaw;
use vfio_migration_guest_driver::registers::{MAGIC, offset};
use vfio_migration_sim::pci::{
    BAR0_SIZE, BAR2_SIZE, CLASS, DEVICE, MSIX_CAP, REVISION, SUBSYSTEM, VENDOR, VENDOR_CAP,
};

use crate::function::Function;
use crate::machine::{Machine, Ram, Server, unpacked};

/// Blocks that each test has the device write, and interrupts that it waits for.
const BLOCKS: u64 = 8;
const SLOT: u32 = 4;

/// A word of config space made of two halves.
fn halves(low: u16, high: u16) -> u32 {
    u32::from(low) | u32::from(high) << 16
}

#[test]
fn qemu_realizes_the_device_and_shows_its_config_space_and_bars() {
    let Some(qemu) = unpacked() else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "device");
    let mut machine = Machine::start(&qemu, Ram::Shared, &[&server]);
    let [msix_cap, vendor_cap] = [MSIX_CAP, VENDOR_CAP].map(|at| u32::try_from(at).unwrap());
    assert_eq!(machine.config_read(SLOT, 0x00), halves(VENDOR, DEVICE));
    assert_eq!(machine.config_read(SLOT, 0x08), CLASS << 8 | u32::from(REVISION));
    assert_eq!(machine.config_read(SLOT, 0x2c), halves(VENDOR, SUBSYSTEM));
    assert_eq!(machine.config_read(SLOT, 0x34) & 0xff, msix_cap);
    assert_eq!(machine.config_read(SLOT, msix_cap), 0x1_0011 | vendor_cap << 8);
    // A BAR says its size by which of its bits can be written.
    for (at, size, kind) in [(0x10, BAR0_SIZE, 0), (0x18, BAR2_SIZE, 0xc)] {
        machine.config_write(SLOT, at, u32::MAX);
        let size = u32::try_from(size).unwrap();
        assert_eq!(machine.config_read(SLOT, at), size.wrapping_neg() | kind, "BAR at {at:#x}");
    }
    let function = Function::set_up(&mut machine, SLOT);
    assert_eq!(machine.read_u32(function.bar0() + offset::MAGIC), MAGIC);
    assert_eq!(machine.read_u64(function.bar0() + offset::STATE_SIZE), 64 << 10);
    let written = 0x1234_5678_9abc_def0;
    machine.write_u64(function.bar0() + offset::RING_BASE, written);
    assert_eq!(machine.read_u64(function.bar0() + offset::RING_BASE), written);
    assert_eq!(machine.read_u32(function.bar0() + offset::RING_BASE + 4), 0x1234_5678);
    machine.quit();
}

#[test]
fn qemu_maps_the_mailbox_into_the_guest() {
    let Some(qemu) = unpacked() else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "device");
    let mut machine = Machine::start(&qemu, Ram::Shared, &[&server]);
    let function = Function::set_up(&mut machine, SLOT);
    assert!(machine.mapped().contains("sample-mailbox"), "the BAR is not mapped:\n{}", machine.mapped());
    let last = BAR2_SIZE - 8;
    for at in [0, 0x5_5000, last] {
        machine.write_u64(function.bar2() + at, !at);
        assert_eq!(machine.read_u64(function.bar2() + at), !at);
        let at = usize::try_from(at).unwrap();
        assert_eq!(server.mailbox()[at..at + 8], (!(at as u64)).to_le_bytes(), "at {at:#x} in the server");
    }
    machine.quit();
}

#[test]
fn dma_by_mapping_and_every_interrupt_arrive() {
    let Some(qemu) = unpacked() else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "device");
    let mut machine = Machine::start(&qemu, Ram::Shared, &[&server]);
    let mut function = Function::set_up(&mut machine, SLOT);
    function.enable(&mut machine);
    let blocks = function.work(&mut machine, BLOCKS);
    assert!(server.mapped().contains("memory-backend-memfd"), "RAM is not mapped:\n{}", server.mapped());
    assert_eq!(blocks.len(), 8);
    machine.quit();
}

#[test]
fn dma_by_message_and_every_interrupt_arrive() {
    let Some(qemu) = unpacked() else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "device");
    let mut machine = Machine::start(&qemu, Ram::Private, &[&server]);
    let mut function = Function::set_up(&mut machine, SLOT);
    function.enable(&mut machine);
    let blocks = function.work(&mut machine, BLOCKS);
    // There is nothing that it could map but its own mailbox.
    let foreign =
        server.mapped().lines().filter(|line| line.contains("/memfd:")).any(|line| !line.contains("sample-"));
    assert!(!foreign, "RAM is mapped:\n{}", server.mapped());
    assert_eq!(blocks.len(), 8);
    machine.quit();
}

#[test]
fn a_block_that_was_altered_is_noticed() {
    let Some(qemu) = unpacked() else { return };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "device");
    let mut machine = Machine::start(&qemu, Ram::Shared, &[&server]);
    let mut function = Function::set_up(&mut machine, SLOT);
    function.enable(&mut machine);
    for (n, block) in function.work(&mut machine, BLOCKS).into_iter().enumerate() {
        let at = block.at + 100 * n as u64;
        let mut byte = [0];
        machine.read(at, &mut byte);
        machine.write(at, &[byte[0] ^ 0x10]);
        let found = block.check(&mut machine);
        assert!(matches!(found, Err(Flaw::NoBlock | Flaw::Sum)), "byte {}: {found:?}", at - block.at);
        machine.write(at, &byte);
        assert_eq!(block.check(&mut machine), Ok(0));
    }
    machine.quit();
}

#[test]
fn two_devices_work_side_by_side_survive_a_reset_and_serve_the_next_qemu() {
    let Some(qemu) = unpacked() else { return };
    let dir = tempfile::tempdir().unwrap();
    let servers = [Server::start(dir.path(), "one"), Server::start(dir.path(), "other")];
    for ram in [Ram::Shared, Ram::Private] {
        let mut machine = Machine::start(&qemu, ram, &servers.each_ref());
        for again in [false, true] {
            let mut functions = [SLOT, SLOT + 1].map(|slot| Function::set_up(&mut machine, slot));
            for function in &functions {
                let bar0 = function.bar0();
                assert_eq!(machine.read_u64(bar0 + offset::RING_BASE), 0, "after reset: {again}");
                assert_eq!(machine.read_u64(bar0 + offset::BLOCKS0), 0, "after reset: {again}");
                function.enable(&mut machine);
            }
            // By turns, so that neither is done before the other begins.
            for _ in 0..BLOCKS / 2 {
                for function in &mut functions {
                    function.work(&mut machine, 2);
                }
            }
            if !again {
                machine.reset();
                assert_eq!(machine.config_read(SLOT, 0x04) & 0x6, 0, "memory space and bus master are off");
            }
        }
        machine.quit();
    }
}
