//! A failure, with its place and its side: the one that a session, its peer and its caller share.

use std::borrow::Cow;
use std::error::Error;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::phase::Phase;
use crate::state::MigrationState;
use crate::text::printable;

/// A side of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The side that has the guest before the migration.
    Source,
    /// The side that has it after.
    Destination,
}

impl Side {
    /// The side at the other end of the connection.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// A failure: its text, its place, and its remedy. It crosses the wire as data, so that both sides of a migration
/// return the same one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Side on which it arose: both have devices of the same name.
    pub side: Side,
    /// Phase in which it arose.
    pub phase: Phase,
    /// Name of the device concerned.
    pub device: Option<String>,
    /// The state transition that failed, from and to; `None` when it was none.
    pub arc: Option<(MigrationState, MigrationState)>,
    /// errno, where one is known.
    pub errno: Option<u32>,
    /// The failure with its causes, in a sentence.
    pub text: String,
    /// The remedy, in a sentence; empty when nothing is known to help.
    pub remedy: String,
}

/// Linux's errno of an operation that was cancelled.
const ECANCELED: u32 = 125;

impl Failure {
    /// A failure of no device and without errno, for which no remedy is known.
    pub fn new(side: Side, phase: Phase, text: impl Into<String>) -> Self {
        let (text, remedy) = (printable(&text.into()).into_owned(), String::new());
        Self { side, phase, device: None, arc: None, errno: None, text, remedy }
    }

    /// A [cancel](crate::CancelCause) at `side`: no failure, but told as one. Its errno, ECANCELED, tells it from a failure at the
    /// other side too.
    pub(crate) fn cancelled(side: Side, phase: Phase, text: impl Into<String>) -> Self {
        Self { errno: Some(ECANCELED), ..Self::new(side, phase, text) }
    }

    /// Whether it is a [cancel](crate::CancelCause).
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.errno == Some(ECANCELED) && self.device.is_none() && self.arc.is_none()
    }

    /// The same, with what to do about it.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: remedy.into(), ..self }
    }

    /// The same, of a device.
    #[must_use]
    pub fn of_device(self, device: impl fmt::Display) -> Self {
        Self { device: Some(device.to_string()), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "in the {} phase at the {}: {}", self.phase, self.side, self.text)?;
        if let Some(device) = self.device.as_ref().filter(|device| !self.text.contains(device.as_str())) {
            write!(f, " (device {device})")?;
        }
        if !self.remedy.is_empty() {
            write!(f, "; {}", self.remedy)?;
        }
        Ok(())
    }
}

/// What was reached, by the errno at the end of an error's text: of these nobody can guess it from the words of the errno.
const LIMITS: [(&str, &str); 4] = [
    (
        "(os error 27)",
        "by the limit on a file's size (RLIMIT_FSIZE: ulimit -f, LimitFSIZE=) or the filesystem's",
    ),
    ("(os error 24)", "by the limit on a process's descriptors (RLIMIT_NOFILE: ulimit -n, LimitNOFILE=)"),
    ("(os error 23)", "by the host's limit on open files (fs.file-max)"),
    // sendmsg(2), for descriptors in messages that nobody has taken yet.
    ("(os error 109)", "by the limit on descriptors on their way (RLIMIT_NOFILE of the user's processes)"),
];

/// The same of EAGAIN, which is a limit's only where a thread was to be made.
/// A thread wants memory for its stack, too.
const NO_THREAD: (&str, &str) = (
    "(os error 11)",
    "by a limit on threads (RLIMIT_NPROC: ulimit -u, TasksMax= or pids.max) or on memory (RLIMIT_AS or RLIMIT_DATA: ulimit -v or -d)",
);

/// An error with its causes on one line, which a terminal shows as it stands: whatever foreign text the errors quote, its
/// control characters are escapes.
pub fn error_chain(error: &dyn Error) -> String {
    chain(error.to_string(), error)
}

/// The same behind what was being done: of a thread that cannot be made that alone may say that it is one.
pub fn error_chain_of(doing: &str, error: &dyn Error) -> String {
    chain(format!("{doing}: {error}"), error)
}

/// `text`, which ends with `error`, with the error's causes.
fn chain(mut text: String, error: &dyn Error) -> String {
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some wrappers repeat their source; a person need not read it twice.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    // Std and rustix write an errno alike.
    let of_threads = Some(&NO_THREAD).filter(|_| text.contains("thread"));
    if let Some((_, limit)) = LIMITS.iter().chain(of_threads).find(|(errno, _)| text.ends_with(errno)) {
        text.push_str(", ");
        text.push_str(limit);
    }
    match printable(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(shown) => shown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("there is no thread to ask on")]
    struct NoThread(#[source] std::io::Error);

    #[test]
    fn a_limit_that_was_reached_is_named() {
        for (errno, says) in
            [(27, "RLIMIT_FSIZE"), (24, "RLIMIT_NOFILE"), (23, "fs.file-max"), (109, "RLIMIT_NOFILE")]
        {
            let error = std::io::Error::from_raw_os_error(errno);
            assert_eq!(error_chain(&error).matches(says).count(), 1);
        }
        for errno in [2, 11] {
            assert!(!error_chain(&std::io::Error::from_raw_os_error(errno)).contains("limit"));
        }
        let error = std::io::Error::from_raw_os_error(11);
        assert!(error_chain_of("cannot make a thread", &error).ends_with("ulimit -v or -d)"));
        let told = error_chain(&NoThread(error));
        // The system does not say which of them it was.
        assert!(
            ["RLIMIT_NPROC", "pids.max", "RLIMIT_AS", "RLIMIT_DATA"].iter().all(|limit| told.contains(limit)),
            "{told}"
        );
    }

    #[test]
    fn it_says_each_thing_once() {
        let failure = Failure::new(Side::Destination, Phase::Ready, "device net0: RESUMING to STOP failed")
            .of_device("net0")
            .with_remedy("the device needs a reset");
        let said = "in the ready phase at the destination: device net0: RESUMING to STOP failed; the device needs a reset";
        assert_eq!(failure.to_string(), said);
        assert_eq!(failure.of_device("net1").to_string(), said.replace(';', " (device net1);"));
    }

    #[test]
    fn a_chain_repeats_no_cause() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer: {0}")]
        struct Outer(#[source] Inner);
        #[derive(Debug, thiserror::Error)]
        #[error("inner")]
        struct Inner;
        assert_eq!(error_chain(&Outer(Inner)), "outer: inner");
        assert_eq!(error_chain(&std::io::Error::other(Inner)), "inner");
    }

    #[test]
    fn foreign_text_in_a_failure_is_escaped() {
        let error = std::io::Error::other("no \u{1b}[2J\nhere");
        assert_eq!(error_chain(&error), "no \\u{1b}[2J\\nhere");
        let failure = Failure::new(Side::Source, Phase::Plan, "\u{202e}evil");
        assert_eq!(failure.text, "\\u{202e}evil");
    }
}
