//! The write log, and several sources as one.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use proptest::prelude::*;
use vfio_migration_memory::{Coverage, DirtySource, MemoryError, WriteLog, report_all, start_all, stop_all};
use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE, RamOffset, Range};

const PAGES: u64 = 1000;
const BYTES: u64 = PAGES * PAGE_SIZE;

fn bitmap() -> Bitmap {
    Bitmap::new(BYTES, Granule::PAGE)
}

fn dirty(map: &Bitmap) -> BTreeSet<u64> {
    map.runs().flat_map(|run| run.first..run.first + run.count).collect()
}

#[test]
fn it_records_only_while_it_runs() {
    let log = WriteLog::new("vmm", BYTES);
    let mut map = bitmap();
    log.mark(RamOffset(0), 1);
    assert!(matches!(log.report(&mut map), Err(MemoryError::NotLogging { .. })));
    log.start().unwrap();
    assert!(matches!(log.start(), Err(MemoryError::AlreadyLogging { .. })));
    log.report(&mut map).unwrap();
    assert!(!map.any(), "marked before the start");
    log.mark(RamOffset(5 * PAGE_SIZE - 1), 2);
    log.mark(RamOffset(7 * PAGE_SIZE), 0);
    log.report(&mut map).unwrap();
    assert_eq!(dirty(&map), BTreeSet::from([4, 5]));
    map.clear_all();
    log.report(&mut map).unwrap();
    assert!(!map.any(), "a report forgets");
    log.mark(RamOffset(0), 1);
    log.stop().unwrap();
    log.stop().unwrap();
    log.start().unwrap();
    log.report(&mut map).unwrap();
    assert!(!map.any(), "a start is a clean slate");
}

#[test]
fn absurd_marks_are_cut_to_size() {
    let log = WriteLog::new("vmm", BYTES);
    log.start().unwrap();
    let mut map = bitmap();
    for (offset, len) in [(BYTES, 1), (u64::MAX, u64::MAX), (u64::MAX - 5, 3)] {
        log.mark(RamOffset(offset), len);
    }
    log.report(&mut map).unwrap();
    assert!(!map.any());
    log.mark(RamOffset(BYTES - 1), u64::MAX);
    log.report(&mut map).unwrap();
    assert_eq!(dirty(&map), BTreeSet::from([PAGES - 1]));
    log.mark(RamOffset(0), u64::MAX);
    log.report(&mut map).unwrap();
    assert_eq!(map.count(), PAGES);
    let empty = WriteLog::new("none", 0);
    empty.start().unwrap();
    empty.mark(RamOffset(0), 1);
    empty.report(&mut map).unwrap();
}

#[test]
fn reports_scale_to_the_callers_granule() {
    let log = WriteLog::new("vmm", BYTES);
    log.start().unwrap();
    log.mark(RamOffset(130 * PAGE_SIZE), 1);
    let mut map = Bitmap::new(BYTES, Granule::new(4 * PAGE_SIZE).unwrap());
    log.report(&mut map).unwrap();
    assert_eq!(dirty(&map), BTreeSet::from([32]));
}

