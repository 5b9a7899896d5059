//! A device into a file.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vfio_migration_device::{Device, DeviceError};
use vfio_migration_types::{Failure, MigrationState, Side, VmId};

use super::control::DeviceControl;
use super::error::{DeviceFate, DeviceFileError};
use super::machine::{LoneDevice, LoneObserver};
use super::report::DeviceReport;
use crate::error::MigrateError;
use crate::options::SourceOptions;
use crate::regular_file::{AtomicFile, FileError};
use crate::snapshot::{SaveError, SaveOptions, save};
use crate::source::Source;
use crate::source::plan::new_attempt_id;

/// Options for saving a device.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct SaveDeviceOptions {
    /// Replace a file that is there.
    pub force: bool,
    /// As if it had no PRE_COPY: all of its state is read while it is stopped.
    pub stop_copy_only: bool,
    /// Most bytes of state that it may give, as [`SaveOptions::state_limit`].
    pub state_limit: Option<u64>,
}

/// Saves `device` into the file `path`, whole or not at all. A device that runs goes on running; one that is stopped,
/// because somebody left its state in it, is never let run.
///
/// A saving session that somebody left open is ended first, which takes nothing from the device.
///
/// # Errors
/// No file is left, and the device is as it was, or the error has its state; but see [`DeviceFileError::WholeFile`].
pub fn save_device(
    device: &Arc<dyn Device>,
    path: &Path,
    options: SaveDeviceOptions,
    control: &DeviceControl,
) -> Result<DeviceReport, DeviceFileError> {
    let begun = Instant::now();
    // What is wrong with the file is told before the device is touched.
    drop(AtomicFile::create(path, options.force).map_err(unfit)?);
    device.capabilities()?;
    let manifest = device.manifest()?;
    let stopped = leave_open_session(device.as_ref())?;
    control.found(if stopped { MigrationState::Stop } else { MigrationState::Running });
    let SaveDeviceOptions { force, stop_copy_only, state_limit } = options;
    let observer = LoneObserver { control: control.clone(), stop_copy_only, stays_stopped: stopped };
    let failed = |error| failed(device.as_ref(), control, error);
    let name = new_attempt_id().map_err(|error| failed(SaveError::Session(error)))?;
    let machine = LoneDevice::new(VmId(name.0), device.clone(), observer)?;
    let mut session = SourceOptions::default().for_saving();
    session.device_alone = true;
    let source = Source::new(Arc::new(machine), session);
    control.attach(source.control());
    let how = SaveOptions { force, state_limit, ..SaveOptions::default() };
    let saved = save(source, path, how, |progress| control.set_left(progress.remaining));
    let saved = saved.map_err(failed)?;
    if let Some(late) = saved.left_undone.first() {
        // It is not asked any more.
        let fate = DeviceFate { device: device.id().clone(), reset: control.was_reset(), now: None };
        return Err(DeviceFileError::WholeFile { failure: late.clone().into(), fate });
    }
    let precopy = control.precopy();
    let state = saved.devices.first().copied().unwrap_or_default();
    Ok(DeviceReport {
        device: manifest,
        file: path.into(),
        file_bytes: saved.bytes,
        file_digest: saved.digest,
        precopy,
        stopcopy: state.bytes.saturating_sub(precopy),
        state_digest: state.digest,
        arcs: control.arcs(),
        took: begun.elapsed(),
        left_in: device.state()?,
    })
}

fn unfit(error: FileError) -> DeviceFileError {
    DeviceFileError::File(error.into())
}

/// Brings the device to where its state is whole, and returns whether it is stopped there.
fn leave_open_session(device: &dyn Device) -> Result<bool, DeviceFileError> {
    let go = |to| {
        device.set_state(to).map_err(|error| {
            DeviceError::new(device.id().clone(), "ending what was left open in it", error.errno, error)
        })
    };
    match device.state()? {
        MigrationState::Running => Ok(false),
        MigrationState::Stop => Ok(true),
        MigrationState::RunningP2p | MigrationState::PreCopy | MigrationState::PreCopyP2p => {
            go(MigrationState::Running)?;
            Ok(false)
        }
        MigrationState::StopCopy => {
            go(MigrationState::Stop)?;
            Ok(true)
        }
        state @ (MigrationState::Resuming | MigrationState::Error) => {
            Err(DeviceFileError::NoWholeState { device: device.id().clone(), state })
        }
    }
}

fn failed(device: &dyn Device, control: &DeviceControl, error: SaveError) -> DeviceFileError {
    let device_now = || device.state().ok();
    let fate = || DeviceFate { device: device.id().clone(), reset: control.was_reset(), now: device_now() };
    match error {
        SaveError::File(error) => DeviceFileError::File(error),
        SaveError::NotResumed(held) => {
            DeviceFileError::WholeFile { failure: held.0.cause.into(), fate: fate() }
        }
        SaveError::Session(MigrateError::Aborted(aborted)) if aborted.cancelled => {
            // One that does not answer is not asked.
            let answers = aborted.left_undone.is_empty();
            let (device, reset) = (device.id().clone(), control.was_reset());
            let now = if answers { device_now() } else { None };
            DeviceFileError::Cancelled(DeviceFate { device, reset, now })
        }
        SaveError::Session(MigrateError::Aborted(aborted)) => {
            DeviceFileError::Failed { failure: aborted.cause.into(), fate: fate() }
        }
        SaveError::Session(MigrateError::NotBegun(_)) if control.is_cancelled() => {
            DeviceFileError::Cancelled(fate())
        }
        SaveError::Session(MigrateError::NotBegun(failure)) => {
            DeviceFileError::Failed { failure: failure.into(), fate: fate() }
        }
        SaveError::Session(error) => {
            let failure: Failure =
                Failure::new(Side::Source, vfio_migration_types::Phase::Final, error.to_string());
            DeviceFileError::Failed { failure: failure.into(), fate: fate() }
        }
    }
}
