//! A kernel device's dirty log, whoever keeps it: the device, its IOMMU, or the container.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_migration_memory::{Coverage, DirtySource, MemoryError};
use vfio_migration_types::{Bitmap, Granule, Iova, PAGE_SIZE, RamOffset, Range, error_chain};
use vfio_migration_uapi::UapiError;

use super::log_users::LogUsers;
use super::ranges::{Logged, fit};
use super::windows::DmaWindows;
use crate::contract::DirtyLog;
use crate::error::UnknownRam;

/// The system calls of one kind of log.
pub(super) trait LogPort: fmt::Debug + Send + Sync {
    /// Begins to log writes to `ranges`; gives the page size of the log.
    fn start(&self, ranges: &[Range<Iova>]) -> Result<Granule, UapiError>;
    /// ORs in what was written to one of the ranges, and forgets it.
    fn report(&self, range: Range<Iova>, granule: Granule, words: &mut [u64]) -> Result<(), UapiError>;
    /// Ends the log.
    fn stop(&self) -> Result<(), UapiError>;
    /// Most ranges that it takes.
    fn most_ranges(&self) -> usize;
    /// Whether the log knows a range only while it is mapped.
    fn goes_with_mapping(&self) -> bool;
    /// Those who use it, of a log that several devices share.
    fn users(&self) -> Option<&LogUsers> {
        None
    }
}

/// The log of one device.
#[derive(Debug)]
pub(super) struct TrackerLog {
    name: String,
    port: Box<dyn LogPort>,
    windows: Arc<DmaWindows>,
    active: Mutex<Option<Active>>,
}

#[derive(Debug)]
struct Active {
    logged: Vec<Logged>,
    /// What changed hands after this is in no log.
    since: u64,
    /// Page size of the log itself.
    granule: Granule,
    /// Page size that reports are asked in: no larger, and every range is made of whole ones.
    asked: Granule,
}

/// The finding of a trial of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tried {
    /// Every page was reported, twice in a row.
    pub(super) all_dirty: bool,
}

impl TrackerLog {
    pub(super) fn new(name: String, port: Box<dyn LogPort>, windows: Arc<DmaWindows>) -> Self {
        Self { name, port, windows, active: Mutex::new(None) }
    }

    /// START, REPORT, STOP: START can succeed where REPORT is not supported. On what is mapped, or on `otherwise` where
    /// nothing is.
    pub(super) fn trial(&self, otherwise: &[(Range<Iova>, RamOffset)]) -> Result<Tried, MemoryError> {
        let mapped = self.windows.ram();
        let over = if mapped.is_empty() { otherwise.to_vec() } else { mapped };
        let bytes = over.iter().map(|(range, ram)| ram.0.saturating_add(range.len())).max().unwrap_or(0);
        let mut lock = self.lock();
        if lock.is_some() {
            return Err(MemoryError::AlreadyLogging { source_name: self.name.clone() });
        }
        let alone = self.port.users().map(LogUsers::alone);
        if matches!(alone, Some(None)) {
            // It runs for another device, which is proof enough.
            return Ok(Tried { all_dirty: false });
        }
        let active = lock.insert(self.begin(over, 0)?);
        let mut all_dirty = bytes > 0;
        let mut reported = Ok(());
        for _ in 0..2 {
            let mut scratch = Bitmap::new(bytes, Granule::PAGE);
            reported =
                active.logged.iter().try_for_each(|logged| self.report_one(active, logged, &mut scratch));
            if reported.is_err() {
                break;
            }
            let covered: u64 =
                active.logged.iter().flat_map(|logged| &logged.pieces).map(|(range, _)| range.len()).sum();
            all_dirty &= scratch.dirty_bytes() >= covered;
        }
        *lock = None;
        let stopped = self.port.stop().map_err(|error| self.failed("stopping", error));
        reported.and(stopped).map(|()| Tried { all_dirty })
    }

    fn begin(&self, mapped: Vec<(Range<Iova>, RamOffset)>, since: u64) -> Result<Active, MemoryError> {
        let logged = fit(mapped, self.port.most_ranges());
        let ranges: Vec<Range<Iova>> = logged.iter().map(|one| one.range).collect();
        if ranges.is_empty() {
            // The kernel refuses a log of nothing, and a device that reaches nothing dirties nothing.
            return Ok(Active { logged, since, granule: Granule::PAGE, asked: Granule::PAGE });
        }
        let granule = self.port.start(&ranges).map_err(|error| self.failed("starting", error))?;
        let asked = whole(granule, &ranges);
        Ok(Active { logged, since, granule, asked })
    }

