//! The Device contract over vfio-user.

use std::time::Duration;

use vfio_migration_compat::{DeviceManifest, DirtyTracking};
use vfio_migration_types::{DeviceId, MigrationState};
use vfio_user_peer::QuestionLimit;

use super::device::{ServedDevice, VfioUserDevice};
use crate::contract::{
    Capabilities, CapabilitiesError, Device, DirtyLog, NotMigratable, ResumingSession, SavingSession,
};
use crate::describe::describe_hardware;
use crate::error::{DeviceError, TransitionError};

/// Bytes of device state in one message. MMIO of the running guest waits behind each.
const CHUNK: usize = 256 << 10;

impl Device for VfioUserDevice {
    fn id(&self) -> &DeviceId {
        &self.inner.id
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        let declared = self.inner.declared()?;
        let manifest = match self.capabilities() {
            Ok(Capabilities { flags, dirty_log, .. }) => DeviceManifest {
                flags: Some(flags),
                no_migration: None,
                // No IOMMU and no container is before a process.
                dirty: Some(DirtyTracking {
                    device_log: Some(dirty_log),
                    iommu: Some(false),
                    container: Some(false),
                    ..DirtyTracking::default()
                }),
                state_size: self.stop_copy_size()?,
                ..declared
            },
            Err(CapabilitiesError::Device(error)) => return Err(error),
            Err(CapabilitiesError::NotMigratable(NotMigratable(why))) => DeviceManifest {
                flags: None,
                no_migration: Some(why),
                dirty: None,
                state_size: None,
                ..declared
            },
        };
        describe_hardware(self, DeviceManifest { backend: "vfio-user".into(), ..manifest })
    }

    fn capabilities(&self) -> Result<Capabilities, CapabilitiesError> {
        let inner = &self.inner;
        let flags = inner.flags.clone()?;
        let negotiated = inner.client.negotiated();
        Ok(Capabilities {
            flags,
            precopy_info: negotiated.extension.precopy_info && flags.pre_copy,
            data_size: negotiated.extension.data_size,
            dirty_log: inner.log.works()?,
            chunk: CHUNK.min(negotiated.max_data_xfer_size as usize),
        })
    }

    fn state(&self) -> Result<MigrationState, DeviceError> {
        self.inner.machine.state()
    }

    fn set_state(&self, to: MigrationState) -> Result<(), TransitionError> {
        self.inner.machine.set_state(to)
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        Ok(Box::new(self.inner.machine.begin_precopy()?))
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        Ok(Box::new(self.inner.machine.begin_stop_copy()?))
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        Ok(Box::new(self.inner.machine.begin_resuming()?))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        if !self.inner.client.negotiated().extension.data_size {
            return Ok(None);
        }
        let size = self.inner.client.mig_data_size();
        size.map(Some).map_err(|error| self.inner.failed("asking for the size of its state", error))
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        let there = self.inner.flags.is_ok() && self.inner.log.is_there();
        there.then_some(&self.inner.log as &dyn DirtyLog)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.inner.machine.reset()
    }

    fn answer_limit(&self, transition: bool) -> Option<Duration> {
        let (of_transition, of_any) = self.inner.limits;
        Some(if transition { of_transition } else { of_any })
    }

    fn limit_question(&self, limit: Duration) -> Option<QuestionLimit> {
        Some(self.inner.client.limit_question(limit))
    }
}

impl ServedDevice {
    /// The extension's manifest document: what is only the server's to know.
    fn declared(&self) -> Result<DeviceManifest, DeviceError> {
        if !self.client.negotiated().extension.manifest {
            return Ok(DeviceManifest::new(self.id.clone()));
        }
        let doing = "reading the device's manifest";
        let bytes = self.client.device_manifest().map_err(|error| self.failed(doing, error))?;
        DeviceManifest::declared(&bytes, self.id.clone(), "its server's manifest")
            .map_err(|error| DeviceError::new(self.id.clone(), doing, None, error))
    }
}
