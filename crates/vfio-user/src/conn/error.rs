//! The ways in which a socket ends, or a wait on it.

use rustix::io::Errno;

use crate::event::DropReason;

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
    /// The peer took too long for this end to go on.
    Late(DropReason),
    /// The system refused this end what it needs.
    System {
        /// Call that was attempted, as a noun phrase.
        doing: &'static str,
        errno: Errno,
    },
    /// The peer sent what cannot be followed.
    Violation(String),
}

impl ConnError {
    pub(crate) fn closed(why: impl Into<String>) -> Self {
        Self::Closed(why.into())
    }

    pub(crate) fn system(doing: &'static str, errno: Errno) -> Self {
        Self::System { doing, errno }
    }

    /// The same, with a time limit that passed put as this.
    pub(crate) fn or_late(self, late: impl FnOnce() -> DropReason) -> Self {
        match self {
            Self::Timeout | Self::Behind => Self::Late(late()),
            other => other,
        }
    }

    /// Why this end drops the peer, where the peer would have stayed.
    pub(crate) fn drops_peer(&self) -> Option<DropReason> {
        match self {
            Self::Timeout | Self::Behind => Some(DropReason::Late(self.why())),
            Self::Late(reason) => Some(reason.clone()),
            Self::System { doing, errno } => Some(DropReason::System { doing, errno: *errno }),
            Self::Violation(what) => Some(DropReason::Protocol(what.clone())),
            Self::Interrupted | Self::Closed(_) => None,
        }
    }

    /// The failure in words.
    pub(crate) fn why(&self) -> String {
        match self {
            Self::Timeout | Self::Behind => "a time limit passed".into(),
            Self::Interrupted => "it was stopped".into(),
            Self::Closed(why) => why.clone(),
            Self::Late(reason) => reason.to_string(),
            Self::System { doing, errno } => format!("{doing}: {errno}"),
            Self::Violation(what) => format!("the peer broke the protocol: {what}"),
        }
    }
}
