//! The hardware face of a PCI device: what a VMM needs of it besides migration, to put it before a guest.
//!
//! A second face next to [`Device`](crate::Device), implemented by the same back ends: regions (BARs and config
//! space), interrupts and DMA mappings. Indices are those of `include/uapi/linux/vfio.h` (`VFIO_PCI_*_REGION_INDEX`,
//! `VFIO_PCI_*_IRQ_INDEX`), which vfio-user uses too.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use vfio_migration_types::{DeviceId, Iova, Range};

use crate::error::DeviceError;

/// A region of a PCI device (`VFIO_PCI_*_REGION_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionIndex(pub u32);

impl RegionIndex {
    /// BAR 0. BAR n is `RegionIndex(n)`, n up to 5.
    pub const BAR0: Self = Self(0);
    /// Index of the expansion ROM.
    pub const ROM: Self = Self(6);
    /// Index of config space.
    pub const CONFIG: Self = Self(7);
}

/// A kind of interrupt of a PCI device (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IrqIndex {
    /// The interrupt pin, INTx.
    Intx,
    /// MSI vectors, as one interrupt index.
    Msi,
    /// MSI-X vectors, as one interrupt index.
    Msix,
}

impl IrqIndex {
    /// The number that the uAPI gives it.
    pub fn number(self) -> u32 {
        match self {
            Self::Intx => 0,
            Self::Msi => 1,
            Self::Msix => 2,
        }
    }
}

/// As the PCI specifications spell it.
impl fmt::Display for IrqIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Intx => "INTx",
            Self::Msi => "MSI",
            Self::Msix => "MSI-X",
        })
    }
}

/// Properties of a region (`VFIO_DEVICE_GET_REGION_INFO`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciRegion {
    /// Index of the region at the device.
    pub index: RegionIndex,
    /// Bytes; 0 where the region is absent.
    pub size: u64,
    /// The region may be read.
    pub readable: bool,
    /// The region may be written.
    pub writable: bool,
    /// Parts of the region that may be mapped, in bytes from its start; empty when all accesses must be trapped, or no
    /// descriptor came with it. Each lies within `size`; they do not overlap.
    pub mappable: Vec<Range<u64>>,
}

/// A device file to map a region from.
#[derive(Clone, Copy, Debug)]
pub struct RegionFile<'a> {
    /// The device file, as it is mapped.
    pub fd: BorrowedFd<'a>,
    /// Offset of the region's byte 0 in the file.
    pub offset: u64,
}

/// A doorbell: an eventfd that takes the place of a guest's write (`VFIO_USER_DEVICE_GET_REGION_IO_FDS`).
#[derive(Debug)]
pub struct Doorbell {
    /// First byte in the region.
    pub offset: u64,
    /// Width of the write in bytes: 1, 2, 4 or 8; 0 for any width.
    pub size: u64,
    /// The value that rings it; `None` for any value.
    pub datamatch: Option<u64>,
    /// The eventfd to signal instead of forwarding the write.
    pub fd: OwnedFd,
}

/// The directions in which a device may use a DMA mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaAccess {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl DmaAccess {
    /// Reading and writing.
    pub const BOTH: Self = Self { read: true, write: true };
}

/// The hardware of a PCI device.
///
/// Methods block for as long as the device takes, under the back end's time limit, and may be called from any
/// thread and at the same time. Nothing here checks that the guest is paused: a VMM does not call the region
/// methods on a guest's behalf while a migration holds the guest still.
pub trait PciHardware: fmt::Debug + Send + Sync {
    /// The device's name, as in [`Device::id`](crate::Device::id).
    fn id(&self) -> &DeviceId;

    /// All regions that exist, in the order of their index. Known since the device was opened: no I/O.
    fn regions(&self) -> &[PciRegion];

    /// The file to map `index` from, when any part of it is [mappable](PciRegion::mappable).
    fn region_file(&self, index: RegionIndex) -> Option<RegionFile<'_>>;

    /// Reads `into.len()` bytes at `offset` of a region. One access of the guest is one call (1, 2, 4 or 8 bytes);
    /// config space may be read in one piece.
    ///
    /// # Errors
    /// The range is outside of the region, or the device refused, read short, or is lost.
    fn region_read(&self, index: RegionIndex, offset: u64, into: &mut [u8]) -> Result<(), DeviceError>;

