//! iommufd, `/dev/iommu`: address spaces, page tables, and the IOMMU's own dirty tracking.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use iommufd_bindings as uapi;
use rustix::ioctl::{Opcode, Updater, opcode};
use vfio_migration_types::{Granule, Iova, Range};

use crate::error::UapiError;
use crate::feature::argsz;
use crate::host_memory::{Dma, HostMemory};
use crate::mapped::Mapped;
use crate::report;

const DESTROY: Opcode = number(uapi::IOMMUFD_CMD_DESTROY);
const IOAS_ALLOC: Opcode = number(uapi::IOMMUFD_CMD_IOAS_ALLOC);
const IOAS_MAP: Opcode = number(uapi::IOMMUFD_CMD_IOAS_MAP);
const IOAS_UNMAP: Opcode = number(uapi::IOMMUFD_CMD_IOAS_UNMAP);
const HWPT_ALLOC: Opcode = number(uapi::IOMMUFD_CMD_HWPT_ALLOC);
const GET_HW_INFO: Opcode = number(uapi::IOMMUFD_CMD_GET_HW_INFO);
const SET_DIRTY_TRACKING: Opcode = number(uapi::IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING);
const GET_DIRTY_BITMAP: Opcode = number(uapi::IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP);

/// `_IO(IOMMUFD_TYPE, command)`.
#[expect(clippy::cast_possible_truncation, reason = "commands are 128 and a few, checked here")]
const fn number(command: u32) -> Opcode {
    assert!(command < 256);
    opcode::none(uapi::IOMMUFD_TYPE, command as u8)
}

/// Abilities of the IOMMU in front of a device: `struct iommu_hw_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HwInfo {
    /// `enum iommu_hw_info_type`: 0 none, 1 Intel VT-d, 2 ARM SMMUv3, …
    pub kind: u32,
    /// `IOMMU_HW_CAP_DIRTY_TRACKING`: a page table may be made that tracks dirty pages.
    pub dirty_tracking: bool,
}

/// An address space of an iommufd (IOAS), and what is mapped in it.
///
/// Memory that is mapped stays mapped in this process too: the address space keeps it until it is unmapped. Dropping it
/// unmaps everything.
#[derive(Debug)]
pub struct Ioas {
    fd: Arc<OwnedFd>,
    id: u32,
    mapped: Mapped,
}

impl Ioas {
    /// Makes an empty address space of the iommufd `fd`.
    pub fn new(fd: Arc<OwnedFd>) -> Result<Self, UapiError> {
        let mut request = uapi::iommu_ioas_alloc {
            size: const { argsz(size_of::<uapi::iommu_ioas_alloc>()) },
            ..Default::default()
        };
        // SAFETY: this ioctl's structure, of plain integers.
        unsafe { call::<IOAS_ALLOC, _>(fd.as_fd(), &mut request, "making an address space of the iommufd") }?;
        Ok(Self { fd, id: request.out_ioas_id, mapped: Mapped::default() })
    }

    /// Id of the address space, to attach a device to.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The iommufd, which holds everything that is made of it.
    pub fn iommufd(&self) -> Arc<OwnedFd> {
        self.fd.clone()
    }

    /// The iommufd's descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Lets the devices of this address space reach `memory` at `iova`, and keeps the memory until it is unmapped.
    ///
    /// # Errors
    /// [`UapiError::Overlaps`]; ENOMEM beyond the limit on locked memory; EINVAL for addresses that the IOMMU reserves.
    pub fn map(&self, iova: Range<Iova>, memory: &HostMemory, dma: Dma) -> Result<(), UapiError> {
        self.mapped.add(iova, memory, || {
            let flag = |on: bool, flag: u32| if on { flag } else { 0 };
            let mut request = uapi::iommu_ioas_map {
                size: const { argsz(size_of::<uapi::iommu_ioas_map>()) },
                flags: uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
                    | flag(dma.read, uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE)
                    | flag(dma.write, uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE),
                ioas_id: self.id,
                __reserved: 0,
                user_va: memory.address(),
                length: iova.len(),
                iova: iova.start().0,
            };
            // SAFETY: this ioctl's structure; the memory that it names stays mapped as long as `mapped` keeps it, and
            // may be written by others at any time (HostMemory's contract).
            unsafe { call::<IOAS_MAP, _>(self.fd(), &mut request, "mapping memory for DMA") }
        })
    }

