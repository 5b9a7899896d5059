//! Why a piece of a session's work ended early.

use vfio_migration_types::Phase;
use vfio_migration_wire::PeerError;

use crate::interrupt::Interrupted;
use crate::link::LinkError;

/// Why work ended early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It was told to: nobody waits for an answer.
    Interrupted,
    /// The link is gone: its reader tells why, after all that the peer said before.
    Link,
    /// It failed.
    Failed(PeerError),
}

impl From<Interrupted> for Stop {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

impl From<PeerError> for Stop {
    fn from(failure: PeerError) -> Self {
        Self::Failed(failure)
    }
}

impl Stop {
    /// A failed write. What could not even be encoded is our own fault, not the link's.
    pub(crate) fn sending(error: LinkError, phase: Phase) -> Self {
        match error {
            LinkError::Wire(error) => {
                Self::Failed(crate::fail::plain(phase, format!("this cannot be sent: {error}")))
            }
            LinkError::Memory(error @ vfio_migration_memory::MemoryError::OutOfBounds { .. }) => {
                Self::Failed(crate::fail::InPhase::in_phase(&error, phase))
            }
            _ => Self::Link,
        }
    }
}

/// The worst of several results of work done side by side: a failure explains more than an interrupt or a dead link.
pub(crate) fn all(results: impl IntoIterator<Item = Result<(), Stop>>) -> Result<(), Stop> {
    let mut worst = Ok(());
    for result in results {
        worst = match (worst, result) {
            (Err(Stop::Failed(first)), _) => Err(Stop::Failed(first)),
            (_, Err(Stop::Failed(failure))) => Err(Stop::Failed(failure)),
            (Err(stop), _) | (Ok(()), Err(stop)) => Err(stop),
            (Ok(()), Ok(())) => Ok(()),
        };
    }
    worst
}
