//! The worker: does one job after another, and answers each by the event that the engine's contract names.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use vfio_migration_device::ConfigState;
use vfio_migration_engine::{DeviceProgress, SourceAction, SourceEvent};
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Failure, Phase, Side};
use vfio_migration_wire::Message;

use crate::channel::binding::SessionKey;
use crate::channel::link::Link;
use crate::control::Undone;
use crate::device_state::send::DeviceSender;
use crate::machine::{Machine, MigratableDevice, Paused};
use crate::ram::dirty::DirtyPages;
use crate::session::events::Events;
use crate::session::fail::{InPhase, panicked};
use crate::session::lock::lock;
use crate::session::work_error::WorkError;
use crate::source::attempt::{SourceCounters, SourceShared};
use crate::source::plan::PlannedMigration;

/// Everything the worker holds while the attempt lasts. What is undone in a rollback is in its fields.
pub(super) struct Worker {
    pub(super) machine: Arc<dyn Machine>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) plan: Arc<PlannedMigration>,
    pub(super) link: Arc<Link>,
    /// Derived at the beginning: a connection that has failed gives none.
    pub(super) session_key: Option<SessionKey>,
    pub(super) shared: Arc<SourceShared>,
    pub(super) counters: Arc<SourceCounters>,
    /// A write of the journal was given up, and may still be under way.
    pub(super) journal_hangs: bool,
    pub(super) functions: Vec<MigratableDevice>,
    /// What each had in config space when its device was last about to be stopped, in their order.
    pub(super) configs: Vec<Option<ConfigState>>,
    pub(super) devices: Vec<DeviceSender>,
    pub(super) dirty: DirtyPages,
    /// Pages sent, data and zero, each time they were sent.
    pub(super) ram_pages: u64,
    pub(super) paused: Option<Paused>,
    pub(super) locks_free: bool,
    /// The machine panicked while it was being paused.
    pub(super) pause_unknown: bool,
}

impl Worker {
    pub(super) fn new(
        plan: &Arc<PlannedMigration>,
        link: &Arc<Link>,
        shared: &Arc<SourceShared>,
        counters: &Arc<SourceCounters>,
    ) -> Self {
        let ram = plan.machine.ram();
        let devices = (0..)
            .zip(&plan.devices)
            .zip(shared.credits.iter().zip(&counters.devices))
            .map(|((index, (moved, capabilities)), (credit, counts))| {
                let (device, credit, counts) =
                    (Arc::clone(&moved.device), Arc::clone(credit), Arc::clone(counts));
                DeviceSender::new(index, device, *capabilities, credit, counts)
            })
            .collect();
        Self {
            machine: Arc::clone(&plan.machine),
            dirty: DirtyPages::new(&ram),
            ram,
            plan: Arc::clone(plan),
            link: Arc::clone(link),
            session_key: SessionKey::of(link, plan.attempt),
            shared: Arc::clone(shared),
            counters: Arc::clone(counters),
            journal_hangs: false,
            configs: Vec::new(),
            functions: plan.devices.iter().map(|(moved, _)| moved.clone()).collect(),
            devices,
            ram_pages: 0,
            paused: None,
            locks_free: false,
            pause_unknown: false,
        }
    }

    /// Works until the job queue is closed, and gives back what is left.
    pub(super) fn run(mut self, jobs: &Receiver<SourceAction>, events: &Events<SourceEvent>) -> Self {
        for job in jobs {
            let answer = match self.guarded(job) {
                Ok(answer) => answer,
                Err(WorkError::Failed(failure)) => {
                    // Whoever hears of the end of the session is told.
                    tracing::debug!(text = %failure.text, "an action failed");
                    Some(SourceEvent::Failed(failure))
                }
                // Nobody waits for the answer of an interrupted action, and the reader reports a lost link.
                Err(WorkError::Interrupted | WorkError::Link) => None,
            };
            self.counters.jobs_done.fetch_add(1, Ordering::Release);
            if let Some(event) = answer {
                self.note_not_undone(&event);
                events.send(event);
            }
        }
        // The session ended without an end: its observer panicked. A guest that may still be ours goes on.
        if self.dirty.is_logging() && !self.paused.as_ref().is_some_and(Paused::stays_paused) {
            let _ = self.guarded(SourceAction::RollBack);
        }
        self
    }

    /// Keeps what a rollback could not undo, for whoever asks when nobody listens to events any more.
    pub(super) fn note_not_undone(&self, event: &SourceEvent) {
        let SourceEvent::RolledBack { reset, not_reset, restored, .. } = event else { return };
        let failure = |text: &str| Failure::new(Side::Source, Phase::Clean, text);
        let reset = reset.iter().map(|device| {
            failure(&format!("device {device} had to be reset and lost its state")).of_device(device)
        });
        let lost = not_reset.iter().map(|device| {
            failure(&format!("device {device} could neither go back nor be reset")).of_device(device)
        });
        let mut not_undone: Vec<_> = reset.chain(lost).collect();
        if !restored {
            not_undone
                .push(failure("the guest is paused here").with_remedy("see to its devices, then resume it"));
        }
        *lock(&self.shared.undone) = Undone { restored: *restored, failures: not_undone };
    }

