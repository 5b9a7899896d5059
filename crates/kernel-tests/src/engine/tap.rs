//! A device whose sessions are listened to, and meddled with, on their way to the driver.

use std::sync::{Arc, Mutex, PoisonError};

use vfio_migration_compat::DeviceManifest;
use vfio_migration_device::{
    Capabilities, Chunk, Device, DeviceError, DirtyLog, KernelDevice, NotMigratable, Position,
    PrecopyProgress, ResumingSession, SavingSession, TransitionError,
};
use vfio_migration_types::{DeviceId, MigrationState};

/// What a tap hears, of all devices that it is on.
#[derive(Debug, Default)]
pub(super) struct Tap {
    heard: Mutex<Vec<(String, Position)>>,
    /// The byte of the stream that is altered as the driver takes it.
    alter: Option<usize>,
}

impl Tap {
    /// One that alters this byte of a stream as the driver takes it.
    pub(super) fn altering(byte: usize) -> Self {
        Self { alter: Some(byte), ..Self::default() }
    }

    /// Puts it on a device.
    pub(super) fn on(self: &Arc<Self>, device: KernelDevice) -> Arc<dyn Device> {
        Arc::new(Tapped { device, tap: Arc::clone(self) })
    }

    /// Each place that a device's saving session came to, in order.
    pub(super) fn heard(&self) -> Vec<(String, Position)> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn hear(&self, device: &DeviceId, position: Position) {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).push((device.to_string(), position));
    }
}

#[derive(Debug)]
struct Tapped {
    device: KernelDevice,
    tap: Arc<Tap>,
}

impl Tapped {
    fn saving(
        &self,
        session: Result<Box<dyn SavingSession>, TransitionError>,
    ) -> Result<Box<dyn SavingSession>, TransitionError> {
        let session = session?;
        self.tap.hear(self.device.id(), session.position());
        let (id, tap) = (self.device.id().clone(), Arc::clone(&self.tap));
        Ok(Box::new(Saving { id, session, tap }))
    }
}

impl Device for Tapped {
    fn id(&self) -> &DeviceId {
        Device::id(&self.device)
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        self.device.manifest()
    }

    fn capabilities(&self) -> Result<Capabilities, NotMigratable> {
        self.device.capabilities()
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        self.device.state()
    }

    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        self.device.set_state(to)
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.saving(self.device.begin_precopy())
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.saving(self.device.begin_stop_copy())
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        let session = self.device.begin_resuming()?;
        Ok(Box::new(Resuming { session, at: 0, tap: Arc::clone(&self.tap) }))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        self.device.stop_copy_size()
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        self.device.dirty_log()
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.device.reset()
    }
}

#[derive(Debug)]
struct Saving {
    id: DeviceId,
    session: Box<dyn SavingSession>,
    tap: Arc<Tap>,
}

impl SavingSession for Saving {
    fn position(&self) -> Position {
        self.session.position()
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Chunk, DeviceError> {
        self.session.read(buf)
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        self.session.progress()
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        self.session.go(to)?;
        self.tap.hear(&self.id, to);
        Ok(())
    }

    fn end(self: Box<Self>) -> Result<MigrationState, TransitionError> {
        self.session.end()
    }
}

#[derive(Debug)]
struct Resuming {
    session: Box<dyn ResumingSession>,
    /// Bytes written so far.
    at: usize,
    tap: Arc<Tap>,
}

impl ResumingSession for Resuming {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        let victim = self.tap.alter.and_then(|victim| victim.checked_sub(self.at));
        self.at += bytes.len();
        let mut bytes = bytes.to_vec();
        if let Some(byte) = victim.and_then(|victim| bytes.get_mut(victim)) {
            *byte ^= 0x20;
        }
        self.session.write(&bytes)
    }

    fn finish(self: Box<Self>) -> Result<(), TransitionError> {
        self.session.finish()
    }

    fn abort(self: Box<Self>) -> Result<(), DeviceError> {
        self.session.abort()
    }
}
