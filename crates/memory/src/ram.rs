//! Guest RAM: regions laid end to end, and the plain accesses to them.

use std::ops::Range as Bytes;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset, Range};

use crate::area::as_usize;
use crate::error::MemoryError;
use crate::hold::{Holds, RamHeld, RamHold};
use crate::pieces::{Piece, Pieces};
use crate::region::{RamRegionInfo, Region, identity};

/// A guest's RAM: its regions end to end in RAM-offset order, each with a mapping of its own.
///
/// It is made by [`GuestRam::new`] and [`GuestRam::owned`], which allocate it, by [`GuestRam::lent`] of memory that the VMM
/// has, or from vm-memory's `GuestMemoryMmap` (feature `vm-memory`).
///
/// To be shared between threads as it is. Nothing here records dirty pages: whoever writes through it while a migration
/// runs marks that in a [`WriteLog`](crate::WriteLog), *after* the write.
#[derive(Debug)]
pub struct GuestRam {
    regions: Vec<Region>,
    infos: Vec<RamRegionInfo>,
    size: u64,
    holds: Arc<Holds>,
}

impl GuestRam {
    /// `regions` as [`lay_out`](crate::region::lay_out) laid them.
    pub(crate) fn of(regions: Vec<Region>) -> Self {
        let infos: Vec<_> = regions.iter().map(|region| region.info).collect();
        let size = infos.iter().map(|info| info.len).sum();
        Self { regions, infos, size, holds: Arc::default() }
    }

    /// Asks whether RAM may be hot-plugged, unplugged, or given another place now. A session holds the layout from its first look at
    /// RAM until it has ended, what is undone behind its end included. May be called from any thread; blocks for nothing.
    ///
    /// # Errors
    /// It may not, and why.
    pub fn may_change(&self) -> Result<(), RamHeld> {
        self.holds.check()
    }

    /// Holds the layout; `why`, a phrase, is what [`may_change`](Self::may_change) answers meanwhile.
    pub fn hold(&self, why: impl Into<String>) -> RamHold {
        self.holds.hold(why.into())
    }

    /// Bytes, all regions together.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The regions, in RAM-offset order.
    pub fn regions(&self) -> &[RamRegionInfo] {
        &self.infos
    }

    /// The descriptor, and the place in it, that show another process the `len` bytes at `offset`, for DMA_MAP. `None` unless
    /// they lie in one region that is a shared file with a descriptor: other memory is this process's alone.
    pub fn shared_file(&self, offset: RamOffset, len: u64) -> Option<(BorrowedFd<'_>, u64)> {
        let (region, into) = self.within_region(offset, len)?;
        region.shared_file(into)
    }

    /// The RAM offset of `len` bytes at byte `offset` of the file `fd`; `None` if the file is no region's, or none of the
    /// bytes is in one.
    ///
    /// # Errors
    /// Some of the bytes are guest RAM and some are not, or the file is mapped private, so that the guest sees something
    /// else than what it holds.
    pub fn offset_in_file(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
    ) -> Result<Option<RamOffset>, MemoryError> {
        let file = identity(fd).map_err(MemoryError::system("examining a file to be mapped"))?;
        for region in &self.regions {
            if let Some(into) = region.place_of(file, offset, len)? {
                return Ok(Some(RamOffset(region.info.offset.0 + into)));
            }
        }
        Ok(None)
    }

    /// Address of `len` bytes that lie in one region, for KVM_SET_USER_MEMORY_REGION. The memory stays mapped as long
    /// as this value lives; whoever uses the address answers for that.
    pub fn host_address(&self, offset: RamOffset, len: u64) -> Option<NonNull<u8>> {
        let (region, into) = self.within_region(offset, len)?;
        region.area.pointer(into, len).ok()
    }

    /// The RAM offset of the `len` bytes at `gpa`. `None` unless they lie in one region.
    pub fn offset_of(&self, gpa: Gpa, len: u64) -> Option<RamOffset> {
        self.infos.iter().find_map(|region| {
            let into = gpa.offset_from(region.gpa)?;
            (into < region.len && len <= region.len - into).then(|| RamOffset(region.offset.0 + into))
        })
    }

    /// The guest physical address of the byte at `offset`. `None` past the end.
    pub fn gpa_of(&self, offset: RamOffset) -> Option<Gpa> {
        let (region, into) = self.within_region(offset, 0)?;
        Some(Gpa(region.info.gpa.0 + into))
    }

    /// Copies `into.len()` bytes out. Aligned words are read whole; longer pieces may be torn by a guest's write.
    pub fn read(&self, offset: RamOffset, into: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = into;
        for (region, bytes) in self.parts(offset.0, rest.len() as u64)? {
            let (part, left) = rest.split_at_mut(as_usize(bytes.end - bytes.start));
            region.area.read(bytes.start, part)?;
            rest = left;
        }
        Ok(())
    }