/// Writers stamp pages and mark them; a reader copies what each report names. After the last report every copy is
/// the newest stamp: no write was missed, whatever the interleaving.
#[test]
fn no_write_is_missed_under_threads() {
    const WRITERS: u64 = 3;
    let log = WriteLog::new("vmm", BYTES);
    let memory: Vec<AtomicU64> = (0..PAGES).map(|_| AtomicU64::new(0)).collect();
    let mut copy = vec![0; memory.len()];
    let stop = AtomicBool::new(false);
    let page = |n: u64| &memory[usize::try_from(n).unwrap()];
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (log, stop) = (&log, &stop);
            scope.spawn(move || {
                let mut random = writer + 1;
                while !stop.load(Ordering::Relaxed) {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let n = (random >> 33) % PAGES;
                    page(n).fetch_add(1, Ordering::Relaxed);
                    log.mark(RamOffset(n * PAGE_SIZE + 100), 8);
                }
            });
        }
        let mut pass = |map: &mut Bitmap| {
            log.report(map).unwrap();
            for n in dirty(&map.take()) {
                copy[usize::try_from(n).unwrap()] = page(n).load(Ordering::Relaxed);
            }
        };
        log.start().unwrap();
        let mut map = bitmap();
        map.set_all();
        // What was written before the log began is in the first pass. The writers never pause, so this ends; the passes
        // and the writes interleave all the while, however late this thread comes to it.
        let written = || memory.iter().map(|word| word.load(Ordering::Relaxed)).sum::<u64>();
        let enough = written() + 1_000_000;
        pass(&mut map);
        while written() < enough {
            pass(&mut map);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mut map = bitmap();
    log.report(&mut map).unwrap();
    for n in dirty(&map) {
        copy[usize::try_from(n).unwrap()] = page(n).load(Ordering::Relaxed);
    }
    let now: Vec<u64> = memory.iter().map(|word| word.load(Ordering::Relaxed)).collect();
    assert_eq!(copy, now);
}

/// Two writers mark every page exactly once, in the same words, while reports take the marks away: the reports
/// together name every page. A small log many times over, because a report then meets a word in mid-change often.
#[test]
fn every_mark_is_in_some_report() {
    const FEW: u64 = 1 << 14;
    let log = WriteLog::new("vmm", FEW * PAGE_SIZE);
    log.start().unwrap();
    for round in 0..100 {
        let running = AtomicU64::new(2);
        let mut seen = Bitmap::new(FEW * PAGE_SIZE, Granule::PAGE);
        thread::scope(|scope| {
            for writer in 0..2 {
                let (log, running) = (&log, &running);
                scope.spawn(move || {
                    (writer..FEW).step_by(2).for_each(|page| log.mark(RamOffset(page * PAGE_SIZE), 1));
                    running.fetch_sub(1, Ordering::Release);
                });
            }
            while running.load(Ordering::Acquire) != 0 {
                log.report(&mut seen).unwrap();
            }
        });
        log.report(&mut seen).unwrap();
        assert_eq!(seen.count(), FEW, "round {round}");
    }
}

proptest! {
    #[test]
    fn marks_match_a_model(
        marks in proptest::collection::vec((0u64..BYTES + 10 * PAGE_SIZE, 0u64..200 * PAGE_SIZE), 0..12), reports in 0usize..12,
    ) {
        let log = WriteLog::new("vmm", BYTES);
        log.start().unwrap();
        let mut map = bitmap();
        for (step, (offset, len)) in marks.iter().enumerate() {
            log.mark(RamOffset(*offset), *len);
            if step == reports {
                log.report(&mut map).unwrap();
            }
        }
        log.report(&mut map).unwrap();
        let model: BTreeSet<u64> = marks.iter().filter(|(_, len)| *len > 0)
            .flat_map(|(offset, len)| offset / PAGE_SIZE..=(offset + len - 1) / PAGE_SIZE)
            .filter(|page| *page < PAGES).collect();
        prop_assert_eq!(dirty(&map), model);
    }
}

/// A source that logs its calls, and fails where it is told to.
#[derive(Debug)]
struct Scripted<'a> {
    name: &'static str,
    fails: &'static [&'static str],
    page: u64,
    calls: &'a Mutex<Vec<String>>,
}

impl Scripted<'_> {
    fn call(&self, what: &str) -> Result<(), MemoryError> {
        self.calls.lock().unwrap().push(format!("{what} {}", self.name));
        if self.fails.contains(&what) {
            return Err(MemoryError::DirtyLog {
                source_name: self.name(),
                doing: what.into(),
                source: format!("{what} refused").into(),
            });
        }
        Ok(())
    }
}

impl DirtySource for Scripted<'_> {
    fn name(&self) -> String {
        self.name.into()
    }

    fn coverage(&self) -> Coverage {
        Coverage::All
    }

    fn start(&self) -> Result<(), MemoryError> {
        self.call("start")
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        into.set(self.page);
        self.call("report")
    }

    fn stop(&self) -> Result<(), MemoryError> {
        self.call("stop")
    }
}

