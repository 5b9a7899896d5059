//! The interface between a session and its back end: the calls for a device's state, and for the data of a session.

use std::fmt;

use rustix::io::Errno;
use vfio_migration_types::MigrationState;
use vfio_migration_uapi::UapiError;
use vfio_user_peer::ClientError;

use crate::contract::PrecopyProgress;
use crate::reset_callback::ResetError;

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

    /// Writes `bytes`, or the first of them, and returns how many.
    fn write(&self, bytes: &[u8]) -> Result<usize, PortError>;

    /// Pre-copy estimates; `None` where the device has none.
    fn precopy_info(&self) -> Result<Option<PrecopyProgress>, PortError>;
}

/// A call that failed, whatever it went through.
#[derive(Debug)]
pub(crate) struct PortError {
    pub(crate) errno: Option<Errno>,
    pub(crate) source: Box<dyn std::error::Error + Send + Sync>,
}

impl From<Errno> for PortError {
    fn from(errno: Errno) -> Self {
        Self { errno: Some(errno), source: errno.into() }
    }
}

impl From<ResetError> for PortError {
    fn from(error: ResetError) -> Self {
        Self { errno: error.errno(), source: error.into() }
    }
}

impl From<UapiError> for PortError {
    fn from(error: UapiError) -> Self {
        Self { errno: error.errno(), source: error.into() }
    }
}

impl From<ClientError> for PortError {
    fn from(error: ClientError) -> Self {
        Self { errno: error.errno(), source: error.into() }
    }
}
