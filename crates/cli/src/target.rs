//! The running `vm` that a verb asks.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::control::client::ControlClient;
use crate::exit::CliError;
use crate::interrupt::UserInterrupt;
use crate::units;
use crate::words::{EXIT_CODES, socket_path};

/// Longest wait for the answer to a request that changes something, over the control socket.
pub(crate) const ANSWER: Duration = Duration::from_secs(30);

/// Patience of a verb that only asks.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct AnswerTimeout {
    /// Longest wait for each answer of a socket that is asked; all of its answers together have five times as long.
    #[arg(long, default_value = "2s", value_parser = units::some_time, value_name = "TIME")]
    pub(crate) timeout: Duration,
}

/// How long all of a socket's answers may take where each may take `each`: a server has many questions to answer.
pub(crate) fn for_all(each: Duration) -> Duration {
    each.saturating_mul(5)
}

/// Which `vm`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct VmTarget {
    /// Control socket of the `vm`.
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub(crate) control: PathBuf,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

impl VmTarget {
    pub(crate) fn connect(&self, interrupt: Option<&UserInterrupt>) -> Result<ControlClient, CliError> {
        self.connect_within(ANSWER, interrupt)
    }

    /// Connects; the greeting, and each answer, may take `timeout`. A verb that listens for signals passes what it hears.
    pub(crate) fn connect_within(
        &self,
        timeout: Duration,
        interrupt: Option<&UserInterrupt>,
    ) -> Result<ControlClient, CliError> {
        ControlClient::connect(&self.control, timeout, interrupt).map_err(|error| error.failure("no contact"))
    }
}
