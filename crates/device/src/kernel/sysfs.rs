//! A VFIO device's entry in sysfs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use vfio_migration_compat::Scalar;

use super::error::KernelError;
use crate::host::facts;
use crate::host::files::attribute;

/// A device below sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SysDevice {
    /// The PCI address, or an mdev's UUID.
    pub(super) name: String,
    /// The driver that it is bound to.
    pub(super) driver: Option<String>,
    /// Version of the driver's module; most modules of the kernel's own tree have none.
    pub(super) driver_version: Option<String>,
    /// Number of its IOMMU group.
    pub(super) group: Option<String>,
    /// Name that VFIO gave it (`vfio0`): a VFIO driver is bound to it. Before Linux 6.1 there is no such name.
    pub(super) vfio: Option<String>,
    /// Whether it is a mediated device, which has no IOMMU before it.
    pub(super) mdev: bool,
    /// A mediated device's type, `mtty-1`.
    pub(super) mdev_type: Option<String>,
    /// Version of its firmware. Read once, as the product is: a driver may ask the device for it, and vital product
    /// data comes slowly, which a paused guest should not wait for.
    pub(super) firmware: Option<String>,
    /// The maker's marks in it.
    product: BTreeMap<String, Scalar>,
    /// The device's folder in sysfs.
    folder: PathBuf,
}

/// The PCI function at `address`.
pub(super) fn pci(sysfs: &Path, address: &str) -> Result<SysDevice, KernelError> {
    let path = sysfs.join("bus/pci/devices").join(address);
    at(&path).ok_or_else(|| KernelError::NoDevice(format!("PCI device {address} (see lspci -D)")))
}

/// The mediated device `uuid`.
pub(super) fn mdev(sysfs: &Path, uuid: &str) -> Result<SysDevice, KernelError> {
    at(&sysfs.join("bus/mdev/devices").join(uuid)).ok_or_else(|| {
        let create = "create it: echo UUID > /sys/class/mdev_bus/PARENT/mdev_supported_types/TYPE/create";
        KernelError::NoDevice(format!("mediated device {uuid}; {create}"))
    })
}

/// The device that a group knows by `name`.
pub(super) fn named(sysfs: &Path, name: &str) -> Option<SysDevice> {
    pci(sysfs, name).or_else(|_| mdev(sysfs, name)).ok()
}

/// The device behind the character device `/dev/vfio/devices/NAME`.
pub(super) fn cdev(sysfs: &Path, file: &Path) -> Option<SysDevice> {
    at(&sysfs.join("class/vfio-dev").join(file.file_name()?).join("device"))
}

impl SysDevice {
    /// The maker's marks, and what its driver compares: attributes, which may be set at any time.
    pub(super) fn facts(&self) -> BTreeMap<String, Scalar> {
        let mut facts = facts::mediated(&self.folder, self.driver.as_deref(), self.mdev_type.as_deref());
        facts.extend(self.product.clone());
        facts
    }

    /// Makes sure that a VFIO driver has it.
    pub(super) fn check_driver(&self) -> Result<(), KernelError> {
        // Nothing but VFIO has drivers for mediated devices, whatever their names.
        let old_kernel = || self.driver.as_ref().is_some_and(|driver| self.mdev || driver.contains("vfio"));
        if self.vfio.is_some() || old_kernel() {
            return Ok(());
        }
        let name = &self.name;
        let remedy = if self.mdev {
            "its parent's driver gives it no VFIO driver".to_owned()
        } else {
            format!(
                "bind it to a VFIO driver: modprobe vfio-pci; driverctl set-override {name} vfio-pci \
                 (or the vendor's variant driver: plain vfio-pci has no migration)"
            )
        };
        Err(KernelError::NotVfio { device: name.clone(), driver: self.driver.clone(), remedy })
    }
}

fn at(path: &Path) -> Option<SysDevice> {
    let real = path.canonicalize().ok()?;
    let link = |name: &str| std::fs::read_link(real.join(name)).ok().and_then(|to| last(&to));
    let vfio = std::fs::read_dir(real.join("vfio-dev")).ok().and_then(|mut entries| {
        entries.find_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
    });
    let mdev_type = link("mdev_type");
    Some(SysDevice {
        name: last(&real)?,
        driver: link("driver"),
        driver_version: attribute(&real.join("driver/module/version")),
        group: link("iommu_group"),
        vfio,
        mdev: mdev_type.is_some(),
        mdev_type,
        firmware: facts::firmware(&real),
        product: facts::product(&real),
        folder: real,
    })
}

