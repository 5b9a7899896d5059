//! Each fault on request, as a user of the uAPI sees it.

use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_migration_types::MigrationState;
use vfio_migration_uapi::{UapiError, device_state, reset, set_device_state, stop_copy_size};

use super::{Ended, go, open_data, read_all, save, set, small, write_all};
use crate::check::{Outcome, holds, same};

/// A failed arc leaves the device before it.
pub(crate) fn fail_arc() -> Outcome {
    let instance = small()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    set(&instance, "fail_errno", 12)?;
    let way = [MigrationState::Running, MigrationState::RunningP2p, MigrationState::Stop];
    for (arc, stays) in (1..).zip(way) {
        reset(device)?;
        set(&instance, "arcs", 0)?;
        set(&instance, "fail_arc", arc)?;
        let refused = set_device_state(device, MigrationState::StopCopy);
        same("errno", refused.err().as_ref().and_then(UapiError::errno), Some(Errno::NOMEM))?;
        same(&format!("after arc {arc} failed"), device_state(device)?, stays)?;
        holds(go(device, MigrationState::StopCopy)?.is_some(), "the next try succeeds")?;
    }
    Ok(())
}

/// Out of ERROR only a reset leads.
pub(crate) fn error_arc() -> Outcome {
    let instance = small()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let data = open_data(device, MigrationState::PreCopy)?;
    set(&instance, "arcs", 0)?;
    set(&instance, "error_arc", 2)?;
    holds(set_device_state(device, MigrationState::StopCopy).is_err(), "the arc fails")?;
    same("where it is", device_state(device)?, MigrationState::Error)?;
    same("its data", rustix::io::read(&data, &mut [0; 8]), Err(Errno::NODEV))?;
    let refused = set_device_state(device, MigrationState::Running);
    same("a way out", refused.err().as_ref().and_then(UapiError::errno), Some(Errno::IO))?;
    reset(device)?;
    same("after a reset", device_state(device)?, MigrationState::Running)
}

pub(crate) fn short_read() -> Outcome {
    let instance = small()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    go(device, MigrationState::Stop)?;
    let whole = save(device)?;
    set(&instance, "short_read", 5)?;
    let data = open_data(device, MigrationState::StopCopy)?;
    same("a read", rustix::io::read(&data, &mut [0; 100]), Ok(5))?;
    let mut rest = Vec::new();
    same("it ends", read_all(&data, &mut rest)?, Ended::Zero)?;
    holds(rest == whole[5..], "the same bytes")
}

/// Once, after so many bytes, the session is gone and the device is RUNNING, as after a guest's own reset.
pub(crate) fn enodev() -> Outcome {
    let instance = small()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let whole = save(device)?;
    go(device, MigrationState::Running)?;
    set(&instance, "enodev_after", 10)?;
    let data = open_data(device, MigrationState::StopCopy)?;
    same("a read", rustix::io::read(&data, &mut [0; 100]), Ok(10))?;
    same("the next", rustix::io::read(&data, &mut [0; 100]), Err(Errno::NODEV))?;
    same("where it is", device_state(device)?, MigrationState::Running)?;
    set(&instance, "enodev_after", 10)?;
    let data = open_data(device, MigrationState::Resuming)?;
    same("writing", write_all(&data, &whole), Err(Errno::NODEV))?;
    same("where it is", device_state(device)?, MigrationState::Running)?;
    let data = open_data(device, MigrationState::Resuming)?;
    same("once only", write_all(&data, &whole), Ok(()))
}

pub(crate) fn wrong_size() -> Outcome {
    let instance = small()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let right = stop_copy_size(device)?;
    for percent in [0, 10, 1000] {
        set(&instance, "size_percent", percent)?;
        same("the estimate", stop_copy_size(device)?, right * percent / 100)?;
    }
    Ok(())
}

pub(crate) fn precopy_zero() -> Outcome {
    let instance = small()?;
    let opened = instance.open()?;
    for (value, wanted) in [(0, Ended::NoMessage), (1, Ended::Zero)] {
        set(&instance, "precopy_zero", value)?;
        let data = open_data(opened.device()?, MigrationState::PreCopy)?;
        same("nothing now", read_all(&data, &mut Vec::new())?, wanted)?;
        go(opened.device()?, MigrationState::Running)?;
    }
    Ok(())
}

pub(crate) fn accept_truncated() -> Outcome {
    let instance = small()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let whole = save(device)?;
    set(&instance, "accept_truncated", 1)?;
    let data = open_data(device, MigrationState::Resuming)?;
    same("a part", write_all(&data, &whole[..40]), Ok(()))?;
    go(device, MigrationState::Stop)?;
    same("where it is", device_state(device)?, MigrationState::Stop)
}

/// An arc that takes long; the state is told meanwhile.
pub(crate) fn slow() -> Outcome {
    let instance = small()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    set(&instance, "arc_delay_ms", 200)?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let arc = scope.spawn(|| set_device_state(device, MigrationState::Stop).map(|_| ()));
        let mut seen = Vec::new();
        while !arc.is_finished() {
            seen.push(device_state(device)?);
            std::thread::yield_now();
        }
        arc.join().map_err(|_| "a panic")??;
        seen.dedup();
        let known = [MigrationState::Running, MigrationState::RunningP2p, MigrationState::Stop];
        holds(
            seen.len() > 1 && seen.iter().all(|state| known.contains(state)),
            &format!("on the way: {seen:?}"),
        )
    })?;
    holds(began.elapsed() >= Duration::from_millis(400), "two arcs of 200 ms each")
}