#[test]
fn one_that_does_not_start_takes_the_others_back() {
    let calls = Mutex::default();
    let make = |name, fails| Scripted { name, fails, page: 0, calls: &calls };
    let (a, b, c, d) = (make("a", &[]), make("b", &["stop"]), make("c", &["start"]), make("d", &[]));
    let error = start_all(&[&a, &c, &d]).unwrap_err();
    assert_eq!(error.to_string(), "the dirty log of c failed: start");
    assert_eq!(*calls.lock().unwrap(), ["start a", "start c", "stop a"]);

    calls.lock().unwrap().clear();
    let error = start_all(&[&a, &b, &c, &d]).unwrap_err();
    assert_eq!(*calls.lock().unwrap(), ["start a", "start b", "start c", "stop b", "stop a"]);
    assert_eq!(
        error.to_string(),
        "starting the dirty logs failed: the dirty log of c failed: start: start refused; \
         the dirty log of b failed: stop: stop refused"
    );
    calls.lock().unwrap().clear();
    start_all(&[&a, &b, &d]).unwrap();
    assert_eq!(*calls.lock().unwrap(), ["start a", "start b", "start d"]);
    start_all(&[]).unwrap();
}

#[test]
fn reports_and_stops_go_through_all_of_them() {
    let calls = Mutex::default();
    let make = |name, page, fails| Scripted { name, fails, page, calls: &calls };
    let (a, b, c) = (make("a", 1, &["report", "stop"]), make("b", 2, &[]), make("c", 2, &["stop"]));
    let mut map = bitmap();
    let error = report_all(&[&a, &b, &c], &mut map).unwrap_err();
    assert!(matches!(error, MemoryError::DirtyLog { .. }), "{error:?}");
    assert_eq!(dirty(&map), BTreeSet::from([1, 2]));
    let error = stop_all(&[&a, &b, &c]).unwrap_err();
    assert!(matches!(&error, MemoryError::Several { errors, .. } if errors.len() == 2), "{error:?}");
    assert_eq!(calls.lock().unwrap()[3..], ["stop c", "stop b", "stop a"]);
    report_all(&[&b], &mut map).unwrap();
}

#[test]
fn what_a_source_leaves_out_is_known() {
    let range = |start: u64, len: u64| Range::new(RamOffset(start), len).unwrap();
    let regions = |seen: &[(u64, u64)]| Coverage::Regions {
        seen: seen.iter().map(|(start, len)| range(*start, *len)).collect(),
        why: "for no reason".into(),
    };
    assert!(Coverage::All.gaps(0x8000).is_empty());
    assert_eq!(Coverage::Nothing("deaf".into()).gaps(0x8000), [range(0, 0x8000)]);
    assert_eq!(regions(&[]).gaps(0x8000), [range(0, 0x8000)]);
    assert!(regions(&[(0x4000, 0x8000), (0, 0x4000)]).gaps(0x8000).is_empty());
    // Unsorted, one within another, and one beyond the end.
    let some = regions(&[(0x6000, 0x1000), (0x1000, 0x3000), (0x2000, 0x1000), (0x9000, 0x1000)]);
    assert_eq!(some.gaps(0x8000), [range(0, 0x1000), range(0x4000, 0x2000), range(0x7000, 0x1000)]);
    assert_eq!((some.why(), Coverage::All.why()), ("for no reason", ""));
    // A log of the VMM's own writes sees those that it has bits for.
    let log = WriteLog::new("vmm", 0x4000);
    assert!(log.coverage().gaps(0x4000).is_empty());
    assert_eq!(log.coverage().gaps(0x8000), [range(0x4000, 0x4000)]);
    assert_eq!(WriteLog::new("vmm", 0).coverage().gaps(0x1000), [range(0, 0x1000)]);
}
