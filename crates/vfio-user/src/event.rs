//! What a server tells beside what it answers: above all why it dropped a client.

use std::time::Duration;

use rustix::io::Errno;

use crate::codec::Command;
use crate::error::ServerError;

/// What [`Backend::server_event`](crate::Backend::server_event) is told. As an error it is a line for a log, with its causes as sources.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerEvent {
    /// A client's connection was ended, which the client would have kept. One that leaves by itself is not told of.
    #[error("a client was dropped")]
    ClientDropped(#[source] DropReason),
    /// The system was short of something for one more client. Told once; the server tries again until there is some.
    #[error("a client could not be accepted; trying again")]
    NotAccepted(#[source] ServerError),
    /// A command failed since the system is short of something, descriptors or memory. Told once of a client, which hears
    /// no more than the errno.
    #[error("{command} failed")]
    CommandFailed {
        /// The client's command.
        command: Command,
        /// What the client was answered.
        #[source]
        errno: Errno,
    },
}

/// Why a server ended the connection of a client that would have stayed. It quotes no text of the client's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DropReason {
    /// The message with its version was not there whole in time, see [`ServerOptions::handshake_timeout`](crate::ServerOptions::handshake_timeout).
    #[error("it did not say its version within {0:?}")]
    NoVersion(Duration),
    /// Of too many connections that had not said their version it was silent longest.
    #[error("it did not say its version, and was silent longest of too many")]
    TooManySilent,
    /// It sent what cannot be followed, in words.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
    /// It took longer than [`ServerOptions::message_timeout`](crate::ServerOptions::message_timeout) over something, in words.
    #[error("{0}")]
    Late(String),
    /// The system refused what the connection needs.
    #[error("{doing}")]
    System {
        /// Call that was attempted, as a noun phrase.
        doing: &'static str,
        /// Error of the system.
        #[source]
        errno: Errno,
    },
}
