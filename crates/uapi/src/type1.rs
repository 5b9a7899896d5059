//! A type1 container: the IOMMU address space of groups, with its own idea of dirty pages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::ioctl::{IntegerSetter, Opcode, Updater, opcode};
use vfio_bindings::bindings::vfio as uapi;
use vfio_migration_types::{Granule, Iova, Range};

use crate::capability::{self, Chain, InfoAnswer};
use crate::error::UapiError;
use crate::feature::argsz;
use crate::host_memory::{Dma, HostMemory};
use crate::mapped::Mapped;
use crate::report;

/// `_IO(VFIO_TYPE, VFIO_BASE + 0)`.
const GET_API_VERSION: Opcode = opcode::none(uapi::VFIO_TYPE, 100);
/// `_IO(VFIO_TYPE, VFIO_BASE + 1)`.
const CHECK_EXTENSION: Opcode = opcode::none(uapi::VFIO_TYPE, 101);
/// `_IO(VFIO_TYPE, VFIO_BASE + 2)`.
const SET_IOMMU: Opcode = opcode::none(uapi::VFIO_TYPE, 102);
/// `_IO(VFIO_TYPE, VFIO_BASE + 12)`.
const IOMMU_GET_INFO: Opcode = opcode::none(uapi::VFIO_TYPE, 112);
/// `_IO(VFIO_TYPE, VFIO_BASE + 13)`.
const IOMMU_MAP_DMA: Opcode = opcode::none(uapi::VFIO_TYPE, 113);
/// `_IO(VFIO_TYPE, VFIO_BASE + 14)`.
const IOMMU_UNMAP_DMA: Opcode = opcode::none(uapi::VFIO_TYPE, 114);
/// `_IO(VFIO_TYPE, VFIO_BASE + 17)`.
const IOMMU_DIRTY_PAGES: Opcode = opcode::none(uapi::VFIO_TYPE, 117);

/// Words of the largest bitmap that the kernel takes: 2^31 pages.
const WORDS_MAX: usize = 1 << 25;

/// Abilities of a type1 container: `struct vfio_iommu_type1_info` and its capabilities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type1Info {
    /// Page sizes that it can map, one bit each.
    pub page_sizes: u64,
    /// `VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION`: it can report dirty pages. What that is worth depends on the devices:
    /// one behind an IOMMU that pins nothing makes every mapped page dirty, always.
    pub dirty_pages: Option<Type1Dirty>,
    /// `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`: addresses that may be mapped, both ends included. Empty when the kernel
    /// does not say.
    pub usable: Vec<(u64, u64)>,
    /// `VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`: mappings that may still be made.
    pub mappings_left: Option<u32>,
}

/// Form in which a container reports dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Type1Dirty {
    /// Page sizes that a report may be asked in, one bit each. Only the smallest is ever taken.
    pub page_sizes: u64,
    /// Most bytes of a bitmap.
    pub max_bitmap_size: u64,
}

/// A container with a type1 v2 IOMMU, and what is mapped in it.
///
/// Memory that is mapped stays mapped in this process too: the container keeps it until it is unmapped. Dropping the
/// container unmaps everything first, since others may hold its descriptor (a group does).
#[derive(Debug)]
pub struct Type1 {
    fd: OwnedFd,
    mapped: Mapped,
}

impl Type1 {
    /// Makes a container of a descriptor of `/dev/vfio/vfio`, newly opened or handed over by whoever set it up.
    ///
    /// # Errors
    /// [`UapiError::ApiVersion`]; ENOTTY when it is no such descriptor.
    pub fn new(fd: OwnedFd) -> Result<Self, UapiError> {
        // SAFETY: this ioctl takes no argument and returns a number.
        let version =
            unsafe { rustix::ioctl::ioctl(&fd, Query::<GET_API_VERSION>(0)) }.map_err(|source| {
                UapiError::System { doing: "asking for the version of the VFIO API", source }
            })?;
        if version != 0 {
            return Err(UapiError::ApiVersion(version));
        }
        Ok(Self { fd, mapped: Mapped::default() })
    }

    /// The container's descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Whether the container knows type1 v2.
    pub fn has_type1v2(&self) -> Result<bool, UapiError> {
        // SAFETY: the argument is a number and so is the answer.
        unsafe { rustix::ioctl::ioctl(&self.fd, Query::<CHECK_EXTENSION>(uapi::VFIO_TYPE1v2_IOMMU as usize)) }
            .map(|answer| answer > 0)
            .map_err(|source| UapiError::System { doing: "asking for the kinds of IOMMU", source })
    }