    /// Copies `from` in; aligned words are written whole. Not logged as dirty.
    pub fn write(&self, offset: RamOffset, from: &[u8]) -> Result<(), MemoryError> {
        let mut rest = from;
        for (region, bytes) in self.parts(offset.0, rest.len() as u64)? {
            let (part, left) = rest.split_at(as_usize(bytes.end - bytes.start));
            region.area.write(bytes.start, part)?;
            rest = left;
        }
        Ok(())
    }

    /// Reads the aligned word at `offset` in one access (acquire). In the host's byte order.
    pub fn read_u64(&self, offset: RamOffset) -> Result<u64, MemoryError> {
        let (region, into) = self.word(offset)?;
        region.area.load_u64(into)
    }

    /// Writes the aligned word at `offset` in one access (release). In the host's byte order. Not logged as dirty.
    pub fn write_u64(&self, offset: RamOffset, value: u64) -> Result<(), MemoryError> {
        let (region, into) = self.word(offset)?;
        region.area.store_u64(into, value)
    }

    /// Runs of pages in this order, to be moved straight from or into the mappings.
    ///
    /// # Errors
    /// [`MemoryError::Misaligned`] for runs that are not of whole pages, [`MemoryError::OutOfBounds`] for what leaves RAM.
    pub fn pieces(&self, pages: &[Range<RamOffset>]) -> Result<Pieces<'_>, MemoryError> {
        let mut pieces = Vec::with_capacity(pages.len());
        for run in pages {
            for (region, bytes) in self.pages(run)? {
                let len = bytes.end - bytes.start;
                let base = region.area.pointer(bytes.start, len)?;
                // SAFETY: the bytes lie in this mapping, which is writable, lives as long as the borrow of `self`, and to which
                // no reference is ever made.
                pieces.push(unsafe { Piece::new(base, as_usize(len)) });
            }
        }
        Ok(Pieces::new(pieces))
    }

    /// Allocates every page, so that nothing can fail for want of memory later. All of RAM is data afterwards.
    ///
    /// # Errors
    /// The host has not enough memory left.
    pub fn populate(&self) -> Result<(), MemoryError> {
        self.regions.iter().try_for_each(Region::populate)
    }

    /// The parts of whole `pages` in each region that they reach into, ascending, as bytes from its begin.
    pub(crate) fn pages(
        &self,
        pages: &Range<RamOffset>,
    ) -> Result<impl Iterator<Item = (&Region, Bytes<u64>)>, MemoryError> {
        let (offset, len) = (pages.start().0, pages.len());
        if !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Misaligned { offset, len, align: PAGE_SIZE });
        }
        self.parts(offset, len)
    }

    /// All regions, in RAM-offset order.
    pub(crate) fn all(&self) -> &[Region] {
        &self.regions
    }

    /// The parts of `len` bytes at `offset` in each region that they reach into, ascending, as bytes from its begin.
    fn parts(
        &self,
        offset: u64,
        len: u64,
    ) -> Result<impl Iterator<Item = (&Region, Bytes<u64>)>, MemoryError> {
        let size = self.size;
        let end = offset.checked_add(len).filter(|end| *end <= size);
        let end = end.ok_or(MemoryError::OutOfBounds { offset, len, size })?;
        let behind = self.regions.get(self.index(offset)..).unwrap_or_default().iter();
        Ok(behind.map_while(move |region| {
            let RamRegionInfo { offset: start, len, .. } = region.info;
            let from = offset.max(start.0) - start.0;
            let to = end.checked_sub(start.0)?.min(len);
            (from < to).then_some((region, from..to))
        }))
    }

    /// The region of the byte at `offset`, and its place in it; `None` unless the `len` bytes there are all of one region.
    pub(crate) fn within_region(&self, offset: RamOffset, len: u64) -> Option<(&Region, u64)> {
        let region = self.regions.get(self.index(offset.0))?;
        let into = offset.offset_from(region.info.offset)?;
        (into < region.info.len && len <= region.info.len - into).then_some((region, into))
    }

    fn word(&self, offset: RamOffset) -> Result<(&Region, u64), MemoryError> {
        const WORD: u64 = size_of::<u64>() as u64;
        if let Some(found) = self.within_region(offset, 1) {
            // Regions are of whole pages: what is aligned in one is aligned in RAM, and in memory.
            return if offset.0.is_multiple_of(WORD) {
                Ok(found)
            } else {
                Err(MemoryError::Misaligned { offset: offset.0, len: WORD, align: WORD })
            };
        }
        Err(MemoryError::OutOfBounds { offset: offset.0, len: WORD, size: self.size })
    }

    /// Index of the last region that begins at or before `offset`.
    fn index(&self, offset: u64) -> usize {
        self.regions.partition_point(|region| region.info.offset.0 <= offset).saturating_sub(1)
    }
}
