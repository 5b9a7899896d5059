//! The worker: does one job after another, and answers each by the event that the engine's contract names.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;

use vfio_migration_compat::{MachineManifest, Report};
use vfio_migration_engine::ownership::{SourceRecord, SourceState};
use vfio_migration_engine::{DeviceProgress, SourceAction, SourceEvent};
use vfio_migration_memory::{DirtySource, GuestRam};
use vfio_migration_types::{AttemptId, Bitmap, Epoch, Phase};
use vfio_migration_wire::{Message, PeerError};

use crate::channel::link::Link;
use crate::control::{Control, lock};
use crate::device::send::{DeviceCounters, Stream};
use crate::machine::{Machine, MigratableDevice, Paused};
use crate::options::SourceOptions;
use crate::ownership::journal::Journal;
use crate::session::fail::{self, InPhase};
use crate::session::work_error::WorkError;
use crate::uri::Uri;

use crate::source::sabotage::Saboteur;
use crate::source::session::{Events, Wires};

/// Counts that the caller's thread shows while the worker works.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) ram_bytes: AtomicU64,
    pub(crate) ram_left: AtomicU64,
    /// CLOCK_MONOTONIC nanoseconds just before the vCPUs were told to stop; 0 before.
    pub(crate) paused_ns: AtomicU64,
    /// Jobs finished, whatever came of them.
    pub(crate) jobs_done: AtomicU64,
    pub(crate) devices: Vec<DeviceCounters>,
    /// Per device, what it last said of itself.
    pub(crate) device_progress: std::sync::Mutex<Vec<DeviceProgress>>,
    /// What both sides' rules say.
    pub(crate) report: std::sync::Mutex<Report>,
}

/// Everything the worker holds while the attempt lasts. What is undone in a rollback is in its fields.
pub(crate) struct Worker<'a> {
    pub(crate) machine: Arc<dyn Machine>,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) options: &'a SourceOptions,
    pub(crate) control: &'a Control,
    pub(crate) uri: &'a Uri,
    pub(crate) link: Arc<Link>,
    pub(crate) wires: &'a Wires,
    pub(crate) counters: &'a Counters,
    pub(crate) journal: &'a Journal,
    pub(crate) attempt: AttemptId,
    pub(crate) epoch: Epoch,
    /// What was offered.
    pub(crate) manifest: &'a MachineManifest,
    pub(crate) functions: Vec<MigratableDevice>,
    pub(crate) streams: Vec<Stream<'a>>,
    /// The VMM's own dirty sources.
    pub(crate) sources: Vec<Arc<dyn DirtySource>>,
    pub(crate) logging: bool,
    pub(crate) dirty: Bitmap,
    /// Pages sent, data and zero, each time they were sent.
    pub(crate) ram_pages: u64,
    pub(crate) paused: Option<Paused>,
    pub(crate) locks_free: bool,
    /// The machine panicked while it was being paused.
    pub(crate) pause_unknown: bool,
    pub(crate) saboteur: Saboteur,
}

impl Worker<'_> {
    /// Works until the job queue is closed.
    pub(crate) fn run(mut self, jobs: &Receiver<SourceAction>, events: &Events) {
        for job in jobs {
            let answer = match self.guarded(job) {
                Ok(answer) => answer,
                Err(WorkError::Failed(failure)) => {
                    tracing::warn!(text = %failure.text, "an action failed");
                    Some(SourceEvent::Failed(failure))
                }
                // Nobody waits for the answer of an interrupted action, and the reader tells of a lost link.
                Err(WorkError::Interrupted | WorkError::Link) => None,
            };
            self.counters.jobs_done.fetch_add(1, Ordering::Release);
            if let Some(event) = answer {
                events.tell(event);
            }
        }
        // The session ended without an end: its observer panicked. A guest that may still be ours goes on.
        if self.logging && !self.paused.as_ref().is_some_and(Paused::is_held) {
            let _ = self.guarded(SourceAction::RollBack);
        }
    }

    /// Does a job. The VMM's code and its devices' run in it: a panic of theirs is a failure like any other, or the session
    /// would wait for an answer for ever.
    fn guarded(&mut self, job: SourceAction) -> Result<Option<SourceEvent>, WorkError> {
        let (pausing, back) = (job == SourceAction::Pause, job == SourceAction::RollBack);
        std::panic::catch_unwind(AssertUnwindSafe(|| self.job(job))).unwrap_or_else(|panic| {
            let failure = panicked(self.wires.phase(), panic.as_ref());
            self.pause_unknown |= pausing;
            if back {
                tracing::error!(text = %failure.text, "the way back ended early");
                // Standing is the safe side of not knowing.
                if let Some(paused) = &mut self.paused {
                    paused.hold();
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
                self.send(&message)?;
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
                // Before, not after: a failure may have let go of some.
                self.locks_free = true;
                self.machine.release_locks().map_err(|error| error.in_phase(Phase::Final))?;
                SourceEvent::LocksReleased
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
                return Err(fail::plain(Phase::Plan, text).into());
            }
        }))
    }

    /// Where every device stands, in manifest order.
    pub(crate) fn device_progress(&mut self, phase: Phase) -> Result<Vec<DeviceProgress>, WorkError> {
        let progress =
            self.streams.iter_mut().map(|stream| stream.progress(phase)).collect::<Result<Vec<_>, _>>()?;
        lock(&self.counters.device_progress).clone_from(&progress);
        Ok(progress)
    }

    /// Adds what every dirty source saw since the last time.
    pub(crate) fn report_dirty(&mut self, phase: Phase) -> Result<(), WorkError> {
        let mut found = Bitmap::new(self.ram.size(), self.dirty.granule());
        for source in &self.sources {
            source.report(&mut found).map_err(|error| error.in_phase(phase))?;
        }
        for stream in &self.streams {
            let Some(log) = stream.device.dirty_log() else { continue };
            let mut seen = Bitmap::new(self.ram.size(), self.dirty.granule());
            log.report(&mut seen).map_err(|error| fail::blame(&stream.id, error.in_phase(phase)))?;
            if !self.saboteur.hides_device_log() {
                found.or(&seen);
            }
        }
        self.dirty.or(&found);
        self.saboteur.hide_dirty(&mut self.dirty);
        self.counters.ram_left.store(self.dirty.dirty_bytes(), Ordering::Relaxed);
        Ok(())
    }

    fn send(&self, message: &Message) -> Result<(), WorkError> {
        self.link.send(message).map_err(|error| WorkError::sending(error, self.wires.phase()))
    }

    /// What the journal says in `state`.
    pub(crate) fn record(&self, state: SourceState) -> SourceRecord {
        SourceRecord {
            vm: self.machine.id(),
            attempt: self.attempt,
            epoch: self.epoch,
            state,
            peer: self.uri.to_string(),
        }
    }

    fn write_journal(&mut self, state: SourceState) -> Result<(), WorkError> {
        if state == SourceState::Committing {
            // Before the record is on disk, not after: from here only the engine's word lets the guest run.
            if let Some(paused) = &mut self.paused {
                paused.hold();
            }
        }
        let record = self.record(state);
        self.journal.write_source(record).map_err(|error| error.in_phase(Phase::Commit).into())
    }
}

/// What a panic said, as a failure.
fn panicked(phase: Phase, panic: &(dyn Any + Send)) -> PeerError {
    let said = panic.downcast_ref::<&str>().copied();
    let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("nothing");
    let text = format!("a panic in the VMM or a device: {said}");
    fail::with_remedy(phase, text, "see the VMM's own log")
}
