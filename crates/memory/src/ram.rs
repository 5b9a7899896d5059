//! Guest RAM on one memory file.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::{Errno, retry_on_intr};
use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset, Range};

use crate::area::{Area, as_usize};
use crate::error::MemoryError;
use crate::pieces::{Piece, Pieces};

/// A piece of guest RAM that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamSpec {
    /// Guest physical address of its first byte: a multiple of 4096.
    pub gpa: Gpa,
    /// Bytes: a multiple of 4096, at least one page.
    pub len: u64,
}

/// A piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegionInfo {
    /// Guest physical address of its first byte.
    pub gpa: Gpa,
    /// The region's size in bytes.
    pub len: u64,
    /// Offset of its first byte in RAM laid end to end, and in the memory file.
    pub offset: RamOffset,
}

/// A guest's RAM: one memory file, its regions end to end in RAM-offset order, mapped shared as a whole.
///
/// To be shared between threads as it is. Nothing here records dirty pages: whoever writes through it while a migration
/// runs marks that in a [`WriteLog`](crate::WriteLog), *after* the write.
///
/// The file is sealed against growing and shrinking, so that no process it is handed to can take a page from under
/// another. Its pages are allocated when first written.
#[derive(Debug)]
pub struct GuestRam {
    pub(crate) fd: OwnedFd,
    pub(crate) area: Area,
    regions: Vec<RamRegionInfo>,
}

impl GuestRam {
    /// RAM made of `specs`, zeroed, in this order. `name` shows in `/proc/*/maps`; at most 249 bytes.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] for regions that overlap, are empty, misaligned or leave the address space;
    /// [`MemoryError::TooLarge`] for more than the host's memory and swap.
    pub fn new(name: &str, specs: &[RamSpec]) -> Result<Self, MemoryError> {
        let regions = lay_out(specs)?;
        let size: u64 = regions.iter().map(|region| region.len).sum();
        if let Some(available) = host_memory()
            && size > available
        {
            return Err(MemoryError::TooLarge { wanted: size, available });
        }
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(MemoryError::system("creating the memory file"))?;
        rustix::fs::ftruncate(&fd, size).map_err(MemoryError::system("sizing the memory file"))?;
        // SEAL too: nobody may add F_SEAL_WRITE later and make the guest's RAM read-only.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(MemoryError::system("sealing the memory file"))?;
        let area = Area::map(fd.as_fd(), 0, as_usize(size), true)
            .map_err(MemoryError::system("mapping guest RAM"))?;
        Ok(Self { fd, area, regions })
    }

    /// Bytes, all regions together.
    pub fn size(&self) -> u64 {
        self.area.len()
    }

    /// The regions, in RAM-offset order.
    pub fn regions(&self) -> &[RamRegionInfo] {
        &self.regions
    }

    /// The memory file: for DMA_MAP, where a region's file offset is its RAM offset.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Address of `len` bytes that lie in one region, for KVM_SET_USER_MEMORY_REGION. The memory stays mapped as long
    /// as this value lives; whoever uses the address answers for that.
    pub fn host_address(&self, offset: RamOffset, len: u64) -> Option<NonNull<u8>> {
        let region = self.region_at(offset)?;
        let left = region.len - (offset.0 - region.offset.0);
        (len <= left).then(|| self.area.pointer(offset.0, len).ok()).flatten()
    }

    /// The RAM offset of the `len` bytes at `gpa`. `None` unless they lie in one region.
    pub fn offset_of(&self, gpa: Gpa, len: u64) -> Option<RamOffset> {
        self.regions.iter().find_map(|region| {
            let into = gpa.offset_from(region.gpa)?;
            (into < region.len && len <= region.len - into).then(|| RamOffset(region.offset.0 + into))
        })
    }

    /// The guest physical address of the byte at `offset`. `None` past the end.
    pub fn gpa_of(&self, offset: RamOffset) -> Option<Gpa> {
        let region = self.region_at(offset)?;
        Some(Gpa(region.gpa.0 + (offset.0 - region.offset.0)))
    }

    /// Copies `into.len()` bytes out. Aligned words are read whole; longer pieces may be torn by a guest's write.
    pub fn read(&self, offset: RamOffset, into: &mut [u8]) -> Result<(), MemoryError> {
        self.area.read(offset.0, into)
    }

