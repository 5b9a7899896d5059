//! Opening what is not there.

use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Gpa};

use super::{KernelDevice, KernelOptions, KernelPath};

/// Opens a path in an empty tree, or one that `make` has filled.
fn refusal(path: &str, make: impl FnOnce(&std::path::Path)) -> crate::error::DeviceError {
    let top = tempfile::tempdir().unwrap();
    make(top.path());
    let options = KernelOptions {
        sysfs: top.path().join("sys"),
        dev: top.path().join("dev"),
        ..KernelOptions::default()
    };
    let ram = GuestRam::new("test", &[RamSpec { gpa: Gpa(0), len: 0x1000 }]).unwrap();
    let path: KernelPath = path.replace("TOP", &top.path().display().to_string()).parse().unwrap();
    KernelDevice::open(DeviceId::new("t0").unwrap(), &path, Arc::new(ram), &options).unwrap_err()
}

fn bound(top: &std::path::Path, parts: &[&str]) {
    let device = top.join("sys/bus/pci/devices/0000:01:00.0");
    std::fs::create_dir_all(&device).unwrap();
    for part in parts {
        match *part {
            "vfio" => std::fs::create_dir_all(device.join("vfio-dev/vfio0")).unwrap(),
            "group" => std::os::unix::fs::symlink("groups/7", device.join("iommu_group")).unwrap(),
            driver => std::os::unix::fs::symlink(driver, device.join("driver")).unwrap(),
        }
    }
}

#[test]
fn what_cannot_be_opened_is_said_with_what_to_do() {
    let says = |refused: &crate::error::DeviceError, what: &str| {
        let text = format!("{refused}: {}", refused.source);
        assert!(text.contains(what), "{text}");
    };
    let none = refusal("0000:01:00.0", |_| {});
    says(&none, "there is no PCI device 0000:01:00.0");
    says(&refusal("83b8f4f2-509f-382f-3c1e-e6bfe0fa1001", |_| {}), "mdev_supported_types");
    says(&refusal("0000:01:00.0", |top| bound(top, &["drivers/e1000e"])), "bound to e1000e");
    says(&refusal("0000:01:00.0", |top| bound(top, &[])), "bound to no driver");
    says(&refusal("0000:01:00.0", |top| bound(top, &["vfio", "drivers/vfio-pci"])), "IOMMU is off");
    let group = refusal("0000:01:00.0", |top| bound(top, &["vfio", "group", "drivers/vfio-pci"]));
    says(&group, "vfio/7 cannot be opened");
    assert_eq!(group.errno, Some(Errno::NOENT));
    let cdev = refusal("TOP/dev/vfio/devices/vfio0", |top| {
        std::fs::create_dir_all(top.join("dev/vfio/devices")).unwrap();
        std::fs::write(top.join("dev/vfio/devices/vfio0"), "").unwrap();
    });
    says(&cdev, "modprobe iommufd");
    // A file that is no group answers no question.
    let file = refusal("0000:01:00.0", |top| {
        bound(top, &["vfio", "group", "drivers/vfio-pci"]);
        std::fs::create_dir_all(top.join("dev/vfio")).unwrap();
        std::fs::write(top.join("dev/vfio/7"), "").unwrap();
    });
    assert_eq!(file.errno, Some(Errno::NOTTY));
}
