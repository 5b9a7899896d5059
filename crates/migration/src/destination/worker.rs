//! The worker: does one job after another, and answers each by the event that the engine's contract names.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::thread::Scope;

use vfio_migration_compat::Reason;
use vfio_migration_device::{ConfigRules, PciState, ResumingSession};
use vfio_migration_engine::ownership::{DestinationRecord, DestinationState};
use vfio_migration_engine::{Attempt, DestinationAction, DestinationEvent};
use vfio_migration_types::{DeviceId, Phase};
use vfio_migration_wire::{Message, PeerError};

use crate::channel::link::Link;
use crate::control::lock;
use crate::machine::{Machine, MigratableDevice};
use crate::offer::Offer;
use crate::options::DestinationOptions;
use crate::ownership::journal::Journal;
use crate::report::StepTime;
use crate::session::fail::{self, InPhase, sentence};
use crate::session::work_error::WorkError;

use crate::destination::session::{Events, Wires};

/// Builds the machine for an offer.
pub(crate) type Build<'a> = Box<dyn FnOnce(&Offer) -> Result<Arc<dyn Machine>, Box<Reason>> + Send + 'a>;

/// One device at the destination, in the source's order.
pub(crate) struct Incoming {
    /// Its name at the source, by which the stream knows it.
    pub(crate) name: DeviceId,
    pub(crate) moved: MigratableDevice,
    /// Which bytes of its config space are compared.
    pub(crate) rules: ConfigRules,
    /// Loaded to its end and not yet finished (RESUMING → STOP).
    pub(crate) session: Option<Box<dyn ResumingSession>>,
    pub(crate) pci_state: Option<PciState>,
    /// Its resuming session was begun: a release has something to undo.
    pub(crate) touched: bool,
}

/// Everything the worker holds while the attempt lasts. What a release undoes is in its fields.
pub(crate) struct Worker<'scope, 'env, 'a> {
    pub(crate) scope: &'scope Scope<'scope, 'env>,
    pub(crate) options: &'a DestinationOptions,
    pub(crate) build: Option<Build<'a>>,
    pub(crate) link: Arc<Link>,
    pub(crate) wires: &'env Wires,
    pub(crate) events: Events,
    pub(crate) local: String,
    pub(crate) journal: Option<Journal>,
    pub(crate) machine: Option<Arc<dyn Machine>>,
    /// A kernel device of this machine pins RAM.
    pub(crate) pinned: bool,
    pub(crate) devices: Vec<Incoming>,
    pub(crate) locked: bool,
}

/// A job: the engine's action, and the attempt it is about, once that is known.
pub(crate) type Job = (DestinationAction, Option<Attempt>);

impl Worker<'_, '_, '_> {
    /// Works until the job queue is closed.
    pub(crate) fn run(mut self, jobs: &Receiver<Job>) {
        for (action, attempt) in jobs {
            let phase = phase_of(&action);
            // The VMM's code and the devices' is called here: a panic of theirs must not leave a session without an end.
            let done = catch_unwind(AssertUnwindSafe(|| self.job(action, attempt)))
                .unwrap_or_else(|panic| Err(panicked(phase, panic.as_ref()).into()));
            let answer = match done {
                Ok(answer) => answer,
                Err(WorkError::Failed(failure)) => {
                    tracing::warn!(text = %failure.text, "an action failed");
                    Some(DestinationEvent::Failed(failure))
                }
                Err(WorkError::Interrupted | WorkError::Link) => None,
            };
            self.wires.jobs_done.fetch_add(1, Ordering::Release);
            if let Some(event) = answer {
                self.events.tell(event);
            }
        }
    }

    fn job(
        &mut self,
        action: DestinationAction,
        attempt: Option<Attempt>,
    ) -> Result<Option<DestinationEvent>, WorkError> {
        Ok(Some(match action {
            DestinationAction::Send(message) => {
                if matches!(message, Message::Abort(_) | Message::Declined(_)) {
                    self.locks_back();
                }
                self.link.send(&message).map_err(|error| WorkError::sending(error, Phase::Hello))?;
                return Ok(None);
            }
            DestinationAction::Reserve(offer) => self.reserve(offer, attempt)?,
            DestinationAction::BeginResuming => {
                self.begin_resuming()?;
                DestinationEvent::ResumingBegun
            }
            DestinationAction::TakeLocks => {
                let machine = self.machine(Phase::Final)?;
                machine.take_locks().map_err(|error| error.in_phase(Phase::Final))?;
                self.locked = true;
                DestinationEvent::LocksTaken
            }
            DestinationAction::Load { totals } => DestinationEvent::Loaded(self.load(&totals)?),
            DestinationAction::Journal(state) => {
                self.write_journal(state, attempt)?;
                DestinationEvent::Journaled(state)
            }
            DestinationAction::Start { epoch, run_guest } => {
                DestinationEvent::Started(self.start(epoch, run_guest)?)
            }
            DestinationAction::Release => {
                self.release()?;
                DestinationEvent::Released
            }
            other => {
                let text = format!("this session cannot do what its engine asks for: {other:?}");
                return Err(fail::plain(Phase::Hello, text).into());
            }
        }))
    }

    /// The source takes its locks back as soon as it hears that we gave up: ours must be gone by then. A failure is not
    /// the last word, the release tries again.
    fn locks_back(&mut self) {
        let Some(machine) = self.machine.as_ref().filter(|_| self.locked) else { return };
        match machine.release_locks() {
            Ok(()) => self.locked = false,
            Err(error) => {
                tracing::warn!(error = %sentence(&error), "a storage lock could not be released yet")
            }
        }
    }

    pub(crate) fn machine(&self, phase: Phase) -> Result<Arc<dyn Machine>, PeerError> {
        self.machine
            .clone()
            .ok_or_else(|| fail::plain(phase, "there is no machine yet: a defect of this program"))
    }

    /// Notes how long a step took, for the report.
    pub(crate) fn step(&self, step: &str, took: std::time::Duration) {
        lock(&self.wires.steps).push(StepTime { step: step.to_owned(), took });
    }

    fn write_journal(&self, state: DestinationState, attempt: Option<Attempt>) -> Result<(), WorkError> {
        let phase = Phase::Commit;
        let (Some(journal), Some(attempt)) = (&self.journal, attempt) else {
            return Err(fail::plain(phase, "there is no journal yet: a defect of this program").into());
        };
        let record = DestinationRecord {
            vm: attempt.vm,
            attempt: attempt.attempt,
            epoch: attempt.epoch,
            state,
            peer: self.local.clone(),
        };
        journal.write_destination(record.clone()).map_err(|error| error.in_phase(phase))?;
        *lock(&self.wires.record) = Some(record);
        Ok(())
    }
}

/// Where a panic during an action is told to have been.
fn phase_of(action: &DestinationAction) -> Phase {
    match action {
        DestinationAction::BeginResuming => Phase::Setup,
        DestinationAction::TakeLocks => Phase::Final,
        DestinationAction::Load { .. } => Phase::Ready,
        DestinationAction::Journal(_) => Phase::Commit,
        DestinationAction::Start { .. } => Phase::Run,
        DestinationAction::Release => Phase::Clean,
        _ => Phase::Hello,
    }
}

/// What a panic of the embedder's code is told as.
pub(crate) fn panicked(phase: Phase, panic: &(dyn Any + Send)) -> PeerError {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
    let remedy = "report it to whoever maintains the VMM or the device";
    fail::with_remedy(phase, format!("a panic in the VMM or a device: {text}"), remedy)
}
