//! Runs of data, of zeros and of holes in guest RAM; and the digest, which is the same for zeros and holes.

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use vfio_migration_types::{PAGE_SIZE, RamOffset, Range};

use crate::area::as_usize;
use crate::error::MemoryError;
use crate::ram::GuestRam;

/// The knowledge of holes that the caller of [`GuestRam::scan`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// There may be some: each page is asked after first (one short system call), so that none is touched.
    Possible,
    /// The range lies within a data extent, as [`GuestRam::data_extents`] gave it and nobody has punched since.
    /// A hole would be allocated.
    Excluded,
}

/// A maximal run of pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScanRun {
    /// RAM offsets of the run: whole pages.
    pub range: Range<RamOffset>,
    /// Whether all of them are zero, or holes.
    pub zero: bool,
}

impl GuestRam {
    /// The parts of RAM that have pages behind them, ascending, apart and in whole pages; all else reads as zero.
    /// Asked of the file (SEEK_DATA, SEEK_HOLE): nothing is touched.
    ///
    /// A snapshot: what is written later may be anywhere, and the dirty logs name it. Takes time by the page of data,
    /// tens of nanoseconds each, so it is for once per pass and not for once per run.
    pub fn data_extents(&self) -> Result<Vec<Range<RamOffset>>, MemoryError> {
        self.data_extents_within(0, self.size())
    }

    fn data_extents_within(&self, from: u64, to: u64) -> Result<Vec<Range<RamOffset>>, MemoryError> {
        let mut extents = Vec::new();
        let mut at = from;
        while let Some(start) = self.next_data(at)?.filter(|start| *start < to) {
            let end = match rustix::fs::seek(&self.fd, SeekFrom::Hole(start)) {
                Ok(end) => end.min(to),
                Err(source) => return Err(MemoryError::System { doing: "looking for holes".into(), source }),
            };
            // Empty when somebody punched the page between the two calls.
            if let Ok(extent) = Range::new(RamOffset(start), end.saturating_sub(start)) {
                extents.push(extent);
            }
            at = end.max(start + PAGE_SIZE);
        }
        Ok(extents)
    }

    /// Whether page number `page` (RAM offset / 4096) is zero now; a hole is, and stays one. `false` past the end.
    pub fn is_zero(&self, page: u64) -> bool {
        let Some(offset) = page.checked_mul(PAGE_SIZE).filter(|offset| *offset < self.size()) else {
            return false;
        };
        matches!(self.is_zero_at(offset, Holes::Possible), Ok(true))
    }

    /// Divides `pages` into maximal runs of zero and of other pages, in order and without gaps.
    pub fn scan(&self, pages: Range<RamOffset>, holes: Holes) -> Result<Vec<ScanRun>, MemoryError> {
        self.check_pages(&pages)?;
        let mut runs = Vec::new();
        let mut push = |start, end, zero| {
            if let Ok(range) = Range::new(RamOffset(start), end - start) {
                runs.push(ScanRun { range, zero });
            }
        };
        let mut start = pages.start().0;
        let mut kind = false;
        for at in (pages.start().0..pages.end()).step_by(as_usize(PAGE_SIZE)) {
            let zero = self.is_zero_at(at, holes)?;
            if zero != kind {
                push(start, at, kind);
                (start, kind) = (at, zero);
            }
        }
        push(start, pages.end(), kind);
        Ok(runs)
    }

    /// Makes `pages` zero by giving them back to the host: what was data becomes a hole, holes are left alone. Not
    /// logged as dirty.
    ///
    /// Not for pages that are pinned for a kernel device (VFIO, iommufd): the device would go on with the page that
    /// was given back. See [`zero_in_place`](Self::zero_in_place).
    pub fn zero(&self, pages: Range<RamOffset>) -> Result<(), MemoryError> {
        self.check_pages(&pages)?;
        if self.next_data(pages.start().0)?.is_none_or(|data| data >= pages.end()) {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, mode, pages.start().0, pages.len()))
            .map_err(MemoryError::system("punching a hole into guest RAM"))
    }

    /// Makes `pages` zero by writing, where they are not zero already: they stay where they are, pinned or not.
    /// Holes are left alone. Not logged as dirty.
    pub fn zero_in_place(&self, pages: Range<RamOffset>) -> Result<(), MemoryError> {
        const ZEROS: [u8; as_usize(PAGE_SIZE)] = [0; as_usize(PAGE_SIZE)];
        for run in self.scan(pages, Holes::Possible)?.into_iter().filter(|run| !run.zero) {
            for page in (run.range.start().0..run.range.end()).step_by(as_usize(PAGE_SIZE)) {
                self.area.write(page, &ZEROS)?;
            }
        }
        Ok(())
    }

    /// BLAKE3 over number (64 bits, little endian) and bytes of every page that is not zero, ascending: a hole and a
    /// page of zeros count the same. Only data is read.
    ///
    /// Of use only while nobody writes.
    pub fn digest(&self) -> Result<[u8; 32], MemoryError> {
        self.digest_within(0, self.size())
    }

    /// The same of a part of RAM.
    pub fn digest_of(&self, pages: Range<RamOffset>) -> Result<[u8; 32], MemoryError> {
        self.check_pages(&pages)?;
        self.digest_within(pages.start().0, pages.end())
    }

    fn digest_within(&self, from: u64, to: u64) -> Result<[u8; 32], MemoryError> {
        const PAGE: usize = as_usize(PAGE_SIZE);
        const ENTRY: usize = size_of::<u64>() + PAGE;
        // Several pages at once, because the hash is several times faster on long input.
        let mut buffer = vec![0; 16 * ENTRY];
        let mut used = 0;
        let mut hasher = blake3::Hasher::new();
        for extent in self.data_extents_within(from, to)? {
            for at in (extent.start().0..extent.end()).step_by(PAGE) {
                if self.is_zero_at(at, Holes::Excluded)? {
                    continue;
                }
                let (number, page) = buffer[used..used + ENTRY].split_at_mut(size_of::<u64>());
                number.copy_from_slice(&(at / PAGE_SIZE).to_le_bytes());
                self.area.read(at, page)?;
                used += ENTRY;
                if used == buffer.len() {
                    hasher.update(&buffer);
                    used = 0;
                }
            }
        }
        hasher.update(&buffer[..used]);
        Ok(*hasher.finalize().as_bytes())
    }

    /// Offset of the first data at or after `from`, rounded down to its page; `None` when the rest is one hole.
    pub(crate) fn next_data(&self, from: u64) -> Result<Option<u64>, MemoryError> {
        if from >= self.size() {
            return Ok(None);
        }
        match rustix::fs::seek(&self.fd, SeekFrom::Data(from)) {
            Ok(data) if data < self.size() => Ok(Some(data)),
            Ok(_) | Err(Errno::NXIO) => Ok(None),
            Err(source) => Err(MemoryError::System { doing: "looking for data".into(), source }),
        }
    }

    fn is_zero_at(&self, offset: u64, holes: Holes) -> Result<bool, MemoryError> {
        if holes == Holes::Possible && self.next_data(offset)?.is_none_or(|data| data >= offset + PAGE_SIZE) {
            return Ok(true);
        }
        self.area.is_zero(offset, PAGE_SIZE)
    }
}
