//! State that the threads of an attempt share, and the attempt's successful ends.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vfio_migration_compat::Report;
use vfio_migration_engine::{self as engine, DeviceProgress};
use vfio_migration_types::Phase;
use vfio_migration_wire::FEATURE_RAM_CRC;

use crate::channel::credit::Credit;
use crate::control::Undone;
use crate::device_state::send::DeviceCounters;
use crate::error::{MigrateError, not_begun};
use crate::ram::send::RamCounters;
use crate::rehearsal::Rehearsal;
use crate::report::Completed;
use crate::session::abort::AbortOnce;
use crate::session::interrupt::Interrupt;
use crate::unresolved::UnresolvedMigration;

/// State that the threads of an attempt share.
#[derive(Debug, Default)]
pub(crate) struct SourceShared {
    pub(crate) interrupt: Interrupt,
    pub(crate) ram_crc: AtomicBool,
    pub(crate) credits: Vec<Arc<Credit>>,
    pub(crate) abort: AbortOnce,
    /// The guest is paused by this attempt, or is about to be. Locked by whoever decides that it may not be any more.
    pub(crate) pausing: Mutex<bool>,
    /// The session has ended, and its worker is kept for whoever asks on what became of COMMIT.
    pub(crate) unresolved: AtomicBool,
    /// The session has ended, and its worker undoes what is left by itself.
    pub(crate) left_behind: AtomicBool,
    /// The session has ended: nobody hears what its worker learns, which is not to wait for it.
    pub(crate) ended: AtomicBool,
    /// What came of the way back.
    pub(crate) undone: Arc<Mutex<Undone>>,
    /// The cause of a record of the journal that is about to be written: why the attempt was given up.
    pub(crate) journal_reason: Mutex<Option<String>>,
    /// The engine's phase, by its index in [`Phase::ALL`].
    pub(crate) phase: AtomicUsize,
}

impl SourceShared {
    /// Takes note of what was negotiated.
    pub(crate) fn note(&self, engine: &engine::SourceEngine) {
        let phase = Phase::ALL.iter().position(|phase| *phase == engine.phase());
        self.phase.store(phase.unwrap_or(0), Ordering::Relaxed);
        let crc = engine.negotiated().is_some_and(|reply| reply.features & FEATURE_RAM_CRC != 0);
        self.ram_crc.store(crc, Ordering::Relaxed);
    }

    /// The phase that the engine is in: what other threads' failures name.
    pub(crate) fn phase(&self) -> Phase {
        Phase::ALL.get(self.phase.load(Ordering::Relaxed)).copied().unwrap_or(Phase::Plan)
    }
}

/// Counts that the caller's thread reports while the worker works.
#[derive(Debug, Default)]
pub(crate) struct SourceCounters {
    pub(crate) ram: RamCounters,
    /// CLOCK_MONOTONIC nanoseconds just before the vCPUs were paused; 0 before.
    pub(crate) paused_ns: AtomicU64,
    /// Jobs finished, whatever came of them.
    pub(crate) jobs_done: AtomicU64,
    /// Nanoseconds for which the guest was paused, all pauses that have ended.
    pub(crate) stood_ns: AtomicU64,
    pub(crate) devices: Vec<Arc<DeviceCounters>>,
    /// Progress that each device last reported, and the bytes that it had given until then.
    pub(crate) device_progress: Mutex<Vec<(DeviceProgress, u64)>>,
    /// The verdict of both sides' rules.
    pub(crate) report: Mutex<Report>,
}

impl SourceCounters {
    /// The pause under way has ended, at `now` (CLOCK_MONOTONIC, nanoseconds); `ran`: a guest that ran before runs again.
    pub(crate) fn pause_ended(&self, now: u64, ran: bool) {
        let began = self.paused_ns.swap(0, Ordering::AcqRel);
        if began != 0 && ran {
            self.stood_ns.fetch_add(now.saturating_sub(began), Ordering::AcqRel);
        }
    }
}

/// The successful end of a session.
pub(crate) enum SourceEnd {
    Completed(Completed),
    Rehearsed(Rehearsal),
}

impl SourceEnd {
    pub(crate) fn completed(self) -> Result<Completed, MigrateError> {
        match self {
            Self::Completed(completed) => Ok(completed),
            Self::Rehearsed(_) => {
                Err(not_begun(Phase::Plan, "it was only rehearsed: a defect of this program"))
            }
        }
    }

    pub(crate) fn rehearsed(self) -> Result<Rehearsal, MigrateError> {
        match self {
            Self::Rehearsed(rehearsal) => Ok(rehearsal),
            Self::Completed(completed) => {
                let why = "the guest moved where a rehearsal was asked for: a defect of this program".into();
                let peer = "the destination".to_owned();
                let Completed { vm, attempt, epoch, .. } = completed;
                let unresolved = UnresolvedMigration::of_journal(vm, attempt, epoch, peer, why);
                Err(MigrateError::Unresolved(Box::new(unresolved)))
            }
        }
    }
}
