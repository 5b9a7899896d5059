//! Contents that move from one instance to another, and what the driver itself refuses.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use vfio_migration_types::MigrationState;
use vfio_migration_uapi::{PrecopyInfo, device_state, reset, set_device_state};

use super::{drain, fill, go, one_port};
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;

const TEXT: &[u8] = b"kept in flight";
/// Bytes of the driver's header, all that it has to say in pre-copy.
const HEADER: usize = 24;
/// Bytes of one port's state.
const PORT_STATE: usize = 36;

pub(crate) fn contents_move() -> Outcome {
    let (from, to) = (one_port()?, one_port()?);
    let (source, destination) = (from.open()?, to.open()?);
    moves(source.device()?, destination.device()?)
}

pub(crate) fn contents_move_by_cdev() -> Outcome {
    let (from, to) = (one_port()?, one_port()?);
    let (source, destination) = (from.open_cdev()?, to.open_cdev()?);
    moves(source.device.as_fd(), destination.device.as_fd())
}

fn moves(source: BorrowedFd<'_>, destination: BorrowedFd<'_>) -> Outcome {
    fill(source, TEXT)?;
    let saving = go(source, MigrationState::PreCopy)?.ok_or("PRE_COPY opened no descriptor")?;
    let loading = go(destination, MigrationState::Resuming)?.ok_or("RESUMING opened no descriptor")?;
    let early = pump(saving.as_fd(), loading.as_fd())?;
    same("bytes of pre-copy", early, HEADER)?;
    // The device runs, and is written to, after its pre-copy was read.
    fill(source, b"!")?;
    go(source, MigrationState::StopCopy)?;
    let late = pump(saving.as_fd(), loading.as_fd())?;
    same("bytes of stop-copy", late, PORT_STATE)?;
    same("the end again", rustix::io::read(&saving, &mut [0; 8])?, 0)?;
    go(destination, MigrationState::Stop)?;
    go(destination, MigrationState::Running)?;
    go(source, MigrationState::Stop)?;
    same("contents", drain(destination)?, [TEXT, b"!"].concat())
}

/// Moves what there is; the number of bytes. A driver that has nothing for now reads 0, as it does at the end.
fn pump(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Outcome<usize> {
    let mut total = 0;
    loop {
        let mut bytes = [0; 7];
        let len = rustix::io::read(from, &mut bytes)?;
        if len == 0 {
            return Ok(total);
        }
        same("a whole write", rustix::io::write(to, &bytes[..len])?, len)?;
        total += len;
    }
}

fn header_of(instance: &Instance) -> Outcome<[u8; HEADER]> {
    let opened = instance.open()?;
    let data = go(opened.device()?, MigrationState::PreCopy)?.ok_or("PRE_COPY opened no descriptor")?;
    let mut header = [0; HEADER];
    same("the header", rustix::io::read(&data, &mut header)?, HEADER)?;
    Ok(header)
}

pub(crate) fn wrong_header() -> Outcome {
    let instance = one_port()?;
    let header = header_of(&instance)?;
    for byte in 0..HEADER {
        let opened = instance.open()?;
        let device = opened.device()?;
        // A device keeps its migration state when it is closed.
        reset(device)?;
        let data = go(device, MigrationState::Resuming)?.ok_or("RESUMING opened no descriptor")?;
        let mut wrong = header;
        wrong[byte] ^= 0x10;
        same(&format!("byte {byte} altered"), rustix::io::write(&data, &wrong), Err(Errno::FAULT))?;
        // The driver goes on accepting after its own refusal: whoever loads must not.
        let goes_on = rustix::io::write(&data, &[0; 8]).is_ok();
        holds(goes_on, "mtty accepts data after a refused header: if this changed, say so in the reference")?;
    }
    Ok(())
}

pub(crate) fn other_ports() -> Outcome {
    let two = Instance::new("mtty", "mtty-2")?;
    let header = header_of(&two)?;
    let one = one_port()?;
    let opened = one.open()?;
    let data = go(opened.device()?, MigrationState::Resuming)?.ok_or("RESUMING opened no descriptor")?;
    same("two ports into one", rustix::io::write(&data, &header), Err(Errno::FAULT))
}

pub(crate) fn precopy_info() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let data = go(device, MigrationState::PreCopy)?.ok_or("PRE_COPY opened no descriptor")?;
    let wanted = |initial_bytes| PrecopyInfo { initial_bytes, dirty_bytes: 0, reinit: false };
    same("at first", self::progress(data.as_fd())?, wanted(24))?;
    rustix::io::read(&data, &mut [0; 10])?;
    same("after ten bytes", self::progress(data.as_fd())?, wanted(14))?;
    go(device, MigrationState::PreCopyP2p)?;
    same("in PRE_COPY_P2P", self::progress(data.as_fd())?, wanted(14))?;
    set_device_state(device, MigrationState::StopCopy)?;
    same("where it is", device_state(device)?, MigrationState::StopCopy)?;
    let refused = precopy_info_errno(data.as_fd());
    same("in STOP_COPY", refused, Some(Errno::INVAL))
}

fn progress(data: BorrowedFd<'_>) -> Outcome<PrecopyInfo> {
    Ok(vfio_migration_uapi::precopy_info(data)?)
}

fn precopy_info_errno(data: BorrowedFd<'_>) -> Option<Errno> {
    vfio_migration_uapi::precopy_info(data).err().and_then(|error| error.errno())
}
