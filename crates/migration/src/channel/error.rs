//! Errors that end a connection.

use rustix::io::Errno;
use vfio_migration_wire::WireError;

use crate::channel::transport::TransportError;
use crate::tls::error::TlsError;

/// An error that ends a connection. The connection's own failures, and what of them is not the connection's: a stream
/// that makes no sense, and memory that cannot be read or written where it was to be moved from or to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the connection ended inside a frame, with {missing} bytes missing")]
    Cut { missing: u64 },
    #[error("{doing} failed")]
    System {
        doing: &'static str,
        #[source]
        source: Errno,
    },
    #[error("guest memory could not be accessed while {doing}")]
    Memory {
        doing: &'static str,
        #[source]
        source: Errno,
    },
    /// A close that only the peer can make did not come: whoever cuts a connection on the way cannot have it taken for the peer's.
    #[error(
        "the connection broke, and the peer had not ended it: its process may have died, or it was cut on the way"
    )]
    Unended(#[source] TlsError),
    #[error("the connection is not secure")]
    Tls(#[source] TlsError),
    #[error("the peer's stream is damaged")]
    Wire(#[from] WireError),
    #[error("bulk data came where only a control message can")]
    Unexpected,
}

impl ChannelError {
    /// The error that a failed call on a connection amounts to.
    pub(crate) fn of(doing: &'static str) -> impl FnOnce(TransportError) -> Self {
        move |error| match error {
            TransportError::System(source @ Errno::FAULT) => Self::Memory { doing, source },
            TransportError::System(source) => Self::System { doing, source },
            TransportError::Tls(error @ TlsError::Truncated) => Self::Unended(error),
            TransportError::Tls(error) => Self::Tls(error),
        }
    }
}