    /// Gives it its IOMMU. A group is in it.
    pub fn set_iommu(&self) -> Result<(), UapiError> {
        // SAFETY: the argument is a number.
        let set = unsafe { IntegerSetter::<SET_IOMMU>::new_usize(uapi::VFIO_TYPE1v2_IOMMU as usize) };
        // SAFETY: as above; the kernel keeps nothing of ours.
        unsafe { rustix::ioctl::ioctl(&self.fd, set) }
            .map_err(|source| UapiError::System { doing: "setting the container's IOMMU", source })
    }

    /// Abilities of the container, whose IOMMU is set.
    pub fn info(&self) -> Result<Type1Info, UapiError> {
        let doing = "asking what the container's IOMMU can do";
        let answer = capability::ask(size_of::<uapi::vfio_iommu_type1_info>(), doing, |buffer| {
            // SAFETY: the buffer begins with the structure that the uAPI gives this ioctl, its argsz says how many
            // bytes it holds, and the kernel writes no more.
            unsafe { buffer.ioctl::<IOMMU_GET_INFO>(self.fd.as_fd()) }
        })?;
        parse(&answer)
    }

    /// Lets its devices reach `memory` at `iova`, and keeps the memory until it is unmapped. Pins it, if a device is
    /// behind an IOMMU: RLIMIT_MEMLOCK counts.
    ///
    /// # Errors
    /// [`UapiError::Overlaps`]; ENOMEM beyond the limit on locked memory; EINVAL for addresses that are not of whole
    /// pages, or that the IOMMU reserves.
    pub fn map(&self, iova: Range<Iova>, memory: &HostMemory, dma: Dma) -> Result<(), UapiError> {
        self.mapped.add(iova, memory, || {
            let flag = |on: bool, flag: u32| if on { flag } else { 0 };
            let mut map = uapi::vfio_iommu_type1_dma_map {
                argsz: const { argsz(size_of::<uapi::vfio_iommu_type1_dma_map>()) },
                flags: flag(dma.read, uapi::VFIO_DMA_MAP_FLAG_READ)
                    | flag(dma.write, uapi::VFIO_DMA_MAP_FLAG_WRITE),
                vaddr: memory.address(),
                iova: iova.start().0,
                size: iova.len(),
            };
            // SAFETY: the structure that the uAPI gives this ioctl; the memory that it names stays mapped as long as
            // `mapped` keeps it, and may be written by others at any time (HostMemory's contract).
            unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<IOMMU_MAP_DMA, _>::new(&mut map)) }
                .map_err(|source| UapiError::System { doing: "mapping memory for DMA", source })
        })
    }

    /// Takes away exactly a range that was mapped. When it returns no device reaches it any more.
    pub fn unmap(&self, iova: Range<Iova>) -> Result<(), UapiError> {
        self.mapped.remove(iova, || self.unmap_range(iova))
    }

    /// Begins to track dirty pages. Begun twice, it goes on.
    pub fn start_dirty(&self) -> Result<(), UapiError> {
        self.dirty_pages(uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_START, "starting the container's dirty tracking")
    }

    /// Ends dirty tracking.
    pub fn stop_dirty(&self) -> Result<(), UapiError> {
        self.dirty_pages(uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, "stopping the container's dirty tracking")
    }

    /// ORs into `bitmap` which pages of `iova` are dirty, and makes the kernel forget them. `granule` is the smallest
    /// of [`Type1Dirty::page_sizes`]; `iova` bisects no mapping. Bit `n` is page `n` from the start of the range.
    pub fn report_dirty(
        &self,
        iova: Range<Iova>,
        granule: Granule,
        bitmap: &mut [u64],
    ) -> Result<(), UapiError> {
        let mut found = scratch(iova, granule, bitmap)?;
        let mut request = DirtyReport {
            argsz: const { argsz(size_of::<DirtyReport>()) },
            flags: uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
            get: uapi::vfio_iommu_type1_dirty_bitmap_get {
                iova: iova.start().0,
                size: iova.len(),
                bitmap: describe(granule, &mut found),
            },
        };
        // SAFETY: `struct vfio_iommu_type1_dirty_bitmap` and the `_get` that follows it with this flag; the kernel
        // writes at most `size` bytes of the bitmap, which the slice has.
        unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<IOMMU_DIRTY_PAGES, _>::new(&mut request)) }
            .map_err(|source| UapiError::System { doing: "reading the container's dirty pages", source })?;
        add(bitmap, &found);
        Ok(())
    }

    /// Ranges that are mapped, in order.
    pub fn mapped(&self) -> Vec<Range<Iova>> {
        self.mapped.ranges()
    }

    fn dirty_pages(&self, flags: u32, doing: &'static str) -> Result<(), UapiError> {
        let mut request = [const { argsz(size_of::<uapi::vfio_iommu_type1_dirty_bitmap>()) }, flags];
        // SAFETY: `struct vfio_iommu_type1_dirty_bitmap` without data, of two integers.
        unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<IOMMU_DIRTY_PAGES, _>::new(&mut request)) }
            .map_err(|source| UapiError::System { doing, source })
    }

    fn unmap_range(&self, iova: Range<Iova>) -> Result<(), UapiError> {
        let mut request = Unmap {
            argsz: const { argsz(size_of::<Unmap>()) },
            flags: 0,
            iova: iova.start().0,
            size: iova.len(),
        };
        // SAFETY: `struct vfio_iommu_type1_dma_unmap` without data.
        unsafe { rustix::ioctl::ioctl(&self.fd, Updater::<IOMMU_UNMAP_DMA, _>::new(&mut request)) }
            .map_err(|source| UapiError::System { doing: "unmapping memory", source })?;
        all_of(iova, request.size)
    }
}

