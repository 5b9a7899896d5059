//! The kernel back end: a device that a VFIO driver of the host serves.
//!
//! The device is opened by its own file and an iommufd where the kernel has both, by its group and a type1 container
//! otherwise. Each device has an address space of its own, so two devices of one IOMMU group cannot be opened at once.
//! Bus addresses are what the VMM maps; a vIOMMU is not supported.

#[cfg(feature = "bare-space")]
mod bare;
mod dirty;
mod error;
mod hardware;
mod iommu;
mod manifest;
mod migrate;
mod open;
mod path;
mod port;
mod ranges;
mod sysfs;
#[cfg(test)]
mod tests;
mod tracker;
mod windows;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use rustix::io::Errno;
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, MigrationFlags, MigrationState};
use vfio_migration_uapi as uapi;

use self::dirty::Log;
use self::hardware::Regions;
use self::iommu::Iommu;
use self::open::AttachedDevice;
use self::port::DevicePort;
use self::sysfs::SysDevice;
use self::windows::DmaWindows;
use crate::contract::NotMigratable;
use crate::error::DeviceError;
use crate::session::StateMachine;

#[cfg(feature = "bare-space")]
pub use self::bare::BareSpace;
pub use self::error::KernelError;
pub use self::path::KernelPath;
pub use self::tracker::{TrackerChoice, TrackerKind};

/// Most regions that a device may have. A PCI function has nine; a driver may add its own.
const REGIONS_MAX: u32 = 64;

/// How a kernel device is opened. [`Default`] suits a VMM.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Where sysfs is mounted: `/sys`.
    pub sysfs: PathBuf,
    /// Where device files are: `/dev`.
    pub dev: PathBuf,
    /// Open by the group also where the device has a file of its own.
    pub prefer_group: bool,
    /// Leave a device that is not RUNNING as it was found, because it holds a guest's state that a journal names.
    pub keep_state: bool,
}

impl Default for KernelOptions {
    fn default() -> Self {
        Self { sysfs: "/sys".into(), dev: "/dev".into(), prefer_group: false, keep_state: false }
    }
}

/// What stands between memory and a device whose descriptor was handed over.
#[derive(Debug)]
#[non_exhaustive]
pub enum IommuHandle {
    /// A type1 container with its IOMMU set, and the device's group, which is in it.
    Type1 {
        /// The container, `/dev/vfio/vfio`.
        container: OwnedFd,
        /// The group, `/dev/vfio/N`.
        group: OwnedFd,
    },
    /// An iommufd. The device is attached to a new address space of it.
    Iommufd {
        /// `/dev/iommu`.
        iommufd: OwnedFd,
        /// The device's id there, when it is bound already.
        bound: Option<u32>,
    },
}

/// A device that a VFIO driver of the host's kernel serves. Cheap to clone: clones are the same open device.
#[derive(Clone, Debug)]
pub struct KernelDevice {
    inner: Arc<Inner>,
}

// Fields are dropped in this order: nothing is mapped any more when the device is closed, and its group after it.
#[derive(Debug)]
struct Inner {
    id: DeviceId,
    tracker: OnceLock<(TrackerChoice, Option<TrackerLog>)>,
    iommu: Iommu,
    windows: Arc<DmaWindows>,
    machine: Arc<StateMachine>,
    device: Arc<OwnedFd>,
    group: Option<OwnedFd>,
    ram: Arc<GuestRam>,
    sys: Option<SysDevice>,
    flags: Result<MigrationFlags, NotMigratable>,
    regions: Regions,
    irqs: [u32; 3],
    connected: [AtomicBool; 3],
    resettable: bool,
    reinit: bool,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.iommu.release((*self.device).as_fd());
    }
}

