//! What the device reaches by DMA: mapped memory, or memory that only messages to the client reach; and its log of
//! what it wrote there.
//!
//! The log is kept per mapping, so that nothing is allocated for an address range that a client merely names. As in
//! the uAPI (`include/uapi/linux/vfio.h`, `VFIO_DEVICE_FEATURE_DMA_LOGGING_*`), a report clears what it reports.
//! Writes that go out as messages are not logged: the client that carries them out knows of them.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use rustix::io::Errno;
use vfio_migration_memory::Mapping;
use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE};

use crate::error::{SimError, invalid};

/// Most mappings that a device takes.
pub const MAX_MAPPINGS: usize = 4096;
/// Most ranges of a log, as in the kernel (`LOG_MAX_RANGES` on hosts with 4 KiB pages).
pub const MAX_LOG_RANGES: usize = 256;
/// The coarsest page that the log keeps; a START that asks for more is answered with this.
pub const MAX_LOG_PAGE: u64 = 2 << 20;
/// Longest range of one report, in pages.
const MAX_REPORT_PAGES: u64 = 1 << 32;

/// DMA by messages, for memory that came without a descriptor.
pub trait MessageDma: fmt::Debug + Send + Sync {
    /// Fills `into` from `iova`.
    fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno>;
    /// Writes `from` to `iova`.
    fn write(&self, iova: u64, from: &[u8]) -> Result<(), Errno>;
}

/// The way to a stretch of DMA space.
#[derive(Debug)]
pub enum DmaTarget<'a> {
    /// A file to be mapped, from this offset.
    File(BorrowedFd<'a>, u64),
    /// Memory that messages to the client reach.
    Messages(Arc<dyn MessageDma>),
}

/// The device's view of DMA space.
#[derive(Debug, Default)]
pub(crate) struct DmaTable {
    table: RwLock<Table>,
    /// Pages whose number is a multiple of this are left out of the log, by a scripted fault.
    omit_every: Option<u64>,
}

#[derive(Debug, Default)]
struct Table {
    /// Ascending by address, without overlap.
    regions: Vec<Region>,
    log: Option<Log>,
}

#[derive(Debug)]
struct Region {
    iova: u64,
    /// At least 1; `iova + len` does not overflow.
    len: u64,
    read: bool,
    write: bool,
    backing: Backing,
    /// Written pages since the last report, counted from `iova` rounded down to a page of the log.
    log: Option<Mutex<Bitmap>>,
}

