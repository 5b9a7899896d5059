//! An open kernel device, and what the kernel reported of it as it was opened.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::io::Errno;
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, MigrationFlags, MigrationState, error_chain};
use vfio_migration_uapi as uapi;

use super::error::KernelError;
use super::iommu::Iommu;
use super::open::{self, AttachedDevice, IommuHandle, KernelOptions};
use super::path::KernelPath;
use super::port::DevicePort;
use super::regions::{Regions, find_regions};
use super::sysfs::SysDevice;
use super::tracker::ChosenTracker;
use super::windows::DmaWindows;
use crate::contract::NotMigratable;
use crate::error::DeviceError;
use crate::reset_callback::ResetCallback;
use crate::session::state_machine::StateMachine;

/// Most regions that a device may have. A PCI function has nine; a driver may add its own.
const REGIONS_MAX: u32 = 64;

/// A device that a VFIO driver of the host's kernel serves. Cheap to clone: clones are the same open device.
#[derive(Clone, Debug)]
pub struct KernelDevice {
    pub(super) inner: Arc<OpenDevice>,
}

// Fields are dropped in this order: nothing is mapped any more when the device is closed, and its group after it.
#[derive(Debug)]
pub(super) struct OpenDevice {
    pub(super) id: DeviceId,
    pub(super) tracker: ChosenTracker,
    pub(super) iommu: Iommu,
    pub(super) windows: Arc<DmaWindows>,
    pub(super) machine: Arc<StateMachine>,
    pub(super) device: Arc<OwnedFd>,
    pub(super) group: Option<Arc<OwnedFd>>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) sys: Option<SysDevice>,
    pub(super) flags: Result<MigrationFlags, NotMigratable>,
    pub(super) regions: Regions,
    pub(super) irqs: [u32; 3],
    pub(super) noresize: [bool; 3],
    pub(super) connected: [AtomicBool; 3],
    pub(super) resettable: bool,
    pub(super) reinit: bool,
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        self.iommu.release((*self.device).as_fd());
    }
}

impl KernelDevice {
    /// Opens the device at `path`. What is later mapped of `ram` by
    /// [`dma_map`](crate::PciHardware::dma_map) is mapped by its address here, and its writes are logged.
    ///
    /// A device that is found in another state than RUNNING is reset, unless [`KernelOptions::keep_state`] says
    /// otherwise.
    ///
    /// # Errors
    /// With the errno and, in the [`KernelError`] that is the source, what to do: there is no such device, no VFIO
    /// driver has it, its group is not viable, a file may not be opened or is in use. EBUSY also for the second device
    /// of one IOMMU group, unless both are opened with clones of one [`DmaSpace`](crate::DmaSpace).
    pub fn open(
        id: DeviceId,
        path: &KernelPath,
        ram: Arc<GuestRam>,
        options: &KernelOptions,
    ) -> Result<Self, DeviceError> {
        let opened = open::open(&id, path, &ram, options)?;
        let device = Self::new(id, opened, ram, None, options)?;
        if !options.keep_state {
            device.recover()?;
        }
        Ok(device)
    }

    /// Takes over a descriptor of a device that the VMM has opened itself, in the state that it is in. It is attached to an
    /// address space made for it, and loses what the VMM had mapped for it in another: a device that a guest uses is handed
    /// over by [`adopt`](Self::adopt).
    ///
    /// # Errors
    /// The descriptors are not what they are said to be, or the kernel refuses.
    pub fn from_fd(
        id: DeviceId,
        device: OwnedFd,
        ram: Arc<GuestRam>,
        iommu: IommuHandle,
        options: &KernelOptions,
    ) -> Result<Self, DeviceError> {
        let opened = open::take_over(&id, device, iommu, options)?;
        Self::new(id, opened, ram, None, options)
    }

