//! The kernel's own sample of a migratable device, `samples/vfio-mdev/mtty.c`: serial ports without DMA.

pub(crate) mod arcs;
pub(crate) mod dirty;
pub(crate) mod info;
pub(crate) mod stream;

use std::os::fd::BorrowedFd;

use rustix::io::{pread, pwrite};
use vfio_migration_types::MigrationState;
use vfio_migration_uapi::{region_info, set_device_state};

use crate::check::Outcome;
use crate::instance::Instance;

/// BAR 0: the first port's registers.
const PORT: u32 = 0;
/// Registers of a 16550: receive and transmit, modem control.
pub(crate) const DATA: u64 = 0;
pub(crate) const MODEM_CONTROL: u64 = 4;
/// Line status; bit 0 when there is something to be read.
pub(crate) const LINE_STATUS: u64 = 5;
/// Modem control: what is sent is received.
pub(crate) const LOOP: u8 = 0x10;

pub(crate) fn one_port() -> Outcome<Instance> {
    Instance::new("mtty", "mtty-1")
}

fn write_register(device: BorrowedFd<'_>, register: u64, value: u8) -> Outcome {
    let region = region_info(device, PORT)?;
    if pwrite(device, &[value], region.offset + register)? != 1 {
        return Err("a short write of a register".into());
    }
    Ok(())
}

fn read_register(device: BorrowedFd<'_>, register: u64) -> Outcome<u8> {
    let region = region_info(device, PORT)?;
    let mut byte = [0];
    if pread(device, &mut byte, region.offset + register)? != 1 {
        return Err("a short read of a register".into());
    }
    Ok(byte[0])
}

/// Leaves `text` in the port's receive queue, by its own loop.
fn fill(device: BorrowedFd<'_>, text: &[u8]) -> Outcome {
    write_register(device, MODEM_CONTROL, LOOP)?;
    text.iter().try_for_each(|byte| write_register(device, DATA, *byte))
}

/// Takes all that is in the receive queue.
fn drain(device: BorrowedFd<'_>) -> Outcome<Vec<u8>> {
    let mut text = Vec::new();
    while read_register(device, LINE_STATUS)? & 1 != 0 && text.len() < 64 {
        text.push(read_register(device, DATA)?);
    }
    Ok(text)
}

/// Leaves `text` in an instance that nobody has open: it keeps it.
pub(crate) fn fill_of(instance: &Instance, text: &[u8]) -> Outcome {
    let opened = instance.open()?;
    fill(opened.device()?, text)
}

/// Takes all that is in the receive queue of an instance that nobody has open.
pub(crate) fn drain_of(instance: &Instance) -> Outcome<Vec<u8>> {
    let opened = instance.open()?;
    drain(opened.device()?)
}

fn go(device: BorrowedFd<'_>, to: MigrationState) -> Outcome<Option<std::os::fd::OwnedFd>> {
    Ok(set_device_state(device, to)?)
}
