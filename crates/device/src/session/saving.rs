//! A saving session: a stream of state, and a state machine that a guest's reset may move under it.

use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_types::MigrationState;

use super::error::SessionError;
use super::port::{PortError, PortStream};
use super::state_machine::StateMachine;
use crate::contract::{Chunk, Position, PrecopyProgress, SavingSession};
use crate::error::{DeviceError, TransitionError};

/// An open saving session.
#[derive(Debug)]
pub(crate) struct PortSaving {
    machine: Arc<StateMachine>,
    stream: Box<dyn PortStream>,
    position: Position,
    open: bool,
}

impl StateMachine {
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
}

impl PortSaving {
    fn new(machine: Arc<StateMachine>, stream: Box<dyn PortStream>, position: Position) -> Self {
        Self { machine, stream, position, open: true }
    }

    fn leave(&mut self) -> Result<MigrationState, TransitionError> {
        self.open = false;
        let to = self.position.after();
        // Where it really is, which need not be where the session left it: a reset may have come in between.
        let now = self.machine.state_before(to)?;
        // In another state of a session it is where an arc ended whose answer was late.
        if now != self.position.state() && !now.is_saving() {
            tracing::warn!(device = %self.machine.id, %now, "the device was reset under its saving session");
        }
        self.machine.go(now, to)?;
        Ok(to)
    }

    /// Fails if the device is not in the session's state any more. Several drivers answer a read of a session that a
    /// guest's reset has ended with something else than ENODEV, so the state is asked.
    fn check(&self, doing: &str) -> Result<(), DeviceError> {
        let now = self.machine.state()?;
        if now == self.position.state() { Ok(()) } else { Err(self.lost(doing, now)) }
    }

    fn lost(&self, doing: &str, now: MigrationState) -> DeviceError {
        let lost = SessionError::Lost(now);
        DeviceError::new(self.machine.id.clone(), doing, Some(Errno::NODEV), lost)
    }

    /// The meaning of a stream's error: a lost session if the device says so or the stream is dead.
    fn failed(&self, doing: &str, error: PortError) -> DeviceError {
        match self.check(doing) {
            Err(lost) => lost,
            Ok(()) if error.errno == Some(Errno::NODEV) => self.lost(doing, self.position.state()),
            Ok(()) => self.machine.failed(doing, error),
        }
    }

    /// Takes up where the device really is after a step that did not go as it should.
    fn stand_at(&mut self, now: Option<MigrationState>) {
        if let Some(position) = now.and_then(Position::of) {
            self.position = position;
        }
    }
}

impl SavingSession for PortSaving {
    fn position(&self) -> Position {
        self.position
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Chunk, DeviceError> {
        const DOING: &str = "reading its state";
        if buf.is_empty() {
            // The answer would be 0, which means the end.
            return Err(DeviceError::new(self.machine.id.clone(), DOING, None, SessionError::EmptyBuffer));
        }
        let stopped = self.position == Position::StopCopy;
        match self.stream.read(buf) {
            Ok(0) if stopped => self.check(DOING).map(|()| Chunk::End),
            Ok(0) => self.check(DOING).map(|()| Chunk::NothingNow),
            Ok(n) => Ok(Chunk::Data(n)),
            // ENOMSG by the uAPI; mtty, hisi_acc and qat give the 0 above, which looks like an end.
            Err(PortError { errno: Some(Errno::NOMSG), .. }) if !stopped => {
                self.check(DOING).map(|()| Chunk::NothingNow)
            }
            // ENOMSG in STOP_COPY too: a driver's error, and the stream is lost.
            Err(error) => Err(self.failed(DOING, error)),
        }
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        if self.position == Position::StopCopy {
            return Ok(None);
        }
        self.stream.precopy_info().map_err(|error| self.failed("asking for pre-copy progress", error))
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        let from = self.machine.state_before(to.state())?;
        // A SET would open a second session, whose data is no sequel to what was read.
        if from != self.position.state() {
            return Err(self.machine.refused(from, to.state(), SessionError::Lost(from)));
        }
        match self.machine.go(from, to.state()) {
            // Inside the saving group there is no new stream: the old one goes on.
            Ok(None) => {
                self.position = to;
                Ok(())
            }
            Ok(Some(_second)) => {
                let now = self.machine.state().ok();
                self.stand_at(now);
                let id = self.machine.id.clone();
                Err(TransitionError::new(id, from, to.state(), now, None, SessionError::SecondStream))
            }
            Err(error) => {
                self.stand_at(error.now);
                Err(error)
            }
        }
    }

    fn end(mut self: Box<Self>) -> Result<MigrationState, TransitionError> {
        self.leave()
    }
}

impl Drop for PortSaving {
    fn drop(&mut self) {
        if self.open
            && let Err(error) = self.leave()
        {
            tracing::warn!(%error, "a saving session was dropped and could not be left");
        }
    }
}
