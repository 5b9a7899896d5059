//! Reasons why a piece of a session's work ended early.

use vfio_migration_types::{Failure, Phase, Side};

use crate::channel::error::ChannelError;
use crate::session::fail::InPhase;
use crate::session::interrupt::Interrupted;

/// The reason why work ended early.
#[derive(Debug)]
pub(crate) enum WorkError {
    /// The work was interrupted: nobody waits for an answer.
    Interrupted,
    /// The link is gone: its reader reports why, after all that the peer sent before.
    Link,
    /// The work itself failed.
    Failed(Failure),
}

impl From<Interrupted> for WorkError {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

impl From<Failure> for WorkError {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl WorkError {
    /// A failed write. What could not even be encoded is our own fault, not the link's.
    pub(crate) fn sending(error: ChannelError, side: Side, phase: Phase) -> Self {
        match error {
            ChannelError::Wire(error) => {
                Self::Failed(Failure::new(side, phase, format!("this cannot be sent: {error}")))
            }
            error @ ChannelError::Memory { .. } => Self::Failed(error.in_phase(side, phase)),
            _ => Self::Link,
        }
    }
}

/// The worst of several results of work done side by side: a failure explains more than an interrupt or a dead link.
pub(crate) fn worst_of(results: impl IntoIterator<Item = Result<(), WorkError>>) -> Result<(), WorkError> {
    let mut worst = Ok(());
    for result in results {
        worst = match (worst, result) {
            (Err(WorkError::Failed(first)), _) => Err(WorkError::Failed(first)),
            (_, Err(WorkError::Failed(failure))) => Err(WorkError::Failed(failure)),
            (Err(stop), _) | (Ok(()), Err(stop)) => Err(stop),
            (Ok(()), Ok(())) => Ok(()),
        };
    }
    worst
}