/// The kernel says how much it unmapped, and calls it a success if that is nothing.
fn all_of(iova: Range<Iova>, unmapped: u64) -> Result<(), UapiError> {
    let whole = unmapped == iova.len();
    if whole { Ok(()) } else { Err(UapiError::NotMapped { iova: iova.start().0, len: iova.len() }) }
}

/// An empty bitmap for a report of `iova`, of no more words than that takes. The kernel writes whole words over what was
/// there (`vfio_iommu_type1.c`, `update_user_bitmap`), unlike every other dirty log.
fn scratch(iova: Range<Iova>, granule: Granule, bitmap: &[u64]) -> Result<Vec<u64>, UapiError> {
    report::check(iova, granule, bitmap)?;
    let words = granule.count(iova.len()).div_ceil(64);
    let words = usize::try_from(words).ok().filter(|words| *words <= WORDS_MAX);
    Ok(vec![0; words.ok_or(UapiError::ReportTooLong(iova.len()))?])
}

fn add(bitmap: &mut [u64], found: &[u64]) {
    for (word, found) in bitmap.iter_mut().zip(found) {
        *word |= found;
    }
}

impl Drop for Type1 {
    fn drop(&mut self) {
        for iova in self.mapped.ranges() {
            if self.unmap(iova).is_err() {
                // A device may still reach it: better lost than given to somebody else.
                self.mapped.leak();
                return;
            }
        }
    }
}

/// An ioctl that is answered by its return value.
struct Query<const OPCODE: Opcode>(usize);

// SAFETY: used for ioctls that take a number, touch no memory and return a number.
unsafe impl<const OPCODE: Opcode> rustix::ioctl::Ioctl for Query<OPCODE> {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        OPCODE
    }

    fn as_ptr(&mut self) -> *mut std::ffi::c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(
        out: rustix::ioctl::IoctlOutput,
        _: *mut std::ffi::c_void,
    ) -> Result<i32, rustix::io::Errno> {
        Ok(out)
    }
}

/// `struct vfio_iommu_type1_dma_unmap` without its flexible array.
#[repr(C)]
struct Unmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// `struct vfio_iommu_type1_dirty_bitmap` with its data.
#[repr(C)]
struct DirtyReport {
    argsz: u32,
    flags: u32,
    get: uapi::vfio_iommu_type1_dirty_bitmap_get,
}

fn describe(granule: Granule, bitmap: &mut [u64]) -> uapi::vfio_bitmap {
    uapi::vfio_bitmap {
        pgsize: granule.bytes(),
        size: size_of_val(bitmap) as u64,
        data: bitmap.as_mut_ptr().cast(),
    }
}

