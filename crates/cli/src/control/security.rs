//! How a session's connection was secured, as the control socket and `--json` have it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration::{ConnectionSecurity, PeerIdentity, SecurityKind, SocketKind, UnixPeer};
use vfio_migration_types::{quote, rfc3339};

/// How a connection is secured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Security")]
pub(crate) struct SecurityInfo {
    /// What secures it.
    pub(crate) kind: SecuredBy,
    /// The cipher suite, by its name in TLS; null where there is none.
    pub(crate) cipher: Option<String>,
    /// What the peer has proved to be; null where nothing is proved.
    pub(crate) peer: Option<PeerInfo>,
    /// What it goes over; null in a record of an older build.
    #[serde(default)]
    pub(crate) socket: Option<SocketWord>,
    /// The process at the other end of a unix socket, by the kernel's word; null of other sockets.
    #[serde(default)]
    pub(crate) unix_peer: Option<UnixPeerInfo>,
}

/// What a connection goes over, also one that was handed over as a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Socket")]
pub(crate) enum SocketWord {
    /// TCP.
    Tcp,
    /// A unix socket.
    Unix,
    /// A vsock socket, between a virtual machine and its host.
    Vsock,
    /// A stream socket of another family.
    Other,
}

/// The process at the other end of a unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "UnixPeer")]
pub(crate) struct UnixPeerInfo {
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
    /// Process id; null of one in another PID namespace.
    pub(crate) pid: Option<u32>,
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
        let ConnectionSecurity { kind, cipher, peer, socket, unix_peer } = security;
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
        let socket = socket.map(|socket| match socket {
            SocketKind::Tcp => SocketWord::Tcp,
            SocketKind::Unix => SocketWord::Unix,
            SocketKind::Vsock => SocketWord::Vsock,
            _ => SocketWord::Other,
        });
        let unix_peer = unix_peer.as_ref().map(|UnixPeer { uid, gid, pid, .. }| UnixPeerInfo {
            uid: *uid,
            gid: *gid,
            pid: *pid,
        });
        Self { kind, cipher: cipher.clone(), peer, socket, unix_peer }
    }
}

impl SecurityInfo {
    /// For a person, behind a comma; empty of a unix socket whose peer is not known.
    pub(crate) fn text(&self) -> String {
        self.sentence().map_or(String::new(), |how| format!(", {how}"))
    }

    /// For a person; nothing of a unix socket.
    pub(crate) fn sentence(&self) -> Option<String> {
        let who = self.peer.as_ref().map_or(String::new(), |peer| {
            let name = peer.names.first().map_or_else(|| "nobody".to_owned(), |name| quote(name));
            format!(" with {name}, {}", peer.pin)
        });
        match self.kind {
            SecuredBy::PlainText => Some("in plain text".to_owned()),
            SecuredBy::Unix => self.unix_peer.as_ref().map(|UnixPeerInfo { uid, pid, .. }| {
                let pid = pid.map_or_else(|| "of another PID namespace".to_owned(), |pid| pid.to_string());
                format!("with process {pid} of user {uid}")
            }),
            // Whoever has not even agreed on a cipher speaks something else.
            SecuredBy::Tls if self.cipher.is_none() => Some("without a TLS handshake".to_owned()),
            SecuredBy::Tls => Some(format!("over TLS{who}")),
            SecuredBy::Vouched => Some(format!("over a stream that was secured before{who}")),
        }
    }
}
