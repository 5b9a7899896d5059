//! Failures of an attempt, as its caller sees them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use vfio_migration_compat::{Reason, Report};
use vfio_migration_types::{CancelCause, DeviceId, Epoch, Failure, Phase, Side, error_chain, milliseconds};

use crate::channel::connect::{CHOOSE, ConnectError};
use crate::channel::transport::TransportError;
use crate::machine::Machine;
use crate::reasons::sentences;
use crate::regular_file::FileError;
use crate::session::threads::no_thread;
use crate::tls::error::TlsError;
use crate::unresolved::UnresolvedMigration;
use crate::uri::Uri;

/// The reason why a guest did not move.
///
/// Exhaustive, as everything is that says how an attempt ended: an end that is new does not compile until its caller has an
/// answer for it.
#[derive(Debug)]
pub enum MigrateError {
    /// The attempt was never begun: this side's own preconditions do not hold. The guest never noticed.
    NotBegun(Failure),
    /// The attempt was refused by the rules of one side, the destination's or this one's. The guest never noticed.
    Refused(Vec<Reason>),
    /// The attempt was undone, with its cause and what is left.
    Aborted(Box<Aborted>),
    /// COMMIT was sent and its outcome is not known: the guest is paused here, and nothing runs by itself. It says what is known, and
    /// can ask again.
    Unresolved(Box<UnresolvedMigration>),
}

impl fmt::Display for MigrateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence_of("the migration"))
    }
}

impl std::error::Error for MigrateError {}

impl MigrateError {
    /// The same in a sentence, of something else that a session is for: `"the rehearsal"`.
    pub fn sentence_of(&self, what: &str) -> String {
        match self {
            Self::NotBegun(failure) => format!("{what} did not begin: {failure}"),
            Self::Refused(reasons) => format!("{what} was refused: {}", sentences(reasons)),
            Self::Aborted(aborted) => aborted.sentence_of(what),
            Self::Unresolved(unresolved) => format!(
                "who owns the guest is not known: {}; the guest is paused here, and ends here if the other side has it",
                unresolved.why
            ),
        }
    }

    /// Whether both sides are as before, and another attempt comes to the same as long as nothing is changed: refused by rules, or by
    /// limits that cannot be met.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Refused(_) => true,
            Self::Aborted(aborted) => aborted.obstacle && aborted.is_as_before(),
            Self::NotBegun(_) | Self::Unresolved { .. } => false,
        }
    }

    /// The verdict, when this is one: a refusal by rules or limits, or by a device that was tried. `None` for what says nothing of
    /// whether the guest could move: a network that failed, an operator who cancelled.
    pub fn report(&self) -> Option<Report> {
        let refused = |failure: &Failure| {
            let reason = crate::reasons::of_device_failure(failure)?;
            Some(crate::reasons::report(&[reason]))
        };
        match self {
            Self::Refused(reasons) => Some(crate::reasons::report(reasons)),
            Self::NotBegun(failure) => refused(failure),
            Self::Aborted(aborted) if aborted.obstacle => {
                Some(crate::reasons::report(&[crate::reasons::of_obstacle(&aborted.cause)]))
            }
            Self::Aborted(aborted) if !aborted.cancelled && !aborted.cause.is_cancelled() => {
                refused(&aborted.cause)
            }
            _ => None,
        }
    }
}

/// An attempt that was undone, and what is left of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Aborted {
    /// The failure, or the cancellation, that ended the attempt.
    pub cause: Failure,
    /// Cancelled at this side, not failed.
    pub cancelled: bool,
    /// The limits cannot be met, as was found before the guest was paused: a rehearsal comes to the same, and so does another attempt
    /// under these limits.
    #[serde(default)]
    pub obstacle: bool,
    /// Devices that had to be reset: their guest state is gone.
    pub reset: Vec<DeviceId>,
    /// Devices that could neither go back nor be reset: the guest has them no more.
    #[serde(default)]
    pub lost: Vec<DeviceId>,
    /// Storage locks that could not be taken back: the guest stays paused.
    pub locks_lost: Vec<String>,
    /// Whether the guest is as it was before the attempt: running, or paused if its operator had paused it. If not,
    /// [`start_held`](crate::start_held) tries again to let it run.
    pub restored: bool,
    /// Time for which the attempt had the guest paused; zero if it never did, or the guest is paused still.
    #[serde(default, rename = "stood_ms", with = "crate::millis")]
    pub stood: Duration,
    /// What did not answer. It is undone behind this end, as
    /// [`Control::pending_rollback`](crate::Control::pending_rollback) tells: another attempt begins when it is. A guest that is not
    /// [restored](Self::restored) goes on then, and is not to be started before.
    #[serde(default)]
    pub left_undone: Vec<Failure>,
}

