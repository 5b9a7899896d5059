//! The device's two threads: its DMA engine, and what keeps changing its bulk state.

use std::time::{Duration, Instant};

use vfio_migration_guest_driver::registers::offset;

use crate::error::{SimError, invalid};
use crate::fault::Fault;
use crate::shared::{Mode, Shared, lock, wait};

/// Magic word of a block.
const BLOCK_MAGIC: u64 = 0x4b43_4f4c_4253_4d56;
/// Words before a block's payload.
const BLOCK_HEAD: usize = 8;
/// Shortest block, in bytes.
const MIN_BLOCK: u32 = 128;
/// Longest block, in bytes.
const MAX_BLOCK: u32 = 65536;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = DESCRIPTOR_BYTES as u64;
const DESCRIPTOR_BYTES: usize = 32;
/// Descriptor flag: the destination is a peer's mailbox; flow 1.
const P2P: u32 = 1 << 0;

/// Interval at which the bulk state is changed while it changes fast.
const TICK: Duration = Duration::from_millis(5);
/// Pages that are changed, or swept, under one hold of the lock.
const SLICE: u64 = 64;
/// Pages that are looked at per block.
const CHECKED_PER_BLOCK: u64 = 2;

/// A descriptor, read and found good.
#[derive(Clone, Copy, Debug)]
struct Job {
    src: u64,
    dst: u64,
    len: u32,
    flags: u32,
    cookie: u64,
}

/// Runs the DMA engine until the device is dropped.
pub(crate) fn run_dma(shared: &Shared) {
    let interval = shared.options.dma_interval;
    let held = shared.options.fault(|fault| match fault {
        Fault::HoldDma(descriptors) => Some(*descriptors),
        _ => None,
    });
    let held = held.unwrap_or(0);
    let mut due = Instant::now();
    let mut scratch = Vec::new();
    loop {
        shared.take_doorbell();
        let Some(mode) = shared.follow(|| finish(shared, held, &mut scratch)) else { return };
        let step = match work(shared, mode, held) {
            Ok(None) => {
                shared.wait_for_work(None);
                continue;
            }
            Ok(Some(job)) => {
                let now = Instant::now();
                if let Some(early) = due.checked_duration_since(now).filter(|early| !early.is_zero()) {
                    shared.wait_for_work(Some(early));
                    continue;
                }
                due = (due + interval).max(now);
                carry_out(shared, job, &mut scratch)
            }
            Err(error) => Err(error),
        };
        if let Err(error) = step {
            stop_ring(shared, &error);
        }
    }
}

fn stop_ring(shared: &Shared, error: &SimError) {
    tracing::info!(%error, "the ring stops");
    lock(&shared.front).registers.ring_error = true;
}

/// Carries out what was `held`, at once: the device is about to leave RUNNING.
fn finish(shared: &Shared, held: u64, scratch: &mut Vec<u8>) {
    for _ in 0..held {
        match work(shared, Mode::Running, 0) {
            Ok(Some(job)) => {
                if let Err(error) = carry_out(shared, job, scratch) {
                    return stop_ring(shared, &error);
                }
            }
            Ok(None) => return,
            Err(error) => return stop_ring(shared, &error),
        }
    }
}

