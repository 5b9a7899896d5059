//! The session of the device's migration, and what the scripted faults have done so far.

use std::time::Instant;

use rustix::io::Errno;
use vfio_migration_types::Bitmap;
use vfio_user_peer::MigrationState;

use crate::error::{SimError, invalid};
use crate::regs::Registers;
use crate::saving::SampleSaving;
use crate::stream::Parser;

/// Target of the lines that say how sessions begin and end: the command says them by default.
const SESSION: &str = "session";

/// The open session, and what the scripted faults have done so far.
#[derive(Debug, Default)]
pub(crate) struct SampleMigration {
    pub(crate) session: SampleSession,
    /// Arcs taken or tried.
    pub(crate) arcs: u64,
    /// Resets done or tried.
    pub(crate) resets: u64,
    /// Strikes of each fault, by its place in the script.
    pub(crate) struck: Vec<u32>,
    /// Bytes read or written in the session.
    pub(crate) moved: u64,
    /// When the session was opened, while one is.
    pub(crate) begun: Option<Instant>,
    /// The bulk state is partly of another device.
    pub(crate) foreign: bool,
}

/// The data session that is open.
#[derive(Debug, Default)]
pub(crate) enum SampleSession {
    #[default]
    None,
    Saving(Box<SampleSaving>),
    Resuming(Box<SampleResuming>),
    /// Ended under its user, as by a reset that the guest asked for.
    Lost,
}

/// A resuming session: the parts of the state that have come.
#[derive(Debug)]
pub(crate) struct SampleResuming {
    pub(crate) parser: Parser,
    /// Pages of the bulk state that came.
    pub(crate) came: Bitmap,
    pub(crate) registers: Option<(Registers, u64)>,
}

impl SampleMigration {
    /// Says on the log that a session has begun or ended, where an arc that was taken did that.
    pub(crate) fn log_arc(&mut self, from: MigrationState, to: MigrationState) {
        use MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
        match (from, to) {
            (Running, PreCopy) | (RunningP2p, PreCopyP2p) => {
                self.log_begin("saving begins, with the device running")
            }
            (Stop, StopCopy) => self.log_begin("saving begins, with the device stopped"),
            (Stop, Resuming) => self.log_begin("loading begins"),
            (StopCopy, Stop) => self.log_end("saving ended"),
            (PreCopy, Running) | (PreCopyP2p, RunningP2p) => {
                self.log_end("saving was given up, and the device goes on");
            }
            (Resuming, Stop) => self.log_end("loading ended"),
            _ => {}
        }
    }

    fn log_begin(&mut self, what: &str) {
        self.begun = Some(Instant::now());
        tracing::info!(target: SESSION, "{what}");
    }

    /// The same of the end of a session. Nothing, if none was open.
    pub(crate) fn log_end(&mut self, what: &str) {
        if let Some(begun) = self.begun.take() {
            tracing::info!(target: SESSION, "{what}: {} bytes in {} ms", self.moved, begun.elapsed().as_millis());
        }
    }

    /// Drops the session. Returns whether the bulk state has to be made anew.
    pub(crate) fn forget(&mut self) -> bool {
        self.log_end("the session was ended by a reset");
        self.session = SampleSession::None;
        self.moved = 0;
        std::mem::take(&mut self.foreign)
    }
}

/// Counts a strike of fault `n`, as long as it has struck less than `times`. Returns whether it strikes.
pub(crate) fn strikes(struck: &mut Vec<u32>, n: usize, times: u32) -> bool {
    if struck.len() <= n {
        struck.resize(n + 1, 0);
    }
    struck.get_mut(n).is_some_and(|struck| {
        let strikes = *struck < times;
        *struck += u32::from(strikes);
        strikes
    })
}

/// The error of a call that needs a session.
pub(crate) fn no_session(migration: &SampleMigration, what: &'static str) -> SimError {
    match migration.session {
        SampleSession::Lost => SimError::new(Errno::NODEV, "the session was lost"),
        _ => invalid(what),
    }
}
