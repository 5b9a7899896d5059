//! What to do with a device that a former client left in some state.

use super::connection::Client;
use crate::codec::Command;
use crate::error::ClientError;
use crate::migration_state::MigrationState;
use rustix::io::Errno;

/// Result of [`Client::recover`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Recovery {
    /// The device has no migration, hence nothing to recover from.
    NoMigration,
    /// The device was running already.
    WasRunning,
    /// The device was in this state and runs now. Whatever migration data it held is gone.
    Recovered {
        /// State that the device was in.
        from: MigrationState,
    },
}

impl Client {
    /// Brings the device to RUNNING from whatever state it is in.
    ///
    /// A half-loaded device (RESUMING) or one in ERROR is reset; others are SET to RUNNING, and reset if they refuse.
    ///
    /// # Errors
    /// The device does not reach RUNNING.
    pub fn recover(&self) -> Result<Recovery, ClientError> {
        let from = match self.mig_state() {
            Ok(MigrationState::Running) => return Ok(Recovery::WasRunning),
            Ok(from) => from,
            // ENOTTY is the kernel's word for no migration, EINVAL libvfio-user's; others have their own.
            Err(ClientError::Refused { errno: Some(_), .. }) => return Ok(Recovery::NoMigration),
            Err(error) => return Err(error),
        };
        // SET comes first since libvfio-user refuses RESET in STOP.
        let must_reset = matches!(from, MigrationState::Resuming | MigrationState::Error);
        let set = if must_reset { None } else { Some(self.set_mig_state(MigrationState::Running)) };
        match set {
            Some(Ok(())) => {}
            None | Some(Err(ClientError::Refused { .. })) => self.reset_to_running()?,
            Some(Err(error)) => return Err(error),
        }
        match self.mig_state()? {
            MigrationState::Running => Ok(Recovery::Recovered { from }),
            _ => Err(ClientError::Refused { command: Command::DEVICE_RESET, errno: Some(Errno::IO) }),
        }
    }

    /// Resets the device and does what else it takes to have it RUNNING, with nothing left of what it had loaded in
    /// RESUMING. A device without migration is reset alone.
    ///
    /// Servers of this crate, like the kernel, are in RUNNING after a reset. libvfio-user keeps the state across one, and
    /// refuses RESET in STOP.
    ///
    /// # Errors
    /// The device could not be reset. One that is in ERROR even after its reset stays there, which is no error of this
    /// call, since nothing may be SET there: ask with [`mig_state`](Self::mig_state).
    pub fn reset_to_running(&self) -> Result<(), ClientError> {
        match self.reset() {
            Err(refusal @ ClientError::Refused { .. }) => match self.mig_state() {
                // In ERROR nothing may be SET, and from RESUMING a SET would make what was loaded so far the state.
                Ok(MigrationState::Error | MigrationState::Resuming) | Err(ClientError::Refused { .. }) => {
                    return Err(refusal);
                }
                Ok(_) => {
                    self.set_mig_state(MigrationState::Running)?;
                    self.reset()?;
                }
                Err(error) => return Err(error),
            },
            done => done?,
        }
        match self.mig_state() {
            Ok(MigrationState::Running | MigrationState::Error) => Ok(()),
            Ok(MigrationState::Resuming) => {
                // The way out leads through STOP, where what was loaded so far became the state; so once more.
                self.set_mig_state(MigrationState::Running)?;
                self.reset()
            }
            Ok(_) => self.set_mig_state(MigrationState::Running),
            // A device without migration has no state.
            Err(ClientError::Refused { .. }) => Ok(()),
            Err(error) => Err(error),
        }
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
