//! State that the threads of an attempt share.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, OnceLock};

use vfio_migration_device::{ConfigRules, PciState, ResumingSession};
use vfio_migration_engine::ownership::DestinationRecord;
use vfio_migration_types::DeviceId;

use crate::channel::binding::SessionKey;
use crate::destination::final_pass::StorageLocks;
use crate::destination::reader::{Received, Sink};
use crate::expectation::{Expectation, Unexpected};
use crate::machine::{Machine, MigratableDevice};
use crate::report::StepTime;
use crate::session::abort::AbortOnce;
use crate::session::awaited::AwaitedAnswers;
use crate::session::interrupt::Interrupt;

/// State that the threads of an attempt share.
#[derive(Default)]
pub(super) struct DestinationShared {
    pub(super) interrupt: Interrupt,
    /// What the session waits for.
    pub(super) answers: AwaitedAnswers,
    pub(super) locks: Arc<StorageLocks>,
    pub(super) abort: AbortOnce,
    pub(super) sink: OnceLock<Sink>,
    pub(super) received: Received,
    /// Nothing is to stay, and nothing is journaled.
    pub(super) rehearsal: AtomicBool,
    /// Of these, a mere question: nothing is tried.
    pub(super) asks: AtomicBool,
    pub(super) ram_total: AtomicU64,
    /// The other end, as the journal and the progress name it.
    pub(super) peer: String,
    /// When it began, by the wall clock.
    pub(super) began: String,
    pub(super) session_key: Option<SessionKey>,
    /// What is expected of what the source brings, and whether it may know that.
    pub(super) expectation: Expectation,
    pub(super) told_expectation: bool,
    /// What it brought is not expected, so that nothing was made for it.
    pub(super) unexpected: OnceLock<Unexpected>,
    /// The machine, once all of its state was made one.
    pub(super) finished: Mutex<Option<Arc<dyn Machine>>>,
    pub(super) jobs_done: AtomicU64,
    pub(super) steps: Mutex<Vec<StepTime>>,
    /// The journal's record, as far as it is on disk.
    pub(super) record: Mutex<Option<DestinationRecord>>,
}

/// One device at the destination, in the source's order.
pub(super) struct ArrivingDevice {
    /// The device's name at the source, by which the stream knows it.
    pub(super) name: DeviceId,
    pub(super) moved: MigratableDevice,
    /// Rules for the bytes of its config space that are compared.
    pub(super) rules: ConfigRules,
    /// Loaded to its end and not yet finished (RESUMING → STOP).
    pub(super) session: Option<Box<dyn ResumingSession>>,
    /// Its function comes with the finished machine.
    pub(super) pci_later: bool,
    pub(super) pci_state: Option<PciState>,
    /// Whether its resuming session was begun: a release has something to undo.
    pub(super) touched: bool,
}