    /// Does a job. The VMM's code and its devices' run in it: a panic of theirs is a failure like any other, or the session
    /// would wait for an answer for ever.
    pub(super) fn guarded(&mut self, job: SourceAction) -> Result<Option<SourceEvent>, WorkError> {
        let (pausing, back) = (job == SourceAction::Pause, job == SourceAction::RollBack);
        catch_unwind(AssertUnwindSafe(|| self.job(job))).unwrap_or_else(|panic| {
            let failure = panicked(Side::Source, self.shared.phase(), panic.as_ref());
            self.pause_unknown |= pausing;
            if back {
                tracing::error!(text = %failure.text, "the way back ended early");
                // Paused is the safe side of not knowing.
                if let Some(paused) = &mut self.paused {
                    paused.keep_paused();
                }
                let (reset, not_reset, locks_lost) = (Vec::new(), Vec::new(), Vec::new());
                return Ok(Some(SourceEvent::RolledBack { reset, not_reset, locks_lost, restored: false }));
            }
            Err(WorkError::Failed(failure))
        })
    }

    fn job(&mut self, job: SourceAction) -> Result<Option<SourceEvent>, WorkError> {
        Ok(Some(match job {
            SourceAction::Send(message) => {
                let abort = matches!(message, Message::Abort(_) | Message::LimitsUnmet(_));
                if !abort || self.shared.abort.take() {
                    self.send(&message)?;
                }
                return Ok(None);
            }
            SourceAction::Judge(accept) => self.judge(accept)?,
            SourceAction::SetUp => SourceEvent::SetUp { devices: self.set_up()? },
            SourceAction::SendIteration { iteration } => SourceEvent::IterationSent(self.iterate(iteration)?),
            SourceAction::Pause => {
                let identity = self.unchanged_identity()?;
                SourceEvent::Paused { guest_ran: self.pause()?, identity }
            }
            SourceAction::Devices(barrier) => {
                SourceEvent::Reached { barrier, devices: self.take_devices(barrier)? }
            }
            SourceAction::Resume => {
                self.resume()?;
                SourceEvent::Resumed
            }
            SourceAction::SendFinal { verify } => {
                let (totals, verify) = self.send_final(verify)?;
                SourceEvent::FinalSent { totals, verify }
            }
            SourceAction::ReleaseLocks => {
                // Before, not after: a failure may have released some.
                self.locks_free = true;
                self.machine.release_locks().map_err(|error| error.in_phase(Side::Source, Phase::Final))?;
                SourceEvent::LocksReleased
            }
            SourceAction::DigestRam { first, count } => {
                SourceEvent::RamDigested(self.digest_ram(first, count)?)
            }
            SourceAction::Journal(state) => {
                self.write_journal(state)?;
                SourceEvent::Journaled(state)
            }
            SourceAction::RollBack => self.roll_back(),
            SourceAction::AskAgain => return Ok(self.ask_again()),
            SourceAction::CleanUp => {
                self.clean_up()?;
                SourceEvent::CleanedUp
            }
            other => {
                let text = format!("this session cannot do what its engine asks for: {other:?}");
                return Err(Failure::new(Side::Source, Phase::Plan, text).into());
            }
        }))
    }

    /// Progress of each device, in manifest order.
    pub(super) fn device_progress(&mut self, phase: Phase) -> Result<Vec<DeviceProgress>, WorkError> {
        let progress =
            self.devices.iter_mut().map(|device| device.progress(phase)).collect::<Result<Vec<_>, _>>()?;
        let moved = self.counters.devices.iter().map(|device| device.moved());
        *lock(&self.counters.device_progress) = progress.iter().copied().zip(moved).collect();
        Ok(progress)
    }

    /// Time that the destination may grant a device nothing. The engine's watchdog sees to it while the guest is
    /// paused, but not during a final pass that ends in a digest, of which it does not know how long it may take.
    pub(super) fn patience(&self, last: bool) -> Duration {
        let work = vfio_migration_engine::work_timeout(self.plan.options.peer_timeout);
        let costs_nothing = self.paused.as_ref().is_none_or(|paused| !paused.ran());
        if last && self.plan.options.verify && !costs_nothing {
            work.min(self.plan.options.downtime_limit)
        } else {
            work
        }
    }

    fn send(&self, message: &Message) -> Result<(), WorkError> {
        self.link.send(message).map_err(|error| WorkError::sending(error, Side::Source, self.shared.phase()))
    }
}
