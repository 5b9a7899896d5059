//! What a vfio-user device is made of, in the types that both ends share.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Region numbers of a PCI device (`VFIO_PCI_*_REGION_INDEX`); BARs are 0 to 5.
pub mod region_index {
    /// Expansion ROM.
    pub const ROM: u32 = 6;
    /// Configuration space.
    pub const CONFIG: u32 = 7;
    /// Legacy VGA ranges.
    pub const VGA: u32 = 8;
    /// Number of regions of a PCI device.
    pub const COUNT: u32 = 9;
}

/// Interrupt types of a PCI device (`VFIO_PCI_*_IRQ_INDEX`).
pub mod irq_index {
    /// INTx.
    pub const INTX: u32 = 0;
    /// MSI.
    pub const MSI: u32 = 1;
    /// MSI-X.
    pub const MSIX: u32 = 2;
    /// Error reporting (AER).
    pub const ERR: u32 = 3;
    /// Device release request.
    pub const REQ: u32 = 4;
    /// Number of interrupt types of a PCI device.
    pub const COUNT: u32 = 5;
}

/// Answer to `DEVICE_GET_INFO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `VFIO_DEVICE_FLAGS_RESET`: the device can be reset.
    pub resettable: bool,
    /// `VFIO_DEVICE_FLAGS_PCI`: it is a PCI device, the only kind that the protocol knows.
    pub pci: bool,
    /// Number of regions.
    pub num_regions: u32,
    /// Number of interrupt types.
    pub num_irqs: u32,
}

/// A part of a region that may be mapped; offsets count from the region's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmapArea {
    /// Offset of the first byte in the region.
    pub offset: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Answer to `DEVICE_GET_REGION_INFO`.
#[derive(Clone, Debug, Default)]
pub struct RegionInfo {
    /// Size in bytes; 0 for a region that the device lacks.
    pub size: u64,
    /// `VFIO_REGION_INFO_FLAG_READ`.
    pub read: bool,
    /// `VFIO_REGION_INFO_FLAG_WRITE`.
    pub write: bool,
    /// `VFIO_REGION_INFO_FLAG_MMAP`: `fd` may be mapped.
    pub mmap: bool,
    /// The parts that may be mapped. Empty with `mmap` set means the whole region.
    pub areas: Vec<MmapArea>,
    /// Added to an offset in the region to give the offset in `fd`.
    pub offset: u64,
    /// The file behind the region, where `mmap` is set.
    pub fd: Option<Arc<OwnedFd>>,
}

impl RegionInfo {
    /// The parts that may be mapped, with the rule for an empty list applied.
    pub fn mmap_areas(&self) -> Vec<MmapArea> {
        match (self.mmap, self.areas.is_empty()) {
            (false, _) => Vec::new(),
            (true, true) => vec![MmapArea { offset: 0, size: self.size }],
            (true, false) => self.areas.clone(),
        }
    }
}

/// One entry of the answer to `DEVICE_GET_REGION_IO_FDS`: accesses to a part of a region may go to a descriptor.
#[derive(Clone, Debug)]
pub struct IoFd {
    /// First byte, from the region's start.
    pub offset: u64,
    /// Length of the accesses in bytes; 0 where it does not matter.
    pub size: u64,
    /// Mechanism that the descriptor is for.
    pub kind: IoFdKind,
    /// Descriptor that the accesses go to. Entries may share one.
    pub fd: Arc<OwnedFd>,
}

/// Mechanism by which accesses reach an [`IoFd`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum IoFdKind {
    /// An eventfd that a write signals (KVM's ioeventfd).
    Eventfd {
        /// `KVM_IOEVENTFD_FLAG_*`.
        flags: u32,
        /// The value that a write must have, where the flags say so.
        datamatch: u64,
    },
    /// A socket that carries the accesses as messages (ioregionfd).
    Regionfd {
        /// `KVM_IOREGION_*`.
        flags: u32,
        /// Passed back with each access.
        user_data: u64,
    },
}

/// Answer to `DEVICE_GET_IRQ_INFO`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// Number of interrupts of the type.
    pub count: u32,
    /// `VFIO_IRQ_INFO_EVENTFD`: eventfds can be connected.
    pub eventfd: bool,
    /// `VFIO_IRQ_INFO_MASKABLE`: MASK and UNMASK work.
    pub maskable: bool,
    /// `VFIO_IRQ_INFO_AUTOMASKED`: an interrupt masks itself when it fires.
    pub automasked: bool,
    /// `VFIO_IRQ_INFO_NORESIZE`: the interrupts are set up as one set.
    pub noresize: bool,
}

/// Action of SET_IRQS (`VFIO_IRQ_SET_ACTION_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Masks the interrupts.
    Mask,
    /// Unmasks the interrupts.
    Unmask,
    /// Raise; with eventfds, connect.
    Trigger,
}

/// To which interrupts of a range SET_IRQS does it (`VFIO_IRQ_SET_DATA_*`), at the client.
#[derive(Clone, Copy, Debug)]
pub enum IrqData<'a> {
    /// To so many, all of them. Zero, with [`IrqAction::Trigger`] at start 0, disables the whole type.
    None(u32),
    /// To those whose entry is true.
    Bool(&'a [bool]),
    /// Connects these eventfds, one per interrupt. More than `max_msg_fds` go in several messages.
    Eventfd(&'a [BorrowedFd<'a>]),
    /// Disconnects the eventfds of so many.
    Disconnect(u32),
}

/// Rights of a device to a DMA mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prot {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl Prot {
    /// Read only.
    pub const READ: Self = Self { read: true, write: false };
    /// Read and write.
    pub const READ_WRITE: Self = Self { read: true, write: true };
}

/// A stretch of client memory that a device may reach, as the server's back end receives it.
#[derive(Debug)]
#[non_exhaustive]
pub struct DmaMapping {
    /// First address on the device's bus.
    pub iova: u64,
    /// Length in bytes.
    pub len: u64,
    /// Rights of the device to the range.
    pub prot: Prot,
    /// The file behind it, to be mapped; `None` where it can be reached through
    /// [`DmaChannel`](crate::DmaChannel) alone.
    pub fd: Option<OwnedFd>,
    /// Offset in `fd` of the first byte.
    pub offset: u64,
}

/// A range of bus addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRange {
    /// First bus address of the range.
    pub iova: u64,
    /// Length in bytes.
    pub len: u64,
}

/// One write of `REGION_WRITE_MULTI`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionWrite {
    /// Offset in the region.
    pub offset: u64,
    /// Index of the region.
    pub region: u32,
    /// Number of bytes of `data` that are written, 1 to 8.
    pub count: u32,
    /// Bytes to write, from the front.
    pub data: [u8; 8],
}

/// Pre-copy estimates, as in `struct vfio_precopy_info`. Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrecopyInfo {
    /// Left of the initial data.
    pub initial_bytes: u64,
    /// Changed since it was read.
    pub dirty_bytes: u64,
    /// `VFIO_PRECOPY_INFO_REINIT`: the initial data began anew.
    pub reinit: bool,
}