fn last(path: &Path) -> Option<String> {
    Some(path.file_name()?.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs with an mlx5 function on its VFIO driver, an e1000e on its own, and an mtty.
    fn tree() -> tempfile::TempDir {
        let top = tempfile::tempdir().unwrap();
        let dir = |path: &str| std::fs::create_dir_all(top.path().join(path)).unwrap();
        let link = |to: &str, from: &str| {
            let from = top.path().join(from);
            std::fs::create_dir_all(from.parent().unwrap()).unwrap();
            symlink(top.path().join(to), from).unwrap();
        };
        for path in [
            "devices/0000:01:00.1/vfio-dev/vfio3",
            "devices/0000:02:00.0",
            "devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/vfio-dev/vfio4",
            "kernel/iommu_groups/12",
            "bus/pci/drivers/mlx5_vfio_pci",
            "bus/pci/drivers/e1000e",
            "module/mlx5_vfio_pci",
            "devices/mtty/mdev_supported_types/mtty-2",
        ] {
            dir(path);
        }
        link("bus/pci/drivers/mlx5_vfio_pci", "devices/0000:01:00.1/driver");
        std::fs::write(top.path().join("module/mlx5_vfio_pci/version"), "24.10\n").unwrap();
        dir("devices/0000:01:00.0/infiniband/mlx5_0");
        std::fs::write(top.path().join("devices/0000:01:00.0/infiniband/mlx5_0/fw_ver"), "22.41.1000\n")
            .unwrap();
        link("devices/0000:01:00.0", "devices/0000:01:00.1/physfn");
        link("module/mlx5_vfio_pci", "bus/pci/drivers/mlx5_vfio_pci/module");
        link("kernel/iommu_groups/12", "devices/0000:01:00.1/iommu_group");
        link("bus/pci/drivers/e1000e", "devices/0000:02:00.0/driver");
        link(
            "devices/mtty/mdev_supported_types/mtty-2",
            "devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/mdev_type",
        );
        link("devices/0000:01:00.1", "bus/pci/devices/0000:01:00.1");
        link("devices/0000:02:00.0", "bus/pci/devices/0000:02:00.0");
        link(
            "devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
            "bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        );
        link("devices/0000:01:00.1", "class/vfio-dev/vfio3/device");
        top
    }

    #[test]
    fn a_bound_function_is_described() {
        let top = tree();
        let device = pci(top.path(), "0000:01:00.1").unwrap();
        assert_eq!(device.driver.as_deref(), Some("mlx5_vfio_pci"));
        assert_eq!(device.driver_version.as_deref(), Some("24.10"));
        assert_eq!(device.firmware.as_deref(), Some("22.41.1000"), "its physical function's");
        assert_eq!((device.group.as_deref(), device.vfio.as_deref()), (Some("12"), Some("vfio3")));
        assert!(!device.mdev && device.check_driver().is_ok());
        assert_eq!(cdev(top.path(), Path::new("/dev/vfio/devices/vfio3")), Some(device.clone()));
        assert_eq!(named(top.path(), "0000:01:00.1"), Some(device));
        assert_eq!(cdev(top.path(), Path::new("/dev/vfio/devices/vfio9")), None);
    }

    #[test]
    fn an_mdev_is_known_as_one() {
        let top = tree();
        let device = mdev(top.path(), "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001").unwrap();
        assert!(device.mdev);
        assert_eq!(device.mdev_type.as_deref(), Some("mtty-2"));
        assert_eq!((device.driver_version.as_deref(), device.firmware.as_deref()), (None, None));
        device.check_driver().unwrap();
    }

    #[test]
    fn what_is_missing_is_said_with_its_remedy() {
        let top = tree();
        let unbound = pci(top.path(), "0000:02:00.0").unwrap().check_driver().unwrap_err().to_string();
        assert!(unbound.contains("bound to e1000e") && unbound.contains("driverctl"), "{unbound}");
        let missing = pci(top.path(), "0000:09:00.0").unwrap_err().to_string();
        assert!(missing.contains("0000:09:00.0"), "{missing}");
        assert!(mdev(top.path(), "83b8f4f2-0000-0000-0000-000000000000").is_err());
    }
}