fn parse(answer: &InfoAnswer) -> Result<Type1Info, UapiError> {
    let flags = answer.u32(4)?;
    let page_sizes = if flags & uapi::VFIO_IOMMU_INFO_PGSIZES != 0 { answer.u64(8)? } else { 0 };
    let mut info = Type1Info { page_sizes, dirty_pages: None, usable: Vec::new(), mappings_left: None };
    if flags & uapi::VFIO_IOMMU_INFO_CAPS == 0 {
        return Ok(info);
    }
    for capability in Chain::new(answer, 24, answer.u32(16)?)? {
        let capability = capability?;
        match u32::from(capability.id) {
            uapi::VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
                info.dirty_pages = Some(Type1Dirty {
                    page_sizes: answer.u64(capability.at + 16)?,
                    max_bitmap_size: answer.u64(capability.at + 24)?,
                });
            }
            uapi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                for range in 0..u64::from(answer.u32(capability.at + 8)?) {
                    let at = capability.element(16, range, 16)?;
                    let (start, end) = (answer.u64(at)?, answer.u64(at + 8)?);
                    if start > end {
                        return Err(UapiError::BadCapability(
                            "a range of usable addresses ends before it begins",
                        ));
                    }
                    info.usable.push((start, end));
                }
            }
            uapi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => {
                info.mappings_left = Some(answer.u32(capability.at + 8)?);
            }
            _ => {}
        }
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_the_uapis() {
        assert_eq!((GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU), (0x3b64, 0x3b65, 0x3b66));
        assert_eq!((IOMMU_GET_INFO, IOMMU_MAP_DMA, IOMMU_UNMAP_DMA), (0x3b70, 0x3b71, 0x3b72));
        assert_eq!(IOMMU_DIRTY_PAGES, 0x3b75);
        assert_eq!(size_of::<uapi::vfio_iommu_type1_info>(), 24);
        assert_eq!(size_of::<uapi::vfio_iommu_type1_dma_map>(), 32);
        assert_eq!((size_of::<Unmap>(), size_of::<uapi::vfio_iommu_type1_dma_unmap>()), (24, 24));
        assert_eq!(std::mem::offset_of!(DirtyReport, get), size_of::<uapi::vfio_iommu_type1_dirty_bitmap>());
        assert_eq!(size_of::<uapi::vfio_bitmap>(), 24);
        assert_eq!(std::mem::offset_of!(uapi::vfio_iommu_type1_info_cap_migration, pgsize_bitmap), 16);
        assert_eq!(std::mem::offset_of!(uapi::vfio_iommu_type1_info_cap_iova_range, iova_ranges), 16);
        assert_eq!(std::mem::offset_of!(uapi::vfio_iommu_type1_info_dma_avail, avail), 8);
    }

    #[test]
    fn capabilities_of_a_container() {
        let words: [u64; 12] = [
            96 | 3 << 32,           // argsz, flags
            0x4000_1000,            // page sizes
            24,                     // first capability
            2 | 1 << 16 | 56 << 32, // migration
            0,                      // flags
            0x1000,                 // page sizes
            1 << 28,                // largest bitmap
            1 | 2 << 16 | 88 << 32, // IOVA ranges
            1,                      // one
            0x1000,
            0xffff_ffff,
            3 | 1 << 16, // mappings left
        ];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(65_535_u64.to_ne_bytes());
        let info = parse(&InfoAnswer::new(bytes)).unwrap();
        assert_eq!(info.page_sizes, 0x4000_1000);
        assert_eq!(info.dirty_pages, Some(Type1Dirty { page_sizes: 0x1000, max_bitmap_size: 1 << 28 }));
        assert_eq!((info.usable, info.mappings_left), (vec![(0x1000, 0xffff_ffff)], Some(65_535)));
    }

    #[test]
    fn a_report_adds_to_what_is_known() {
        let mut known = [1, 0, 8];
        add(&mut known, &[2, 4]);
        assert_eq!(known, [3, 4, 8]);
        let range = Range::new(Iova(0), 65 * 4096).unwrap();
        assert_eq!(scratch(range, Granule::PAGE, &known).unwrap(), [0, 0]);
        let whole = Range::new(Iova(0), 1 << 44).unwrap();
        assert!(scratch(whole, Granule::PAGE, &known).is_err());
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let refused = Type1::new(null.into()).unwrap_err();
        assert_eq!(refused.errno(), Some(rustix::io::Errno::NOTTY));
    }
}
