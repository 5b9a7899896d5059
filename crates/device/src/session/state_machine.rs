//! A device's migration state machine: what is asked of it, and what its answers mean.

use vfio_migration_types::{ArcError, DeviceId, MigrationFlags, MigrationState, path};

use super::error::SessionError;
use super::port::{Port, PortError, PortStream};
use crate::error::{DeviceError, TransitionError, is_late};

/// The state machine of one device.
#[derive(Debug)]
pub(crate) struct StateMachine {
    pub(super) id: DeviceId,
    pub(super) port: Box<dyn Port>,
    /// `None` for a device that does not migrate.
    flags: Option<MigrationFlags>,
}

impl StateMachine {
    pub(crate) fn new(id: DeviceId, port: Box<dyn Port>, flags: Option<MigrationFlags>) -> Self {
        Self { id, port, flags }
    }

    /// The state that the device really is in.
    pub(crate) fn state(&self) -> Result<MigrationState, DeviceError> {
        self.port.state().map_err(|error| self.failed("asking for its state", error))
    }

    /// Moves it outside of any session.
    pub(crate) fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        let from = self.state_before(to)?;
        if !matches!(to, MigrationState::Running | MigrationState::RunningP2p | MigrationState::Stop) {
            // Its data stream would be lost, and cannot be had again.
            return Err(self.refused(from, to, SessionError::State));
        }
        if from == MigrationState::Resuming {
            // RESUMING → STOP makes what was loaded so far the device's state.
            return Err(self.refused(from, to, SessionError::Resuming));
        }
        self.go(from, to).map(drop)
    }

    /// Resets it; afterwards it is RUNNING, or of no use.
    pub(crate) fn reset(&self) -> Result<(), DeviceError> {
        const DOING: &str = "resetting";
        self.port.reset().map_err(|error| self.failed(DOING, error))?;
        if self.flags.is_none() {
            // It has no state to be asked for.
            return Ok(());
        }
        match self.port.state() {
            Ok(MigrationState::Running) => Ok(()),
            Ok(other) => Err(DeviceError::new(self.id.clone(), DOING, None, SessionError::ResetLeft(other))),
            Err(error) => Err(self.failed(DOING, error)),
        }
    }

    /// A failure of the device outside of a transition.
    pub(super) fn failed(&self, doing: impl Into<String>, error: PortError) -> DeviceError {
        DeviceError::new(self.id.clone(), doing, error.errno, error.source)
    }

    /// The state before an arc to `to`. Nothing is ever SET on a device in ERROR: the kernel would warn, and a host
    /// with `panic_on_warn` panic (`vfio_main.c`, `vfio_mig_get_next_state`).
    pub(super) fn state_before(&self, to: MigrationState) -> Result<MigrationState, TransitionError> {
        match self.port.state() {
            Ok(MigrationState::Error) => Err(self.refused(MigrationState::Error, to, ArcError::InError)),
            Ok(now) => Ok(now),
            Err(PortError { errno, source }) => {
                Err(TransitionError::new(self.id.clone(), None, to, None, errno, source))
            }
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
    ) -> Result<Option<Box<dyn PortStream>>, TransitionError> {
        // What would be refused with a bare EINVAL is refused here with its reason.
        if let Some(flags) = self.flags
            && let Err(why) = path(from, to, flags)
        {
            return Err(self.refused(from, to, why));
        }
        if from == to {
            return Ok(None);
        }
        self.port.set_state(from, to).map_err(|PortError { errno, source }| {
            // Whoever has not answered would not answer that either, and is waited for once.
            let now = if is_late(&*source) { None } else { self.port.state().ok() };
            TransitionError::new(self.id.clone(), from, to, now, errno, source)
        })
    }

    /// SETs `to`, which opens a session, and gives its stream.
    pub(super) fn open(
        &self,
        from: MigrationState,
        to: MigrationState,
    ) -> Result<Box<dyn PortStream>, TransitionError> {
        let now = || self.port.state().ok();
        self.go(from, to)?.ok_or_else(|| {
            TransitionError::new(self.id.clone(), from, to, now(), None, SessionError::NoStream)
        })
    }
}
