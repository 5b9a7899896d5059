//! One region of guest RAM: where it is, what is behind its pages, and what may be done to them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, SealFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};
use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset, Range};

use crate::area::{Area, as_usize};
use crate::error::{MemoryError, RegionError};
use crate::pagemap;

/// What is behind a region's pages, which says how they are made zero and where holes are looked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RamKind {
    /// A file mapped shared (MAP_SHARED): a memory file, one of huge pages, a file of a filesystem. Shared anonymous
    /// memory as well, which is a file without a descriptor.
    #[default]
    SharedFile,
    /// Anonymous memory mapped private (MAP_PRIVATE | MAP_ANONYMOUS).
    PrivateAnonymous,
    /// A file mapped private (MAP_PRIVATE): what is written is this process's own copy, and a page that is given back
    /// shows the file's contents again.
    PrivateFile,
}

/// The size of the host's pages behind a region. Dirty logs and the stream count pages of 4 KiB whatever it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RamPageSize {
    /// 4 KiB, transparent huge pages or not.
    #[default]
    Size4K,
    /// Huge pages of 2 MiB (hugetlbfs).
    Size2M,
    /// Huge pages of 1 GiB (hugetlbfs).
    Size1G,
}

impl RamPageSize {
    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Size4K => PAGE_SIZE,
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// A piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamRegionInfo {
    /// Guest physical address of its first byte.
    pub gpa: Gpa,
    /// The region's size in bytes.
    pub len: u64,
    /// Offset of its first byte in RAM laid end to end: the sum of the lengths before it, and no place in a file.
    pub offset: RamOffset,
    /// What is behind its pages.
    pub kind: RamKind,
    /// The size of the pages behind it.
    pub page_size: RamPageSize,
}

/// The file behind a region.
#[derive(Debug)]
pub(crate) struct RegionFile {
    fd: OwnedFd,
    /// Of the region's first byte.
    offset: u64,
    /// Device and inode number.
    identity: (u64, u64),
    /// It cannot be made shorter.
    sealed: bool,
}

/// A region with its memory.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) info: RamRegionInfo,
    pub(crate) area: Area,
    file: Option<RegionFile>,
    /// Nobody has written to it: it reads as zero.
    fresh: AtomicBool,
    /// Pages may be given back to the host.
    punch_holes: AtomicBool,
}

impl RegionFile {
    pub(crate) fn new(fd: OwnedFd, offset: u64) -> Result<Self, Errno> {
        let stat = rustix::fs::fstat(&fd)?;
        let sealed = rustix::fs::fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        Ok(Self { fd, offset, identity: (stat.st_dev, stat.st_ino), sealed })
    }

    /// Byte ranges of `from .. to`, counted from the region's begin, that have pages behind them.
    fn data(&self, from: u64, to: u64) -> Result<Vec<(u64, u64)>, MemoryError> {
        let mut extents = Vec::new();
        let mut at = from;
        while at < to {
            let Some(start) = self.seek(SeekFrom::Data(self.offset + at))?.filter(|start| *start < to) else {
                break;
            };
            // Onwards, whatever a filesystem answers.
            let start = start.max(at);
            // Where nothing follows the data that was just found, somebody has punched it between the two calls.
            let end = self.seek(SeekFrom::Hole(self.offset + start))?.unwrap_or(start);
            // An extent of a file need not begin and end where a page does.
            let (start, end) = (start - start % PAGE_SIZE, end.next_multiple_of(PAGE_SIZE).min(to));
            if start < end {
                extents.push((start, end));
            }
            at = end.max(start + PAGE_SIZE);
        }
        Ok(extents)
    }

    fn has_data(&self, from: u64, to: u64) -> Result<bool, MemoryError> {
        Ok(self.seek(SeekFrom::Data(self.offset + from))?.is_some_and(|start| start < to))
    }

    /// The region's byte that is found; `None` past the last data of the file.
    fn seek(&self, to: SeekFrom) -> Result<Option<u64>, MemoryError> {
        match rustix::fs::seek(&self.fd, to) {
            Ok(found) => Ok(Some(found.saturating_sub(self.offset))),
            Err(Errno::NXIO) => Ok(None),
            Err(source) => {
                Err(MemoryError::System { doing: "looking for holes in guest RAM".into(), source })
            }
        }
    }
}

impl Region {
    pub(crate) fn new(
        info: RamRegionInfo,
        area: Area,
        file: Option<RegionFile>,
        fresh: bool,
        punch_holes: bool,
    ) -> Self {
        Self { info, area, file, fresh: fresh.into(), punch_holes: punch_holes.into() }
    }

