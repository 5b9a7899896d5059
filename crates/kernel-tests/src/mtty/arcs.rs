//! The migration state machine of a real driver, against our own table of it.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::io::Errno;
use vfio_migration_types::{MigrationState, path};
use vfio_migration_uapi::{UapiError, device_state, migration_flags, precopy_info, reset, set_device_state};

use super::{go, one_port};
use crate::check::{Outcome, holds, same};

/// Where a SET is refused by the core, the device stays; where an arc of the driver fails, it stays before that arc.
pub(crate) fn every_arc() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let flags = migration_flags(device)?;
    let states = MigrationState::ALL.into_iter().filter(|state| *state != MigrationState::Error);
    for from in states.clone() {
        for to in MigrationState::ALL {
            reset(device)?;
            same("after a reset", device_state(device)?, MigrationState::Running)?;
            let _session = go(device, from)?;
            same("on the way", device_state(device)?, from)?;
            let what = format!("{from} to {to}");
            let answer = set_device_state(device, to);
            let (wanted, ends) = expected(from, to, path(from, to, flags).ok());
            same(&what, answer.as_ref().map(|_| ()).map_err(UapiError::errno), wanted.map_err(Some))?;
            same(&format!("{what}: where it is"), device_state(device)?, ends)?;
            let opens = !from.is_saving() && to.is_saving() || from != to && to == MigrationState::Resuming;
            same(
                &format!("{what}: a descriptor"),
                answer.is_ok_and(|fd| fd.is_some()),
                wanted.is_ok() && opens,
            )?;
        }
    }
    Ok(())
}

/// What our table says, and mtty's one refusal: what it was loaded with is too short, so that it stays in RESUMING.
fn expected(
    from: MigrationState,
    to: MigrationState,
    path: Option<Vec<MigrationState>>,
) -> (Result<(), Errno>, MigrationState) {
    let leaves_empty = from == MigrationState::Resuming && to != MigrationState::Resuming;
    match path {
        Some(_) if leaves_empty => (Err(Errno::INVAL), from),
        Some(_) => (Ok(()), to),
        None => (Err(Errno::INVAL), from),
    }
}

pub(crate) fn failed_set() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let data = go(device, MigrationState::Resuming)?.ok_or("RESUMING opened no descriptor")?;
    rustix::io::write(&data, &[0x4e; 4])?;
    let refused =
        set_device_state(device, MigrationState::Running).err().ok_or("a stub of a state was taken")?;
    same("errno", refused.errno(), Some(Errno::INVAL))?;
    same("where it is", device_state(device)?, MigrationState::Resuming)?;
    reset(device)?;
    same("after a reset", device_state(device)?, MigrationState::Running)
}

pub(crate) fn one_descriptor() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let data = go(device, MigrationState::PreCopy)?.ok_or("PRE_COPY opened no descriptor")?;
    for to in [
        MigrationState::PreCopyP2p,
        MigrationState::PreCopy,
        MigrationState::PreCopy,
        MigrationState::StopCopy,
    ] {
        holds(go(device, to)?.is_none(), "no second descriptor inside the saving group")?;
    }
    let mut bytes = [0; 16];
    same("the old one still reads", rustix::io::read(&data, &mut bytes)?, 16)
}

pub(crate) fn reset_ends_a_session() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let data = go(device, MigrationState::PreCopy)?.ok_or("PRE_COPY opened no descriptor")?;
    reset(device)?;
    same("where it is", device_state(device)?, MigrationState::Running)?;
    dead(data.as_fd())?;
    let data = go(device, MigrationState::Resuming)?.ok_or("RESUMING opened no descriptor")?;
    reset(device)?;
    same("a write", rustix::io::write(&data, &[0; 8]), Err(Errno::NODEV))
}

fn dead(data: BorrowedFd<'_>) -> Outcome {
    same("a read", rustix::io::read(data, &mut [0; 8]), Err(Errno::NODEV))?;
    // The state is looked at before the session: EINVAL, where a read says ENODEV.
    let info = precopy_info(data).map_err(|error| error.errno());
    same("its progress", info, Err(Some(Errno::INVAL)))
}
