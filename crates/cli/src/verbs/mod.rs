//! The verbs, one file each.

pub(crate) mod check;
pub(crate) mod describe;
pub(crate) mod device;
pub(crate) mod device_file;
pub(crate) mod devices;
pub(crate) mod doctor;
pub(crate) mod explain;
pub(crate) mod migrate;
pub(crate) mod rehearse;
pub(crate) mod save;
pub(crate) mod status;
pub(crate) mod steer;

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::args::Target;
use crate::control::{Client, MigrationInfo, StatusInfo};
use crate::exit::Failure;

/// Longest wait for an answer over the control socket.
pub(crate) const ANSWER: Duration = Duration::from_secs(30);

/// What `status --json` and `migrate --json` print.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct StatusReport {
    /// The VM.
    pub(crate) vm: StatusInfo,
    /// Its migration.
    pub(crate) migration: MigrationInfo,
}

/// What the verbs that only ask a `vm` for something print with `--json`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Acknowledged {
    /// The request was taken.
    pub(crate) ok: bool,
}

impl Target {
    pub(crate) fn connect(&self) -> Result<Client, Failure> {
        Client::connect(&self.control, ANSWER).map_err(|error| Failure::caused("no contact", &error))
    }
}