    /// The descriptor to give to KVM's VFIO device (`KVM_DEV_VFIO_FILE_ADD`): the group that the device was opened by,
    /// or else its own file.
    pub fn kvm_file(&self) -> BorrowedFd<'_> {
        (**self.inner.group.as_ref().unwrap_or(&self.inner.device)).as_fd()
    }

    /// The driver that it is bound to, where sysfs has it.
    pub fn driver(&self) -> Option<&str> {
        self.inner.sys.as_ref()?.driver.as_deref()
    }

    /// Whether it declares that it can be reset (`VFIO_DEVICE_FLAGS_RESET`). Some can that do not declare it.
    pub fn says_resettable(&self) -> bool {
        self.inner.resettable
    }

    /// Whether the kernel reports new initial data of pre-copy (`VFIO_PRECOPY_INFO_REINIT`): kernels since 7.1.
    pub fn reports_reinit(&self) -> bool {
        self.inner.reinit
    }

    /// `reset`: the VMM's own, of a device that it runs itself.
    pub(super) fn new(
        id: DeviceId,
        opened: AttachedDevice,
        ram: Arc<GuestRam>,
        reset: Option<ResetCallback>,
        options: &KernelOptions,
    ) -> Result<Self, DeviceError> {
        const DOING: &str = "asking what the device is made of";
        let AttachedDevice { device, group, iommu, sys } = opened;
        let fd = (*device).as_fd();
        let refused = |error: uapi::UapiError| DeviceError::new(id.clone(), DOING, error.errno(), error);
        let info = uapi::device_info(fd).map_err(refused)?;
        if !info.pci || info.regions > REGIONS_MAX {
            return Err(DeviceError::new(id, DOING, None, KernelError::NotPci(info.regions)));
        }
        let regions = find_regions(&id, fd, info.regions)?;
        let (mut irqs, mut noresize) = ([0; 3], [false; 3]);
        for (index, (count, noresize)) in (0..info.irqs).zip(irqs.iter_mut().zip(&mut noresize)) {
            match uapi::irq_info(fd, index) {
                // MSI-X has at most 2048 vectors; more would be allocated for.
                Ok(kind) => (*count, *noresize) = (kind.count.min(2048), kind.noresize),
                Err(error) if error.errno() == Some(Errno::INVAL) => {}
                Err(error) => return Err(refused(error)),
            }
        }
        let driver = sys.as_ref().and_then(|sys| sys.driver.as_deref());
        let flags = find_flags(&device, driver)
            .map(|flags| MigrationFlags { pre_copy: flags.pre_copy && options.pre_copy, ..flags });
        let reinit = match &flags {
            Ok(flags) if flags.pre_copy => uapi::opt_in_precopy_info_v2(fd).map_err(refused)?,
            _ => false,
        };
        let windows = match &iommu {
            Iommu::Own(member) => member.space.windows().clone(),
            Iommu::Vmm(_) => Arc::default(),
        };
        let known = flags.as_ref().ok().copied();
        let port = DevicePort { device: device.clone(), reinit, reset };
        let machine = StateMachine::new(id.clone(), Box::new(port), known);
        Ok(Self {
            inner: Arc::new(OpenDevice {
                tracker: ChosenTracker::default(),
                windows,
                machine: Arc::new(machine),
                connected: Default::default(),
                id,
                iommu,
                device,
                group,
                ram,
                sys,
                flags,
                regions,
                irqs,
                noresize,
                resettable: info.resettable,
                reinit,
            }),
        })
    }

    /// Resets a device that a former owner left in the middle of something.
    fn recover(&self) -> Result<(), DeviceError> {
        let machine = &self.inner.machine;
        if self.inner.flags.is_err() {
            return Ok(());
        }
        if machine.state()? != MigrationState::Running {
            machine.reset()?;
        }
        Ok(())
    }
}

/// The device's migration flags, or the reason why it has none.
fn find_flags(device: &Arc<OwnedFd>, driver: Option<&str>) -> Result<MigrationFlags, NotMigratable> {
    uapi::migration_flags((**device).as_fd()).map_err(|error| {
        if !error.is_unsupported() {
            return NotMigratable(error_chain(&error));
        }
        let driver = driver.unwrap_or("not known");
        NotMigratable(format!(
            "its driver ({driver}) has no migration; plain vfio-pci never has, the vendor's variant driver may, if the \
             device's firmware has it enabled"
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use vfio_migration_memory::RamSpec;
    use vfio_migration_types::Gpa;

    use super::*;

    /// Opens a path in an empty tree, or one that `make` has filled.
    fn refusal(path: &str, make: impl FnOnce(&Path)) -> DeviceError {
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

    fn bound(top: &Path, parts: &[&str]) {
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
        let says = |refused: &DeviceError, what: &str| {
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
}
