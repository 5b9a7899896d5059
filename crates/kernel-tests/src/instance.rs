//! An instance of a mediated device, made for one test and removed after it.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{Mode, OFlags, open};
use vfio_migration_uapi::{
    Ioas, Type1, attach, bind_iommufd, group_device, group_status, set_container, unset_container,
};

use crate::check::{Outcome, holds};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A mediated device, removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Instance {
    uuid: String,
}

impl Instance {
    /// Makes an instance of type `kind` (`mtty-1`) of the driver `parent`.
    pub(crate) fn new(parent: &str, kind: &str) -> Outcome<Self> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed) + (std::process::id() << 8);
        let uuid = format!("{number:08x}-0000-4000-8000-000000000000");
        let types = fs::read_link(format!("/sys/class/mdev_bus/{parent}"))?;
        let create = Path::new("/sys/class/mdev_bus")
            .join(types)
            .join("mdev_supported_types")
            .join(kind)
            .join("create");
        fs::write(&create, &uuid).map_err(|error| format!("{}: {error}", create.display()))?;
        Ok(Self { uuid })
    }

    pub(crate) fn uuid(&self) -> &str {
        &self.uuid
    }

    /// The path of its VFIO group.
    pub(crate) fn group(&self) -> Outcome<PathBuf> {
        let group = fs::read_link(self.sysfs().join("iommu_group"))?;
        Ok(Path::new("/dev/vfio").join(group.file_name().ok_or("a group without a number")?))
    }

    /// Its own file, on a kernel that gives it one.
    pub(crate) fn file(&self) -> Option<PathBuf> {
        let entry = fs::read_dir(self.sysfs().join("vfio-dev")).ok()?.next()?.ok()?;
        Some(Path::new("/dev/vfio/devices").join(entry.file_name()))
    }

    fn sysfs(&self) -> PathBuf {
        Path::new("/sys/bus/mdev/devices").join(&self.uuid)
    }

    /// Opens it by its group and a container of its own.
    pub(crate) fn open(&self) -> Outcome<Opened> {
        Opened::by_group(&self.group()?, &self.uuid)
    }

    /// Opens it by its own file, in an address space of its own.
    pub(crate) fn open_cdev(&self) -> Outcome<OpenedCdev> {
        let entry =
            fs::read_dir(self.sysfs().join("vfio-dev"))?.next().ok_or("it has no file of its own")??;
        let device = file(&Path::new("/dev/vfio/devices").join(entry.file_name()))?;
        let iommufd = Arc::new(file(Path::new("/dev/iommu"))?);
        let id = bind_iommufd(device.as_fd(), iommufd.as_fd())?;
        let space = Ioas::new(iommufd)?;
        attach(device.as_fd(), space.id())?;
        Ok(OpenedCdev { device, id, space })
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.sysfs().join("remove"), "1") {
            eprintln!("removing {}: {error}", self.uuid);
        }
    }
}

/// A device opened by its group. Closed in the order that the kernel wants: device, container, group.
#[derive(Debug)]
pub(crate) struct Opened {
    device: Option<OwnedFd>,
    group: OwnedFd,
    container: Option<Type1>,
}

impl Opened {
    /// Opens the device `name` of a group, in a container of its own.
    pub(crate) fn by_group(group: &Path, name: &str) -> Outcome<Self> {
        let group = file(group)?;
        holds(group_status(group.as_fd())?.viable, "the group is viable")?;
        let container = Type1::new(file(Path::new("/dev/vfio/vfio"))?)?;
        holds(container.has_type1v2()?, "the container knows type1 v2")?;
        set_container(group.as_fd(), &container)?;
        container.set_iommu()?;
        let device = group_device(group.as_fd(), &CString::new(name)?)?;
        Ok(Self { device: Some(device), group, container: Some(container) })
    }

    pub(crate) fn device(&self) -> Outcome<BorrowedFd<'_>> {
        Ok(self.device.as_ref().ok_or("closed")?.as_fd())
    }

    pub(crate) fn group(&self) -> BorrowedFd<'_> {
        self.group.as_fd()
    }

    pub(crate) fn container(&self) -> Outcome<&Type1> {
        Ok(self.container.as_ref().ok_or("closed")?)
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.device = None;
        if let Err(error) = unset_container(self.group.as_fd()) {
            eprintln!("leaving the container: {error}");
        }
        self.container = None;
    }
}

/// A device opened by its own file.
#[derive(Debug)]
pub(crate) struct OpenedCdev {
    pub(crate) device: OwnedFd,
    /// Id of the device in the iommufd.
    pub(crate) id: u32,
    pub(crate) space: Ioas,
}

fn file(path: &Path) -> Outcome<OwnedFd> {
    open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| format!("{}: {error}", path.display()).into())
}
