//! Exit codes, the same for every verb, and the error that carries one.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::control::refused::Refused;
use vfio_migration_types::{error_chain_of, printable};

/// The end of a run of the command, as its exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Done, and verified where there was something to verify.
    Done = 0,
    /// The verb failed; the guest, if there is one, runs where it ran.
    Failed = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Refused: the two sides do not fit, or the limits cannot be met; the guest never noticed.
    Incompatible = 3,
    /// The owner of the guest is not known: it is paused here, or not started, and the text says what to look at.
    Unresolved = 4,
    /// The guest is the destination's, and does not run there, or nobody knows whether it does.
    NotStarted = 5,
}

/// A failed run: what to say, and how to exit.
#[derive(Debug)]
pub(crate) struct CliError {
    pub(crate) exit: Exit,
    pub(crate) text: String,
    /// Class of the refusal, as on the control socket.
    class: String,
}

impl CliError {
    /// A failure that is told on one line; foreign text in it is made printable.
    pub(crate) fn new(exit: Exit, text: impl AsRef<str>) -> Self {
        Self { exit, text: printable(text.as_ref()).into_owned(), class: "GenericError".into() }
    }

    /// A plain failure, exit 1.
    pub(crate) fn failed(text: impl AsRef<str>) -> Self {
        Self::new(Exit::Failed, text)
    }

    /// The same error with the class of a refusal.
    pub(crate) fn of_class(self, class: &str) -> Self {
        Self { class: class.into(), ..self }
    }

    /// The document that `--json` prints.
    pub(crate) fn report(&self) -> FailureReport {
        FailureReport {
            error: Refused { class: self.class.clone(), desc: self.text.clone() },
            exit: self.exit as u8,
        }
    }

    /// `error` with its chain of causes on one line.
    pub(crate) fn caused(doing: &str, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::failed(error_chain_of(doing, error))
    }
}

/// What a verb with `--json` prints when it cannot do what it was asked for.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct FailureReport {
    /// Why the verb failed, as a refusal of the control socket.
    pub(crate) error: Refused,
    /// The exit code of the process.
    pub(crate) exit: u8,
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for CliError {}