    fn report_one(&self, active: &Active, logged: &Logged, into: &mut Bitmap) -> Result<(), MemoryError> {
        let range = logged.range;
        let words = active.asked.count(range.len()).div_ceil(64);
        let mut words = vec![0; usize::try_from(words).unwrap_or(usize::MAX)];
        self.port.report(range, active.asked, &mut words).map_err(|error| self.failed("reporting", error))?;
        if let [(piece, ram)] = logged.pieces[..]
            && piece == range
        {
            into.or_scaled(ram.0, &words, active.asked);
            return Ok(());
        }
        let mut bits = Bitmap::new(range.len(), active.asked);
        bits.or_words(0, &words);
        for run in bits.runs() {
            let start = range.start().0 + run.first * active.asked.bytes();
            let end = start + run.count * active.asked.bytes();
            for (piece, ram) in &logged.pieces {
                let (from, to) = (start.max(piece.start().0), end.min(piece.end()));
                if from < to {
                    into.set_bytes(ram.0 + (from - piece.start().0), to - from);
                }
            }
        }
        Ok(())
    }

    fn failed(
        &self,
        doing: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> MemoryError {
        MemoryError::DirtyLog { source_name: self.name.clone(), doing: doing.into(), source: source.into() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtySource for TrackerLog {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn coverage(&self) -> Coverage {
        // Whoever mapped the guest's RAM for the device did so elsewhere: nothing is known of what it writes.
        if self.windows.knows_ram() { Coverage::All } else { Coverage::Nothing(UnknownRam.to_string()) }
    }

    fn start(&self) -> Result<(), MemoryError> {
        let mut active = self.lock();
        if active.is_some() {
            // With iommufd a second start would lose what the first has logged.
            return Err(MemoryError::AlreadyLogging { source_name: self.name.clone() });
        }
        let (mapped, since) = self.windows.begin();
        if mapped.is_empty() && !self.windows.knows_ram() {
            return Err(self.failed("starting", UnknownRam));
        }
        let _entered = self.port.users().map(LogUsers::enter);
        *active = Some(self.begin(mapped, since)?);
        Ok(())
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        let lock = self.lock();
        let Some(active) = lock.as_ref() else {
            return Err(MemoryError::NotLogging { source_name: self.name.clone() });
        };
        for logged in &active.logged {
            // What was unmapped since counts as dirty below; asked for, the kernel would refuse, or stop at the hole
            // and call it a success.
            if !self.port.goes_with_mapping() || self.windows.contains(logged.range) {
                self.report_one(active, logged, into)?;
            }
        }
        for (ram, bytes) in self.windows.moved(active.since) {
            into.set_bytes(ram.0, bytes);
        }
        Ok(())
    }

    fn covers(&self, offset: RamOffset) -> bool {
        let holds = |start: &RamOffset, len: u64| (start.0..start.0 + len).contains(&offset.0);
        self.lock().as_ref().is_some_and(|active| {
            let mut pieces = active.logged.iter().flat_map(|logged| &logged.pieces);
            pieces.any(|(range, ram)| holds(ram, range.len()))
                || self.windows.moved(active.since).iter().any(|(ram, bytes)| holds(ram, *bytes))
        })
    }

    fn stop(&self) -> Result<(), MemoryError> {
        match self.lock().take() {
            Some(active) if !active.logged.is_empty() => {
                self.port.stop().map_err(|error| self.failed("stopping", error))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for TrackerLog {
    /// What the device is closed by ends its log, but not where the VMM holds its descriptor too, or another device the log.
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::debug!(log = %self.name, error = %error_chain(&error), "a dirty log was not stopped as its device went");
        }
    }
}

impl DirtyLog for TrackerLog {
    fn granule(&self) -> Granule {
        self.lock().as_ref().map_or(Granule::PAGE, |active| active.granule)
    }
}

/// The largest granule up to `granule` of which all `ranges` are whole multiples. The kernel turns the log's own pages
/// into any size from 4 KiB (`drivers/vfio/iova_bitmap.c`).
fn whole(granule: Granule, ranges: &[Range<Iova>]) -> Granule {
    let bits = ranges.iter().fold(granule.bytes(), |bits, range| bits | range.start().0 | range.len());
    let bytes = (1u64 << bits.trailing_zeros()).max(PAGE_SIZE);
    Granule::new(bytes).unwrap_or(Granule::PAGE)
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::super::windows::DmaWindow;
    use super::*;

    /// A log whose pages are set by the test.
    #[derive(Debug, Default)]
    struct Fake {
        state: Mutex<FakeState>,
        granule: u64,
        most: usize,
        no_report: bool,
        always: bool,
        goes_with_mapping: bool,
    }

    #[derive(Debug, Default)]
    struct FakeState {
        ranges: Vec<Range<Iova>>,
        written: Vec<u64>,
        starts: u32,
        stops: u32,
    }

    fn error(source: Errno) -> UapiError {
        UapiError::System { doing: "a test", source }
    }

    impl LogPort for Arc<Fake> {
        fn start(&self, ranges: &[Range<Iova>]) -> Result<Granule, UapiError> {
            let mut state = self.state.lock().unwrap();
            if ranges.is_empty() || !state.ranges.is_empty() {
                return Err(error(Errno::INVAL));
            }
            state.ranges = ranges.to_vec();
            state.starts += 1;
            Ok(Granule::new(self.granule).unwrap())
        }

        fn report(&self, range: Range<Iova>, granule: Granule, words: &mut [u64]) -> Result<(), UapiError> {
            if self.no_report {
                return Err(error(Errno::OPNOTSUPP));
            }
            let mut state = self.state.lock().unwrap();
            // As pds: a range as it was started, of whole pages.
            let whole = range.start().0.is_multiple_of(granule.bytes());
            if !state.ranges.contains(&range) || !whole || !range.len().is_multiple_of(granule.bytes()) {
                return Err(error(Errno::INVAL));
            }
            let mut bits = Bitmap::new(range.len(), granule);
            if self.always {
                bits.set_all();
            }
            state.written.retain(|iova| {
                let inside = range.contains(Iova(*iova));
                if inside {
                    bits.set_bytes(iova - range.start().0, 1);
                }
                !inside
            });
            words.iter_mut().zip(bits.words()).for_each(|(word, bits)| *word |= bits);
            Ok(())
        }

        fn stop(&self) -> Result<(), UapiError> {
            let mut state = self.state.lock().unwrap();
            state.ranges.clear();
            state.stops += 1;
            Ok(())
        }

        fn most_ranges(&self) -> usize {
            self.most
        }

        fn goes_with_mapping(&self) -> bool {
            self.goes_with_mapping
        }
    }

    fn window(start: u64, pages: u64, ram: u64) -> DmaWindow {
        let iova = Range::new(Iova(start), pages * PAGE_SIZE).unwrap();
        DmaWindow { iova, write: true, ram: Some(RamOffset(ram * PAGE_SIZE)) }
    }

    fn rig(fake: Fake) -> (Arc<Fake>, Arc<DmaWindows>, TrackerLog) {
        let fake = Arc::new(fake);
        let windows = Arc::new(DmaWindows::default());
        // RAM pages 0..16 at 0, 16..32 above a hole, and a BAR that no log is to hold.
        windows.add(window(0, 16, 0));
        windows.add(window(0x10_0000, 16, 16));
        let bar = Range::new(Iova(0xfe00_0000), PAGE_SIZE).unwrap();
        windows.add(DmaWindow { iova: bar, write: true, ram: None });
        let log = TrackerLog::new("device t0".into(), Box::new(fake.clone()), windows.clone());
        (fake, windows, log)
    }

    fn exact() -> Fake {
        Fake { granule: PAGE_SIZE, most: 256, ..Fake::default() }
    }

    fn dirty(log: &TrackerLog) -> Vec<u64> {
        let mut into = Bitmap::new(64 * PAGE_SIZE, Granule::PAGE);
        log.report(&mut into).unwrap();
        (0..64).filter(|page| into.test(*page)).collect()
    }

    #[test]
    fn writes_are_found_at_their_ram_offsets_once() {
        let (fake, _, log) = rig(exact());
        log.start().unwrap();
        fake.state.lock().unwrap().written = vec![0x3008, 0x10_0000, 0xfe00_0000];
        assert_eq!(dirty(&log), [3, 16]);
        assert!(dirty(&log).is_empty());
        assert!(matches!(log.start(), Err(MemoryError::AlreadyLogging { .. })));
        log.stop().unwrap();
        log.stop().unwrap();
        assert_eq!(fake.state.lock().unwrap().stops, 1);
        let mut into = Bitmap::new(PAGE_SIZE, Granule::PAGE);
        assert!(matches!(log.report(&mut into), Err(MemoryError::NotLogging { .. })));
    }

    #[test]
    fn joined_ranges_say_nothing_of_what_lies_between() {
        let (fake, _, log) = rig(Fake { most: 1, ..exact() });
        log.start().unwrap();
        assert_eq!(fake.state.lock().unwrap().ranges.len(), 1);
        fake.state.lock().unwrap().written = vec![0xf000, 0x8_0000, 0x10_1000];
        assert_eq!(dirty(&log), [15, 17]);
    }

    #[test]
    fn a_larger_page_of_the_device_is_asked_for_in_what_fits() {
        let (fake, _, log) = rig(Fake { granule: 1 << 21, ..exact() });
        log.start().unwrap();
        assert_eq!(log.granule().bytes(), 1 << 21);
        fake.state.lock().unwrap().written = vec![0x3008];
        // 64 KiB: what the ranges are made of.
        assert_eq!(dirty(&log), (0..16).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_mapped_or_unmapped_meanwhile_counts_as_dirty() {
        let (fake, windows, log) = rig(Fake { goes_with_mapping: true, ..exact() });
        log.start().unwrap();
        windows.add(window(0x80_0000, 1, 40));
        windows.remove(window(0x10_0000, 16, 16).iova);
        fake.state.lock().unwrap().ranges.retain(|range| range.start().0 == 0);
        let expected: Vec<u64> = (16..32).chain([40]).collect();
        assert_eq!(dirty(&log), expected);
        // And whatever it held once is its to report.
        let covered: Vec<u64> = (0..64).filter(|page| log.covers(RamOffset(page * PAGE_SIZE))).collect();
        assert_eq!(covered, (0..32).chain([40]).collect::<Vec<_>>());
        log.stop().unwrap();
        log.start().unwrap();
        assert!(dirty(&log).is_empty());
    }

    #[test]
    fn a_log_that_starts_and_cannot_report_fails_its_trial_and_is_stopped() {
        let (fake, _, log) = rig(Fake { no_report: true, ..exact() });
        let refused = log.trial(&[]).unwrap_err();
        assert!(refused.to_string().contains("reporting"), "{refused}");
        let state = fake.state.lock().unwrap();
        assert_eq!((state.starts, state.stops), (1, 1));
    }

    #[test]
    fn a_trial_tells_a_log_that_knows_from_one_that_says_everything() {
        let (_, _, log) = rig(exact());
        assert_eq!(log.trial(&[]).unwrap(), Tried { all_dirty: false });
        let (_, _, log) = rig(Fake { always: true, ..exact() });
        assert_eq!(log.trial(&[]).unwrap(), Tried { all_dirty: true });
        // A log that was tried can be started.
        log.start().unwrap();
    }

    #[test]
    fn a_device_that_may_write_no_ram_dirties_nothing() {
        let fake = Arc::new(exact());
        let windows = Arc::new(DmaWindows::default());
        windows.add(DmaWindow { write: false, ..window(0, 16, 0) });
        let log = TrackerLog::new("device t0".into(), Box::new(fake.clone()), windows);
        log.start().unwrap();
        assert!(dirty(&log).is_empty());
        log.stop().unwrap();
        assert_eq!(fake.state.lock().unwrap().starts, 0);
    }

    #[test]
    fn a_log_that_knows_no_mapping_of_ram_refuses_to_start() {
        let windows = Arc::new(DmaWindows::default());
        let log = TrackerLog::new("device t0".into(), Box::new(Arc::new(exact())), windows.clone());
        let refused = |log: &TrackerLog| {
            let error = log.start().unwrap_err();
            let text = vfio_migration_types::error_chain(&error);
            assert!(text.contains("device t0") && text.contains("no mapping of guest RAM"), "{text}");
            let mut into = Bitmap::new(PAGE_SIZE, Granule::PAGE);
            assert!(matches!(log.report(&mut into), Err(MemoryError::NotLogging { .. })));
        };
        refused(&log);
        // Another device's BAR says nothing of RAM.
        let bar = Range::new(Iova(0xfe00_0000), PAGE_SIZE).unwrap();
        windows.add(DmaWindow { iova: bar, write: true, ram: None });
        refused(&log);
        windows.add(window(0, 16, 0));
        log.start().unwrap();
        log.stop().unwrap();
    }
}