    /// Copies `from` in; aligned words are written whole. Not logged as dirty.
    pub fn write(&self, offset: RamOffset, from: &[u8]) -> Result<(), MemoryError> {
        self.area.write(offset.0, from)
    }

    /// Reads the aligned word at `offset` in one access (acquire). In the host's byte order.
    pub fn read_u64(&self, offset: RamOffset) -> Result<u64, MemoryError> {
        self.area.load_u64(offset.0)
    }

    /// Writes the aligned word at `offset` in one access (release). In the host's byte order. Not logged as dirty.
    pub fn write_u64(&self, offset: RamOffset, value: u64) -> Result<(), MemoryError> {
        self.area.store_u64(offset.0, value)
    }

    /// Runs of pages in this order, to be moved straight from or into the mapping.
    ///
    /// # Errors
    /// [`MemoryError::Misaligned`] for runs that are not of whole pages, [`MemoryError::OutOfBounds`] for what leaves RAM.
    pub fn pieces(&self, pages: &[Range<RamOffset>]) -> Result<Pieces<'_>, MemoryError> {
        let piece = |run: &Range<RamOffset>| {
            self.check_pages(run)?;
            let base = self.area.pointer(run.start().0, run.len())?;
            // SAFETY: the run lies in this mapping, which is writable, lives as long as the borrow of `self`, and to which no
            // reference is ever made.
            Ok(unsafe { Piece::new(base, as_usize(run.len())) })
        };
        Ok(Pieces::new(pages.iter().map(piece).collect::<Result<_, MemoryError>>()?))
    }

    /// Allocates every page, so that nothing can fail for want of memory later. All of RAM is data afterwards.
    ///
    /// # Errors
    /// The host has not enough memory left.
    pub fn populate(&self) -> Result<(), MemoryError> {
        match retry_on_intr(|| self.area.populate()) {
            // Before Linux 5.14 there is no MADV_POPULATE_WRITE; allocating by the file leaves the page tables empty.
            Err(Errno::INVAL) => {
                retry_on_intr(|| rustix::fs::fallocate(&self.fd, FallocateFlags::empty(), 0, self.size()))
            }
            done => done,
        }
        .map_err(MemoryError::system("allocating guest RAM"))
    }

    pub(crate) fn check_pages(&self, pages: &Range<RamOffset>) -> Result<(), MemoryError> {
        let (offset, len) = (pages.start().0, pages.len());
        if !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Misaligned { offset, len, align: PAGE_SIZE });
        }
        self.area.pointer(offset, len).map(drop)
    }

    fn region_at(&self, offset: RamOffset) -> Option<&RamRegionInfo> {
        self.regions
            .iter()
            .find(|region| offset.offset_from(region.offset).is_some_and(|into| into < region.len))
    }
}

fn lay_out(specs: &[RamSpec]) -> Result<Vec<RamRegionInfo>, MemoryError> {
    let refuse = |why: String| Err(MemoryError::Layout(why));
    if specs.is_empty() {
        return refuse("no regions".into());
    }
    let mut regions: Vec<RamRegionInfo> = Vec::with_capacity(specs.len());
    let mut size = 0u64;
    for RamSpec { gpa, len } in specs.iter().copied() {
        let range = match Range::new(gpa, len) {
            Ok(range) => range,
            Err(error) => return refuse(error.to_string()),
        };
        if !gpa.0.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return refuse(format!("the region {gpa}+{len:#x} is not made of whole pages of 4096 bytes"));
        }
        let overlapped =
            regions.iter().find(|other| Range::new(other.gpa, other.len).is_ok_and(|o| o.overlaps(&range)));
        if let Some(other) = overlapped {
            return refuse(format!("the regions {gpa}+{len:#x} and {}+{:#x} overlap", other.gpa, other.len));
        }
        regions.push(RamRegionInfo { gpa, len, offset: RamOffset(size) });
        // A file's size is a signed 64-bit number.
        size = match size.checked_add(len).filter(|size| i64::try_from(*size).is_ok()) {
            Some(size) => size,
            None => return refuse("the regions together are larger than a file can be".into()),
        };
    }
    Ok(regions)
}

/// The host's memory and swap in bytes, used or not; `None` where procfs does not say.
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    field("MemTotal:")?.checked_add(field("SwapTotal:").unwrap_or(0))
}