    /// The descriptor that another process can map to see what the guest sees, and the place of byte `into` in it.
    pub(crate) fn shared_file(&self, into: u64) -> Option<(BorrowedFd<'_>, u64)> {
        let file = self.file.as_ref().filter(|_| self.info.kind == RamKind::SharedFile)?;
        Some((file.fd.as_fd(), file.offset + into))
    }

    /// The place in this region of `len` bytes at `offset` of the file with that identity; `None`: none of them is in it.
    ///
    /// # Errors
    /// Only some of them are, or the region does not show what its file holds.
    pub(crate) fn place_of(
        &self,
        identity: (u64, u64),
        offset: u64,
        len: u64,
    ) -> Result<Option<u64>, MemoryError> {
        let Some(file) = self.file.as_ref().filter(|file| file.identity == identity) else { return Ok(None) };
        let (start, end) = (file.offset, file.offset + self.info.len);
        if offset >= end || offset.saturating_add(len) <= start {
            return Ok(None);
        }
        if self.info.kind == RamKind::PrivateFile {
            return Err(self.refused(RegionError::PrivateFile));
        }
        if offset < start || len > end - offset {
            return Err(MemoryError::OutOfBounds { offset, len, size: end });
        }
        Ok(Some(offset - start))
    }

    /// Whether they have host memory in common, or a part of a file that both share.
    pub(crate) fn is_same_memory(&self, other: &Self) -> bool {
        let overlap = |(start, len): (u64, u64), (other, others): (u64, u64)| {
            start < other.saturating_add(others) && other < start.saturating_add(len)
        };
        let shared = |region: &Self| {
            let file = region.file.as_ref().filter(|_| region.info.kind == RamKind::SharedFile)?;
            Some((file.identity, (file.offset, region.info.len)))
        };
        overlap((self.area.address(), self.info.len), (other.area.address(), other.info.len))
            || matches!((shared(self), shared(other)), (Some((file, bytes)), Some((others, other)))
                if file == others && overlap(bytes, other))
    }

    /// Pages of it may be pinned from now on: none is given back any more.
    pub(crate) fn keep_pages(&self) {
        self.punch_holes.store(false, Ordering::Release);
    }

    /// Makes sure that the file still reaches to the region's end, where it can be made shorter at all.
    pub(crate) fn check_file(&self) -> Result<(), MemoryError> {
        let Some(file) = self.file.as_ref().filter(|file| !file.sealed) else { return Ok(()) };
        let stat = rustix::fs::fstat(&file.fd)
            .map_err(|source| self.refused(RegionError::System { doing: "examining its file", source }))?;
        let (size, needed) = (u64::try_from(stat.st_size).unwrap_or(0), file.offset + self.info.len);
        if size < needed { Err(self.refused(RegionError::FileTooSmall { size, needed })) } else { Ok(()) }
    }

    /// Byte ranges of `from .. to`, ascending, apart and in whole pages, outside of which all reads as zero; none of it is
    /// touched. What has no way to tell its holes is data.
    pub(crate) fn data(&self, from: u64, to: u64) -> Result<Vec<(u64, u64)>, MemoryError> {
        self.check_file()?;
        match (self.info.kind, &self.file) {
            (RamKind::SharedFile, Some(file)) => file.data(from, to),
            (RamKind::PrivateAnonymous, _) => Ok(pagemap::used(self.area.address() + from, to - from)
                .map(|used| used.into_iter().map(|(start, end)| (from + start, from + end)).collect())
                .unwrap_or_else(|| vec![(from, to)])),
            _ => Ok(vec![(from, to)]),
        }
    }

    /// Makes whole pages zero: gives them back to the host where that is allowed and reads as zero, or else writes zeros
    /// where there are none. Holes are left alone.
    pub(crate) fn zero(&self, from: u64, to: u64) -> Result<(), MemoryError> {
        let page = self.info.page_size.bytes();
        let (first, last) = (from.next_multiple_of(page), to - to % page);
        if self.punch_holes.load(Ordering::Acquire) && first < last && self.punch(first, last)? {
            self.write_zeros(from, first)?;
            return self.write_zeros(last, to);
        }
        self.write_zeros(from, to)
    }

    /// Makes all of it zero, unless nobody has written to it yet.
    pub(crate) fn clear(&self) -> Result<(), MemoryError> {
        if self.fresh.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.zero(0, self.info.len)
    }

