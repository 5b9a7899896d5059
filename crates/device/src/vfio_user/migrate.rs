//! The Device contract over vfio-user.

use vfio_migration_compat::DeviceManifest;
use vfio_migration_types::{DeviceId, MigrationState};
use vfio_user_peer::ClientError;

use super::session::{Resuming, Saving};
use super::{Inner, VfioUserDevice};
use crate::{
    Capabilities, Device, DeviceError, DirtyLog, NotMigratable, Position, ResumingSession, SavingSession,
    TransitionError,
};

/// Bytes of device state in one message. MMIO of the running guest waits behind each.
const CHUNK: usize = 256 << 10;

impl Device for VfioUserDevice {
    fn id(&self) -> &DeviceId {
        &self.inner.id
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        let capabilities = self.capabilities().map_err(|NotMigratable(why)| {
            DeviceError::new(self.inner.id.clone(), "describing a device that cannot migrate", None, why)
        })?;
        self.describe(capabilities.flags, capabilities.dirty_log)
    }

    fn capabilities(&self) -> Result<Capabilities, NotMigratable> {
        self.inner.capabilities.get_or_init(|| self.inner.find_capabilities()).clone()
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        self.inner.state()
    }

    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        self.inner.go(self.inner.state_before(to)?, to)
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        let from = self.inner.state_before(MigrationState::PreCopy)?;
        let (to, position) = match from {
            MigrationState::RunningP2p => (MigrationState::PreCopyP2p, Position::PreCopyP2p),
            _ => (MigrationState::PreCopy, Position::PreCopy),
        };
        self.inner.go(from, to)?;
        Ok(Box::new(Saving::new(self.inner.clone(), position)))
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        let from = self.inner.state_before(MigrationState::StopCopy)?;
        self.inner.go(from, MigrationState::StopCopy)?;
        Ok(Box::new(Saving::new(self.inner.clone(), Position::StopCopy)))
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        let from = self.inner.state_before(MigrationState::Resuming)?;
        self.inner.go(from, MigrationState::Resuming)?;
        Ok(Box::new(Resuming::new(self.inner.clone())))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        if !self.inner.client.negotiated().extension.data_size {
            return Ok(None);
        }
        let size = self.inner.client.mig_data_size();
        size.map(Some).map_err(|error| self.inner.failed("asking for the size of its state", error))
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        let there = self.capabilities().is_ok_and(|capabilities| capabilities.dirty_log);
        there.then_some(&*self.inner as &dyn DirtyLog)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.inner.reset()
    }
}

impl Inner {
    fn find_capabilities(&self) -> Result<Capabilities, NotMigratable> {
        let none = |why: String| NotMigratable(format!("device {}: {why}", self.id));
        let flags = self
            .client
            .migration_flags()
            .map_err(|error| none(format!("its server does not say whether it can: {error}")))?
            .ok_or_else(|| none("its server does not implement migration".into()))?;
        let extension = self.client.negotiated().extension;
        Ok(Capabilities {
            flags,
            precopy_info: extension.precopy_info && flags.pre_copy,
            data_size: extension.data_size,
            dirty_log: self.try_log(),
            chunk: CHUNK.min(self.client.negotiated().max_data_xfer_size as usize),
        })
    }

    pub(super) fn state(&self) -> Result<MigrationState, DeviceError> {
        self.client.mig_state().map_err(|error| self.failed("asking for its state", error))
    }

    /// Where it is before it goes to `to`. Nothing is ever SET on a device in ERROR.
    pub(super) fn state_before(&self, to: MigrationState) -> Result<MigrationState, TransitionError> {
        let error = |now: Option<MigrationState>, errno, source: Box<dyn std::error::Error + Send + Sync>| {
            let from = now.unwrap_or(MigrationState::Error);
            TransitionError::new(self.id.clone(), from, to, now, errno, source)
        };
        match self.client.mig_state() {
            Ok(MigrationState::Error) => Err(error(
                Some(MigrationState::Error),
                None,
                "it is in ERROR, which only a reset leaves".into(),
            )),
            Ok(now) => Ok(now),
            Err(cause) => Err(error(None, cause.errno(), cause.into())),
        }
    }

    /// A transition that is not tried, from where the device is.
    pub(super) fn refused(
        &self,
        now: MigrationState,
        to: MigrationState,
        why: &'static str,
    ) -> TransitionError {
        TransitionError::new(self.id.clone(), now, to, Some(now), None, why)
    }

    /// SETs `to`; after a failure, asks where it really is.
    pub(super) fn go(&self, from: MigrationState, to: MigrationState) -> Result<(), TransitionError> {
        if from == to {
            return Ok(());
        }
        self.client.set_mig_state(to).map_err(|error| {
            let now = self.client.mig_state().ok();
            TransitionError::new(self.id.clone(), from, to, now, error.errno(), error)
        })
    }

    /// Resets. Some servers refuse RESET while the device is stopped, and keep the migration state across one.
    pub(super) fn reset(&self) -> Result<(), DeviceError> {
        let failed = |error: ClientError| self.failed("resetting", error);
        match self.client.reset() {
            Ok(()) => {}
            Err(refusal @ ClientError::Refused { .. }) => {
                // In ERROR nothing may be SET, and from RESUMING a SET would make what was loaded so far the state.
                let now = self.client.mig_state().map_err(failed)?;
                if matches!(now, MigrationState::Error | MigrationState::Resuming) {
                    return Err(failed(refusal));
                }
                self.client.set_mig_state(MigrationState::Running).map_err(failed)?;
                self.client.reset().map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
        match self.client.mig_state().map_err(failed)? {
            MigrationState::Running => Ok(()),
            MigrationState::Error => {
                Err(DeviceError::new(self.id.clone(), "resetting", None, "it is in ERROR even after a reset"))
            }
            _ => self.client.set_mig_state(MigrationState::Running).map_err(failed),
        }
    }
}