impl Aborted {
    /// Whether the guest is as it was before the attempt, and each of its devices, and nothing is left to be undone.
    pub fn is_as_before(&self) -> bool {
        // All of it, so that what is new is asked too.
        let Self {
            cause: _,
            cancelled: _,
            obstacle: _,
            reset,
            lost,
            locks_lost,
            restored,
            stood: _,
            left_undone,
        } = self;
        *restored && reset.is_empty() && lost.is_empty() && locks_lost.is_empty() && left_undone.is_empty()
    }
}

impl fmt::Display for Aborted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence_of("the migration"))
    }
}

impl Aborted {
    fn stood_text(&self) -> String {
        match self.stood {
            Duration::ZERO => String::new(),
            stood => format!(", and was paused for {} ms", milliseconds(stood)),
        }
    }

    fn sentence_of(&self, what: &str) -> String {
        // Whichever side's operator it was.
        let cancelled = self.cancelled || self.cause.is_cancelled();
        let verb = if cancelled { "cancelled" } else { "aborted" };
        let mut text = format!("{what} was {verb} {}", self.cause);
        if self.is_as_before() {
            // It may have been paused by its operator before, and is then.
            return text + "; the guest is here as it was before" + &self.stood_text();
        }
        text.push_str(match (self.restored, self.left_undone.is_empty()) {
            (true, _) => "; the guest is here",
            (false, true) => "; the guest is not resumed here",
            (false, false) => {
                "; the guest is not resumed here before what is late has answered, and goes on then"
            }
        });
        text.push_str(&self.stood_text());
        for (index, device) in self.lost.iter().enumerate().filter(|_| self.restored) {
            text += &format!("{} device {device}", if index == 0 { ", without" } else { " and" });
        }
        for device in &self.reset {
            text += &format!("; device {device} had to be reset and lost its state");
        }
        for lock in &self.locks_lost {
            text += &format!("; the storage lock {lock} could not be taken back");
        }
        if self.restored && !self.left_undone.is_empty() {
            text.push_str("; not all of it was undone by then");
        }
        text
    }
}

/// The reason why no guest arrived.
#[derive(Debug, thiserror::Error)]
pub enum IncomingError {
    /// No session was begun: the socket, the journal, or nobody came in time.
    #[error("no migration came in: {0}")]
    NotBegun(Failure),
    /// The attempt was refused by the rules of one side, the source's or this one's.
    #[error("the migration was refused: {}", sentences(.0))]
    Refused(Vec<Reason>),
    /// Nothing ran here; every device is reset and released.
    #[error("the incoming migration was {how} {0}", how = how(.0))]
    Aborted(Failure),
    /// The source had brought nothing of its guest in time, and made way for another that waits: the next may be
    /// [accepted](crate::Destination::accept).
    #[error("the incoming migration made way for another {0}")]
    GaveWay(Failure),
    /// The same, since the source has found with its guest running that the limits cannot be met: another attempt under these limits comes to
    /// the same.
    #[error("the incoming migration was aborted {0}")]
    LimitsUnmet(Failure),
    /// The attempt, or the wait for one, was cancelled at this side. Nothing ran here; every device is reset and released.
    #[error("the incoming migration was cancelled {0}")]
    Cancelled(Failure),
    /// The attempt was a rehearsal, and is over, however it ended. The next may be
    /// [accepted](crate::Destination::accept).
    #[error("{0}")]
    Rehearsed(Box<RehearsedHere>),
    /// This side owns the guest, and could not start it: the guest is held paused, and nobody else may run it.
    /// [`OwnedNotStarted::start`] tries again.
    #[error("the guest is owned here (epoch {}) but could not be started {}", .0.epoch.0, .0.cause)]
    OwnedNotStarted(Box<OwnedNotStarted>),
}

