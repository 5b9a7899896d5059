//! The running `vm` that a verb asks.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::control::client::ControlClient;
use crate::exit::CliError;
use crate::words::EXIT_CODES;

/// Longest wait for an answer over the control socket.
pub(crate) const ANSWER: Duration = Duration::from_secs(30);

/// Which `vm`.
#[derive(Args, Clone, Debug)]
#[command(after_help = EXIT_CODES)]
pub(crate) struct VmTarget {
    /// Control socket of the `vm`.
    #[arg(long, value_name = "PATH")]
    pub(crate) control: PathBuf,
    /// Print one JSON object on stdout.
    #[arg(long)]
    pub(crate) json: bool,
}

impl VmTarget {
    pub(crate) fn connect(&self) -> Result<ControlClient, CliError> {
        ControlClient::connect(&self.control, ANSWER).map_err(|error| CliError::caused("no contact", &error))
    }
}
