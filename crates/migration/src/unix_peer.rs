//! The process at the other end of a unix socket, and which one may be there.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::AsFd;

use serde::{Deserialize, Serialize};
use vfio_migration_uapi::{PeerCredentials, UapiError, peer_credentials};

/// The process at the other end of a unix socket, by the kernel's word: who connected, who listened when it was connected to, or who
/// made the pair. Ids are as this process's own namespaces have them: a user that has none there is the overflow user, 65534.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct UnixPeer {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
    /// Process id; `None` of one in another PID namespace.
    pub pid: Option<u32>,
}

impl UnixPeer {
    /// Asks the kernel who is at the other end of `socket`.
    ///
    /// # Errors
    /// It is no connected unix socket.
    pub fn of(socket: impl AsFd) -> Result<Self, UnixPeerError> {
        let PeerCredentials { pid, uid, gid, groups } =
            peer_credentials(socket.as_fd()).map_err(UnixPeerError::Unknown)?;
        Ok(Self { uid, gid, groups, pid })
    }

    /// Whether the process has the group, as its own or beside it.
    pub fn is_of_group(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }
}

impl fmt::Display for UnixPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { uid, gid, groups: _, pid } = self;
        match pid {
            Some(pid) => write!(f, "process {pid} of user {uid}, group {gid}"),
            None => write!(f, "a process of another PID namespace, of user {uid}, group {gid}"),
        }
    }
}

/// Who may be at the other end of a unix socket beside this process's own user and root. Nobody by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AllowedUnixPeers {
    /// User ids.
    pub uids: BTreeSet<u32>,
    /// Group ids: of a process that has one of them, as its own or beside it.
    pub gids: BTreeSet<u32>,
}

impl AllowedUnixPeers {
    /// Whether nobody else may be there than this process's own user and root.
    pub fn is_empty(&self) -> bool {
        self.uids.is_empty() && self.gids.is_empty()
    }

    /// Whether `peer` may be there.
    pub fn allows(&self, peer: &UnixPeer) -> bool {
        peer.uid == own_user()
            || peer.uid == 0
            || self.uids.contains(&peer.uid)
            || self.gids.iter().any(|gid| peer.is_of_group(*gid))
    }

    /// Who is at the other end of `socket`, if he may be there.
    ///
    /// # Errors
    /// He may not, or nobody knows who he is.
    pub fn check(&self, socket: impl AsFd) -> Result<UnixPeer, UnixPeerError> {
        let peer = UnixPeer::of(socket)?;
        self.check_peer(&peer)?;
        Ok(peer)
    }

    pub(crate) fn check_peer(&self, peer: &UnixPeer) -> Result<(), UnixPeerError> {
        if self.allows(peer) { Ok(()) } else { Err(UnixPeerError::NotAllowed(peer.clone())) }
    }
}

/// This process's own user.
pub(crate) fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// The reason why nothing is sent to, or read from, whoever is at the other end of a unix socket.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnixPeerError {
    /// The kernel does not tell who it is.
    #[error("it is not known who is at the other end of the socket")]
    Unknown(#[source] UapiError),
    /// The kernel did not tell it when the connection was made.
    #[error("it is not known who is at the other end of the unix socket")]
    Untold,
    /// It is somebody who may not be there.
    #[error(
        "{0}, is at the other end of the unix socket, and may not: it is neither of this side's own user ({own}) nor root's, \
         and neither its user nor a group of its is allowed (--allow-uid, --allow-gid)",
        own = own_user()
    )]
    NotAllowed(UnixPeer),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_user_and_root_may_always_and_others_if_they_are_named() {
        let peer = |uid, gid, groups: &[u32]| UnixPeer { uid, gid, groups: groups.into(), pid: Some(1) };
        let other = own_user() + 4711;
        let nobody = AllowedUnixPeers::default();
        assert!(nobody.is_empty() && nobody.allows(&peer(own_user(), other, &[])));
        assert!(nobody.allows(&peer(0, other, &[])));
        assert!(!nobody.allows(&peer(other, own_user(), &[own_user(), 0])), "a group makes no user");
        let user = AllowedUnixPeers { uids: [other].into(), ..AllowedUnixPeers::default() };
        assert!(user.allows(&peer(other, 1, &[])) && !user.allows(&peer(other + 1, other, &[other])));
        let group = AllowedUnixPeers { gids: [77].into(), ..AllowedUnixPeers::default() };
        assert!(!group.is_empty());
        assert!(group.allows(&peer(other, 77, &[])) && group.allows(&peer(other, 1, &[5, 77])));
        assert!(!group.allows(&peer(77, 1, &[5])), "a user makes no group");
    }
}