    /// Takes away exactly a range that was mapped. When it returns no device reaches it any more.
    ///
    /// What the IOMMU had tracked of it is lost: read it before, with `keep`, if it stays the guest's.
    pub fn unmap(&self, iova: Range<Iova>) -> Result<(), UapiError> {
        self.mapped.remove(iova, || {
            let mut request = uapi::iommu_ioas_unmap {
                size: const { argsz(size_of::<uapi::iommu_ioas_unmap>()) },
                ioas_id: self.id,
                iova: iova.start().0,
                length: iova.len(),
            };
            // SAFETY: this ioctl's structure, of plain integers.
            unsafe { call::<IOAS_UNMAP, _>(self.fd(), &mut request, "unmapping memory") }
        })
    }

    /// Ranges that are mapped, in order.
    pub fn mapped(&self) -> Vec<Range<Iova>> {
        self.mapped.ranges()
    }

    /// Makes a page table (HWPT) of this address space for the device `device` (its id, from
    /// [`bind_iommufd`](crate::bind_iommufd)) that can track dirty pages. The device is then attached to it. Gives its
    /// id.
    ///
    /// # Errors
    /// EOPNOTSUPP where the IOMMU cannot: it must be asked for now, and cannot be added later. ENOENT and EINVAL for an
    /// emulated device (mdev), which has no IOMMU.
    pub fn make_tracking_table(&self, device: u32) -> Result<u32, UapiError> {
        let mut request = uapi::iommu_hwpt_alloc {
            size: const { argsz(size_of::<uapi::iommu_hwpt_alloc>()) },
            flags: uapi::iommufd_hwpt_alloc_flags_IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
            dev_id: device,
            pt_id: self.id,
            ..Default::default()
        };
        // SAFETY: this ioctl's structure; it names no memory.
        unsafe {
            call::<HWPT_ALLOC, _>(self.fd(), &mut request, "making a page table that tracks dirty pages")
        }?;
        Ok(request.out_hwpt_id)
    }
}

impl Drop for Ioas {
    fn drop(&mut self) {
        for iova in self.mapped.ranges() {
            if self.unmap(iova).is_err() {
                // A device may still reach it: better lost than given to somebody else.
                self.mapped.leak();
                return;
            }
        }
        // While a device is attached the kernel refuses (EBUSY); it goes with the iommufd.
        let _ = destroy(self.fd(), self.id);
    }
}

/// What the IOMMU in front of `device` (its id) can do. ENOENT or EOPNOTSUPP for an emulated device, which has none.
pub fn hw_info(iommufd: BorrowedFd<'_>, device: u32) -> Result<HwInfo, UapiError> {
    let mut info = Hardware {
        size: const { argsz(size_of::<Hardware>()) },
        flags: 0,
        dev_id: device,
        data_len: 0,
        data_uptr: 0,
        out_data_type: 0,
        out_max_pasid_log2: 0,
        reserved: [0; 3],
        out_capabilities: 0,
    };
    // SAFETY: `struct iommu_hw_info`; no memory is offered for the data that depends on the IOMMU.
    unsafe { call::<GET_HW_INFO, _>(iommufd, &mut info, "asking what the IOMMU can do") }?;
    let tracks = u64::from(uapi::iommufd_hw_capabilities_IOMMU_HW_CAP_DIRTY_TRACKING);
    Ok(HwInfo { kind: info.out_data_type, dirty_tracking: info.out_capabilities & tracks != 0 })
}

/// Begins or ends the tracking of dirty pages in page table `table`. Beginning clears all dirty bits, also when it had
/// begun: twice loses them.
pub fn set_dirty_tracking(iommufd: BorrowedFd<'_>, table: u32, on: bool) -> Result<(), UapiError> {
    let enable = uapi::iommufd_hwpt_set_dirty_tracking_flags_IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
    let mut request = uapi::iommu_hwpt_set_dirty_tracking {
        size: const { argsz(size_of::<uapi::iommu_hwpt_set_dirty_tracking>()) },
        flags: if on { enable } else { 0 },
        hwpt_id: table,
        __reserved: 0,
    };
    // SAFETY: this ioctl's structure, of plain integers.
    unsafe { call::<SET_DIRTY_TRACKING, _>(iommufd, &mut request, "switching the IOMMU's dirty tracking") }
}

