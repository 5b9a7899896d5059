//! Errors of a kernel device, with what its operator can do.

use std::path::PathBuf;

use rustix::io::Errno;

/// A cause that the kernel back end found itself; the source of a [`DeviceError`](crate::DeviceError) or of a
/// [`TransitionError`](crate::TransitionError).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// The text names no device.
    #[error(
        "'{0}' names no VFIO device (want a PCI address such as 0000:01:00.0, an mdev's UUID, or /dev/vfio/devices/vfioN)"
    )]
    Path(String),
    /// The host has no such device.
    #[error("there is no {0}")]
    NoDevice(String),
    /// The device belongs to a driver that is no VFIO driver, or to none.
    #[error("{device} is bound to {}; {remedy}", driver.as_deref().unwrap_or("no driver"))]
    NotVfio {
        /// The device, by its PCI address or UUID.
        device: String,
        /// The driver that has the device, if any.
        driver: Option<String>,
        /// The change that its operator can make.
        remedy: String,
    },
    /// The device has no IOMMU group.
    #[error(
        "{0} has no IOMMU group: the host's IOMMU is off (enable it in the firmware, and boot with intel_iommu=on or amd_iommu=on)"
    )]
    NoGroup(String),
    /// Not all devices of the group are bound to VFIO drivers.
    #[error(
        "IOMMU group {0} is not viable: bind every device in /sys/kernel/iommu_groups/{0}/devices to a VFIO driver, or to none"
    )]
    NotViable(String),
    /// A file of VFIO or iommufd could not be opened.
    #[error("{} cannot be opened{}", path.display(), remedy.map(|remedy| format!("; {remedy}")).unwrap_or_default())]
    Open {
        /// The file that was to be opened.
        path: PathBuf,
        /// The change that its operator can make, where the errno suggests one.
        remedy: Option<&'static str>,
        /// The errno of opening it.
        #[source]
        source: Errno,
    },
    /// The kernel refused in a way that its operator can do something about.
    #[error("{remedy}")]
    Refused {
        /// The change that its operator can make.
        remedy: &'static str,
        /// The system call that was refused.
        #[source]
        source: vfio_migration_uapi::UapiError,
    },
    /// An address space is shared by devices of one guest.
    #[error("the address space is that of another guest's devices (DmaSpace): its RAM is another")]
    OtherRam,
    /// The kernel has no TYPE1v2 IOMMU back end.
    #[error("the kernel offers no TYPE1v2 IOMMU for its containers; modprobe vfio_iommu_type1")]
    NoType1,
    /// A descriptor that was handed over is no VFIO device's.
    #[error("the descriptor is no VFIO device's, or that of a device which is not bound to an iommufd yet")]
    NotDevice(#[source] vfio_migration_uapi::UapiError),
    /// A descriptor that was handed over is no container's.
    #[error("the descriptor is no VFIO container's (/dev/vfio/vfio)")]
    NotContainer(#[source] vfio_migration_uapi::UapiError),
    /// A descriptor that was handed over is no iommufd's.
    #[error("the descriptor is no iommufd's (/dev/iommu)")]
    NotIommufd(#[source] vfio_migration_uapi::UapiError),
    /// The device is no PCI device.
    #[error("it is no PCI device, or has {0} regions")]
    NotPci(u32),
    /// The kernel describes a region in a way that cannot be.
    #[error("mappable area {start:#x}+{len:#x} of a region of {size:#x} bytes")]
    Region {
        /// First byte of the area, from the region's start.
        start: u64,
        /// Length of the area, in bytes.
        len: u64,
        /// Bytes of the region.
        size: u64,
    },
    /// An access leaves the region, or there is no such region.
    #[error("{len:#x} bytes at {offset:#x} leave region {region} of {size:#x} bytes")]
    OutsideRegion {
        /// Index of the region.
        region: u32,
        /// First byte of the access, from the region's start.
        offset: u64,
        /// Length of the access, in bytes.
        len: u64,
        /// Bytes of the region, 0 where there is none.
        size: u64,
    },
    /// The device took or gave fewer bytes than asked.
    #[error("the device moved {moved} bytes of {wanted}")]
    ShortAccess {
        /// Number of bytes moved.
        moved: usize,
        /// Number of bytes asked for.
        wanted: usize,
    },
    /// A DMA mapping without a file, and not of guest RAM that has none.
    #[error(
        "a kernel device maps memory itself: it needs a file, or guest RAM at that address; it cannot ask for each access"
    )]
    NoFile,
    /// Memory that is not guest RAM cannot be given to the IOMMU.
    #[error(
        "the IOMMU does not take another device's BAR: there is no peer-to-peer DMA to it from this device"
    )]
    NoPeerDma(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The range overlaps a mapped one, or is not mapped.
    #[error("the range {start:#x}+{len:#x} {what}")]
    Window {
        /// First address of the range.
        start: u64,
        /// Length of the range, in bytes.
        len: u64,
        /// The fault of the range, as a verb phrase.
        what: &'static str,
    },
}

impl KernelError {
    /// A file that could not be opened, with what the errno suggests.
    pub(super) fn open(path: PathBuf, source: Errno) -> Self {
        let is = |name: &str| path.ends_with(name);
        let remedy = match source {
            Errno::NOENT | Errno::NODEV | Errno::NXIO if is("iommu") => {
                "modprobe iommufd, on a kernel that has CONFIG_IOMMUFD"
            }
            Errno::NOENT | Errno::NODEV | Errno::NXIO if is("vfio/vfio") => {
                "modprobe vfio, and vfio_iommu_type1"
            }
            Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                "bind the device to a VFIO driver (modprobe vfio-pci)"
            }
            Errno::ACCESS | Errno::PERM => {
                "give this user read and write access to it (chown, or a udev rule)"
            }
            Errno::BUSY => Self::remedy(source),
            Errno::MFILE | Errno::NFILE => "raise the limit on open files",
            _ => return Self::Open { path, remedy: None, source },
        };
        Self::Open { path, remedy: Some(remedy), source }
    }

    /// The remedy that an errno of opening suggests.
    pub(super) fn remedy(errno: Errno) -> &'static str {
        match errno {
            Errno::BUSY => "another process, or another device of the same IOMMU group here, holds it",
            Errno::NOMEM => "the limit on locked memory may be too low (ulimit -l)",
            _ => {
                "the kernel does not permit it: without interrupt remapping, vfio_iommu_type1 or iommufd takes \
                 allow_unsafe_interrupts=1; see the kernel's log"
            }
        }
    }
}
