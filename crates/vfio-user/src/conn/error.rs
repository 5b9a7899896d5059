//! The ways in which a socket ends, or a wait on it.

use rustix::io::Errno;
use vfio_migration_types::error_chain;

/// The reason for which a socket is of no more use, or a wait ended.
#[derive(Debug)]
pub(crate) enum ConnError {
    /// The deadline passed.
    Timeout,
    /// The deadline passed before the peer had answered an earlier request: this one was not sent.
    Behind,
    /// The interrupt descriptor became readable.
    Interrupted,
    /// The peer ended the stream, or the connection was dead already.
    Closed(String),
    /// This end cannot go on with it: the system refused, or the peer took too long.
    GivenUp(String),
    /// The peer sent what cannot be followed.
    Violation(String),
}

impl ConnError {
    pub(crate) fn closed(why: impl Into<String>) -> Self {
        Self::Closed(why.into())
    }

    /// What the system refused, and the limit behind it where that is known.
    pub(crate) fn system(doing: &str, errno: Errno) -> Self {
        Self::GivenUp(format!("{doing}: {}", error_chain(&errno)))
    }

    /// The same, with a time limit that passed put as this.
    pub(crate) fn or_late(self, late: impl FnOnce() -> String) -> Self {
        match self {
            Self::Timeout | Self::Behind => Self::GivenUp(late()),
            other => other,
        }
    }

    /// Whether this end drops the peer, which would have stayed.
    pub(crate) fn drops_peer(&self) -> bool {
        matches!(self, Self::Timeout | Self::Behind | Self::GivenUp(_) | Self::Violation(_))
    }

    /// The failure in words.
    pub(crate) fn why(&self) -> String {
        match self {
            Self::Timeout | Self::Behind => "a time limit passed".into(),
            Self::Interrupted => "it was stopped".into(),
            Self::Closed(why) | Self::GivenUp(why) => why.clone(),
            Self::Violation(why) => format!("the peer broke the protocol: {why}"),
        }
    }
}