/// ORs into `bitmap` which pages of `iova` were written through page table `table` since the last time. Bit `n` is page
/// `n` from the start of the range. Unless `keep`, the IOMMU forgets them.
///
/// Ask for all of one mapped range at a time. The kernel stops at a hole and calls it a success (`io_pagetable.c` leaves
/// the result of the walk alone). Of a huge page of the IOMMU's that the range begins in, it forgets the part before
/// the range as well. Of a table that does not track, it reports nothing, and no error.
pub fn iommu_dirty(
    iommufd: BorrowedFd<'_>,
    table: u32,
    iova: Range<Iova>,
    granule: Granule,
    bitmap: &mut [u64],
    keep: bool,
) -> Result<(), UapiError> {
    let no_clear = uapi::iommufd_hwpt_get_dirty_bitmap_flags_IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR;
    report::read(iova, granule, bitmap, |data| {
        let mut request = uapi::iommu_hwpt_get_dirty_bitmap {
            size: const { argsz(size_of::<uapi::iommu_hwpt_get_dirty_bitmap>()) },
            hwpt_id: table,
            flags: if keep { no_clear } else { 0 },
            __reserved: 0,
            iova: iova.start().0,
            length: iova.len(),
            page_size: granule.bytes(),
            data,
        };
        // SAFETY: this ioctl's structure; the kernel sets bits in the memory pages that the bitmap takes, which are there
        // to be written (`report`), and keeps no pointer to them.
        unsafe { call::<GET_DIRTY_BITMAP, _>(iommufd, &mut request, "reading the IOMMU's dirty pages") }
    })
}

/// Destroys an object of the iommufd: a page table, once no device is attached to it.
pub fn destroy(iommufd: BorrowedFd<'_>, id: u32) -> Result<(), UapiError> {
    let mut request = uapi::iommu_destroy { size: const { argsz(size_of::<uapi::iommu_destroy>()) }, id };
    // SAFETY: this ioctl's structure, of plain integers.
    unsafe { call::<DESTROY, _>(iommufd, &mut request, "destroying an object of the iommufd") }
}

/// `struct iommu_hw_info`, whose union holds one number of either name.
#[repr(C)]
struct Hardware {
    size: u32,
    flags: u32,
    dev_id: u32,
    data_len: u32,
    data_uptr: u64,
    out_data_type: u32,
    out_max_pasid_log2: u8,
    reserved: [u8; 3],
    out_capabilities: u64,
}

/// # Safety
/// `T` is the structure that `OPCODE` takes, its first field says its size, and what it points to is good for what the
/// kernel does with it.
unsafe fn call<const OPCODE: Opcode, T>(
    fd: BorrowedFd<'_>,
    request: &mut T,
    doing: &'static str,
) -> Result<(), UapiError> {
    // SAFETY: by this function's contract.
    unsafe { rustix::ioctl::ioctl(fd, Updater::<OPCODE, T>::new(request)) }
        .map_err(|source| UapiError::System { doing, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_the_uapis() {
        assert_eq!((DESTROY, IOAS_ALLOC, IOAS_MAP, IOAS_UNMAP), (0x3b80, 0x3b81, 0x3b85, 0x3b86));
        assert_eq!((HWPT_ALLOC, GET_HW_INFO), (0x3b89, 0x3b8a));
        assert_eq!((SET_DIRTY_TRACKING, GET_DIRTY_BITMAP), (0x3b8b, 0x3b8c));
        assert_eq!(size_of::<uapi::iommu_ioas_map>(), 40);
        assert_eq!(size_of::<uapi::iommu_hwpt_alloc>(), 48);
        assert_eq!(size_of::<uapi::iommu_hwpt_get_dirty_bitmap>(), 48);
        assert_eq!(size_of::<Hardware>(), size_of::<uapi::iommu_hw_info>());
        assert_eq!(
            std::mem::offset_of!(Hardware, out_capabilities),
            std::mem::offset_of!(uapi::iommu_hw_info, out_capabilities)
        );
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let null = Arc::new(OwnedFd::from(std::fs::File::open("/dev/null").unwrap()));
        let mut bits = [0; 1];
        let range = Range::new(Iova(0), 4096).unwrap();
        let granule = Granule::new(4096).unwrap();
        let refusals = [
            Ioas::new(null.clone()).map(|_| ()),
            hw_info(null.as_fd(), 1).map(|_| ()),
            set_dirty_tracking(null.as_fd(), 1, true),
            iommu_dirty(null.as_fd(), 1, range, granule, &mut bits, false),
            destroy(null.as_fd(), 1),
        ];
        for refused in refusals {
            assert_eq!(refused.unwrap_err().errno(), Some(rustix::io::Errno::NOTTY));
        }
    }
}
