//! A device as a migration sees it: it is noted that it was reset under its guest, whose state in it is gone then.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vfio_migration_compat::DeviceManifest;
use vfio_migration_device::{
    Capabilities, CapabilitiesError, Device, DeviceError, DirtyLog, QuestionLimit, ResumingSession,
    SavingSession, TransitionError, is_unsent_reset,
};
use vfio_migration_types::{DeviceId, MigrationState};

/// A device whose resets are noted, whoever asks for them: a session on its way back, or what it left behind its end. Not the
/// guest, which resets its device as it likes.
#[derive(Debug)]
pub(super) struct NotedDevice {
    device: Arc<dyn Device>,
    reset: AtomicBool,
}

impl NotedDevice {
    pub(super) fn new(device: Arc<dyn Device>) -> Self {
        Self { device, reset: AtomicBool::new(false) }
    }

    /// Whether the state that its guest had in it is gone, or may be.
    pub(super) fn was_reset(&self) -> bool {
        self.reset.load(Ordering::Acquire)
    }

    /// A guest begins with it, or comes in with its state.
    pub(super) fn forget(&self) {
        self.reset.store(false, Ordering::Release);
    }
}

impl Device for NotedDevice {
    fn id(&self) -> &DeviceId {
        self.device.id()
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        self.device.manifest()
    }

    fn capabilities(&self) -> Result<Capabilities, CapabilitiesError> {
        self.device.capabilities()
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        self.device.state()
    }

    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        self.device.set_state(to)
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.device.begin_precopy()
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.device.begin_stop_copy()
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        self.device.begin_resuming()
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        self.device.stop_copy_size()
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        self.device.dirty_log()
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let reset = self.device.reset();
        // Also one that fails: the device is late and may do it yet, or it is in no state that the guest knows. Not one that the
        // device was never asked for.
        if !reset.as_ref().is_err_and(is_unsent_reset) {
            self.reset.store(true, Ordering::Release);
        }
        reset
    }

    fn answer_limit(&self, transition: bool) -> Option<Duration> {
        self.device.answer_limit(transition)
    }

    fn limit_question(&self, limit: Duration) -> Option<QuestionLimit> {
        self.device.limit_question(limit)
    }
}