impl IncomingError {
    /// The same in a sentence, of something else that a session is for than a migration: `"the restore"`.
    pub fn sentence_of(&self, what: &str) -> String {
        match self {
            Self::Refused(reasons) => format!("{what} was refused: {}", sentences(reasons)),
            Self::Aborted(cause) => format!("{what} was {} {cause}", how(cause)),
            Self::LimitsUnmet(cause) => format!("{what} was aborted {cause}"),
            Self::Cancelled(cause) => format!("{what} was cancelled {cause}"),
            Self::GaveWay(cause) => format!("{what} made way for another {cause}"),
            Self::NotBegun(cause) => format!("{what} did not begin: {cause}"),
            Self::Rehearsed(_) | Self::OwnedNotStarted(_) => self.to_string(),
        }
    }

    /// Whether another attempt comes to the same as long as nothing is changed: refused by rules, or by limits that cannot be met. What the
    /// source's [`MigrateError::is_refusal`] says of the same attempt.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Refused(_) | Self::LimitsUnmet(_) => true,
            Self::Rehearsed(here) => !here.reasons().is_empty(),
            Self::NotBegun(_)
            | Self::Aborted(_)
            | Self::GaveWay(_)
            | Self::Cancelled(_)
            | Self::OwnedNotStarted(_) => false,
        }
    }

    /// Why not, by rules, limits, or a device that was tried: the list that [`MigrateError::report`] has of the same attempt. Empty for what
    /// says nothing of whether the guest could move.
    pub fn reasons(&self) -> Vec<Reason> {
        match self {
            Self::Refused(reasons) => reasons.clone(),
            Self::LimitsUnmet(cause) => vec![crate::reasons::of_obstacle(cause)],
            Self::Aborted(cause) if !cause.is_cancelled() => {
                crate::reasons::of_device_failure(cause).into_iter().collect()
            }
            Self::Rehearsed(here) => here.reasons(),
            Self::NotBegun(_)
            | Self::GaveWay(_)
            | Self::Aborted(_)
            | Self::Cancelled(_)
            | Self::OwnedNotStarted(_) => Vec::new(),
        }
    }
}

impl RehearsedHere {
    /// Why the guest would not move, as far as that was found.
    pub fn reasons(&self) -> Vec<Reason> {
        let Self { only_asked: _, refused, obstacle, cause, left_undone: _ } = self;
        let of_limits = obstacle.iter().map(crate::reasons::of_obstacle);
        let failed = cause.iter().filter(|cause| !cause.is_cancelled());
        let of_device = failed.filter_map(crate::reasons::of_device_failure);
        refused.iter().cloned().chain(of_limits).chain(of_device).collect()
    }
}

/// How an attempt ended, whichever side's operator it was.
fn how(cause: &Failure) -> &'static str {
    if cause.is_cancelled() { "cancelled" } else { "aborted" }
}

/// A rehearsal, as its destination sees it. Nothing was to stay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RehearsedHere {
    /// It was a mere question: nothing was to be tried.
    pub only_asked: bool,
    /// Reasons of the side whose rules refused it; empty if none did.
    pub refused: Vec<Reason>,
    /// The limits that a migration could not meet, as the source has found.
    pub obstacle: Option<Failure>,
    /// The failure that ended it early, or its cancel.
    pub cause: Option<Failure>,
    /// The failure that kept something from being released at its end.
    pub left_undone: Option<Failure>,
}

impl fmt::Display for RehearsedHere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.only_asked { "check" } else { "rehearsal" };
        write!(f, "a {what} ended, and nothing was to stay")?;
        if !self.refused.is_empty() {
            write!(f, "; it was refused: {}", sentences(&self.refused))?;
        }
        if let Some(cause) = &self.cause {
            write!(f, "; it {} {cause}", if cause.is_cancelled() { "was cancelled" } else { "failed" })?;
        }
        if let Some(obstacle) = &self.obstacle {
            write!(f, "; a migration would not come to its end {obstacle}")?;
        }
        match &self.left_undone {
            Some(failure) => write!(f, "; not all could be released {failure}"),
            None => Ok(()),
        }
    }
}

/// A guest that is ours and does not run.
#[derive(Clone)]
pub struct OwnedNotStarted {
    /// The machine that holds the guest, paused.
    pub machine: Arc<dyn Machine>,
    /// Under this epoch it is ours.
    pub epoch: Epoch,
    /// The failure that keeps it from running.
    pub cause: Failure,
}

