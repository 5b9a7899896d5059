//! RAM of every kind does the same: random operations on regions of all kinds agree with plain bytes.
#![expect(clippy::cast_possible_truncation, reason = "test sizes are small")]

use std::any::Any;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;
use vfio_migration_memory::{GuestRam, Holes, RamSpec};
use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset, Range};

use crate::lender::{BACKINGS, Backing, MARGIN, Mapped, lend, number};

const PAGE: usize = PAGE_SIZE as usize;

/// One region: its backing, its size in pages, and whether holes may be punched.
type Spec = (Backing, u64, bool);

struct Rig {
    ram: Arc<GuestRam>,
    mapped: Arc<Vec<(Backing, Mapped)>>,
    /// What RAM holds.
    model: Vec<u8>,
}

impl Rig {
    fn new(specs: &[Spec]) -> Self {
        let mapped: Vec<_> =
            specs.iter().map(|(backing, pages, _)| (*backing, Mapped::new(*pages, *backing))).collect();
        let mapped = Arc::new(mapped);
        let (mut regions, mut model) = (Vec::new(), Vec::new());
        // Falling addresses: RAM offsets are another order.
        for ((n, (backing, pages, punch)), (_, mapped)) in (0..).zip(specs).zip(mapped.iter()) {
            regions.push(mapped.region((100 - n) << 32, *backing, *punch));
            let private = matches!(backing, Backing::Private | Backing::PrivateUndescribed);
            for page in MARGIN..MARGIN + pages {
                model.extend(if private { number(page) } else { [0; PAGE] });
            }
        }
        let ram = lend(regions, Arc::clone(&mapped) as Arc<dyn Any + Send + Sync>).unwrap();
        Self { ram: Arc::new(ram), mapped, model }
    }

    fn pages(&self) -> u64 {
        self.ram.size() / PAGE_SIZE
    }

    /// The pages from `first` on, as many of `count` as there are.
    fn run(&self, first: u64, count: u64) -> Range<RamOffset> {
        let first = first % self.pages();
        let count = count.clamp(1, self.pages() - first);
        Range::new(RamOffset(first * PAGE_SIZE), count * PAGE_SIZE).unwrap()
    }

    fn part(&mut self, run: Range<RamOffset>) -> &mut [u8] {
        &mut self.model[run.start().0 as usize..run.end() as usize]
    }

    fn act(&mut self, step: &Step) {
        match *step {
            Step::Write(at, len, byte) => {
                let at = (at as usize) % self.model.len();
                let len = len.min(self.model.len() - at);
                self.ram.write(RamOffset(at as u64), &vec![byte; len]).unwrap();
                self.model[at..at + len].fill(byte);
            }
            Step::Zero(first, count) => {
                let run = self.run(first, count);
                self.ram.zero(run).unwrap();
                self.part(run).fill(0);
            }
            Step::Receive(first, count, byte) => {
                let run = self.run(first, count);
                let (mut to, from) = UnixStream::pair().unwrap();
                let mut pieces = self.ram.pieces(&[run]).unwrap();
                while pieces.left() > 0 {
                    to.write_all(&vec![byte; (pieces.left() as usize).min(PAGE)]).unwrap();
                    let moved = pieces.receive(from.as_fd()).unwrap();
                    pieces.advance(moved);
                }
                self.part(run).fill(byte);
            }
            Step::Clear => {
                self.ram.clear().unwrap();
                self.model.fill(0);
            }
            Step::Populate => self.ram.populate().unwrap(),
            Step::Pin(first) => {
                let at = RamOffset(first % self.pages() * PAGE_SIZE);
                drop(self.ram.host_memory(at, PAGE_SIZE).unwrap());
            }
        }
    }