    /// Gives whole pages back. Returns whether the host took them.
    fn punch(&self, from: u64, to: u64) -> Result<bool, MemoryError> {
        match (self.info.kind, &self.file) {
            (RamKind::SharedFile, Some(file)) => {
                self.check_file()?;
                if !file.has_data(from, to)? {
                    return Ok(true);
                }
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let punched =
                    retry_on_intr(|| rustix::fs::fallocate(&file.fd, mode, file.offset + from, to - from));
                // A filesystem that cannot, a seal against writing: zeros are written then.
                Ok(punched.is_ok())
            }
            // Locked memory, and huge pages before Linux 5.18, are not given back.
            (RamKind::PrivateAnonymous, _) => Ok(self.area.give_back(from, to - from).is_ok()),
            _ => Ok(false),
        }
    }

    fn write_zeros(&self, from: u64, to: u64) -> Result<(), MemoryError> {
        const ZEROS: [u8; as_usize(PAGE_SIZE)] = [0; as_usize(PAGE_SIZE)];
        if from >= to {
            return Ok(());
        }
        for (start, end) in self.data(from, to)? {
            for page in (start..end).step_by(as_usize(PAGE_SIZE)) {
                if !self.area.is_zero(page, PAGE_SIZE)? {
                    self.area.write(page, &ZEROS)?;
                }
            }
        }
        Ok(())
    }

    /// Allocates every page.
    pub(crate) fn populate(&self) -> Result<(), MemoryError> {
        self.check_file()?;
        match (retry_on_intr(|| self.area.populate()), &self.file) {
            // Before Linux 5.14 there is no MADV_POPULATE_WRITE; allocating by the file leaves the page tables empty.
            (Err(Errno::INVAL), Some(file)) if self.info.kind == RamKind::SharedFile => retry_on_intr(|| {
                rustix::fs::fallocate(&file.fd, FallocateFlags::empty(), file.offset, self.info.len)
            }),
            (Err(Errno::INVAL), _) => return self.area.touch(self.info.page_size.bytes()),
            (done, _) => done,
        }
        .map_err(|source| self.refused(RegionError::System { doing: "allocating its pages", source }))
    }

    /// What this region is refused, or failed, for.
    pub(crate) fn refused(&self, why: RegionError) -> MemoryError {
        MemoryError::Region { gpa: self.info.gpa, len: self.info.len, why }
    }
}

/// A region that is wanted: its place, and the size of the pages that it is to be made of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) gpa: Gpa,
    pub(crate) len: u64,
    pub(crate) page_size: RamPageSize,
    pub(crate) kind: RamKind,
}

/// Lays regions end to end, in this order.
///
/// # Errors
/// [`MemoryError::Layout`], which names the regions.
pub(crate) fn lay_out(wanted: impl IntoIterator<Item = Wanted>) -> Result<Vec<RamRegionInfo>, MemoryError> {
    let refuse = |why: String| Err(MemoryError::Layout(why));
    let mut regions: Vec<RamRegionInfo> = Vec::new();
    let mut size = 0u64;
    for Wanted { gpa, len, page_size, kind } in wanted {
        let range = match Range::new(gpa, len) {
            Ok(range) => range,
            Err(error) => return refuse(error.to_string()),
        };
        let page = page_size.bytes();
        if !gpa.0.is_multiple_of(page) || !len.is_multiple_of(page) {
            return refuse(format!("the region {gpa}+{len:#x} is not made of whole pages of {page} bytes"));
        }
        let overlapped =
            regions.iter().find(|other| Range::new(other.gpa, other.len).is_ok_and(|o| o.overlaps(&range)));
        if let Some(other) = overlapped {
            return refuse(format!("the regions {gpa}+{len:#x} and {}+{:#x} overlap", other.gpa, other.len));
        }
        regions.push(RamRegionInfo { gpa, len, offset: RamOffset(size), kind, page_size });
        // A file's size is a signed 64-bit number.
        size = match size.checked_add(len).filter(|size| i64::try_from(*size).is_ok()) {
            Some(size) => size,
            None => return refuse("the regions together are larger than a file can be".into()),
        };
    }
    if regions.is_empty() {
        return refuse("no regions".into());
    }
    Ok(regions)
}

/// Device and inode number of a file: the same for every descriptor of it.
pub(crate) fn identity(fd: BorrowedFd<'_>) -> Result<(u64, u64), Errno> {
    let stat = rustix::fs::fstat(fd)?;
    Ok((stat.st_dev, stat.st_ino))
}
