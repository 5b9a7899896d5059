//! A device's migration state machine: what is asked of it, and what its answers mean.

use std::sync::Arc;

use vfio_migration_types::{ArcError, DeviceId, MigrationFlags, MigrationState, path};

use super::resuming::PortResuming;
use super::saving::PortSaving;
use super::{Port, PortError, PortStream, SessionError};
use crate::contract::Position;
use crate::error::{DeviceError, TransitionError};

/// The state machine of one device.
#[derive(Debug)]
pub(crate) struct StateMachine {
    pub(super) id: DeviceId,
    port: Box<dyn Port>,
    /// `None` for a device that does not migrate.
    flags: Option<MigrationFlags>,
}

impl StateMachine {
    pub(crate) fn new(id: DeviceId, port: Box<dyn Port>, flags: Option<MigrationFlags>) -> Self {
        Self { id, port, flags }
    }

    /// Where it really is.
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

    /// Opens a saving session at RUNNING → PRE_COPY, or RUNNING_P2P → PRE_COPY_P2P.
    pub(crate) fn begin_precopy(self: &Arc<Self>) -> Result<PortSaving, TransitionError> {
        let from = self.state_before(MigrationState::PreCopy)?;
        let position = match from {
            MigrationState::RunningP2p => Position::PreCopyP2p,
            _ => Position::PreCopy,
        };
        self.begin_saving(from, position)
    }

    /// Opens a saving session at STOP → STOP_COPY.
    pub(crate) fn begin_stop_copy(self: &Arc<Self>) -> Result<PortSaving, TransitionError> {
        let from = self.state_before(MigrationState::StopCopy)?;
        self.begin_saving(from, Position::StopCopy)
    }

    /// Opens a resuming session, from whatever state the device is in.
    pub(crate) fn begin_resuming(self: &Arc<Self>) -> Result<PortResuming, TransitionError> {
        const TO: MigrationState = MigrationState::Resuming;
        let mut from = self.state_before(TO)?;
        if from == TO {
            // Somebody's session that was not finished: its stream cannot be had again, and the way out is a reset.
            self.reset().map_err(|error| {
                TransitionError::new(self.id.clone(), from, TO, self.port.state().ok(), error.errno, error)
            })?;
            from = self.state_before(TO)?;
        }
        Ok(PortResuming::new(self.clone(), self.open(from, TO)?))
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

    fn begin_saving(
        self: &Arc<Self>,
        from: MigrationState,
        at: Position,
    ) -> Result<PortSaving, TransitionError> {
        if from.is_saving() || from == MigrationState::Resuming {
            return Err(self.refused(from, at.state(), SessionError::Open));
        }
        Ok(PortSaving::new(self.clone(), self.open(from, at.state())?, at))
    }

    /// A failure of the device outside of a transition.
    pub(super) fn failed(&self, doing: impl Into<String>, error: PortError) -> DeviceError {
        DeviceError::new(self.id.clone(), doing, error.errno, error.source)
    }

    /// Where it is before it goes to `to`. Nothing is ever SET on a device in ERROR: the kernel would warn, and a host
    /// with `panic_on_warn` panic (`vfio_main.c`, `vfio_mig_get_next_state`).
    pub(super) fn state_before(&self, to: MigrationState) -> Result<MigrationState, TransitionError> {
        const UNKNOWN: MigrationState = MigrationState::Error;
        match self.port.state() {
            Ok(MigrationState::Error) => Err(self.refused(MigrationState::Error, to, ArcError::InError)),
            Ok(now) => Ok(now),
            Err(PortError { errno, source }) => {
                Err(TransitionError::new(self.id.clone(), UNKNOWN, to, None, errno, source))
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
            TransitionError::new(self.id.clone(), from, to, self.port.state().ok(), errno, source)
        })
    }

    /// SETs `to`, which opens a session, and gives its stream.
    fn open(&self, from: MigrationState, to: MigrationState) -> Result<Box<dyn PortStream>, TransitionError> {
        let now = || self.port.state().ok();
        self.go(from, to)?.ok_or_else(|| {
            TransitionError::new(self.id.clone(), from, to, now(), None, SessionError::NoStream)
        })
    }
}
