//! A driver of the device, in user space: what the reference guest does, by hand.

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{pread, pwrite};
use vfio_migration_guest_driver::registers::offset;
use vfio_migration_guest_driver::{Descriptor, DeviceRegisters, ExpectedBlock, Ring, SharedMemory};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{Gpa, Iova, RamOffset, Range};
use vfio_migration_uapi::{Dma, region_info, set_irq_eventfds};

use crate::check::{Outcome, same};
use crate::instance::{Opened, OpenedCdev};

/// Bytes of memory, at IOVA [`BASE`].
pub(crate) const LEN: u64 = 1 << 20;
pub(crate) const BASE: u64 = 0x10_0000;
/// Offsets in it: counts of completed blocks, sources.
pub(crate) const DONE: u64 = 0x2000;
const SOURCE: u64 = 0x1_0000;
const RING: Ring = Ring { base: BASE, entries: 16, tail: BASE + 0x1000, done: BASE + DONE };
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
        self.posted = 0;
        RING.post(&mut self.shared_memory(), 0)?;
        RING.start(&mut &*self)
    }

    /// Posts a descriptor, and rings the doorbell.
    pub(crate) fn post(&mut self, job: Job) -> Outcome {
        let Job { at, len, flags } = job;
        let (source, target, cookie) = (BASE + SOURCE, BASE + at, cookie(self.posted));
        let descriptor = Descriptor { source, target, len, flags, cookie };
        RING.put(&mut self.shared_memory(), self.posted, &descriptor)?;
        self.posted += 1;
        RING.post(&mut self.shared_memory(), self.posted)?;
        Ring::ring(&mut &*self)
    }

    fn shared_memory(&self) -> AtIova<'_> {
        AtIova { ram: &self.ram, base: BASE }
    }

    /// Waits until `flow` has so many blocks done, acknowledging each interrupt.
    pub(crate) fn wait(&self, flow: usize, blocks: u64) -> Outcome {
        let began = Instant::now();
        loop {
            // Until the device has written it, the word is whatever was in memory.
            let done = RING.done(&mut self.shared_memory(), flow)?;
            let found = Some(done).filter(|done| *done <= self.posted).unwrap_or(0);
            Ring::acknowledge(&mut &*self, flow, found)?;
            if found >= blocks {
                return same("blocks done", found, blocks);
            }
            if began.elapsed() > PATIENCE {
                return Err(format!(
                    "{found} of {blocks} blocks; status {:#x}",
                    self.read32(offset::STATUS)?
                )
                .into());
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

impl DeviceRegisters for &MigdevDriver {
    type Error = Box<dyn Error>;

    fn write32(&mut self, register: u64, value: u32) -> Outcome {
        self.write(0, register, &value.to_le_bytes())
    }

    fn write64(&mut self, register: u64, value: u64) -> Outcome {
        self.write(0, register, &value.to_le_bytes())
    }
}

/// RAM that the device sees from `base` on.
struct AtIova<'a> {
    ram: &'a GuestRam,
    base: u64,
}

impl SharedMemory for AtIova<'_> {
    type Error = Box<dyn Error>;

    fn load(&mut self, address: u64) -> Outcome<u64> {
        Ok(self.ram.read_u64(RamOffset(address - self.base))?)
    }

    fn store(&mut self, address: u64, value: u64) -> Outcome {
        Ok(self.ram.write_u64(RamOffset(address - self.base), value)?)
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
    let Job { len, flags, .. } = job;
    let expected = ExpectedBlock { number, cookie: cookie(posted), len, flags, source_sum: sum };
    let words = usize::try_from(len / 8)?;
    Ok((0..words).flat_map(|i| expected.word(i).to_le_bytes()).collect())
}

/// The cookie of the descriptor that was posted as `posted`.
pub(crate) fn cookie(posted: u64) -> u64 {
    0xc00c_1e00_0000_0000 | posted
}
