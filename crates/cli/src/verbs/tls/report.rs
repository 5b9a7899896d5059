//! What `tls` prints with `--json`.

use std::path::Path;
use std::time::SystemTime;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{PeerIdentity, RevocationList, TlsRole, TrustedAuthority};
use vfio_migration_types::rfc3339;

/// What `tls init`, `tls host` and `tls revoke` print with `--json`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct TlsMadeReport {
    /// For whom it was made: the CA's name, or the host's; of a revocation list its CA's.
    pub(crate) name: String,
    /// The folder that was written into.
    pub(crate) directory: String,
    /// Names of the files that were written there.
    pub(crate) files: Vec<String>,
    /// How many certificates the revocation list has; null where none was written.
    pub(crate) revoked: Option<u64>,
}

impl TlsMadeReport {
    pub(crate) fn new(name: &str, directory: &Path, files: Vec<String>) -> Self {
        Self { name: name.to_owned(), directory: directory.display().to_string(), files, revoked: None }
    }
}

/// What `tls show` prints with `--json`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct TlsShowReport {
    /// The folder.
    pub(crate) directory: String,
    /// Whether all of it can be used.
    pub(crate) usable: bool,
    /// Files of certificates.
    pub(crate) files: Vec<TlsFileInfo>,
    /// Lists of revoked certificates.
    pub(crate) revocation_lists: Vec<RevocationListInfo>,
}

/// One file of the folder.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "TlsFile")]
pub(crate) struct TlsFileInfo {
    /// Its name.
    pub(crate) file: String,
    /// What it is for.
    pub(crate) purpose: TlsPurpose,
    /// Why it cannot be used; null if it can.
    pub(crate) error: Option<String>,
    /// What is to be seen to beyond what the certificates say: CAs between the host and a trusted one that end within 30 days.
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
    /// The certificates that count: of a host the first. Empty, without an error: it is not there, and what a host needs for guests that go
    /// the other way is.
    pub(crate) certificates: Vec<CertificateInfo>,
}

/// What a file of the folder is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum TlsPurpose {
    /// The CAs that are trusted.
    Authorities,
    /// What they have revoked.
    Revocations,
    /// The host, where a guest arrives.
    Server,
    /// The host, where one leaves.
    Client,
}

impl From<TlsRole> for TlsPurpose {
    fn from(role: TlsRole) -> Self {
        match role {
            TlsRole::Server => Self::Server,
            TlsRole::Client => Self::Client,
        }
    }
}

/// One certificate.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Certificate")]
pub(crate) struct CertificateInfo {
    /// Names of its holder.
    pub(crate) names: Vec<String>,
    /// Its public key, `"sha256:"` and 64 hexadecimal digits.
    pub(crate) pin: String,
    /// End of its validity, RFC 3339 in UTC.
    pub(crate) not_after: String,
    /// Whole days until then.
    pub(crate) days_left: u64,
    /// Whether that is soon enough to make a new one: 30 days, or less.
    pub(crate) expires_soon: bool,
    /// Of a CA: why it is left out, and nobody of it taken; null if it is not.
    pub(crate) problem: Option<String>,
}

impl From<&TrustedAuthority> for CertificateInfo {
    fn from(ca: &TrustedAuthority) -> Self {
        Self { problem: ca.problem(SystemTime::now()), ..Self::from(&ca.identity) }
    }
}

impl From<&PeerIdentity> for CertificateInfo {
    fn from(identity: &PeerIdentity) -> Self {
        Self {
            names: identity.names.clone(),
            pin: identity.pin.to_string(),
            not_after: rfc3339(identity.not_after),
            days_left: days_until(identity.not_after),
            expires_soon: identity.expires_soon(),
            problem: None,
        }
    }
}

/// A list of revoked certificates.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "RevocationList")]
pub(crate) struct RevocationListInfo {
    /// The CA.
    pub(crate) issuer: String,
    /// How many certificates it has revoked.
    pub(crate) revoked: u64,
    /// End of the list's validity, RFC 3339 in UTC.
    pub(crate) next_update: String,
    /// Whether that is soon enough to make a new one: 30 days, or less.
    pub(crate) expires_soon: bool,
}

impl From<&RevocationList> for RevocationListInfo {
    fn from(list: &RevocationList) -> Self {
        Self {
            issuer: list.issuer.clone(),
            revoked: list.revoked.len() as u64,
            next_update: rfc3339(list.next_update),
            expires_soon: list.expires_soon(),
        }
    }
}

/// What `tls pin` prints with `--json`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct TlsPinReport {
    /// The folder's keys, at least one.
    pub(crate) keys: Vec<PinInfo>,
}

/// One key.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "PinnedKey")]
pub(crate) struct PinInfo {
    /// What it is for.
    pub(crate) purpose: TlsPurpose,
    /// The key, as `--tls-pin` takes it.
    pub(crate) pin: String,
}

fn days_until(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::now()).unwrap_or_default().as_secs() / (24 * 3600)
}
