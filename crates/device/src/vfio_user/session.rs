//! Saving and resuming sessions over vfio-user: the data travels by MIG_DATA_READ and MIG_DATA_WRITE.

use std::sync::Arc;

use vfio_migration_types::MigrationState;

use super::Inner;
use crate::{DeviceError, Position, PrecopyProgress, Read, ResumingSession, SavingSession, TransitionError};

/// An open saving session.
#[derive(Debug)]
pub(super) struct Saving {
    device: Arc<Inner>,
    position: Position,
    open: bool,
}

impl Saving {
    pub(super) fn new(device: Arc<Inner>, position: Position) -> Self {
        Self { device, position, open: true }
    }

    fn leave(&mut self) -> Result<MigrationState, TransitionError> {
        self.open = false;
        let to = self.position.after();
        // Where it really is, which need not be where the session left it: a reset may have come in between.
        self.device.go(self.device.state_before(to)?, to)?;
        Ok(to)
    }
}

impl SavingSession for Saving {
    fn position(&self) -> Position {
        self.position
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Read, DeviceError> {
        let read = self.device.client.mig_data_read(buf);
        match read.map_err(|error| self.device.failed("reading its state", error))? {
            0 if self.position == Position::StopCopy => Ok(Read::End),
            // Not the end: the server may have more as the device goes on.
            0 => Ok(Read::NothingNow),
            n => Ok(Read::Data(n)),
        }
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        if self.position == Position::StopCopy || !self.device.client.negotiated().extension.precopy_info {
            return Ok(None);
        }
        let info = self.device.client.precopy_info();
        let info = info.map_err(|error| self.device.failed("asking for pre-copy progress", error))?;
        Ok(Some(PrecopyProgress {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            reinit: info.reinit,
        }))
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        let now = self.device.state_before(to.state())?;
        // A SET would open a second session, whose data is no sequel to what was read.
        if now != self.position.state() {
            let why = "the saving session was lost: the device was reset under it";
            return Err(self.device.refused(now, to.state(), why));
        }
        if let Err(error) = self.device.go(now, to.state()) {
            if let Some(position) = error.now.and_then(Position::of) {
                self.position = position;
            }
            return Err(error);
        }
        self.position = to;
        Ok(())
    }

    fn end(mut self: Box<Self>) -> Result<MigrationState, TransitionError> {
        self.leave()
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        if self.open
            && let Err(error) = self.leave()
        {
            tracing::warn!(%error, "a saving session was dropped and could not be left");
        }
    }
}

/// An open resuming session.
#[derive(Debug)]
pub(super) struct Resuming {
    device: Arc<Inner>,
    open: bool,
}

impl Resuming {
    pub(super) fn new(device: Arc<Inner>) -> Self {
        Self { device, open: true }
    }
}

impl ResumingSession for Resuming {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        self.device
            .client
            .mig_data_write(bytes)
            .map_err(|error| self.device.failed("writing its state", error))
    }

    fn finish(mut self: Box<Self>) -> Result<(), TransitionError> {
        let now = self.device.state_before(MigrationState::Stop)?;
        // A device that was reset is empty; it must not pass for one that has taken its state.
        if now != MigrationState::Resuming {
            let why = "the resuming session was lost: the device was reset under it";
            return Err(self.device.refused(now, MigrationState::Stop, why));
        }
        self.device.go(now, MigrationState::Stop)?;
        self.open = false;
        Ok(())
    }

    fn abort(mut self: Box<Self>) -> Result<(), DeviceError> {
        self.open = false;
        self.device.reset()
    }
}

impl Drop for Resuming {
    fn drop(&mut self) {
        if self.open
            && let Err(error) = self.device.reset()
        {
            tracing::warn!(%error, "a resuming session was dropped and the device could not be reset");
        }
    }
}
