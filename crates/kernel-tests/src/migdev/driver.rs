//! A driver of the device, in user space: what the reference guest does, by hand.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{pread, pwrite};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{Gpa, Iova, RamOffset, Range};
use vfio_migration_uapi::{Dma, region_info, set_irq_eventfds};

use crate::check::{Outcome, same};
use crate::instance::{Opened, OpenedCdev};

/// Bytes of memory, at IOVA [`BASE`].
pub(crate) const LEN: u64 = 1 << 20;
pub(crate) const BASE: u64 = 0x10_0000;
/// Offsets in it: ring, count of posted descriptors, counts of completed blocks, sources.
const RING: u64 = 0;
const TAIL: u64 = 0x1000;
pub(crate) const DONE: u64 = 0x2000;
const SOURCE: u64 = 0x1_0000;
/// Entries of the ring.
const ENTRIES: u64 = 16;
/// Registers, as in `crates/sim/src/regs.rs`.
pub(crate) const CONTROL: u64 = 0x08;
pub(crate) const STATUS: u64 = 0x0c;
pub(crate) const ACK0: u64 = 0x30;
pub(crate) const BLOCKS0: u64 = 0x48;
pub(crate) const BLOCKS1: u64 = 0x50;
pub(crate) const DOORBELL: u64 = 0x1000;
/// VFIO's index of MSI-X.
pub(crate) const MSIX: u32 = 2;
/// A guard against a hang alone.
const PATIENCE: Duration = Duration::from_secs(20);

/// A device opened either way.
#[derive(Debug)]
pub(crate) enum Handle {
    Group(Opened),
    Cdev(OpenedCdev),
}

impl Handle {
    pub(crate) fn fd(&self) -> Outcome<BorrowedFd<'_>> {
        match self {
            Self::Group(opened) => opened.device(),
            Self::Cdev(opened) => Ok(opened.device.as_fd()),
        }
    }
}

/// The device, its memory and its vectors.
#[derive(Debug)]
pub(crate) struct MigdevDriver {
    pub(crate) handle: Handle,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) events: [OwnedFd; 2],
    pub(crate) posted: u64,
}

/// A descriptor: where the block goes, how long, for which flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) at: u64,
    pub(crate) len: u32,
    pub(crate) flags: u32,
}

