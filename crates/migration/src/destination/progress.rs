//! Progress while a guest arrives, for the caller's observer, and the caller's result.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vfio_migration_engine::{Attempt, DestinationOutcome};
use vfio_migration_types::{Failure, Phase, Side};

use crate::destination::attempt::DestinationShared;
use crate::destination::commit::KnownOutcome;
use crate::device_state::receive::DeviceReceiver;
use crate::error::{IncomingError, OwnedNotStarted, RehearsedHere};
use crate::expectation::Unexpected;
use crate::machine::Machine;
use crate::offer::Arrived;
use crate::reasons;
use crate::report::{ArrivalReport, Bytes, DeviceStatus};
use crate::session::lock::lock;

pub(super) fn statuses(shared: &DestinationShared) -> Vec<DeviceStatus> {
    let devices = shared.sink.get().map(|sink| sink.devices.as_slice()).unwrap_or_default();
    let status = |device: &Arc<DeviceReceiver>| DeviceStatus {
        id: device.id.clone(),
        precopy: device.precopy.load(Ordering::Relaxed),
        stopcopy: device.stopcopy.load(Ordering::Relaxed),
        initial_left: None,
        dirty_left: None,
        stop_copy_estimate: None,
    };
    devices.iter().map(status).collect()
}

pub(super) fn bytes(shared: &DestinationShared, devices: &[DeviceStatus]) -> Bytes {
    Bytes {
        ram: shared.sink.get().map_or(0, |sink| sink.ram.bytes()),
        device_precopy: devices.iter().map(|device| device.precopy).sum(),
        device_stopcopy: devices.iter().map(|device| device.stopcopy).sum(),
    }
}

/// What a session came to.
pub(super) struct Ended {
    pub(super) arrived: Result<Arrived, IncomingError>,
    /// What became of the attempt, for a source that asks later.
    pub(super) known: Option<KnownOutcome>,
    /// What the source brought was not expected: it was refused, and nothing was made for it.
    pub(super) unexpected: Option<Unexpected>,
    /// Its source offered nothing: why that was waited for no longer.
    pub(super) offered_nothing: Option<String>,
}

impl From<IncomingError> for Ended {
    fn from(error: IncomingError) -> Self {
        Self { arrived: Err(error), known: None, unexpected: None, offered_nothing: None }
    }
}

pub(super) fn into_result(
    outcome: DestinationOutcome,
    machine: Option<Arc<dyn Machine>>,
    attempt: Option<Attempt>,
    shared: &DestinationShared,
    took: Duration,
) -> Result<Arrived, IncomingError> {
    let lost = || {
        Failure::new(
            Side::Destination,
            Phase::Run,
            "the session lost its own machine: a defect of this program",
        )
    };
    let rehearsal = shared.rehearsal.load(Ordering::Acquire);
    let only_asked = shared.asks.load(Ordering::Acquire);
    let rehearsed =
        |here: RehearsedHere| Err(IncomingError::Rehearsed(Box::new(RehearsedHere { only_asked, ..here })));
    match outcome {
        DestinationOutcome::Owner { epoch, ready, guest, paused } => {
            let (Some(machine), Some(attempt)) = (machine, attempt) else {
                return Err(IncomingError::Aborted(lost()));
            };
            let devices = statuses(shared);
            let report = ArrivalReport {
                vm: attempt.vm,
                attempt: attempt.attempt,
                epoch,
                guest,
                paused,
                total: took,
                ram_pages: ready.ram_pages,
                sections: ready.sections,
                bytes: bytes(shared, &devices),
                vectors: ready.vectors,
                verify: Duration::from_nanos(ready.verify_ns),
                steps: std::mem::take(&mut *lock(&shared.steps)),
                devices,
            };
            Ok(Arrived { machine, epoch, report })
        }
        DestinationOutcome::OwnedNotStarted { epoch, cause } => match machine {
            Some(machine) => {
                Err(IncomingError::OwnedNotStarted(Box::new(OwnedNotStarted { machine, epoch, cause })))
            }
            None => Err(IncomingError::Aborted(lost())),
        },
        // However a rehearsal ends, nobody was to come.
        DestinationOutcome::Refused(reasons) if rehearsal => {
            rehearsed(RehearsedHere { refused: reasons::from_wire(reasons), ..RehearsedHere::default() })
        }
        DestinationOutcome::Aborted(cause) if rehearsal => {
            rehearsed(RehearsedHere { cause: Some(cause), ..RehearsedHere::default() })
        }
        DestinationOutcome::Rehearsed { obstacle, left_undone } => {
            rehearsed(RehearsedHere { obstacle, left_undone, ..RehearsedHere::default() })
        }
        DestinationOutcome::LimitsUnmet(cause) => Err(IncomingError::LimitsUnmet(cause)),
        DestinationOutcome::Refused(reasons) => Err(IncomingError::Refused(reasons::from_wire(reasons))),
        DestinationOutcome::Aborted(cause) => Err(IncomingError::Aborted(cause)),
        DestinationOutcome::Cancelled(cause) => Err(IncomingError::Cancelled(cause)),
        other => {
            let text = format!("an outcome that this version does not know: {other:?}");
            Err(IncomingError::Aborted(Failure::new(Side::Destination, Phase::Run, text)))
        }
    }
}
