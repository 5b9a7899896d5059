//! What a kernel device says of itself.

use std::path::Path;

use vfio_migration_compat::{DeviceManifest, DirtyTracking, Driver};
use vfio_migration_types::MigrationFlags;

use super::sysfs::SysDevice;
use super::{KernelDevice, TrackerKind};
use crate::contract::Device;
use crate::describe::describe_hardware;
use crate::error::DeviceError;
use crate::host::attribute;

impl KernelDevice {
    /// What sysfs and its PCI function show. No kernel driver declares a model, so none is made up: equality is strict,
    /// the driver included, where sysfs is there to say it.
    pub(super) fn describe(&self, flags: MigrationFlags) -> Result<DeviceManifest, DeviceError> {
        let sys = self.inner.sys.as_ref();
        let driver = sys.and_then(|sys| {
            let version = sys.driver_version.clone();
            Some(Driver { version, ..Driver::new(sys.driver.clone()?) })
        });
        let manifest = DeviceManifest {
            backend: "kernel".into(),
            driver,
            kernel: attribute(Path::new("/proc/sys/kernel/osrelease")),
            mdev_type: sys.and_then(|sys| sys.mdev_type.clone()),
            flags: Some(flags),
            dirty: self.dirty(),
            state_size: self.stop_copy_size()?,
            firmware: sys.and_then(|sys| sys.firmware.clone()),
            facts: sys.map(SysDevice::facts).unwrap_or_default(),
            ..DeviceManifest::new(self.inner.id.clone())
        };
        describe_hardware(self, manifest)
    }

    /// The tracker that was chosen. Before any memory is mapped a choice would be made on nothing, and stay.
    fn dirty(&self) -> Option<DirtyTracking> {
        let inner = &self.inner;
        let known = inner.tracker.get().is_some() || !inner.windows.ram().is_empty();
        known.then(|| tracking(self.tracker().kind))
    }
}

/// What is better than the tracker that was chosen was tried before it, and failed; what is worse was not tried.
fn tracking(kind: TrackerKind) -> DirtyTracking {
    let none = DirtyTracking { device_log: Some(false), iommu: Some(false), ..DirtyTracking::default() };
    match kind {
        TrackerKind::DeviceLog => DirtyTracking { device_log: Some(true), ..DirtyTracking::default() },
        TrackerKind::Iommufd => DirtyTracking { iommu: Some(true), ..none },
        TrackerKind::Type1 => DirtyTracking { container: Some(true), ..none },
        TrackerKind::Everything => DirtyTracking { container: Some(false), all_dirty: Some(true), ..none },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tracker_says_nothing_of_those_that_were_not_tried() {
        let log = tracking(TrackerKind::DeviceLog);
        assert_eq!((log.device_log, log.iommu, log.container, log.all_dirty), (Some(true), None, None, None));
        let all = tracking(TrackerKind::Everything);
        assert_eq!((all.device_log, all.iommu, all.container), (Some(false), Some(false), Some(false)));
        assert_eq!(all.all_dirty, Some(true));
    }
}
