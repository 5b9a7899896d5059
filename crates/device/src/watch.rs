//! A device under watch: a pass-through [`Device`] that reports to an observer each state that the device comes to, how
//! long the way there took, and each piece of its state on the way; and whose abilities are cut to those that the
//! observer allows.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration_compat::DeviceManifest;
use vfio_migration_types::{DeviceId, MigrationState};

use crate::contract::{
    Capabilities, CapabilitiesError, Chunk, Device, DirtyLog, Position, PrecopyProgress, ResumingSession,
    SavingSession,
};
use crate::error::{DeviceError, TransitionError};
use vfio_user_peer::QuestionLimit;

/// The observer of a [`WatchedDevice`]. Each method is called on the thread that uses the device, and by default lets
/// all pass.
pub trait DeviceObserver: fmt::Debug + Send + Sync {
    /// The abilities that the watched device reports, of those that were `found`. A DMA log that is not among them is
    /// not given either.
    fn shown(&self, found: Capabilities) -> Capabilities {
        found
    }

    /// Whether the device is moved when it is asked to, outside of a session. Otherwise the move is reported as done,
    /// and the device left where it is.
    fn lets_move(&self) -> bool {
        true
    }

    /// Whether the device is reset before a resuming session is opened on it.
    fn resets_before_resuming(&self) -> bool {
        false
    }

    /// `device` went to `to`, by a reset or an arc, in `took`.
    fn went(&self, device: &DeviceId, to: MigrationState, reset: bool, took: Duration) {
        let _ = (device, to, reset, took);
    }

    /// A transition failed, and left the device where `error` says.
    fn failed(&self, error: &TransitionError) {
        let _ = error;
    }

    /// Takes `bytes` of state that were read from a saving session in `position`. What is altered here is altered for
    /// the reader.
    fn read(&self, device: &DeviceId, position: Position, bytes: &mut [u8]) {
        let _ = (device, position, bytes);
    }

    /// `bytes` of state are about to be written to a resuming session. Gives what the device is to take in their place.
    ///
    /// # Errors
    /// They are not to be written.
    fn writing<'a>(&self, device: &DeviceId, bytes: &'a [u8]) -> Result<Cow<'a, [u8]>, DeviceError> {
        let _ = device;
        Ok(Cow::Borrowed(bytes))
    }

    /// So many bytes of state were written.
    fn written(&self, device: &DeviceId, bytes: usize) {
        let _ = (device, bytes);
    }
}

/// A device, and who watches it.
#[derive(Clone, Debug)]
pub struct WatchedDevice {
    device: Arc<dyn Device>,
    observer: Arc<dyn DeviceObserver>,
}

impl WatchedDevice {
    /// Puts `device` under the watch of `observer`.
    pub fn new(device: Arc<dyn Device>, observer: Arc<dyn DeviceObserver>) -> Self {
        Self { device, observer }
    }

    fn under_watch<S>(&self, session: S) -> Watch<S> {
        Watch { session, id: self.device.id().clone(), observer: self.observer.clone() }
    }

    /// Takes an arc to `to`, and reports it.
    fn arc<T>(
        &self,
        to: MigrationState,
        arc: impl FnOnce() -> Result<T, TransitionError>,
    ) -> Result<T, TransitionError> {
        timed(&*self.observer, self.device.id(), |_| to, arc)
    }

    fn saving(
        &self,
        begin: impl FnOnce() -> Result<Box<dyn SavingSession>, TransitionError>,
    ) -> Result<Box<dyn SavingSession>, TransitionError> {
        let session = timed(&*self.observer, self.device.id(), |session| session.position().state(), begin)?;
        Ok(Box::new(self.under_watch(session)))
    }
}

impl Device for WatchedDevice {
    fn id(&self) -> &DeviceId {
        self.device.id()
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        self.device.manifest()
    }

    fn capabilities(&self) -> Result<Capabilities, CapabilitiesError> {
        Ok(self.observer.shown(self.device.capabilities()?))
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        self.device.state()
    }

    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        if !self.observer.lets_move() {
            return Ok(());
        }
        self.arc(to, || self.device.set_state(to))
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.saving(|| self.device.begin_precopy())
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.saving(|| self.device.begin_stop_copy())
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        let to = MigrationState::Resuming;
        if self.observer.resets_before_resuming() {
            let from = self.device.state().unwrap_or(MigrationState::Error);
            self.reset().map_err(|error| {
                let now = self.device.state().ok();
                TransitionError::new(self.id().clone(), from, to, now, error.errno, error)
            })?;
        }
        Ok(Box::new(self.under_watch(self.arc(to, || self.device.begin_resuming())?)))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        self.device.stop_copy_size()
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        let hidden = self.capabilities().is_ok_and(|capabilities| !capabilities.dirty_log);
        if hidden { None } else { self.device.dirty_log() }
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let begun = Instant::now();
        self.device.reset()?;
        self.observer.went(self.id(), MigrationState::Running, true, begun.elapsed());
        Ok(())
    }

    fn answer_limit(&self, transition: bool) -> Option<Duration> {
        self.device.answer_limit(transition)
    }

    fn limit_question(&self, limit: Duration) -> Option<QuestionLimit> {
        self.device.limit_question(limit)
    }
}

/// A session under watch.
#[derive(Debug)]
struct Watch<S> {
    session: S,
    id: DeviceId,
    observer: Arc<dyn DeviceObserver>,
}

impl SavingSession for Watch<Box<dyn SavingSession>> {
    fn position(&self) -> Position {
        self.session.position()
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Chunk, DeviceError> {
        let chunk = self.session.read(buf)?;
        if let Chunk::Data(bytes) = chunk
            && let Some(bytes) = buf.get_mut(..bytes)
        {
            self.observer.read(&self.id, self.session.position(), bytes);
        }
        Ok(chunk)
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        self.session.progress()
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        timed(&*self.observer, &self.id, |()| to.state(), || self.session.go(to))
    }

    fn end(self: Box<Self>) -> Result<MigrationState, TransitionError> {
        let Self { session, id, observer } = *self;
        timed(&*observer, &id, |left| *left, || session.end())
    }
}

impl ResumingSession for Watch<Box<dyn ResumingSession>> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        self.session.write(&self.observer.writing(&self.id, bytes)?)?;
        self.observer.written(&self.id, bytes.len());
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), TransitionError> {
        let Self { session, id, observer } = *self;
        timed(&*observer, &id, |()| MigrationState::Stop, || session.finish())
    }

    fn abort(self: Box<Self>) -> Result<(), DeviceError> {
        let begun = Instant::now();
        self.session.abort()?;
        self.observer.went(&self.id, MigrationState::Running, true, begun.elapsed());
        Ok(())
    }
}

/// Takes an arc, whose end state is what `to` makes of its outcome, and reports it.
fn timed<T>(
    observer: &dyn DeviceObserver,
    device: &DeviceId,
    to: impl FnOnce(&T) -> MigrationState,
    arc: impl FnOnce() -> Result<T, TransitionError>,
) -> Result<T, TransitionError> {
    let begun = Instant::now();
    let gone = arc().inspect_err(|error| observer.failed(error))?;
    observer.went(device, to(&gone), false, begun.elapsed());
    Ok(gone)
}
