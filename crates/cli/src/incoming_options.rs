//! Options of a wait for a guest that a running `vm` begins: each is declared here once, for the command line and for the control
//! socket.

use std::path::PathBuf;

use clap::Args;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{Pin, Security};

use crate::exit::CliError;
use crate::tls_options::{AskedSecurity, absolute};

/// What one wait asks for beyond what its `vm` was started with.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct IncomingOptions {
    /// Absolute path of the folder of certificates for this wait, instead of that of `vm --tls-creds`.
    #[arg(
        long,
        value_parser = absolute,
        value_name = "DIR",
        help = "Folder of certificates and keys for this wait, instead of that of vm --tls-creds"
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tls_creds: Option<PathBuf>,
    /// Public keys by one of which a source is trusted, whatever its certificate says; absent: those of `vm --tls-pin`.
    #[arg(
        long = "tls-pin",
        value_name = "PIN",
        help = "Trust sources by this public key, as `tls pin` prints it there, instead of those of vm --tls-pin. May be given more than once"
    )]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>")]
    pub(crate) tls_pins: Vec<Pin>,
    /// What comes over TCP is to come in plain text: whoever is on the way reads and changes the guest. Absent: as `vm
    /// --insecure-plaintext` says. Where neither is said and there are no certificates, nothing comes over TCP (`"TlsRequired"`).
    #[arg(
        long,
        conflicts_with_all = ["tls_creds", "tls_pins"],
        help = "Let what comes over TCP come in plain text: whoever is on the way reads and changes the guest"
    )]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) insecure_plaintext: bool,
    /// Absolute path of the file (TOML or JSON) that says who may come, and with what, instead of that of `vm --expect`.
    #[arg(
        long,
        value_parser = absolute,
        value_name = "FILE",
        help = "File (TOML or JSON) that says who may come and with what, instead of that of vm --expect; it is read anew for each source that comes"
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expect: Option<PathBuf>,
    /// Wait for one migration only, and no longer if it fails or is refused. Absent: as `vm --once` says.
    #[arg(
        long,
        help = "Wait for one migration only, and no longer if it fails or is refused, as with vm --once"
    )]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) once: bool,
    /// The guest arrives paused, and `cont` lets it run. What `vm --paused` says is of its first guest alone.
    #[arg(long, help = "Have the guest arrive paused: `cont` lets it run")]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) paused: bool,
}

impl IncomingOptions {
    /// How what comes is secured, in a process that was started with `process`.
    pub(crate) fn security(&self, process: Option<Security>) -> Result<Option<Security>, CliError> {
        let asked = AskedSecurity {
            creds: self.tls_creds.as_ref(),
            hostname: None,
            pins: &self.tls_pins,
            insecure_plaintext: self.insecure_plaintext,
        };
        asked.over(process)
    }
}
