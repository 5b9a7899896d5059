//! What to do with a device that a former client left in some state.

use rustix::io::Errno;
use vfio_migration_types::MigrationState;

use super::Client;
use crate::error::ClientError;

/// What [`Client::recover`] found and did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recovery {
    /// The device has no migration, hence nothing to recover from.
    NoMigration,
    /// It was running already.
    WasRunning,
    /// It was in this state and runs now. Whatever migration data it held is gone or has become its state.
    Recovered {
        /// Where it was.
        from: MigrationState,
    },
}

impl Client {
    /// Brings the device to RUNNING from whatever state it is in.
    ///
    /// A half-loaded device (RESUMING) or one in ERROR is reset; others are SET to RUNNING, and reset if they refuse.
    /// SET comes first since libvfio-user refuses RESET in STOP.
    ///
    /// # Errors
    /// The device does not reach RUNNING.
    pub fn recover(&self) -> Result<Recovery, ClientError> {
        if self.no_migration {
            return Ok(Recovery::NoMigration);
        }
        let from = match self.mig_state() {
            Ok(MigrationState::Running) => return Ok(Recovery::WasRunning),
            Ok(from) => from,
            // ENOTTY is the kernel's word for no migration, EINVAL libvfio-user's; others have their own.
            Err(ClientError::Refused { errno: Some(_), .. }) => return Ok(Recovery::NoMigration),
            Err(error) => return Err(error),
        };
        let reset_first = matches!(from, MigrationState::Resuming | MigrationState::Error);
        let first = if reset_first { self.reset() } else { self.set_mig_state(MigrationState::Running) };
        match first {
            Ok(()) => {}
            Err(ClientError::Refused { .. }) if !reset_first => self.reset()?,
            Err(error) => return Err(error),
        }
        // A reset need not have moved the state (libvfio-user keeps it). In ERROR nothing may be SET.
        match self.mig_state()? {
            MigrationState::Running => {}
            MigrationState::Error => {
                let command = crate::codec::Command::DEVICE_RESET;
                return Err(ClientError::Refused { command, errno: Some(Errno::IO) });
            }
            _ => self.set_mig_state(MigrationState::Running)?,
        }
        Ok(Recovery::Recovered { from })
    }

    /// [`recover`](Self::recover) as the handshake's last step.
    pub(super) fn recover_at_connect(&mut self) -> Result<(), ClientError> {
        self.found = match self.recover()? {
            Recovery::NoMigration => None,
            Recovery::WasRunning => Some(MigrationState::Running),
            Recovery::Recovered { from } => Some(from),
        };
        Ok(())
    }
}
