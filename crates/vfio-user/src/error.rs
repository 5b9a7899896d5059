//! What can go wrong on either end.

use std::io;
use std::time::Duration;

use rustix::io::Errno;

use crate::codec::Command;

/// An error with its causes on one line. What these say of foreign text is the crate's own: none is quoted.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Error of a client's request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The socket could not be reached or set up.
    #[error("{doing}")]
    Io {
        /// Call that was attempted, as a noun phrase.
        doing: String,
        /// Error of the system.
        #[source]
        source: io::Error,
    },
    /// The server did not answer in time. The connection goes on; the answer is dropped when it comes.
    #[error(
        "the server did not answer {}{command} within {after:?}{}",
        if *sent { "" } else { "an earlier request, behind which this one waited unsent: " },
        if *command == Command::VERSION { "; most serve one client at a time, so another may have it" } else { "" }
    )]
    Timeout {
        /// Request that was not answered well.
        command: Command,
        /// Time that the server had.
        after: Duration,
        /// Whether the request was sent. One that waited for the answer to an earlier one may not have been.
        sent: bool,
    },
    /// What was to be done in all was not done in time.
    #[error("the server has not answered all that it was asked within {limit:?}; {command} was the last")]
    OutOfTime {
        /// Request that was not answered, or not sent, any more.
        command: Command,
        /// Time that there was for all.
        limit: Duration,
    },
    /// The connection broke, in this request or an earlier one.
    #[error("the connection to the vfio-user server is lost: {why}")]
    ConnectionLost {
        /// How the connection was lost.
        why: String,
    },
    /// The server refused the command. The connection stays good.
    #[error("the server refused {command}{}", errno.map(|errno| format!(": {errno}")).unwrap_or_default())]
    Refused {
        /// Request that was not answered well.
        command: Command,
        /// The server's errno; `None` when it gave none (or no real one).
        errno: Option<Errno>,
    },
    /// The server sent what the protocol forbids.
    #[error("the server broke the protocol in {command}: {what}")]
    Protocol {
        /// Request that was not answered well.
        command: Command,
        /// How the answer breaks the protocol.
        what: String,
    },
    /// The request exceeds a limit that was negotiated or that this crate sets; nothing was sent.
    #[error("{what} is {value}, over the limit of {limit}")]
    Limit {
        /// Quantity that is too large.
        what: &'static str,
        /// Value that was asked for.
        value: u64,
        /// Largest value that is taken.
        limit: u64,
    },
    /// The connection does not have what the request needs, since it was not negotiated; nothing was sent.
    #[error("{0} was not negotiated with the server")]
    NotNegotiated(&'static str),
}

impl ClientError {
    /// The errno that describes the failure best: the server's own where it gave one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Io { source, .. } => Errno::from_io_error(source),
            Self::Timeout { .. } | Self::OutOfTime { .. } => Some(Errno::TIMEDOUT),
            Self::ConnectionLost { .. } => Some(Errno::CONNRESET),
            Self::Refused { errno, .. } => *errno,
            Self::Protocol { .. } => Some(Errno::PROTO),
            Self::Limit { .. } => Some(Errno::MSGSIZE),
            Self::NotNegotiated(_) => Some(Errno::OPNOTSUPP),
        }
    }
}

/// Error of a server that could not be set up, or stopped serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// Another server answers on the path.
    #[error("another server answers on {0}")]
    InUse(String),
    /// The path is taken by something that is no socket.
    #[error("{0} exists and is no socket")]
    NotASocket(String),
    /// The operating system refused.
    #[error("{doing} failed")]
    Io {
        /// Call that was attempted, as a noun phrase.
        doing: String,
        /// Error of the system.
        #[source]
        source: io::Error,
    },
}

impl ServerError {
    pub(crate) fn io(doing: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { doing: doing.into(), source: source.into() }
    }
}
