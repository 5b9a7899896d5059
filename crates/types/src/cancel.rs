//! What cancels a migration, and how both sides are told of it.

use crate::failure::{Failure, Side};
use crate::phase::Phase;

/// What cancels an attempt, or the wait for one: its own side's operator, or the end of its own side's process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CancelCause {
    /// The operator cancelled.
    Operator,
    /// The process ends, by this: `SIGTERM`, `quit`.
    ProcessEnds(String),
}

impl CancelCause {
    /// The cancel as both sides are told it: one at `side`, in `phase`.
    pub fn failure(&self, side: Side, phase: Phase) -> Failure {
        let text = match (self, side) {
            (Self::Operator, _) => "cancelled by the operator".into(),
            (Self::ProcessEnds(by), Side::Source) => {
                format!("the process of the source ends by {by}, and the guest with it")
            }
            (Self::ProcessEnds(by), Side::Destination) => {
                format!("the process of the destination ends by {by}")
            }
        };
        Failure::cancelled(side, phase, text)
    }
}
