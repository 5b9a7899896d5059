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

use crate::control::{Control, lock};
use crate::fail::{self, InPhase};
use crate::journal::Journal;
use crate::link::Link;
use crate::machine::{Machine, MigratableDevice, Paused};
use crate::options::SourceOptions;
use crate::pump::{DeviceCounters, Stream};
use crate::stop::Stop;
use crate::uri::Uri;

use super::run::{Events, Wires};
use super::sabotage::Saboteur;

/// Counts that the caller's thread shows while the worker works.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) ram_bytes: AtomicU64,
    pub(super) ram_left: AtomicU64,
    /// CLOCK_MONOTONIC nanoseconds just before the vCPUs were told to stop; 0 before.
    pub(super) paused_ns: AtomicU64,
    /// Jobs finished, whatever came of them.
    pub(super) jobs_done: AtomicU64,
    pub(super) devices: Vec<DeviceCounters>,
    /// Per device, what it last said of itself.
    pub(super) device_progress: std::sync::Mutex<Vec<DeviceProgress>>,
    /// What both sides' rules say.
    pub(super) report: std::sync::Mutex<Report>,
}

/// Everything the worker holds while the attempt lasts. What is undone in a rollback is in its fields.
pub(super) struct Worker<'a> {
    pub(super) machine: Arc<dyn Machine>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) options: &'a SourceOptions,
    pub(super) control: &'a Control,
    pub(super) uri: &'a Uri,
    pub(super) link: Arc<Link>,
    pub(super) wires: &'a Wires,
    pub(super) counters: &'a Counters,
    pub(super) journal: &'a Journal,
    pub(super) attempt: AttemptId,
    pub(super) epoch: Epoch,
    /// What was offered.
    pub(super) manifest: &'a MachineManifest,
    pub(super) functions: Vec<MigratableDevice>,
    pub(super) streams: Vec<Stream<'a>>,
    /// The VMM's own dirty sources.
    pub(super) sources: Vec<Arc<dyn DirtySource>>,
    pub(super) logging: bool,
    pub(super) dirty: Bitmap,
    /// Pages sent, data and zero, each time they were sent.
    pub(super) ram_pages: u64,
    pub(super) paused: Option<Paused>,
    pub(super) locks_free: bool,
    /// The machine panicked while it was being paused.
    pub(super) pause_unknown: bool,
    pub(super) saboteur: Saboteur,
}

impl Worker<'_> {
    /// Works until the job queue is closed.
    pub(super) fn run(mut self, jobs: &Receiver<SourceAction>, events: &Events) {
        for job in jobs {
            let answer = match self.guarded(job) {
                Ok(answer) => answer,
                Err(Stop::Failed(failure)) => {
                    tracing::warn!(text = %failure.text, "an action failed");
                    Some(SourceEvent::Failed(failure))
                }
                // Nobody waits for the answer of an interrupted action, and the reader tells of a lost link.
                Err(Stop::Interrupted | Stop::Link) => None,
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
    fn guarded(&mut self, job: SourceAction) -> Result<Option<SourceEvent>, Stop> {
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
            Err(Stop::Failed(failure))
        })
    }

    fn job(&mut self, job: SourceAction) -> Result<Option<SourceEvent>, Stop> {
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
    pub(super) fn device_progress(&mut self, phase: Phase) -> Result<Vec<DeviceProgress>, Stop> {
        let progress =
            self.streams.iter_mut().map(|stream| stream.progress(phase)).collect::<Result<Vec<_>, _>>()?;
        lock(&self.counters.device_progress).clone_from(&progress);
        Ok(progress)
    }

    /// Adds what every dirty source saw since the last time.
    pub(super) fn report_dirty(&mut self, phase: Phase) -> Result<(), Stop> {
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

    fn send(&self, message: &Message) -> Result<(), Stop> {
        self.link.send(message).map_err(|error| Stop::sending(error, self.wires.phase()))
    }

    /// What the journal says in `state`.
    pub(super) fn record(&self, state: SourceState) -> SourceRecord {
        SourceRecord {
            vm: self.machine.id(),
            attempt: self.attempt,
            epoch: self.epoch,
            state,
            peer: self.uri.to_string(),
        }
    }

    fn write_journal(&mut self, state: SourceState) -> Result<(), Stop> {
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