    /// Writes `from` at `offset` of a region, and returns when the device has taken it.
    ///
    /// # Errors
    /// As [`region_read`](Self::region_read).
    fn region_write(&self, index: RegionIndex, offset: u64, from: &[u8]) -> Result<(), DeviceError>;

    /// The doorbells of a region; none when the device offers none. Each call hands out descriptors anew.
    fn doorbells(&self, index: RegionIndex) -> Result<Vec<Doorbell>, DeviceError>;

    /// Number of interrupts of this kind; 0 where there are none. Known since the device was opened: no I/O.
    fn irq_count(&self, index: IrqIndex) -> u32;

    /// Whether the kind is set up as a set (`VFIO_IRQ_INFO_NORESIZE`): an interrupt beyond those that were there when
    /// it was enabled is connected only after all of it was disabled. Known since the device was opened: no I/O.
    fn irq_noresize(&self, _index: IrqIndex) -> bool {
        false
    }

    /// Enables the kind with no interrupt connected, where the device needs that to keep what it raises meanwhile
    /// (MSI-X of a kernel device: its own pending bits). Elsewhere nothing is done, and nothing has to be.
    fn enable_irqs(&self, _index: IrqIndex) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Connects interrupts `start ..` to eventfds, by as few SET_IRQS as the back end allows (one on the kernel,
    /// `max_msg_fds` at a time on vfio-user). `None` disconnects that one. Enables the kind when it was not.
    ///
    /// The device keeps its own reference to each descriptor.
    ///
    /// # Errors
    /// Also when the host has not so many: see [`DeviceError::fewer_interrupts`].
    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), DeviceError>;

    /// Disconnects all interrupts of this kind (`VFIO_IRQ_SET_DATA_NONE`, count 0). Succeeds when none is connected.
    fn disable_irqs(&self, index: IrqIndex) -> Result<(), DeviceError>;

    /// Raises one interrupt as if the device had (`VFIO_IRQ_SET_ACTION_TRIGGER`, `DATA_NONE`).
    fn trigger_irq(&self, index: IrqIndex, vector: u32) -> Result<(), DeviceError>;

    /// Masks or unmasks one interrupt at the device.
    ///
    /// # Errors
    /// Also where the kind cannot be masked (MSI-X on the kernel: `EINVAL`). A VMM that masks by exchanging eventfds
    /// needs it for INTx alone.
    fn mask_irq(&self, index: IrqIndex, vector: u32, masked: bool) -> Result<(), DeviceError>;

    /// Connects the eventfd that unmasks INTx after the guest has acknowledged it (KVM's resamplefd), since the device
    /// masks a level interrupt as it signals it (`VFIO_IRQ_SET_ACTION_UNMASK`, `DATA_EVENTFD`); `None` takes it away.
    /// INTx is connected by [`set_irq_eventfds`](Self::set_irq_eventfds) before.
    ///
    /// # Errors
    /// Also where the device, or its server, does not take one: a VMM then calls [`mask_irq`](Self::mask_irq) itself.
    fn set_intx_resample(&self, eventfd: Option<BorrowedFd<'_>>) -> Result<(), DeviceError>;

    /// Lets the device reach `iova` by DMA. With `file`, (descriptor, byte offset), the device maps that memory: of guest RAM,
    /// what `GuestRam::shared_file` gives. Without, it is guest RAM at that guest physical address which has no such file: a
    /// kernel device maps it by its address in this process, a vfio-user server has to ask for each access (DMA_READ and
    /// DMA_WRITE).
    ///
    /// # Errors
    /// Also when the range overlaps one that is mapped, and when the file is one of guest RAM that is mapped private, which
    /// does not hold what the guest sees.
    fn dma_map(
        &self,
        iova: Range<Iova>,
        access: DmaAccess,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), DeviceError>;

    /// Takes away exactly a range that was mapped. When it returns the device does not touch it any more.
    fn dma_unmap(&self, iova: Range<Iova>) -> Result<(), DeviceError>;
}
