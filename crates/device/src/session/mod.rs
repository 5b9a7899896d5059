//! Migration sessions over whatever serves the device: its state machine, and the stream of a session, with what each
//! answer means.
//!
//! A back end brings the calls alone ([`Port`], [`PortStream`]); the rules are here, so that a device of the kernel and one of a
//! vfio-user server are treated alike, and the rules can be tested without either.

mod error;
mod resuming;
mod saving;
mod state_machine;
#[cfg(test)]
mod tests;

use std::fmt;

use vfio_migration_types::MigrationState;

pub(crate) use self::error::PortError;
pub use self::error::SessionError;
pub(crate) use self::state_machine::StateMachine;
use crate::contract::PrecopyProgress;

/// The migration state machine of an open device. Each method is a call, and gives the answer as it came.
pub(crate) trait Port: fmt::Debug + Send + Sync {
    /// GET of the state.
    fn state(&self) -> Result<MigrationState, PortError>;

    /// SET of the state on a device that is in `from`, with the stream if that opened a session.
    fn set_state(
        &self,
        from: MigrationState,
        to: MigrationState,
    ) -> Result<Option<Box<dyn PortStream>>, PortError>;

    /// Resets it, and does what else it takes to have it RUNNING.
    fn reset(&self) -> Result<(), PortError>;
}

/// The data of a session.
pub(crate) trait PortStream: fmt::Debug + Send {
    /// Reads at most `buf`. 0: nothing more, or nothing for now.
    fn read(&self, buf: &mut [u8]) -> Result<usize, PortError>;

    /// Writes `bytes`, or the first of them, and says how many.
    fn write(&self, bytes: &[u8]) -> Result<usize, PortError>;

    /// Pre-copy estimates; `None` where the device has none.
    fn precopy_info(&self) -> Result<Option<PrecopyProgress>, PortError>;
}