    fn check(&self) {
        let all = self.run(0, u64::MAX);
        let zero = |page: u64| self.model[page as usize * PAGE..][..PAGE].iter().all(|byte| *byte == 0);
        // What is no data is zero; and what can tell that it was never written is none.
        let data = self.ram.data_extents().unwrap();
        let is_data = |page: u64| {
            data.iter().any(|extent| (extent.start().0..extent.end()).contains(&(page * PAGE_SIZE)))
        };
        assert!(data.is_sorted_by(|a, b| a.end() < b.start().0), "{data:?}");
        for page in 0..self.pages() {
            assert!(zero(page) || is_data(page), "page {page} is lost");
            assert_eq!(self.ram.is_zero(page), zero(page), "page {page}");
        }
        for (holes, within) in [(Holes::Possible, vec![all]), (Holes::Excluded, data.clone())] {
            for range in within {
                let mut at = range.start().0;
                let mut last = None;
                for run in self.ram.scan(range, holes).unwrap() {
                    assert_eq!(run.range.start().0, at);
                    assert_ne!(last.replace(run.zero), Some(run.zero), "not maximal");
                    for page in run.range.start().0 / PAGE_SIZE..run.range.end() / PAGE_SIZE {
                        assert_eq!(run.zero, zero(page), "page {page}");
                    }
                    at = run.range.end();
                }
                assert_eq!(at, range.end());
            }
        }
        assert_eq!(self.ram.data_extents().unwrap(), data, "looking allocates nothing");
        let plain = GuestRam::new("plain", &[RamSpec { gpa: Gpa(0), len: self.ram.size() }]).unwrap();
        plain.write(RamOffset(0), &self.model).unwrap();
        assert_eq!(self.ram.digest().unwrap(), plain.digest().unwrap());
        let some = self.run(self.pages() / 3, self.pages() / 2);
        assert_eq!(self.ram.digest_of(some).unwrap(), plain.digest_of(some).unwrap());

        let mut sent = vec![1; self.model.len()];
        assert_eq!(self.ram.pieces(&[all]).unwrap().copy_out(&mut sent), sent.len());
        assert!(sent == self.model, "what is sent is not what is there");
        let mut back = vec![1; self.model.len()];
        self.ram.read(RamOffset(0), &mut back).unwrap();
        assert!(back == self.model, "what is read is not what is there");
        for (backing, mapped) in &*self.mapped {
            assert!(mapped.file_is_as_made(*backing), "{backing:?}: the file was touched where it is no RAM");
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64),
    Receive(u64, u64, u8),
    Clear,
    Populate,
    Pin(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let (page, count) = (0u64..120, 1u64..40);
    prop_oneof![
        4 => (0u64..120 * PAGE_SIZE, 0usize..4 * PAGE, any::<u8>()).prop_map(|(at, len, byte)| Step::Write(at, len, byte)),
        4 => (page.clone(), count.clone()).prop_map(|(first, count)| Step::Zero(first, count)),
        2 => (page.clone(), 1u64..8, any::<u8>()).prop_map(|(first, count, byte)| Step::Receive(first, count, byte)),
        1 => Just(Step::Clear),
        1 => Just(Step::Populate),
        1 => page.prop_map(Step::Pin),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn regions_of_all_kinds_agree_with_plain_bytes(
        specs in proptest::collection::vec((proptest::sample::select(&BACKINGS[..]), 1u64..24, any::<bool>()), 1..6),
        steps in proptest::collection::vec(step(), 0..16),
    ) {
        let mut rig = Rig::new(&specs);
        rig.check();
        for step in &steps {
            rig.act(step);
        }
        rig.check();
    }
}

/// Every kind by itself, so that a failure names it: written, made zero in parts, and cleared.
#[test]
fn each_kind_is_made_zero() {
    for (backing, punch) in BACKINGS.iter().flat_map(|backing| [(*backing, false), (*backing, true)]) {
        println!("{backing:?}, holes may be punched: {punch}");
        let mut rig = Rig::new(&[(backing, 16, punch)]);
        rig.act(&Step::Write(3 * PAGE_SIZE, 10 * PAGE, 9));
        rig.act(&Step::Zero(5, 3));
        rig.check();
        rig.act(&Step::Clear);
        rig.check();
    }
}

#[test]
fn pages_go_back_to_the_host_where_they_may() {
    let data = |backing, punch| {
        let mut rig = Rig::new(&[(backing, 16, punch)]);
        rig.act(&Step::Write(0, 16 * PAGE, 9));
        rig.act(&Step::Zero(4, 8));
        rig.ram.data_extents().unwrap().iter().map(|extent| extent.len() / PAGE_SIZE).sum::<u64>()
    };
    for backing in [Backing::MemoryFile, Backing::Anonymous] {
        assert_eq!((data(backing, true), data(backing, false)), (8, 16), "{backing:?}");
    }
    // Neither can tell, nor are pages given back: of a private file they would show its contents again.
    for backing in [Backing::Undescribed, Backing::Private, Backing::PrivateUndescribed] {
        assert_eq!((data(backing, true), data(backing, false)), (16, 16), "{backing:?}");
    }
}

#[test]
fn holes_of_anonymous_memory_are_found_and_stay_holes() {
    let rig = Rig::new(&[(Backing::Anonymous, 40_000, false)]);
    for page in [3, 4, 30_000] {
        rig.ram.write(RamOffset(page * PAGE_SIZE + 17), &[1]).unwrap();
    }
    let pages = |first: u64, count: u64| Range::new(RamOffset(first * PAGE_SIZE), count * PAGE_SIZE).unwrap();
    // Transparent huge pages would be data as a whole.
    let data = rig.ram.data_extents().unwrap();
    if data.iter().all(|extent| extent.len() < 512 * PAGE_SIZE) {
        assert_eq!(data, [pages(3, 2), pages(30_000, 1)]);
    }
    rig.ram.digest().unwrap();
    rig.ram.scan(pages(0, 40_000), Holes::Possible).unwrap();
    rig.ram.zero(pages(100, 1000)).unwrap();
    assert_eq!(rig.ram.data_extents().unwrap(), data);
}
