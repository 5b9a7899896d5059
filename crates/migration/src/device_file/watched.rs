//! A device under watch: each arc is noted and timed, each byte counted, and what a lone device is not to use is hidden.

use std::sync::Arc;
use std::time::Instant;

use vfio_migration_compat::DeviceManifest;
use vfio_migration_device::{
    Capabilities, Chunk, Device, DeviceError, DirtyLog, NotMigratable, Position, PrecopyProgress,
    ResumingSession, SavingSession, TransitionError,
};
use vfio_migration_types::{DeviceId, MigrationState};

use super::DeviceControl;

/// The device, as a session sees it.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) device: Arc<dyn Device>,
    pub(super) control: DeviceControl,
    /// Without its PRE_COPY.
    pub(super) stop_copy_only: bool,
    /// It stands, and is never let run.
    pub(super) stands: bool,
}

impl Watched {
    fn reset_first(&self, to: MigrationState) -> Result<(), TransitionError> {
        let from = self.control.at();
        self.reset().map_err(|error| {
            let now = self.device.state().ok();
            TransitionError::new(self.id().clone(), from, to, now, error.errno, error)
        })
    }
}

impl Device for Watched {
    fn id(&self) -> &DeviceId {
        self.device.id()
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        self.device.manifest()
    }

    /// What the device has, less what runs, if it is not to run, and less its DMA log: it reaches no memory.
    fn capabilities(&self) -> Result<Capabilities, NotMigratable> {
        let mut found = self.device.capabilities()?;
        found.flags.pre_copy &= !self.stop_copy_only && !self.stands;
        found.precopy_info &= found.flags.pre_copy;
        found.dirty_log = false;
        Ok(found)
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        self.device.state()
    }

    /// A device that is to stand already does, whichever of the three it is asked for.
    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        if self.stands {
            return Ok(());
        }
        timed(&self.control, to, || self.device.set_state(to))
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        let to = match self.control.at() {
            MigrationState::RunningP2p => MigrationState::PreCopyP2p,
            _ => MigrationState::PreCopy,
        };
        let session = timed(&self.control, to, || self.device.begin_precopy())?;
        Ok(Box::new(Saving { session, control: self.control.clone() }))
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        let session = timed(&self.control, MigrationState::StopCopy, || self.device.begin_stop_copy())?;
        Ok(Box::new(Saving { session, control: self.control.clone() }))
    }

    /// What somebody left half done in it ends in a reset first.
    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        let to = MigrationState::Resuming;
        if !matches!(self.control.at(), MigrationState::Running | MigrationState::Stop) {
            self.reset_first(to)?;
        }
        let session = timed(&self.control, to, || self.device.begin_resuming())?;
        Ok(Box::new(Resuming { session, id: self.id().clone(), control: self.control.clone() }))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        self.device.stop_copy_size()
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        None
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let begun = Instant::now();
        self.device.reset()?;
        self.control.went(MigrationState::Running, true, begun.elapsed());
        Ok(())
    }
}

/// A saving session under watch.
#[derive(Debug)]
struct Saving {
    session: Box<dyn SavingSession>,
    control: DeviceControl,
}

impl SavingSession for Saving {
    fn position(&self) -> Position {
        self.session.position()
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Chunk, DeviceError> {
        let read = self.session.read(buf)?;
        if let Chunk::Data(bytes) = read {
            self.control.add_moved(bytes);
            if self.position() != Position::StopCopy {
                self.control.add_precopy(bytes);
            }
        }
        Ok(read)
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        self.session.progress()
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        timed(&self.control, to.state(), || self.session.go(to))
    }

    fn end(self: Box<Self>) -> Result<MigrationState, TransitionError> {
        let begun = Instant::now();
        let left = self.session.end()?;
        self.control.went(left, false, begun.elapsed());
        Ok(left)
    }
}

/// A resuming session under watch.
#[derive(Debug)]
struct Resuming {
    session: Box<dyn ResumingSession>,
    id: DeviceId,
    control: DeviceControl,
}

impl ResumingSession for Resuming {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        if self.control.is_cancelled() {
            return Err(DeviceError::new(self.id.clone(), "loading its state", None, "it was cancelled"));
        }
        self.session.write(bytes)?;
        self.control.add_moved(bytes.len());
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), TransitionError> {
        let Self { session, control, .. } = *self;
        timed(&control, MigrationState::Stop, || session.finish())
    }

    fn abort(self: Box<Self>) -> Result<(), DeviceError> {
        let begun = Instant::now();
        self.session.abort()?;
        self.control.went(MigrationState::Running, true, begun.elapsed());
        Ok(())
    }
}

/// Takes an arc to `to`, and notes it if the device went there.
fn timed<T>(
    control: &DeviceControl,
    to: MigrationState,
    arc: impl FnOnce() -> Result<T, TransitionError>,
) -> Result<T, TransitionError> {
    let begun = Instant::now();
    match arc() {
        Ok(gone) => {
            control.went(to, false, begun.elapsed());
            Ok(gone)
        }
        Err(error) => {
            control.found(error.now.unwrap_or(MigrationState::Error));
            Err(error)
        }
    }
}