impl fmt::Debug for OwnedNotStarted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OwnedNotStarted")
            .field("epoch", &self.epoch)
            .field("cause", &self.cause)
            .finish_non_exhaustive()
    }
}

pub(crate) fn not_connected(error: ConnectError) -> MigrateError {
    if let ConnectError::NoThread(error) = &error {
        return refused_here(no_thread(Side::Source, Phase::Hello, "connection", error));
    }
    let phase = if matches!(error, ConnectError::NotChosen(_)) { Phase::Plan } else { Phase::Hello };
    let remedy = match &error {
        ConnectError::NotChosen(_) => CHOOSE,
        ConnectError::NotAStream(_)
        | ConnectError::System { uri: Uri::Fd(_), .. }
        | ConnectError::Used(Uri::Fd(_)) => "pass a connected stream socket",
        ConnectError::Insecure { source: TransportError::Tls(TlsError::Late(_)), .. } => {
            "try again: the destination may be held up; if it comes again, start it with --tls-creds DIR as well, or, where plain text is meant, say --insecure-plaintext on both sides"
        }
        ConnectError::Insecure { source: TransportError::Tls(error), .. } if error.hints_at_plain_text() => {
            "start the destination with --tls-creds DIR as well; where plain text is meant, say --insecure-plaintext on both sides; one that does not wait any more ends it so, too"
        }
        ConnectError::Insecure {
            source: TransportError::Tls(TlsError::Protocol(_) | TlsError::NotAsked),
            ..
        } => "check the address: something else than a destination listens there",
        ConnectError::Insecure { source: TransportError::Tls(error), .. } if error.remedy().is_some() => {
            "see to the files of this side: `vfio-migrate tls show DIR` says what is wrong with them, and what mends it"
        }
        ConnectError::Insecure { .. } => {
            "compare the certificates of both hosts: `vfio-migrate tls show DIR` tells their names and their ends, `vfio-migrate tls pin DIR` their keys"
        }
        ConnectError::Closed { .. } => {
            "see whether a destination waits there still: its operator may have cancelled, or its process have ended; if it does, its log says why it refuses"
        }
        ConnectError::Stranger { .. } => "see whose process listens there",
        _ => "check the address, and that a destination listens there",
    };
    let late = matches!(
        error,
        ConnectError::TimedOut { .. }
            | ConnectError::Insecure { source: TransportError::Tls(TlsError::Late(_)), .. }
    );
    let errno = late.then(|| Errno::TIMEDOUT.raw_os_error().unsigned_abs()).or_else(|| errno_of(&error));
    let failure = Failure::new(Side::Source, phase, error_chain(&error)).with_remedy(remedy);
    MigrateError::NotBegun(Failure { errno, ..failure })
}

/// What the system said, where it is the cause: of a socket, or of a file of this side's that secures it.
pub(crate) fn errno_of(error: &ConnectError) -> Option<u32> {
    let raw = |error: &std::io::Error| error.raw_os_error().map(i32::unsigned_abs);
    match error {
        ConnectError::System { source, .. } | ConnectError::Factory(source) => raw(source),
        ConnectError::Closed { source: errno, .. }
        | ConnectError::Insecure { source: TransportError::System(errno), .. } => {
            Some(errno.raw_os_error().unsigned_abs())
        }
        ConnectError::Insecure { source: TransportError::Tls(error), .. }
        | ConnectError::Unprepared { source: error, .. } => match error {
            TlsError::File { source, .. } => raw(source),
            TlsError::Open(error) => match &**error {
                FileError::System { source, .. } => raw(source),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}

/// A cancel before there was a session: nothing is to be undone.
pub(crate) fn cancelled(why: &CancelCause, phase: Phase) -> MigrateError {
    MigrateError::Aborted(Box::new(Aborted {
        cause: why.failure(Side::Source, phase),
        cancelled: true,
        obstacle: false,
        reset: Vec::new(),
        lost: Vec::new(),
        locks_lost: Vec::new(),
        restored: true,
        stood: Duration::ZERO,
        left_undone: Vec::new(),
    }))
}

pub(crate) fn not_begun(phase: Phase, text: impl Into<String>) -> MigrateError {
    MigrateError::NotBegun(Failure::new(Side::Source, phase, text))
}

pub(crate) fn refused_here(failure: Failure) -> MigrateError {
    MigrateError::NotBegun(failure)
}
