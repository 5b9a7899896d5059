//! The worker: does one job after another, and answers each by the event that the engine's contract names.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::thread::Scope;

use vfio_migration_engine::{Attempt, DestinationAction, DestinationEvent};
use vfio_migration_memory::RamHold;
use vfio_migration_types::{Failure, Phase, Side, error_chain};
use vfio_migration_wire::Message;

use crate::channel::link::Link;
use crate::destination::attempt::{ArrivingDevice, DestinationShared};
use crate::incoming_machine::IncomingMachine;
use crate::machine::Machine;
use crate::offer::{IncomingOffer, NotBuilt};
use crate::options::DestinationOptions;
use crate::ownership::journal::Journal;
use crate::report::StepTime;
use crate::session::events::Events;
use crate::session::fail::{InPhase, panicked};
use crate::session::lock::lock;
use crate::session::work_error::WorkError;

/// Builds the machine for an offer.
pub(super) type Build<'a> =
    Box<dyn FnOnce(&IncomingOffer) -> Result<Arc<dyn IncomingMachine>, NotBuilt> + Send + 'a>;

/// Everything the worker holds while the attempt lasts. What a release undoes is in its fields.
pub(super) struct Worker<'scope, 'env, 'a> {
    pub(super) scope: &'scope Scope<'scope, 'env>,
    pub(super) options: &'a DestinationOptions,
    pub(super) build: Option<Build<'a>>,
    pub(super) link: Arc<Link>,
    pub(super) shared: &'env DestinationShared,
    pub(super) events: Events<DestinationEvent>,
    pub(super) journal: Option<Journal>,
    pub(super) machine: Option<Arc<dyn IncomingMachine>>,
    /// Its RAM stays as it is.
    pub(super) ram_hold: Option<RamHold>,
    pub(super) devices: Vec<ArrivingDevice>,
}

/// A job: the engine's action, and what the engine knew when it asked for it.
pub(super) struct Job {
    pub(super) action: DestinationAction,
    /// The attempt that it is about, once that is known.
    pub(super) attempt: Option<Attempt>,
    /// Why the attempt is given up, where it is.
    pub(super) given_up: Option<String>,
}

impl<'scope, 'env, 'a> Worker<'scope, 'env, 'a> {
    pub(super) fn new(
        scope: &'scope Scope<'scope, 'env>,
        options: &'a DestinationOptions,
        build: Build<'a>,
        link: Arc<Link>,
        shared: &'env DestinationShared,
        events: Events<DestinationEvent>,
    ) -> Self {
        Self {
            scope,
            options,
            build: Some(build),
            link,
            shared,
            events,
            journal: None,
            machine: None,
            ram_hold: None,
            devices: Vec::new(),
        }
    }

    /// Works until the job queue is closed.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        for job in jobs {
            let phase = phase_of(&job.action);
            // The VMM's code and the devices' is called here: a panic of theirs must not leave a session without an end.
            let done = catch_unwind(AssertUnwindSafe(|| self.job(job)))
                .unwrap_or_else(|panic| Err(panicked(Side::Destination, phase, panic.as_ref()).into()));
            let answer = match done {
                Ok(answer) => answer,
                Err(WorkError::Failed(failure)) => {
                    // Whoever hears of the end of the session is told.
                    tracing::debug!(text = %failure.text, "an action failed");
                    Some(DestinationEvent::Failed(failure))
                }
                Err(WorkError::Interrupted | WorkError::Link) => None,
            };
            self.shared.jobs_done.fetch_add(1, Ordering::Release);
            if let Some(event) = answer {
                self.events.send(event);
            }
        }
    }

    fn job(&mut self, job: Job) -> Result<Option<DestinationEvent>, WorkError> {
        let Job { action, attempt, given_up } = job;
        Ok(Some(match action {
            DestinationAction::Send(message) => {
                if matches!(message, Message::Abort(_) | Message::Declined(_)) {
                    self.locks_back();
                }
                let abort = matches!(message, Message::Abort(_));
                if abort && !self.shared.abort.take() {
                    return Ok(None);
                }
                self.link
                    .send(&message)
                    .map_err(|error| WorkError::sending(error, Side::Destination, Phase::Hello))?;
                return Ok(None);
            }
            DestinationAction::Reserve(offer) => self.reserve(offer, attempt)?,
            DestinationAction::BeginResuming => {
                self.begin_resuming()?;
                DestinationEvent::ResumingBegun
            }
            DestinationAction::TakeLocks => {
                let machine = self.machine(Phase::Final)?;
                let taken = self.shared.locks.take(&machine);
                taken.map_err(|error| error.in_phase(Side::Destination, Phase::Final))?;
                DestinationEvent::LocksTaken
            }
            DestinationAction::Load { totals } => DestinationEvent::Loaded(self.load(&totals)?),
            DestinationAction::Journal(state) => {
                self.write_journal(state, attempt, given_up)?;
                DestinationEvent::Journaled(state)
            }
            DestinationAction::Start { epoch, run_guest } => {
                self.shared.locks.keep();
                DestinationEvent::Started(self.start(epoch, run_guest)?)
            }
            DestinationAction::Release => {
                self.release()?;
                DestinationEvent::Released
            }
            other => {
                let text = format!("this session cannot do what its engine asks for: {other:?}");
                return Err(Failure::new(Side::Destination, Phase::Hello, text).into());
            }
        }))
    }

    /// The source takes its locks back as soon as it receives that we gave up: ours must be gone by then. A failure is
    /// not final, the release tries again.
    fn locks_back(&self) {
        if let Err(error) = self.shared.locks.release() {
            tracing::warn!(error = %error_chain(&error), "a storage lock could not be released yet");
        }
    }

    pub(super) fn machine(&self, phase: Phase) -> Result<Arc<dyn IncomingMachine>, Failure> {
        self.machine.clone().ok_or_else(|| {
            Failure::new(Side::Destination, phase, "there is no machine yet: a defect of this program")
        })
    }

    /// What was made of the state that arrived.
    pub(super) fn finished(&self, phase: Phase) -> Result<Arc<dyn Machine>, Failure> {
        lock(&self.shared.finished).clone().ok_or_else(|| {
            Failure::new(
                Side::Destination,
                phase,
                "the machine is not finished yet: a defect of this program",
            )
        })
    }

    /// Notes how long a step took, for the report.
    pub(super) fn step(&self, step: &str, took: std::time::Duration) {
        lock(&self.shared.steps).push(StepTime { step: step.to_owned(), took });
    }
}

/// The phase that a panic during an action is reported in.
fn phase_of(action: &DestinationAction) -> Phase {
    match action {
        DestinationAction::BeginResuming => Phase::Setup,
        DestinationAction::TakeLocks => Phase::Final,
        DestinationAction::Load { .. } => Phase::Ready,
        DestinationAction::Journal(state) => state.phase(),
        DestinationAction::Start { .. } => Phase::Run,
        DestinationAction::Release => Phase::Clean,
        _ => Phase::Hello,
    }
}