impl MigdevDriver {
    /// Maps memory, fills all of it, connects the vectors; the engine is not enabled.
    pub(crate) fn new(handle: Handle) -> Outcome<Self> {
        let ram = Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: LEN }])?);
        for at in (0..LEN).step_by(8) {
            ram.write_u64(RamOffset(at), at.wrapping_mul(0x0101_0101_0101_0101))?;
        }
        let memory = ram.host_memory(RamOffset(0), LEN)?;
        match &handle {
            Handle::Group(opened) => opened.container()?.map(all()?, &memory, Dma::BOTH)?,
            Handle::Cdev(opened) => opened.space.map(all()?, &memory, Dma::BOTH)?,
        }
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let events = [event()?, event()?];
        let driver = Self { handle, ram, events, posted: 0 };
        driver.connect()?;
        Ok(driver)
    }

    pub(crate) fn fd(&self) -> Outcome<BorrowedFd<'_>> {
        self.handle.fd()
    }

    pub(crate) fn connect(&self) -> Outcome {
        let [first, second] = &self.events;
        Ok(set_irq_eventfds(self.fd()?, MSIX, 0, &[Some(first.as_fd()), Some(second.as_fd())])?)
    }

    /// Points the device at the ring, and enables it.
    pub(crate) fn enable(&mut self) -> Outcome {
        self.ram.write_u64(RamOffset(TAIL), 0)?;
        self.posted = 0;
        self.write64(0x10, BASE + RING)?;
        self.write32(0x18, u32::try_from(ENTRIES)?)?;
        self.write64(0x20, BASE + TAIL)?;
        self.write64(0x28, BASE + DONE)?;
        self.write32(CONTROL, 1)
    }

    /// Posts a descriptor, and rings the doorbell.
    pub(crate) fn post(&mut self, job: Job) -> Outcome {
        let at = RING + self.posted % ENTRIES * 32;
        let about = u64::from(job.len) | u64::from(job.flags) << 32;
        for (n, word) in (0..).zip([BASE + SOURCE, BASE + job.at, about, cookie(self.posted)]) {
            self.ram.write_u64(RamOffset(at + 8 * n), word)?;
        }
        self.posted += 1;
        self.ram.write_u64(RamOffset(TAIL), self.posted)?;
        self.write32(DOORBELL, 1)
    }

    /// Waits until `flow` has so many blocks done, acknowledging each interrupt.
    pub(crate) fn wait(&self, flow: usize, blocks: u64) -> Outcome {
        let began = Instant::now();
        let done = RamOffset(DONE + 8 * flow as u64);
        loop {
            // Until the device has written it, the word is whatever was in memory.
            let found = Some(self.ram.read_u64(done)?).filter(|found| *found <= self.posted).unwrap_or(0);
            self.write64(ACK0 + 8 * flow as u64, found)?;
            if found >= blocks {
                return same("blocks done", found, blocks);
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("{found} of {blocks} blocks; status {:#x}", self.read32(STATUS)?).into());
            }
            self.interrupted(flow)?;
        }
    }

    /// Waits for an interrupt of `flow`.
    pub(crate) fn interrupted(&self, flow: usize) -> Outcome {
        let mut fds = [PollFd::from_borrowed_fd(self.events[flow].as_fd(), PollFlags::IN)];
        let patience = PATIENCE.try_into()?;
        same("an interrupt", poll(&mut fds, Some(&patience))?, 1)?;
        rustix::io::read(&self.events[flow], &mut [0; 8])?;
        Ok(())
    }

    /// The block that the device makes of `job`, as number `number` of its flow, posted as `posted`.
    pub(crate) fn block(&self, job: Job, number: u64, posted: u64) -> Outcome<Vec<u8>> {
        block(&self.ram, SOURCE, job, number, posted)
    }

    /// A copy of all of the device's memory.
    pub(crate) fn memory(&self) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(LEN)?];
        self.ram.read(RamOffset(0), &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn read32(&self, register: u64) -> Outcome<u32> {
        let mut bytes = [0; 4];
        self.read(0, register, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(crate) fn read64(&self, register: u64) -> Outcome<u64> {
        let mut bytes = [0; 8];
        self.read(0, register, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub(crate) fn write32(&self, register: u64, value: u32) -> Outcome {
        self.write(0, register, &value.to_le_bytes())
    }

    pub(crate) fn write64(&self, register: u64, value: u64) -> Outcome {
        self.write(0, register, &value.to_le_bytes())
    }

    pub(crate) fn read(&self, region: u32, at: u64, into: &mut [u8]) -> Outcome {
        let offset = region_info(self.fd()?, region)?.offset;
        let wanted = into.len();
        same("a whole read of a region", pread(self.fd()?, into, offset + at)?, wanted)
    }

    pub(crate) fn write(&self, region: u32, at: u64, from: &[u8]) -> Outcome {
        let offset = region_info(self.fd()?, region)?.offset;
        same("a whole write of a region", pwrite(self.fd()?, from, offset + at)?, from.len())
    }
}

/// DMA addresses of the memory.
pub(crate) fn all() -> Outcome<Range<Iova>> {
    Ok(Range::new(Iova(BASE), LEN)?)
}

/// The block that the device makes of `job` from what is at `source`, as number `number` of its flow, posted as `posted`.
pub(crate) fn block(ram: &GuestRam, source: u64, job: Job, number: u64, posted: u64) -> Outcome<Vec<u8>> {
    let mut sum = 0u64;
    for at in (0..u64::from(job.len)).step_by(8) {
        sum = sum.wrapping_add(ram.read_u64(RamOffset(source + at))?);
    }
    let seed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let about = u64::from(job.len) | u64::from(job.flags) << 32;
    let mut words = vec![0x4b43_4f4c_4253_4d56, number, cookie(posted), about, sum, 0, 0, 0];
    words.extend((8..u64::from(job.len) / 8).map(|i| seed ^ (i << 32 | i)));
    words[7] = words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
    Ok(words.iter().flat_map(|word| word.to_le_bytes()).collect())
}

/// The cookie of the descriptor that was posted as `posted`.
pub(crate) fn cookie(posted: u64) -> u64 {
    0xc00c_1e00_0000_0000 | posted
}
