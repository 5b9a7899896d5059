//! The toy's guest: it numbers the pages that it writes, has its devices write numbered blocks by DMA, and walks over all
//! of it again and again. All that it knows lies in RAM and in one register, so that it goes on wherever both are whole.

use std::error::Error;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration_device::{KernelDevice, PciHardware, RegionIndex};
use vfio_migration_guest_driver::registers::{ENABLE, offset};
use vfio_migration_guest_driver::{Descriptor, DeviceRegisters, Ring, SharedMemory};
use vfio_migration_memory::{GuestRam, WriteLog};
use vfio_migration_types::RamOffset;

use crate::check::{Outcome, holds, same};
use crate::migdev::driver::{Job, block, cookie};

/// Bytes of RAM, which begins at address 0.
pub(crate) const LEN: u64 = 2 << 20;
/// Bytes that belong to one device, from the start of RAM: ring, counts, what it reads, and where its blocks go.
const AREA: u64 = 256 << 10;
const TAIL: u64 = 0x1000;
const DONE: u64 = 0x2000;
const CHECKED: u64 = 0x3000;
const SOURCE: u64 = 0x4000;
const BLOCKS: u64 = 0x1_0000;
/// Places for blocks, a page each, used in turn.
const PLACES: u64 = 32;
/// Entries of a ring, and how many of them are under way at most.
const ENTRIES: u32 = 16;
const AHEAD: u64 = 8;
const BLOCK_LEN: u32 = 256;
/// Pages that the guest itself writes, in turn, and how many in one step.
const PAGES_AT: u64 = 1 << 20;
const PAGES: u64 = 128;
const PER_STEP: u64 = 8;
/// The guest's idle time after each step.
const PACE: Duration = Duration::from_millis(2);
/// A guard against a hang alone.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest, on a thread of its own.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) ram: Arc<GuestRam>,
    writes: Arc<WriteLog>,
    /// The devices that it drives: instances of migdev.
    cards: Vec<KernelDevice>,
    run: Mutex<Run>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Run {
    wanted: bool,
    standing: bool,
    ended: bool,
    /// The one register: how often the guest went round.
    loops: u64,
    /// Steps here, and blocks of each device found right here.
    steps: u64,
    blocks: Vec<u64>,
    /// Times that a device was found reset, and set up anew; how often that is no surprise.
    restarts: u64,
    expected: u64,
    failure: Option<String>,
}

impl Program {
    pub(super) fn new(ram: Arc<GuestRam>, writes: Arc<WriteLog>, cards: Vec<KernelDevice>) -> Self {
        let run = Run { standing: true, blocks: vec![0; cards.len()], ..Run::default() };
        Self { ram, writes, cards, run: Mutex::new(run), changed: Condvar::new() }
    }

    /// What there is in memory before the guest first runs; its devices know of their rings.
    pub(super) fn boot(&self) -> Outcome {
        for card in 0..self.cards.len() as u64 {
            for at in (0..0x1000).step_by(8) {
                self.put(card * AREA + SOURCE + at, (card << 32 | at).wrapping_mul(0x0101_0101_0101_0101))?;
            }
        }
        (0..).zip(&self.cards).try_for_each(|(n, card)| self.set_up(n, card))
    }

    /// The guest's thread.
    pub(super) fn run(&self) {
        loop {
            let mut run = self.lock();
            while !run.wanted && !run.ended {
                run.standing = true;
                self.changed.notify_all();
                run = self.wait(run);
            }
            if run.ended {
                return;
            }
            run.standing = false;
            let loops = run.loops;
            drop(run);
            let stepped = self.step(loops);
            let mut run = self.lock();
            match stepped {
                Ok(()) => {
                    run.loops += 1;
                    run.steps += 1;
                }
                // It halts where it is.
                Err(why) => {
                    run.failure.get_or_insert(why.to_string());
                    run.wanted = false;
                }
            }
            self.changed.notify_all();
            if run.wanted {
                drop(self.changed.wait_timeout(run, PACE).unwrap_or_else(PoisonError::into_inner));
            }
        }
    }

    /// Stops it between two steps; whether it ran.
    pub(super) fn stop(&self) -> bool {
        let mut run = self.lock();
        let ran = std::mem::replace(&mut run.wanted, false);
        self.changed.notify_all();
        while !run.standing {
            run = self.wait(run);
        }
        ran
    }

    pub(super) fn go(&self) {
        self.lock().wanted = true;
        self.changed.notify_all();
    }

    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    pub(super) fn register(&self) -> u64 {
        self.lock().loops
    }

    pub(super) fn set_register(&self, loops: u64) {
        self.lock().loops = loops;
    }

    /// Whether it runs now.
    pub(crate) fn runs(&self) -> bool {
        self.lock().wanted
    }

    /// Another reset of a device is no surprise from here on.
    pub(crate) fn expect_restart(&self) {
        self.lock().expected += 1;
    }

    /// How often a device was found reset.
    pub(crate) fn restarts(&self) -> u64 {
        self.lock().restarts
    }