/// The next descriptor that may be started in `mode`, with the last `held` left waiting.
fn work(shared: &Shared, mode: Mode, held: u64) -> Result<Option<Job>, SimError> {
    let mut front = lock(&shared.front);
    if !front.registers.enabled || front.registers.ring_error {
        return Ok(None);
    }
    if std::mem::take(&mut front.registers.doorbell) {
        let at = front.registers.tail_addr;
        drop(front);
        let mut tail = [0; 8];
        shared.dma.read(at, &mut tail)?;
        front = lock(&shared.front);
        front.registers.tail = u64::from_le_bytes(tail);
    }
    let registers = &front.registers;
    let (head, tail, size, base) = (registers.head, registers.tail, registers.ring_size, registers.ring_base);
    drop(front);
    let waiting = tail.wrapping_sub(head);
    if waiting <= held {
        return Ok(None);
    }
    if !size.is_power_of_two() || !(2..=4096).contains(&size) {
        return Err(invalid(format!("a ring of {size} entries")));
    }
    if waiting > u64::from(size) {
        return Err(invalid(format!("{waiting} descriptors in a ring of {size}")));
    }
    let at = base.wrapping_add(head % u64::from(size) * DESCRIPTOR);
    let mut bytes = [0; DESCRIPTOR_BYTES];
    shared.dma.read(at, &mut bytes)?;
    let word =
        |n: usize| bytes[n * 8..n * 8 + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let halves = word(2).to_le_bytes();
    let half = |n: usize| halves[n..n + 4].iter().rev().fold(0, |half, byte| half << 8 | u32::from(*byte));
    let job = Job { src: word(0), dst: word(1), len: half(0), flags: half(4), cookie: word(3) };
    if !(MIN_BLOCK..=MAX_BLOCK).contains(&job.len) || !job.len.is_multiple_of(64) || job.flags & !P2P != 0 {
        return Err(invalid(format!("a malformed descriptor: length {}, flags {:#x}", job.len, job.flags)));
    }
    Ok((mode == Mode::Running || job.flags & P2P == 0).then_some(job))
}

/// Reads, sums, writes the block, counts it in guest memory and in the registers, raises. Nothing of this is left
/// half done when the engine is told to stand still.
fn carry_out(shared: &Shared, job: Job, scratch: &mut Vec<u8>) -> Result<(), SimError> {
    let flow = if job.flags & P2P == 0 { 0 } else { 1 };
    scratch.resize(job.len as usize, 0);
    shared.dma.read(job.src, scratch)?;
    let sum = sum(scratch);
    let (number, reinits, done_addr) = {
        let registers = &lock(&shared.front).registers;
        (registers.blocks[flow].wrapping_add(1), registers.reinits, registers.done_addr)
    };
    let integrity = {
        let mut bulk = lock(&shared.bulk);
        bulk.check_some(CHECKED_PER_BLOCK);
        bulk.integrity
    };
    let about = u64::from(job.len) | u64::from(job.flags) << 32;
    fill(scratch, [BLOCK_MAGIC, number, job.cookie, about, sum, integrity, reinits]);
    shared.dma.write(job.dst, scratch)?;
    shared.dma.write(done_addr.wrapping_add(8 * flow as u64), &number.to_le_bytes())?;
    let mut front = lock(&shared.front);
    front.registers.blocks[flow] = number;
    front.registers.head = front.registers.head.wrapping_add(1);
    front.raise(flow);
    Ok(())
}

/// Makes a block of `head` (all but its own sum) and the payload that follows from its number.
fn fill(block: &mut [u8], head: [u64; BLOCK_HEAD - 1]) {
    let seed = head[1].wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut total = 0u64;
    for (i, to) in (0u64..).zip(block.chunks_exact_mut(8)) {
        let word = match i {
            0..7 => head[usize::try_from(i).unwrap_or(0)],
            7 => 0,
            _ => seed ^ (i << 32 | i),
        };
        total = total.wrapping_add(word);
        to.copy_from_slice(&word.to_le_bytes());
    }
    block[56..64].copy_from_slice(&total.to_le_bytes());
}

fn sum(bytes: &[u8]) -> u64 {
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    bytes.chunks_exact(8).fold(0u64, |sum, bytes| sum.wrapping_add(word(bytes)))
}

/// Changes the bulk state at its rate, and sweeps it after a migration.
pub(crate) fn run_churn(shared: &Shared) {
    let rate = u128::from(shared.options.state_dirty_rate);
    // Bytes times 10^9: what has become due and was not yet changed.
    let mut owed = 0u128;
    let mut last = Instant::now();
    let mut bulk = lock(&shared.bulk);
    loop {
        if shared.ending.load(std::sync::atomic::Ordering::Acquire) {
            return;
        }
        if bulk.frozen || (rate == 0 && bulk.sweep.is_none()) {
            bulk = wait(&shared.bulk_changed, bulk);
            last = Instant::now();
            continue;
        }
        let now = Instant::now();
        owed += rate * now.duration_since(last).as_nanos();
        last = now;
        // After a long wait for the lock the device does not try to catch up on all of it.
        owed = owed.min(rate * 10 * TICK.as_nanos() + PAGE_NANOS);
        let pages = u64::try_from(owed / PAGE_NANOS).unwrap_or(u64::MAX).min(SLICE);
        bulk.churn(pages);
        owed -= u128::from(pages) * PAGE_NANOS;
        if bulk.sweep_some(SLICE) || owed >= PAGE_NANOS {
            drop(bulk);
            std::thread::yield_now();
            bulk = lock(&shared.bulk);
            continue;
        }
        bulk = match shared.bulk_changed.wait_timeout(bulk, TICK.max(page_time(rate))) {
            Ok((bulk, _)) => bulk,
            Err(poisoned) => poisoned.into_inner().0,
        };
    }
}

/// A page's bytes times 10^9.
const PAGE_NANOS: u128 = 4096 * 1_000_000_000;

/// Time that one page takes at `rate`, at most a second.
fn page_time(rate: u128) -> Duration {
    let nanos = PAGE_NANOS.checked_div(rate).unwrap_or(1_000_000_000).min(1_000_000_000);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(1_000_000_000))
}

// A doorbell is a whole page of its own, so that an ioeventfd can stand for it.
const _: () = assert!(offset::DOORBELL == 0x1000);
