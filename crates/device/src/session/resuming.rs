//! A resuming session: it is finished, or the device is reset, by whoever learns that it could not be finished.

use std::sync::Arc;

use vfio_migration_types::MigrationState;

use super::error::SessionError;
use super::port::PortStream;
use super::state_machine::StateMachine;
use crate::contract::ResumingSession;
use crate::error::{DeviceError, TransitionError, is_late};

/// An open resuming session.
#[derive(Debug)]
pub(crate) struct PortResuming {
    machine: Arc<StateMachine>,
    stream: Box<dyn PortStream>,
    open: bool,
}

impl StateMachine {
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
}

impl PortResuming {
    fn new(machine: Arc<StateMachine>, stream: Box<dyn PortStream>) -> Self {
        Self { machine, stream, open: true }
    }
}

impl ResumingSession for PortResuming {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        const DOING: &str = "writing its state";
        let id = || self.machine.id.clone();
        let mut left = bytes;
        while !left.is_empty() {
            match self.stream.write(left) {
                Ok(taken) if taken > 0 && taken <= left.len() => left = &left[taken..],
                Ok(taken) => {
                    let why = SessionError::OddWrite { taken, offered: left.len() };
                    return Err(DeviceError::new(id(), DOING, None, why));
                }
                Err(error) => {
                    return Err(match self.machine.state() {
                        Ok(now) if now != MigrationState::Resuming => {
                            DeviceError::new(id(), DOING, error.errno, SessionError::Lost(now))
                        }
                        _ => self.machine.failed(DOING, error),
                    });
                }
            }
        }
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<(), TransitionError> {
        // Its caller learns of a failure at once, and resets the device then: a reset may take longer than the arc.
        self.open = false;
        let now = self.machine.state_before(MigrationState::Stop)?;
        // A device that was reset is empty; it must not pass for one that has taken its state.
        if now != MigrationState::Resuming {
            return Err(self.machine.refused(now, MigrationState::Stop, SessionError::Lost(now)));
        }
        self.machine.go(now, MigrationState::Stop).map(drop)
    }

    fn abort(mut self: Box<Self>) -> Result<(), DeviceError> {
        self.open = false;
        self.machine.reset()
    }
}

impl Drop for PortResuming {
    fn drop(&mut self) {
        if self.open
            && let Err(error) = self.machine.reset()
        {
            match is_late(&error) {
                // Whoever ends the session waits for it, and resets it then.
                true => {
                    tracing::debug!(%error, "a resuming session was dropped before its device had answered")
                }
                false => {
                    tracing::warn!(%error, "a resuming session was dropped and the device could not be reset")
                }
            }
        }
    }
}
