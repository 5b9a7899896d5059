//! What a vfio-user device says of itself.

use vfio_migration_compat::{DeviceManifest, DirtyTracking};
use vfio_migration_types::MigrationFlags;

use super::{Inner, VfioUserDevice};
use crate::contract::Device;
use crate::describe::describe_hardware;
use crate::error::DeviceError;

impl Inner {
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

impl VfioUserDevice {
    /// Puts together what the server declares and what its PCI function shows.
    pub(super) fn describe(
        &self,
        flags: MigrationFlags,
        dirty_log: bool,
    ) -> Result<DeviceManifest, DeviceError> {
        // No IOMMU and no container is before a process.
        let dirty = DirtyTracking {
            device_log: Some(dirty_log),
            iommu: Some(false),
            container: Some(false),
            ..DirtyTracking::default()
        };
        let manifest = DeviceManifest {
            backend: "vfio-user".into(),
            flags: Some(flags),
            dirty: Some(dirty),
            state_size: self.stop_copy_size()?,
            ..self.inner.declared()?
        };
        describe_hardware(self, manifest)
    }
}
