//! Runs of data, of zeros and of holes in guest RAM; and the digest, which is the same for zeros and holes.

use std::ops::Range as Bytes;

use vfio_migration_types::{PAGE_SIZE, RamOffset, Range};

use crate::area::as_usize;
use crate::error::MemoryError;
use crate::ram::GuestRam;
use crate::region::Region;

/// The knowledge of holes that the caller of [`GuestRam::scan`] has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// There may be some: they are looked for first (two short system calls for each stretch of data), so that none is
    /// touched.
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
    /// The parts of RAM that have pages behind them, ascending, apart and in whole pages; all else reads as zero. Asked of
    /// the kernel, by SEEK_DATA and SEEK_HOLE of a shared file and by the page map of private anonymous memory: nothing is
    /// touched. A region of another kind has no way to tell, and is one extent.
    ///
    /// A snapshot: what is written later may be anywhere, and the dirty logs name it. Takes time by the page of data,
    /// tens of nanoseconds each, so it is for once per pass and not for once per run.
    pub fn data_extents(&self) -> Result<Vec<Range<RamOffset>>, MemoryError> {
        self.extents(self.all().iter().map(|region| (region, 0..region.info.len)))
    }

    fn extents<'a>(
        &self,
        parts: impl Iterator<Item = (&'a Region, Bytes<u64>)>,
    ) -> Result<Vec<Range<RamOffset>>, MemoryError> {
        let mut extents: Vec<Range<RamOffset>> = Vec::new();
        for (region, bytes) in parts {
            for (start, end) in region.data(bytes.start, bytes.end)? {
                let start = region.info.offset.0 + start;
                let end = region.info.offset.0 + end;
                // The last of one region and the first of the next may touch.
                let start = extents.pop_if(|last| last.end() == start).map_or(start, |last| last.start().0);
                extents.extend(Range::new(RamOffset(start), end - start));
            }
        }
        Ok(extents)
    }

    /// Whether page number `page` (RAM offset / 4096) is zero now; a hole is, and stays one. `false` past the end.
    pub fn is_zero(&self, page: u64) -> bool {
        let range =
            page.checked_mul(PAGE_SIZE).and_then(|start| Range::new(RamOffset(start), PAGE_SIZE).ok());
        let runs = range.and_then(|range| self.scan(range, Holes::Possible).ok());
        runs.is_some_and(|runs| runs.iter().all(|run| run.zero))
    }

    /// Divides `pages` into maximal runs of zero and of other pages, in order and without gaps.
    pub fn scan(&self, pages: Range<RamOffset>, holes: Holes) -> Result<Vec<ScanRun>, MemoryError> {
        let mut runs: Vec<ScanRun> = Vec::new();
        let mut push = |start: u64, end: u64, zero: bool| {
            let start = runs
                .pop_if(|last| last.zero == zero && last.range.end() == start)
                .map_or(start, |last| last.range.start().0);
            let range = Range::new(RamOffset(start), end.saturating_sub(start));
            runs.extend(range.map(|range| ScanRun { range, zero }));
        };
        for (region, bytes) in self.pages(&pages)? {
            let at = |into: u64| region.info.offset.0 + into;
            let data = match holes {
                Holes::Possible => region.data(bytes.start, bytes.end)?,
                Holes::Excluded => {
                    region.check_file()?;
                    vec![(bytes.start, bytes.end)]
                }
            };
            let mut hole = bytes.start;
            for (start, end) in data {
                push(at(hole), at(start), true);
                for page in (start..end).step_by(as_usize(PAGE_SIZE)) {
                    push(at(page), at(page + PAGE_SIZE), region.area.is_zero(page, PAGE_SIZE)?);
                }
                hole = end;
            }
            push(at(hole), at(bytes.end), true);
        }
        Ok(runs)
    }

    /// Makes `pages` zero; holes are left alone. Not logged as dirty.
    ///
    /// Where the region allows holes to be punched, and its pages would read as zero afterwards, whole host pages are given
    /// back: those of a shared file by a hole in it, private anonymous ones by MADV_DONTNEED. Everywhere else zeros are
    /// written over what is not zero, so that pages stay where they are, pinned or not.
    pub fn zero(&self, pages: Range<RamOffset>) -> Result<(), MemoryError> {
        self.pages(&pages)?.try_for_each(|(region, bytes)| region.zero(bytes.start, bytes.end))
    }

    /// Makes all of RAM zero, as [`zero`](Self::zero) does, for a guest that is to arrive in it. A region that was lent as
    /// fresh is taken at its word, once.
    pub fn clear(&self) -> Result<(), MemoryError> {
        self.all().iter().try_for_each(Region::clear)
    }

    /// BLAKE3 over number (64 bits, little endian) and bytes of every page that is not zero, ascending: a hole and a
    /// page of zeros count the same, and so does RAM of whatever kind. Only data is read.
    ///
    /// Of use only while nobody writes.
    pub fn digest(&self) -> Result<[u8; 32], MemoryError> {
        self.digest_within(self.all().iter().map(|region| (region, 0..region.info.len)))
    }

    /// The same of a part of RAM.
    pub fn digest_of(&self, pages: Range<RamOffset>) -> Result<[u8; 32], MemoryError> {
        self.digest_within(self.pages(&pages)?)
    }

    fn digest_within<'a>(
        &self,
        parts: impl Iterator<Item = (&'a Region, Bytes<u64>)>,
    ) -> Result<[u8; 32], MemoryError> {
        const PAGE: usize = as_usize(PAGE_SIZE);
        const ENTRY: usize = size_of::<u64>() + PAGE;
        // Several pages at once, because the hash is several times faster on long input.
        let mut buffer = vec![0; 16 * ENTRY];
        let mut used = 0;
        let mut hasher = blake3::Hasher::new();
        for (region, bytes) in parts {
            for (start, end) in region.data(bytes.start, bytes.end)? {
                for into in (start..end).step_by(PAGE) {
                    if region.area.is_zero(into, PAGE_SIZE)? {
                        continue;
                    }
                    let (number, page) = buffer[used..used + ENTRY].split_at_mut(size_of::<u64>());
                    number.copy_from_slice(&((region.info.offset.0 + into) / PAGE_SIZE).to_le_bytes());
                    region.area.read(into, page)?;
                    used += ENTRY;
                    if used == buffer.len() {
                        hasher.update(&buffer);
                        used = 0;
                    }
                }
            }
        }
        hasher.update(&buffer[..used]);
        Ok(*hasher.finalize().as_bytes())
    }
}