    /// Waits until the guest has written and checked everything once more, its devices included.
    pub(crate) fn goes_on(&self) -> Outcome {
        let steps = PAGES / PER_STEP + 1;
        let mut run = self.lock();
        let (until, blocks) = (run.steps + steps, run.blocks.clone());
        let began = Instant::now();
        loop {
            if let Some(why) = &run.failure {
                return Err(format!("the guest found that {why}").into());
            }
            let whole = run.blocks.iter().zip(&blocks).all(|(now, then)| *now >= then + PLACES);
            if run.steps >= until && whole {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("the guest does not go on: {run:?}").into());
            }
            run = self.changed.wait_timeout(run, PACE).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn step(&self, loops: u64) -> Outcome {
        for (n, card) in (0..).zip(&self.cards) {
            self.drive(n, card, loops)?;
        }
        for turn in loops * PER_STEP..(loops + 1) * PER_STEP {
            let at = PAGES_AT + turn % PAGES * 4096;
            let wanted = turn.checked_sub(PAGES).map_or(0, stamp);
            for at in [at, at + 4088] {
                same(&format!("word {at:#x} of its memory, in turn {turn}"), self.get(at)?, wanted)?;
                self.put(at, stamp(turn))?;
            }
        }
        Ok(())
    }

    /// Looks at what a device has done, and gives it more to do.
    fn drive(&self, n: u64, card: &KernelDevice, loops: u64) -> Outcome {
        if register(card, offset::CONTROL)? & ENABLE == 0 {
            let mut run = self.lock();
            run.restarts += 1;
            holds(run.restarts <= run.expected, &format!("device {n} was not reset behind its back"))?;
            drop(run);
            self.set_up(n, card)?;
        }
        let (area, ring, memory) = (n * AREA, ring(n), &mut &*self);
        let mut posted = self.get(ring.tail)?;
        // The device writes its count to memory before it shows the same in its registers.
        let counted = register(card, offset::BLOCKS0)? + register(card, offset::BLOCKS1)?;
        let done = ring.done(memory, 0)? + ring.done(memory, 1)?;
        holds(done <= posted, &format!("device {n} has done no more than it was told"))?;
        holds(done >= u64::from(counted), &format!("what device {n} counted arrived in memory"))?;
        for index in self.get(area + CHECKED)?..done {
            self.check(n, index)?;
            if let Some(blocks) = self.lock().blocks.get_mut(usize::try_from(n)?) {
                *blocks += 1;
            }
        }
        self.put(area + CHECKED, done)?;
        // Some of those that lie there longer.
        for place in (loops * 4..(loops + 1) * 4).map(|turn| turn % PLACES) {
            let latest = (done.saturating_sub(PLACES)..done).find(|index| index % PLACES == place);
            if let Some(index) = latest.filter(|index| index + PLACES >= posted) {
                self.check(n, index)?;
            }
        }
        while posted < done + AHEAD {
            let Job { at: target, len, flags } = job(area, posted);
            let descriptor = Descriptor { source: area + SOURCE, target, len, flags, cookie: cookie(posted) };
            ring.put(memory, posted, &descriptor)?;
            posted += 1;
            ring.post(memory, posted)?;
        }
        Ring::ring(&mut Card(card))
    }

    /// Fails unless the block that was posted as `index` is in its place.
    fn check(&self, n: u64, index: u64) -> Outcome {
        let area = n * AREA;
        let job = job(area, index);
        let number = if job.flags == 1 { index / 4 + 1 } else { index - index / 4 + 1 };
        let mut found = vec![0; BLOCK_LEN as usize];
        self.ram.read(RamOffset(job.at), &mut found)?;
        let wanted = block(&self.ram, area + SOURCE, job, number, index)?;
        holds(found == wanted, &format!("block {index} of device {n} is where the device wrote it"))
    }

    /// Empties a device's ring, and points the device at it.
    fn set_up(&self, n: u64, card: &KernelDevice) -> Outcome {
        let area = n * AREA;
        for at in [TAIL, DONE, DONE + 8, CHECKED] {
            self.put(area + at, 0)?;
        }
        ring(n).start(&mut Card(card))
    }

    fn get(&self, at: u64) -> Outcome<u64> {
        Ok(self.ram.read_u64(RamOffset(at))?)
    }

    fn put(&self, at: u64, value: u64) -> Outcome {
        self.ram.write_u64(RamOffset(at), value)?;
        // After the write, never before.
        self.writes.mark(RamOffset(at), 8);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Run> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, run: MutexGuard<'a, Run>) -> MutexGuard<'a, Run> {
        self.changed.wait(run).unwrap_or_else(PoisonError::into_inner)
    }
}

impl SharedMemory for &Program {
    type Error = Box<dyn Error>;

    fn load(&mut self, address: u64) -> Outcome<u64> {
        self.get(address)
    }

    fn store(&mut self, address: u64, value: u64) -> Outcome {
        self.put(address, value)
    }
}

struct Card<'a>(&'a KernelDevice);

impl DeviceRegisters for Card<'_> {
    type Error = Box<dyn Error>;

    fn write32(&mut self, register: u64, value: u32) -> Outcome {
        Ok(self.0.region_write(RegionIndex::BAR0, register, &value.to_le_bytes())?)
    }

    fn write64(&mut self, register: u64, value: u64) -> Outcome {
        Ok(self.0.region_write(RegionIndex::BAR0, register, &value.to_le_bytes())?)
    }
}

/// The ring of device `n`.
fn ring(n: u64) -> Ring {
    let area = n * AREA;
    Ring { base: area, entries: ENTRIES, tail: area + TAIL, done: area + DONE }
}

/// Nothing of a former guest is in the device: it is as a reset leaves it.
pub(crate) fn is_empty(card: &KernelDevice) -> Outcome {
    same("CONTROL after a reset", register(card, offset::CONTROL)?, 0)?;
    same("BLOCKS0 after a reset", register(card, offset::BLOCKS0)?, 0)
}

/// Every fourth block belongs to the flow that stands in the P2P states.
fn job(area: u64, index: u64) -> Job {
    Job { at: area + BLOCKS + index % PLACES * 4096, len: BLOCK_LEN, flags: u32::from(index % 4 == 3) }
}

fn stamp(turn: u64) -> u64 {
    0x7057_0000_0000_0000 | turn
}

fn register(card: &KernelDevice, at: u64) -> Outcome<u32> {
    let mut bytes = [0; 4];
    card.region_read(RegionIndex::BAR0, at, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}