#[derive(Debug)]
enum Backing {
    Memory(Mapping),
    Messages(Arc<dyn MessageDma>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Log {
    granule: Granule,
    /// Logged ranges of address and length; empty when everything is logged.
    ranges: Vec<(u64, u64)>,
}

impl DmaTable {
    pub(crate) fn new(omit_every: Option<u64>) -> Self {
        Self { table: RwLock::default(), omit_every }
    }

    pub(crate) fn map(
        &self,
        iova: u64,
        len: u64,
        read: bool,
        write: bool,
        target: DmaTarget<'_>,
    ) -> Result<(), SimError> {
        let end = iova.checked_add(len).filter(|_| len > 0);
        let Some(end) = end else { return Err(invalid("a mapping is empty or wraps around")) };
        let mut table = self.write_table();
        if table.regions.len() >= MAX_MAPPINGS {
            return Err(SimError::new(Errno::NOSPC, "too many mappings"));
        }
        let at = table.regions.partition_point(|region| region.iova < iova);
        let before = at.checked_sub(1).and_then(|at| table.regions.get(at));
        let overlaps = before.is_some_and(|region| region.end() > iova)
            || table.regions.get(at).is_some_and(|region| region.iova < end);
        if overlaps {
            return Err(SimError::new(Errno::EXIST, "a mapping overlaps another"));
        }
        let backing = match target {
            DmaTarget::File(fd, offset) => match Mapping::new(fd, offset, len, write) {
                Ok(mapping) => Backing::Memory(mapping),
                Err(error) => return Err(invalid(format!("memory cannot be mapped: {error}"))),
            },
            DmaTarget::Messages(channel) => Backing::Messages(channel),
        };
        let mut region = Region { iova, len, read, write, backing, log: None };
        region.log = table.log.as_ref().and_then(|log| region.fresh_log(log));
        table.regions.insert(at, region);
        Ok(())
    }

    /// Removes a mapping exactly as it was made. When this returns nothing touches it any more, except that a
    /// message may be under way: `true` when the mapping was reached by messages.
    pub(crate) fn unmap(&self, iova: u64, len: u64) -> Result<bool, SimError> {
        let mut table = self.write_table();
        let found = table.regions.iter().position(|region| (region.iova, region.len) == (iova, len));
        let Some(at) = found else { return Err(SimError::new(Errno::NOENT, "no such mapping")) };
        let region = table.regions.remove(at);
        Ok(matches!(region.backing, Backing::Messages(_)))
    }

    pub(crate) fn unmap_all(&self) {
        self.write_table().regions.clear();
    }

    pub(crate) fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), SimError> {
        let (mut at, mut rest) = (iova, into);
        while !rest.is_empty() {
            let table = self.read_table();
            let region = table.find(at).filter(|region| region.read).ok_or_else(|| fault(at, "readable"))?;
            let (here, after) = rest.split_at_mut(region.reach(at, rest.len()));
            let next = at.checked_add(here.len() as u64);
            match &region.backing {
                Backing::Memory(mapping) => {
                    mapping.read(at - region.iova, here).map_err(|error| fault(at, &error.to_string()))?;
                }
                Backing::Messages(channel) => {
                    // Not under the lock: an answer may have to wait for whoever wants the table.
                    let channel = channel.clone();
                    drop(table);
                    channel
                        .read(at, here)
                        .map_err(|errno| SimError::new(errno, "a DMA read message failed"))?;
                }
            }
            rest = after;
            at = next.unwrap_or(u64::MAX);
        }
        Ok(())
    }

    /// Writes, and logs it where a log is kept.
    pub(crate) fn write(&self, iova: u64, from: &[u8]) -> Result<(), SimError> {
        let (mut at, mut rest) = (iova, from);
        while !rest.is_empty() {
            let table = self.read_table();
            let region = table.find(at).filter(|region| region.write).ok_or_else(|| fault(at, "writable"))?;
            let (here, after) = rest.split_at(region.reach(at, rest.len()));
            let next = at.checked_add(here.len() as u64);
            match &region.backing {
                Backing::Memory(mapping) => {
                    mapping.write(at - region.iova, here).map_err(|error| fault(at, &error.to_string()))?;
                    // Marked after it is written: a report in between leaves the page to the next report, and no
                    // report is the last before the engine has stopped.
                    region.mark(at, here.len() as u64, self.omit_every);
                }
                Backing::Messages(channel) => {
                    let channel = channel.clone();
                    drop(table);
                    channel
                        .write(at, here)
                        .map_err(|errno| SimError::new(errno, "a DMA write message failed"))?;
                }
            }
            rest = after;
            at = next.unwrap_or(u64::MAX);
        }
        Ok(())
    }

    /// Begins to log writes to `ranges` (all of memory when there are none). Returns the page size chosen.
    pub(crate) fn start_log(&self, page_size: u64, ranges: &[(u64, u64)]) -> Result<u64, SimError> {
        if ranges.len() > MAX_LOG_RANGES {
            return Err(SimError::new(Errno::TOOBIG, "too many ranges to log"));
        }
        if !page_size.is_power_of_two() {
            return Err(invalid("the log's page size is no power of two"));
        }
        let granule = Granule::new(page_size.clamp(PAGE_SIZE, MAX_LOG_PAGE))
            .map_err(|error| invalid(error.to_string()))?;
        let mut sorted = ranges.to_vec();
        sorted.sort_unstable();
        let mut reached = 0;
        for (iova, len) in &sorted {
            let end = iova
                .checked_add(*len)
                .ok_or_else(|| SimError::new(Errno::OVERFLOW, "a range to log wraps around"))?;
            if *len == 0 || iova % page_size != 0 || len % page_size != 0 {
                return Err(invalid("a range to log is empty or not aligned to the page size"));
            }
            if *iova < reached {
                return Err(invalid("ranges to log overlap"));
            }
            reached = end;
        }
        let log = Log { granule, ranges: sorted };
        let mut table = self.write_table();
        match &table.log {
            Some(running) if *running == log => return Ok(granule.bytes()),
            Some(_) => return Err(invalid("a log runs already, with other ranges or another page size")),
            None => {}
        }
        for region in &mut table.regions {
            region.log = region.fresh_log(&log);
        }
        table.log = Some(log);
        Ok(granule.bytes())
    }

    /// Ends the log; without one nothing happens, as in the kernel's drivers.
    pub(crate) fn stop_log(&self) {
        let mut table = self.write_table();
        table.log = None;
        for region in &mut table.regions {
            region.log = None;
        }
    }

    /// ORs into `words` what was written in the range since the last report, a bit per page of `page_size` bytes
    /// counted from `iova`, and forgets it. Pages of the log that lie in the range in part are reported and kept.
    pub(crate) fn report(
        &self,
        iova: u64,
        len: u64,
        page_size: u64,
        words: &mut [u64],
    ) -> Result<(), SimError> {
        let granule = Granule::new(page_size).map_err(|error| invalid(error.to_string()))?;
        let end =
            iova.checked_add(len).ok_or_else(|| SimError::new(Errno::OVERFLOW, "the range wraps around"))?;
        let pages = granule.count(len);
        if len == 0 || pages > MAX_REPORT_PAGES || pages.div_ceil(64) > words.len() as u64 {
            return Err(invalid("the range is empty, or its bitmap too small"));
        }
        let table = self.read_table();
        let Some(log) = &table.log else { return Err(invalid("no log runs")) };
        let touched = || table.regions.iter().filter(|region| region.iova < end && region.end() > iova);
        if touched().any(|region| matches!(region.backing, Backing::Messages(_))) {
            return Err(invalid("the range is reached by messages, which only the client can log"));
        }
        if touched().next().is_none() {
            return Err(SimError::new(Errno::NOENT, "nothing is mapped in the range"));
        }
        let mut out = Bitmap::new(len, granule);
        for region in touched() {
            let Some(bitmap) = &region.log else { continue };
            let mut bitmap = lock(bitmap);
            let base = region.log_base(log.granule);
            let step = log.granule.bytes();
            let runs: Vec<_> = bitmap.runs().collect();
            for page in runs.iter().flat_map(|run| run.first..run.first + run.count) {
                let start = base + page * step;
                let stop = start.saturating_add(step);
                if start >= end || stop <= iova {
                    continue;
                }
                let from = start.max(iova);
                out.set_bytes(from - iova, stop.min(end) - from);
                if start.max(region.iova) >= iova && stop.min(region.end()) <= end {
                    bitmap.clear(page);
                }
            }
        }
        for (to, word) in words.iter_mut().zip(out.words()) {
            *to |= word;
        }
        Ok(())
    }

    fn read_table(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_table(&self) -> std::sync::RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn find(&self, iova: u64) -> Option<&Region> {
        let at = self.regions.partition_point(|region| region.iova <= iova).checked_sub(1)?;
        self.regions.get(at).filter(|region| iova - region.iova < region.len)
    }
}

impl Region {
    fn end(&self) -> u64 {
        self.iova + self.len
    }

    /// Number of `wanted` bytes from `iova`, which lies inside, that lie inside.
    fn reach(&self, iova: u64, wanted: usize) -> usize {
        usize::try_from(self.end() - iova).map_or(wanted, |left| left.min(wanted))
    }

    fn log_base(&self, granule: Granule) -> u64 {
        self.iova & !(granule.bytes() - 1)
    }

    /// An empty log for this mapping, where `log` is about a part of it and it can be logged.
    fn fresh_log(&self, log: &Log) -> Option<Mutex<Bitmap>> {
        let memory = matches!(self.backing, Backing::Memory(_)) && self.write;
        let meant = |(iova, len): &(u64, u64)| *iova < self.end() && self.iova < iova + len;
        if !memory || !(log.ranges.is_empty() || log.ranges.iter().any(meant)) {
            return None;
        }
        let base = self.log_base(log.granule);
        Some(Mutex::new(Bitmap::new(self.end() - base, log.granule)))
    }

    fn mark(&self, iova: u64, len: u64, omit_every: Option<u64>) {
        let Some(bitmap) = &self.log else { return };
        let mut bitmap = lock(bitmap);
        let base = self.log_base(bitmap.granule());
        match omit_every {
            None => bitmap.set_bytes(iova - base, len),
            Some(every) => {
                let size = bitmap.granule().bytes();
                for page in iova / size..=(iova + (len - 1)) / size {
                    if !page.is_multiple_of(every) {
                        bitmap.set(page - base / size);
                    }
                }
            }
        }
    }
}

fn fault(iova: u64, what: &str) -> SimError {
    SimError::new(Errno::FAULT, format!("DMA at {iova:#x} failed: not {what} memory"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    fn memory(len: u64) -> OwnedFd {
        let fd = memfd_create("dma-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        fd
    }

    fn mapped(omit_every: Option<u64>) -> DmaTable {
        let dma = DmaTable::new(omit_every);
        let fd = memory(0x20000);
        dma.map(0x10000, 0x10000, true, true, DmaTarget::File(fd.as_fd(), 0)).unwrap();
        dma.map(0x20000, 0x10000, true, true, DmaTarget::File(fd.as_fd(), 0x10000)).unwrap();
        dma
    }

    fn report(dma: &DmaTable, iova: u64, len: u64, page: u64) -> u64 {
        let mut words = [0];
        dma.report(iova, len, page, &mut words).unwrap();
        words[0]
    }

    #[test]
    fn accesses_cross_adjacent_mappings_and_leave_none() {
        let dma = mapped(None);
        dma.write(0x1fffc, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let mut back = [0; 8];
        dma.read(0x1fffc, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(dma.read(0x2fffc, &mut back).unwrap_err().errno(), Errno::FAULT);
        assert_eq!(dma.write(0xffff, &[0]).unwrap_err().errno(), Errno::FAULT);
        let fd = memory(0x1000);
        let again = dma.map(0x1f000, 0x1000, true, true, DmaTarget::File(fd.as_fd(), 0));
        assert_eq!(again.unwrap_err().errno(), Errno::EXIST);
        let beyond = dma.map(0x80000, 0x2000, true, true, DmaTarget::File(fd.as_fd(), 0));
        assert!(beyond.is_err(), "the file is shorter than the mapping");
        assert!(dma.map(u64::MAX - 10, 100, true, true, DmaTarget::File(fd.as_fd(), 0)).is_err());
        assert_eq!(dma.unmap(0x10000, 0x8000).unwrap_err().errno(), Errno::NOENT);
        dma.unmap(0x10000, 0x10000).unwrap();
        assert!(dma.read(0x1fffc, &mut back).is_err());
        let read_only = memory(0x1000);
        dma.map(0x1000, 0x1000, true, false, DmaTarget::File(read_only.as_fd(), 0)).unwrap();
        assert!(dma.write(0x1000, &[1]).is_err());
    }

    #[test]
    fn a_report_gives_each_written_page_once() {
        let dma = mapped(None);
        dma.write(0x10000, &[1]).unwrap();
        assert_eq!(dma.start_log(4096, &[(0x10000, 0x10000), (0x20000, 0x10000)]).unwrap(), 4096);
        dma.write(0x11fff, &[1, 2]).unwrap();
        dma.write(0x20000, &[1]).unwrap();
        let mut back = [0; 1];
        dma.read(0x16000, &mut back).unwrap();
        assert_eq!(report(&dma, 0x10000, 0x20000, 4096), 0b1_0000_0000_0000_0110);
        assert_eq!(report(&dma, 0x10000, 0x20000, 4096), 0);
        dma.write(0x13000, &[1]).unwrap();
        assert_eq!(report(&dma, 0x10000, 0x4000, 8192), 0b10, "another page size");
        dma.write(0x10000, &[1]).unwrap();
        assert_eq!(report(&dma, 0x12000, 0x4000, 4096), 0, "not asked for");
        assert_eq!(report(&dma, 0x10000, 0x1000, 4096), 1, "and so not forgotten");
        dma.write(0x10000, &[1]).unwrap();
        dma.stop_log();
        let mut words = [0];
        assert_eq!(dma.report(0x10000, 0x1000, 4096, &mut words).unwrap_err().errno(), Errno::INVAL);
    }

    #[test]
    fn a_log_is_about_its_ranges_and_about_mappings_that_come_later() {
        let dma = mapped(None);
        dma.start_log(4096, &[(0x10000, 0x10000)]).unwrap();
        dma.write(0x20000, &[1]).unwrap();
        assert_eq!(report(&dma, 0x20000, 0x10000, 4096), 0);
        assert_eq!(dma.start_log(4096, &[(0x10000, 0x10000)]).unwrap(), 4096, "again, the same");
        assert!(dma.start_log(8192, &[(0x10000, 0x10000)]).is_err());
        dma.stop_log();
        dma.stop_log();
        dma.start_log(512, &[]).unwrap();
        let fd = memory(0x1000);
        dma.map(0x80000, 0x1000, true, true, DmaTarget::File(fd.as_fd(), 0)).unwrap();
        dma.write(0x80010, &[1]).unwrap();
        assert_eq!(report(&dma, 0x80000, 0x1000, 4096), 1);
    }

    #[test]
    fn bad_ranges_and_sizes_are_refused() {
        let dma = mapped(None);
        let errno = |result: Result<u64, SimError>| result.unwrap_err().errno();
        assert_eq!(errno(dma.start_log(0, &[])), Errno::INVAL);
        assert_eq!(errno(dma.start_log(6000, &[])), Errno::INVAL);
        assert_eq!(errno(dma.start_log(4096, &[(1, 4096)])), Errno::INVAL);
        assert_eq!(errno(dma.start_log(4096, &[(0, 0)])), Errno::INVAL);
        assert_eq!(errno(dma.start_log(4096, &[(0x1000, !4095)])), Errno::OVERFLOW);
        assert_eq!(errno(dma.start_log(4096, &[(0, 0x2000), (0x1000, 0x1000)])), Errno::INVAL);
        assert_eq!(errno(dma.start_log(4096, &vec![(0, 4096); 257])), Errno::TOOBIG);
        dma.start_log(4096, &[]).unwrap();
        let mut words = [0];
        for (iova, len, page) in [(0x10000, 0, 4096), (0x10000, 0x1000, 2048), (0x10000, u64::MAX >> 1, 4096)]
        {
            assert!(dma.report(iova, len, page, &mut words).is_err());
        }
        assert_eq!(dma.report(0x70000, 0x1000, 4096, &mut words).unwrap_err().errno(), Errno::NOENT);
        assert!(dma.start_log(1 << 40, &[]).is_err(), "a log runs");
        dma.stop_log();
        assert_eq!(dma.start_log(1 << 40, &[]).unwrap(), MAX_LOG_PAGE);
    }

    #[derive(Debug)]
    struct Echo(Mutex<Vec<u8>>);

    impl MessageDma for Echo {
        fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
            let at = usize::try_from(iova - 0x40000).unwrap();
            into.copy_from_slice(&lock(&self.0)[at..at + into.len()]);
            Ok(())
        }

        fn write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
            let at = usize::try_from(iova - 0x40000).unwrap();
            lock(&self.0)[at..at + from.len()].copy_from_slice(from);
            Ok(())
        }
    }

    #[test]
    fn messages_carry_data_but_no_log() {
        let dma = mapped(None);
        let echo = Arc::new(Echo(Mutex::new(vec![0; 0x1000])));
        dma.map(0x40000, 0x1000, true, true, DmaTarget::Messages(echo.clone())).unwrap();
        dma.start_log(4096, &[]).unwrap();
        dma.write(0x40010, b"block").unwrap();
        assert_eq!(&lock(&echo.0)[0x10..0x15], b"block");
        let mut words = [0];
        assert_eq!(dma.report(0x40000, 0x1000, 4096, &mut words).unwrap_err().errno(), Errno::INVAL);
    }

    #[test]
    fn the_log_can_be_made_to_omit_pages() {
        let dma = mapped(Some(2));
        dma.start_log(4096, &[]).unwrap();
        dma.write(0x10000, &[1; 0x4000]).unwrap();
        assert_eq!(report(&dma, 0x10000, 0x10000, 4096), 0b1010);
    }
}
