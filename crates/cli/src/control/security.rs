//! How a session's connection was secured, as the control socket and `--json` have it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{ConnectionSecurity, PeerIdentity, SecurityKind};
use vfio_migration_types::{quote, rfc3339};

/// How a connection is secured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Security")]
pub(crate) struct SecurityInfo {
    /// What secures it.
    pub(crate) kind: SecuredBy,
    /// The cipher suite, by its name in TLS; null where there is none.
    pub(crate) cipher: Option<String>,
    /// What the peer has proved to be; null where nothing is proved.
    pub(crate) peer: Option<PeerInfo>,
}

/// What secures a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum SecuredBy {
    /// Nothing: whoever is on the way reads and changes what is sent.
    PlainText,
    /// It is a unix socket.
    Unix,
    /// TLS 1.3.
    Tls,
    /// Whoever handed it over says that it is secured.
    Vouched,
}

/// What a peer has proved to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Peer")]
pub(crate) struct PeerInfo {
    /// Names of its certificate.
    pub(crate) names: Vec<String>,
    /// Its public key, `"sha256:"` and 64 hexadecimal digits.
    pub(crate) pin: String,
    /// End of its certificate's validity, RFC 3339 in UTC.
    pub(crate) not_after: String,
}

impl From<&ConnectionSecurity> for SecurityInfo {
    fn from(security: &ConnectionSecurity) -> Self {
        let ConnectionSecurity { kind, cipher, peer } = security;
        let kind = match kind {
            SecurityKind::PlainText => SecuredBy::PlainText,
            SecurityKind::Unix => SecuredBy::Unix,
            SecurityKind::Tls => SecuredBy::Tls,
            SecurityKind::Vouched => SecuredBy::Vouched,
        };
        let peer = peer.as_ref().map(|PeerIdentity { names, pin, not_after }| PeerInfo {
            names: names.clone(),
            pin: pin.to_string(),
            not_after: rfc3339(*not_after),
        });
        Self { kind, cipher: cipher.clone(), peer }
    }
}

impl SecurityInfo {
    /// For a person, behind a comma; empty of a unix socket.
    pub(crate) fn text(&self) -> String {
        let who = self.peer.as_ref().map_or(String::new(), |peer| {
            let name = peer.names.first().map_or_else(|| "nobody".to_owned(), |name| quote(name));
            format!(" with {name}, {}", peer.pin)
        });
        match self.kind {
            SecuredBy::PlainText => ", in plain text".to_owned(),
            SecuredBy::Unix => String::new(),
            SecuredBy::Tls => format!(", over TLS{who}"),
            SecuredBy::Vouched => format!(", over a stream that was secured before{who}"),
        }
    }
}