impl KernelDevice {
    /// Opens the device at `path`. What is later mapped of `ram`'s file by
    /// [`dma_map`](crate::PciHardware::dma_map) is mapped by its address here, and its writes are logged.
    ///
    /// A device that is found in another state than RUNNING is reset, unless [`KernelOptions::keep_state`] says
    /// otherwise.
    ///
    /// # Errors
    /// With the errno and, in the [`KernelError`] that is the source, what to do: there is no such device, no VFIO
    /// driver has it, its group is not viable, a file may not be opened or is in use. EBUSY also for the second device
    /// of one IOMMU group.
    pub fn open(
        id: DeviceId,
        path: &KernelPath,
        ram: Arc<GuestRam>,
        options: &KernelOptions,
    ) -> Result<Self, DeviceError> {
        let opened = open::open(&id, path, options)?;
        let device = Self::new(id, opened, ram)?;
        if !options.keep_state {
            device.recover()?;
        }
        Ok(device)
    }

    /// Takes over a descriptor of a device that the VMM has opened itself, in the state that it is in.
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
        let opened = open::adopt(&id, device, iommu, options)?;
        Self::new(id, opened, ram)
    }

    /// The descriptor to give to KVM's VFIO device (`KVM_DEV_VFIO_FILE_ADD`): the group that the device was opened by,
    /// or else its own file.
    pub fn kvm_file(&self) -> BorrowedFd<'_> {
        self.inner.group.as_ref().map_or((*self.inner.device).as_fd(), AsFd::as_fd)
    }

    /// Who logs its DMA writes, and what follows from that. Chosen by trial when it is first asked for, best after the
    /// guest's RAM was mapped.
    pub fn tracker(&self) -> &TrackerChoice {
        &self.inner.tracked().0
    }

    /// The driver that it is bound to, where sysfs says.
    pub fn driver(&self) -> Option<&str> {
        self.inner.sys.as_ref()?.driver.as_deref()
    }

    /// Whether it says that it can be reset (`VFIO_DEVICE_FLAGS_RESET`). Some can that do not say so.
    pub fn says_resettable(&self) -> bool {
        self.inner.resettable
    }

    /// Whether the kernel reports new initial data of pre-copy (`VFIO_PRECOPY_INFO_REINIT`): kernels since 7.1.
    pub fn reports_reinit(&self) -> bool {
        self.inner.reinit
    }

    fn new(id: DeviceId, opened: AttachedDevice, ram: Arc<GuestRam>) -> Result<Self, DeviceError> {
        const DOING: &str = "asking what the device is made of";
        let AttachedDevice { device, group, iommu, sys } = opened;
        let fd = (*device).as_fd();
        let refused = |error: uapi::UapiError| DeviceError::new(id.clone(), DOING, error.errno(), error);
        let info = uapi::device_info(fd).map_err(refused)?;
        if !info.pci || info.regions > REGIONS_MAX {
            return Err(DeviceError::new(id, DOING, None, KernelError::NotPci(info.regions)));
        }
        let regions = hardware::find_regions(&id, fd, info.regions)?;
        let mut irqs = [0; 3];
        for (index, count) in (0..info.irqs).zip(&mut irqs) {
            match uapi::irq_info(fd, index) {
                // MSI-X has at most 2048 vectors; more would be allocated for.
                Ok(kind) => *count = kind.count.min(2048),
                Err(error) if error.errno() == Some(Errno::INVAL) => {}
                Err(error) => return Err(refused(error)),
            }
        }
        let driver = sys.as_ref().and_then(|sys| sys.driver.as_deref());
        let flags = migrate::find_flags(&id, &device, driver);
        let reinit = match &flags {
            Ok(flags) if flags.pre_copy => uapi::opt_in_precopy_info_v2(fd).map_err(refused)?,
            _ => false,
        };
        let known = flags.as_ref().ok().copied();
        let port = DevicePort { device: device.clone(), reinit };
        let machine = StateMachine::new(id.clone(), Box::new(port), known);
        Ok(Self {
            inner: Arc::new(Inner {
                tracker: OnceLock::new(),
                windows: Arc::default(),
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
