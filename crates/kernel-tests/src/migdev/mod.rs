//! The project's own test driver, `kernel/migdev`: DMA, a log that is exact, state that changes, faults on request.

pub(crate) mod arcs;
pub(crate) mod dma;
pub(crate) mod driver;
pub(crate) mod faults;
pub(crate) mod stream;

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use vfio_migration_types::MigrationState;
use vfio_migration_uapi::set_device_state;

use crate::check::Outcome;
use crate::instance::Instance;

/// An instance without bulk state.
pub(crate) fn small() -> Outcome<Instance> {
    Instance::new("migdev", "migdev-0")
}

/// Writes one of an instance's numbers in sysfs: a setting, or a fault.
pub(crate) fn set(instance: &Instance, name: &str, value: u64) -> Outcome {
    let path = format!("/sys/bus/mdev/devices/{}/{name}", instance.uuid());
    fs::write(&path, value.to_string()).map_err(|error| format!("{path}: {error}").into())
}

/// Reads an attribute.
pub(crate) fn get(instance: &Instance, name: &str) -> Outcome<u64> {
    let path = format!("/sys/bus/mdev/devices/{}/{name}", instance.uuid());
    Ok(fs::read_to_string(path)?.trim().parse()?)
}

fn go(device: BorrowedFd<'_>, to: MigrationState) -> Outcome<Option<OwnedFd>> {
    Ok(set_device_state(device, to)?)
}

/// As [`go`], where a data descriptor is opened.
fn open_data(device: BorrowedFd<'_>, to: MigrationState) -> Outcome<OwnedFd> {
    go(device, to)?.ok_or_else(|| format!("{to} opened no descriptor").into())
}

/// Reads what there is now: to the end in STOP_COPY, to ENOMSG in pre-copy.
fn read_all(data: &OwnedFd, into: &mut Vec<u8>) -> Outcome<Ended> {
    let mut bytes = vec![0; 1 << 20];
    loop {
        match rustix::io::read(data, &mut bytes) {
            Ok(0) => return Ok(Ended::Zero),
            Ok(len) => into.extend_from_slice(&bytes[..len]),
            Err(Errno::NOMSG) => return Ok(Ended::NoMessage),
            Err(errno) => return Err(format!("reading device state: {errno}").into()),
        }
    }
}

/// What said that there is no more now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Zero,
    NoMessage,
}

/// The whole of a device's state, from standing still.
fn save(device: BorrowedFd<'_>) -> Outcome<Vec<u8>> {
    let data = open_data(device, MigrationState::StopCopy)?;
    let mut bytes = Vec::new();
    read_all(&data, &mut bytes)?;
    go(device, MigrationState::Stop)?;
    Ok(bytes)
}

/// Writes until an error.
fn write_all(data: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let len = rustix::io::write(data.as_fd(), bytes)?;
        bytes = bytes.get(len..).unwrap_or_default();
    }
    Ok(())
}
