//! A kernel device's migration state machine: what is asked of it, and what its answers mean.

use vfio_migration_types::{DeviceId, MigrationFlags, MigrationState, path};
use vfio_migration_uapi::UapiError;

use super::error::KernelError;
use super::port::{Port, Stream};
use crate::{DeviceError, TransitionError};

/// The state machine of one device.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) id: DeviceId,
    port: Box<dyn Port>,
    /// `None` for a device that does not migrate.
    flags: Option<MigrationFlags>,
    /// The kernel took the opt-in to honest pre-copy flags.
    pub(super) reinit: bool,
}

impl Machine {
    pub(super) fn new(
        id: DeviceId,
        port: Box<dyn Port>,
        flags: Option<MigrationFlags>,
        reinit: bool,
    ) -> Self {
        Self { id, port, flags, reinit }
    }

    /// Where it really is.
    pub(super) fn state(&self) -> Result<MigrationState, UapiError> {
        self.port.state()
    }

    /// A failure of the device outside of a transition.
    pub(super) fn failed(&self, doing: impl Into<String>, error: UapiError) -> DeviceError {
        DeviceError::new(self.id.clone(), doing, error.errno(), error)
    }

    /// Where it is before it goes to `to`. Nothing is ever SET on a device in ERROR: the kernel would warn, and a host
    /// with `panic_on_warn` panic (`vfio_main.c`, `vfio_mig_get_next_state`).
    pub(super) fn state_before(&self, to: MigrationState) -> Result<MigrationState, TransitionError> {
        match self.state() {
            Ok(MigrationState::Error) => {
                Err(self.refused(MigrationState::Error, to, vfio_migration_types::ArcError::InError))
            }
            Ok(now) => Ok(now),
            Err(cause) => Err(TransitionError::new(
                self.id.clone(),
                MigrationState::Error,
                to,
                None,
                cause.errno(),
                cause,
            )),
        }
    }

    /// A transition that is not tried, from where the device is.
    pub(super) fn refused(
        &self,
        now: MigrationState,
        to: MigrationState,
        why: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> TransitionError {
        TransitionError::new(self.id.clone(), now, to, Some(now), None, why)
    }

    /// SETs `to`, and gives the data stream if an arc opened one. After a failure, asks where the device really is:
    /// it stays where the last arc that succeeded left it, and the reply of a failed SET is an echo.
    pub(super) fn go(
        &self,
        from: MigrationState,
        to: MigrationState,
    ) -> Result<Option<Box<dyn Stream>>, TransitionError> {
        // What the kernel would refuse with a bare EINVAL is refused here with its reason.
        if let Some(flags) = self.flags
            && let Err(why) = path(from, to, flags)
        {
            return Err(self.refused(from, to, why));
        }
        if from == to {
            return Ok(None);
        }
        self.port.set_state(to).map_err(|error| {
            let now = self.state().ok();
            TransitionError::new(self.id.clone(), from, to, now, error.errno(), error)
        })
    }

    /// SETs `to`, which opens a session, and gives its stream.
    pub(super) fn open(
        &self,
        from: MigrationState,
        to: MigrationState,
    ) -> Result<Box<dyn Stream>, TransitionError> {
        match self.go(from, to)? {
            Some(stream) => Ok(stream),
            None => {
                let why = KernelError::NoStream;
                Err(TransitionError::new(self.id.clone(), from, to, self.state().ok(), None, why))
            }
        }
    }

    /// Moves it outside of any session.
    pub(super) fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        let from = self.state_before(to)?;
        if !matches!(to, MigrationState::Running | MigrationState::RunningP2p | MigrationState::Stop) {
            // Its data descriptor would be lost, and cannot be had again.
            return Err(self.refused(from, to, KernelError::SessionState));
        }
        if from == MigrationState::Resuming {
            // RESUMING → STOP makes what was loaded so far the device's state.
            return Err(self.refused(from, to, KernelError::ResumingOpen));
        }
        self.go(from, to).map(drop)
    }

    /// Resets it; afterwards it is RUNNING, or of no use.
    pub(super) fn reset(&self) -> Result<(), DeviceError> {
        const DOING: &str = "resetting";
        self.port.reset().map_err(|error| self.failed(DOING, error))?;
        match self.state() {
            Ok(MigrationState::Running) => Ok(()),
            Ok(other) => {
                let why = KernelError::ResetLeft(other);
                Err(DeviceError::new(self.id.clone(), DOING, None, why))
            }
            // A device without migration has no state to be asked for.
            Err(error) if self.flags.is_none() && error.is_unsupported() => Ok(()),
            Err(error) => Err(self.failed(DOING, error)),
        }
    }
}
