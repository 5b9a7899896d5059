//! A device out of a file.

use std::sync::Arc;
use std::time::Instant;

use vfio_migration_device::Device;
use vfio_migration_types::{Failure, Phase, Side, error_chain};

use super::control::DeviceControl;
use super::error::{DeviceFate, DeviceFileError};
use super::machine::{LoneDevice, LoneObserver};
use super::report::DeviceReport;
use crate::error::IncomingError;
use crate::machine::Machine;
use crate::offer::NotBuilt;
use crate::options::DestinationOptions;
use crate::snapshot::Snapshot;

/// Options for restoring a device.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct RestoreDeviceOptions {
    /// Leave it in STOP, with the state loaded and nothing of it changed.
    pub leave_stopped: bool,
}

/// Loads what `snapshot` holds into `device`, which must be one that [`save_device`](super::save_device) could have
/// written it from, by the rules of a migration. It runs afterwards.
///
/// A device that is neither running nor stopped is reset before anything is loaded.
///
/// # Errors
/// A device that does not fit was not touched. One that was is reset, or the error has its state.
pub fn restore_device(
    snapshot: Snapshot,
    device: &Arc<dyn Device>,
    options: RestoreDeviceOptions,
    control: &DeviceControl,
) -> Result<DeviceReport, DeviceFileError> {
    let begun = Instant::now();
    if snapshot.device().is_none() {
        return Err(DeviceFileError::OfMachine { kind: snapshot.manifest().machine.clone() });
    }
    device.capabilities()?;
    let manifest = device.manifest()?;
    control.found(device.state()?);
    let (file, file_bytes, file_digest) =
        (snapshot.path().to_path_buf(), snapshot.bytes(), snapshot.digest());
    let state = snapshot.device_states().first().copied().unwrap_or_default();
    control.set_left(state.bytes);
    let observer = LoneObserver {
        control: control.clone(),
        stop_copy_only: false,
        stays_stopped: options.leave_stopped,
    };
    let alone = DestinationOptions { device_alone: true, ..DestinationOptions::default() };
    let arrived =
        snapshot.restore(alone, |offer| match LoneDevice::new(offer.vm, device.clone(), observer) {
            Ok(machine) => Ok::<Arc<dyn Machine>, _>(Arc::new(machine)),
            Err(error) => Err(NotBuilt::Failed(error_chain(&error))),
        });
    let report = arrived.map_err(|error| failed(device.as_ref(), control, error))?.report;
    let precopy = report.devices.first().map_or(0, |device| device.precopy);
    Ok(DeviceReport {
        device: manifest,
        file,
        file_bytes,
        file_digest,
        precopy,
        stopcopy: state.bytes.saturating_sub(precopy),
        state_digest: state.digest,
        arcs: control.arcs(),
        took: begun.elapsed(),
        left_in: device.state()?,
    })
}

fn failed(device: &dyn Device, control: &DeviceControl, error: IncomingError) -> DeviceFileError {
    let fate =
        DeviceFate { device: device.id().clone(), reset: control.was_reset(), now: device.state().ok() };
    match error {
        IncomingError::Refused(reasons) => DeviceFileError::OtherDevice(reasons),
        _ if control.is_cancelled() => DeviceFileError::Cancelled(fate),
        IncomingError::NotBegun(failure)
        | IncomingError::Aborted(failure)
        | IncomingError::GaveWay(failure)
        | IncomingError::LimitsUnmet(failure)
        | IncomingError::Cancelled(failure) => DeviceFileError::Failed { failure: failure.into(), fate },
        IncomingError::Rehearsed(_) => {
            let failure = Failure::new(
                Side::Destination,
                Phase::Run,
                "a file was only rehearsed: a defect of this program",
            );
            DeviceFileError::Failed { failure: failure.into(), fate }
        }
        IncomingError::OwnedNotStarted(held) => {
            let text = format!("its state is loaded, and it does not start: {}", held.cause.text);
            let failure = Failure::new(Side::Destination, Phase::Run, text);
            DeviceFileError::Failed { failure: failure.into(), fate }
        }
    }
}
