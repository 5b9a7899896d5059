//! What a kernel device says of itself.

use std::collections::BTreeMap;
use std::path::Path;

use vfio_migration_compat::{DeviceManifest, DirtyTracking, Driver, Scalar};
use vfio_migration_types::MigrationFlags;

use super::sysfs::{SysDevice, attribute};
use super::{KernelDevice, TrackerKind};
use crate::{Device, DeviceError, describe};

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
            facts: sys.map(facts).unwrap_or_default(),
            ..DeviceManifest::new(self.inner.id.clone())
        };
        describe::hardware(self, manifest)
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

/// What the driver's own rule compares, where sysfs shows it.
fn facts(sys: &SysDevice) -> BTreeMap<String, Scalar> {
    let mut facts = BTreeMap::new();
    let mut put = |name: &str, value: Option<i64>| {
        facts.extend(value.map(|value| (name.to_owned(), Scalar::Int(value))));
    };
    match sys.driver.as_deref() {
        // samples/vfio-mdev/mtty.c, mtty_types: one port and two.
        Some("mtty") => put(
            "ports",
            match sys.mdev_type.as_deref() {
                Some("mtty-1") => Some(1),
                Some("mtty-2") => Some(2),
                _ => None,
            },
        ),
        // kernel/migdev/README.md, Instances.
        Some("migdev") => {
            let number = |name: &str| attribute(&sys.path.join(name))?.parse().ok();
            put("stream_version", number("version"));
            put("state_size", number("state_size"));
        }
        _ => {}
    }
    facts
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_tracker_says_nothing_of_those_that_were_not_tried() {
        let log = tracking(TrackerKind::DeviceLog);
        assert_eq!((log.device_log, log.iommu, log.container, log.all_dirty), (Some(true), None, None, None));
        let all = tracking(TrackerKind::Everything);
        assert_eq!((all.device_log, all.iommu, all.container), (Some(false), Some(false), Some(false)));
        assert_eq!(all.all_dirty, Some(true));
    }

    #[test]
    fn facts_are_read_where_the_driver_shows_them() {
        let top = tempfile::tempdir().unwrap();
        let sys = |driver: &str, kind: &str| SysDevice {
            name: "d".into(),
            path: top.path().to_owned(),
            driver: Some(driver.into()),
            driver_version: None,
            group: None,
            vfio: None,
            mdev: true,
            mdev_type: Some(kind.into()),
        };
        assert_eq!(facts(&sys("mtty", "mtty-2")), BTreeMap::from([("ports".into(), Scalar::Int(2))]));
        assert!(facts(&sys("mtty", "mtty-9")).is_empty() && facts(&sys("other", "mtty-2")).is_empty());
        assert!(facts(&sys("migdev", "migdev-1M")).is_empty());
        std::fs::write(top.path().join("version"), "2\n").unwrap();
        std::fs::write(top.path().join("state_size"), "nonsense\n").unwrap();
        let found = facts(&sys("migdev", "migdev-1M"));
        assert_eq!(found, BTreeMap::from([("stream_version".into(), Scalar::Int(2))]));
    }
}
