//! How a connection was secured, for whoever watches a session or reads of it later.

use serde::{Deserialize, Serialize};

use crate::tls::identity::PeerIdentity;
use crate::unix_peer::{AllowedUnixPeers, UnixPeer, UnixPeerError};

/// How a connection is secured, and what its peer has proved to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionSecurity {
    /// What secures it.
    pub kind: SecurityKind,
    /// The cipher suite, by its name in TLS.
    pub cipher: Option<String>,
    /// What the peer has proved to be; `None` where nothing is proved.
    pub peer: Option<PeerIdentity>,
    /// What it goes over; `None` in what an older build wrote down.
    #[serde(default)]
    pub socket: Option<SocketKind>,
    /// The process at the other end of a unix socket.
    #[serde(default)]
    pub unix_peer: Option<UnixPeer>,
}

/// What a connection goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SocketKind {
    /// TCP, over IPv4 or IPv6.
    Tcp,
    /// A unix socket: within the host.
    Unix,
    /// A socket between a virtual machine and its host.
    Vsock,
    /// A stream socket of another family.
    Other,
}

impl ConnectionSecurity {
    /// Refuses the process at the other end of a unix socket that is none of the `peers`. Others are known, or not, by other means,
    /// as are those that somebody vouches for.
    pub(crate) fn check_unix_peer(&self, peers: &AllowedUnixPeers) -> Result<(), UnixPeerError> {
        match (self.kind, &self.unix_peer) {
            (SecurityKind::Unix, Some(peer)) => peers.check_peer(peer),
            (SecurityKind::Unix, None) => Err(UnixPeerError::Untold),
            (SecurityKind::PlainText | SecurityKind::Tls | SecurityKind::Vouched, _) => Ok(()),
        }
    }

    /// Whether the peer of a connection like this may speak of a session whose connection was `session`: it is the same one.
    /// Nobody is told from another where nothing is proved. `by_name`: a CA vouches for names, so that whoever was given a new key
    /// meanwhile is known all the same. Over a unix socket it is another process as a rule, of the same user or of root.
    pub(crate) fn is_of(&self, session: &Self, by_name: bool) -> bool {
        if let Some(known) = &session.unix_peer
            && !self.unix_peer.as_ref().is_some_and(|asking| asking.uid == known.uid || asking.uid == 0)
        {
            return false;
        }
        match (&self.peer, &session.peer) {
            (_, None) => true,
            (Some(asking), Some(known)) => {
                asking.pin == known.pin || (by_name && !known.names.is_empty() && asking.names == known.names)
            }
            (None, Some(_)) => false,
        }
    }
}

/// What secures a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecurityKind {
    /// Nothing: whoever is on the way reads and changes what is sent.
    PlainText,
    /// It is a unix socket, and leaves the host only through a process of it.
    Unix,
    /// TLS 1.3.
    Tls,
    /// Whoever handed it over says that it is secured.
    Vouched,
}

impl SecurityKind {
    /// As texts and documents name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::PlainText => "plain-text",
            Self::Unix => "unix",
            Self::Tls => "tls",
            Self::Vouched => "vouched",
        }
    }
}
