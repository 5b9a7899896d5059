//! Connections that a destination refused, for whoever watches it.

use std::fmt;
use std::time::SystemTime;

use vfio_migration_compat::SessionCode;
use vfio_migration_types::{VmId, quote};

use crate::expectation::{Right, Unexpected};
use crate::tls::security::ConnectionSecurity;

/// A connection that was refused. It disturbed nobody, and nothing was allocated for it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RefusedConnection {
    /// When it was refused.
    pub at: SystemTime,
    /// The address at its other end.
    pub from: String,
    /// How it was secured, and what its peer had proved to be.
    pub security: ConnectionSecurity,
    /// What it came for, and with which VM, if it got as far as to say so.
    pub wanted: Option<(Right, VmId)>,
    /// Why it was refused.
    pub why: RefusalCause,
    /// Of one that is [told](crate::IncomingControl::on_refused): how many before it were refused, since the one that was told last, of which
    /// nobody was told one by one.
    pub left_out: u64,
}

/// Why a connection was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusalCause {
    /// Its source, or what that brought, is not expected.
    #[error("{0}")]
    Unexpected(#[from] Unexpected),
    /// No guest is taken in now: one is on its way, or has arrived.
    #[error("{0}")]
    NotNow(String),
    /// It did not get as far as to say what it came for: it is not trusted, or no migration.
    #[error("{0}")]
    NoMigration(String),
    /// It came over a unix socket, of a process that may not be at its other end.
    #[error("neither its user nor a group of its may come (--allow-uid, --allow-gid)")]
    NotAllowed,
    /// It asked what became of a migration whose source it is not.
    #[error("it asked what became of another's migration")]
    AskedForAnother,
}

impl RefusalCause {
    /// The code of the reason that its source was given, where there is one.
    pub fn code(&self) -> Option<SessionCode> {
        match self {
            Self::Unexpected(unexpected) => Some(unexpected.code()),
            Self::NotNow(_) | Self::NoMigration(_) | Self::NotAllowed | Self::AskedForAnother => None,
        }
    }
}

/// How many connections were refused, and the last of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusedConnections {
    /// Their number. Whoever connected and left without a word is not among them.
    pub count: u64,
    /// The last of them.
    pub last: Option<RefusedConnection>,
}

/// Who is at the other end of a connection: its address, and what it has proved to be.
pub(crate) fn who(address: &str, security: &ConnectionSecurity) -> String {
    let mut text = address.to_owned();
    if let Some(peer) = &security.peer {
        let name = peer.names.first().map_or_else(|| "no name".to_owned(), |name| quote(name));
        text += &format!(" ({name}, {})", peer.pin);
    }
    if let Some(process) = &security.unix_peer {
        text += &format!(" ({process})");
    }
    text
}

impl fmt::Display for RefusedConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&who(&self.from, &self.security))?;
        match self.wanted {
            Some((Right::Ask, vm)) if !vm.names_a_vm() => f.write_str(", asking for no VM by name")?,
            Some((Right::Ask, vm)) => write!(f, ", asking for VM {vm}")?,
            Some((Right::Move, vm)) => write!(f, ", with VM {vm}")?,
            None => {}
        }
        write!(f, ": {}", self.why)?;
        match self.left_out {
            0 => Ok(()),
            1 => f.write_str(" (and one more before it)"),
            more => write!(f, " (and {more} more before it)"),
        }
    }
}
