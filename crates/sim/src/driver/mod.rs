//! The guest's side: a driver for the device, in a process instead of a guest, with the guest's checks.
//!
//! It keeps the device busy, numbers what it expects, and counts what was lost: a block that is not as it must be
//! (old ones are looked at again, too), an interrupt that did not come within a second, damage that the device
//! reports in its own state. It survives the device: [`TestDriver::connect`] on another one, and it goes on.

mod hardware;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vfio_migration_guest_driver::registers::{VECTORS, offset};
use vfio_migration_guest_driver::{Descriptor, DeviceRegisters, ExpectedBlock, P2P, Ring, SharedMemory};
use vfio_migration_memory::{Mapping, MemoryError};

pub use self::hardware::{BoxError, Hardware, P2pTarget};
use crate::pci::BAR2_SIZE;
use crate::shared::{drain, signal};

/// Blocks of one flow that have a place at a time.
pub const SLOTS: u64 = PLACES as u64;
const PLACES: usize = 64;
/// Time that an interrupt may take before it counts as lost.
pub const INTERRUPT_LIMIT: Duration = Duration::from_secs(1);

const PAGE: u64 = 4096;
const RING: u64 = 0;
const RING_ENTRIES: u32 = 128;
const TAIL: u64 = PAGE;
const DONE: u64 = 2 * PAGE;
const SOURCES: u64 = 3 * PAGE;
const SLOT_BASE: u64 = SOURCES + 2 * SLOTS * PAGE;
/// Bytes of the driver's memory.
pub const RAM_SIZE: u64 = 1 << 20;

/// Settings of a [`TestDriver`].
#[derive(Clone, Copy, Debug)]
pub struct DriverConfig {
    /// Address of the driver's memory in the device's DMA space.
    pub ram_base: u64,
    /// Bytes per block: a multiple of 64 from 128 to 4096.
    pub block_len: u32,
    /// Descriptors kept in flight per flow, at most [`SLOTS`].
    pub in_flight: u64,
    /// Rings the doorbell by its eventfd, where the device was connected with one, instead of by a register write.
    pub doorbell_eventfd: bool,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self { ram_base: 0x10_0000, block_len: 512, in_flight: 16, doorbell_eventfd: false }
    }
}

/// Blocks and interrupts that were seen so far, and what was wrong with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockFindings {
    /// Blocks handled, both flows.
    pub blocks: u64,
    /// Blocks that came by peer-to-peer DMA.
    pub p2p_blocks: u64,
    /// Blocks, new or old, that were not as they must be.
    pub blocks_lost: u64,
    /// Interrupts that the driver handled.
    pub interrupts: u64,
    /// Interrupts that did not come in time.
    pub interrupts_lost: u64,
    /// Interrupts with nothing new. Legal.
    pub spurious: u64,
    /// The highest count of damaged state pages that a block told of. Each such block counts as lost as well.
    pub integrity: u64,
}

/// An error that a driver cannot go on with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The device refused a call.
    #[error("the device refused {doing}")]
    Device {
        /// Call that was attempted, after "refused".
        doing: &'static str,
        /// Reason that the device gave.
        #[source]
        source: BoxError,
    },
    /// The driver's own memory.
    #[error("the driver's memory failed")]
    Memory(#[from] MemoryError),
    /// The host lacks a descriptor or memory.
    #[error("{doing} failed")]
    System {
        /// Work that failed, as a noun phrase.
        doing: &'static str,
        /// Errno of the system call.
        #[source]
        source: Errno,
    },
    /// The device stopped working.
    #[error("{missing} of {wanted} blocks did not come within {limit:?}")]
    Stalled {
        /// Blocks that the driver waited for.
        wanted: u64,
        /// Blocks that did not come.
        missing: u64,
        /// Time for which they were awaited.
        limit: Duration,
    },
}

/// A driver of one device.
#[derive(Debug)]
pub struct TestDriver {
    config: DriverConfig,
    ram: OwnedFd,
    memory: Mapping,
    vectors: [OwnedFd; VECTORS],
    peer: Option<(P2pTarget, Mapping)>,
    doorbell: Option<OwnedFd>,
    /// Descriptors posted, both flows.
    tail: u64,
    flows: [Flow; VECTORS],
    found: BlockFindings,
}

#[derive(Debug)]
struct Flow {
    posted: u64,
    handled: u64,
    /// Since when there is something that no interrupt told of.
    waiting: Option<Instant>,
    slots: [Option<ExpectedBlock>; PLACES],
}

impl TestDriver {
    /// A driver with memory of its own and, to do peer-to-peer DMA, a peer's mailbox.
    ///
    /// # Errors
    /// The host lacks memory or descriptors.
    pub fn new(config: DriverConfig, peer: Option<P2pTarget>) -> Result<Self, DriverError> {
        let system = |doing| move |source| DriverError::System { doing, source };
        let ram = memfd_create("test-driver", MemfdFlags::CLOEXEC).map_err(system("making memory"))?;
        ftruncate(&ram, RAM_SIZE).map_err(system("sizing memory"))?;
        let memory = Mapping::new(ram.as_fd(), 0, RAM_SIZE, true)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let event = || eventfd(0, flags).map_err(system("making an eventfd"));
        let peer = match peer {
            Some(peer) => {
                let mapping = Mapping::new(peer.fd.as_fd(), 0, BAR2_SIZE, true)?;
                Some((peer, mapping))
            }
            None => None,
        };
        let flow = || Flow { posted: 0, handled: 0, waiting: None, slots: [None; PLACES] };
        Ok(Self {
            config,
            ram,
            memory,
            vectors: [event()?, event()?],
            peer,
            doorbell: None,
            tail: 0,
            flows: [flow(), flow()],
            found: BlockFindings::default(),
        })
    }

    /// Gives a device what the driver's VMM would: DMA mappings, the mailbox of the peer, eventfds. The driver itself
    /// does not notice; to be called for a device that takes over from another as well.
    pub fn connect(&mut self, device: &dyn Hardware) -> Result<(), DriverError> {
        self.map(device)?;
        self.connect_vectors(device)?;
        self.doorbell = device.doorbell();
        Ok(())
    }

    /// The first half of [`connect`](Self::connect): DMA mappings.
    pub fn map(&self, device: &dyn Hardware) -> Result<(), DriverError> {
        let refused = refused("a DMA mapping");
        device.map(self.config.ram_base, RAM_SIZE, self.ram.as_fd()).map_err(refused)?;
        if let Some((peer, _)) = &self.peer {
            device.map(peer.iova, BAR2_SIZE, peer.fd.as_fd()).map_err(refused)?;
        }
        Ok(())
    }

    /// The other half: eventfds.
    pub fn connect_vectors(&self, device: &dyn Hardware) -> Result<(), DriverError> {
        let [first, second] = &self.vectors;
        device.connect_vectors([first.as_fd(), second.as_fd()]).map_err(refused("its eventfds"))
    }

    /// Replaces the peer, as when it moved too: maps nothing, see [`connect`](Self::connect).
    pub fn set_peer(&mut self, peer: P2pTarget) -> Result<(), DriverError> {
        let mapping = Mapping::new(peer.fd.as_fd(), 0, BAR2_SIZE, true)?;
        self.peer = Some((peer, mapping));
        Ok(())
    }

    /// Programs the registers and enables the device, as a driver does once.
    pub fn start(&self, device: &dyn Hardware) -> Result<(), DriverError> {
        self.layout().start(&mut Registers(device))
    }

    /// Posts descriptors until enough are in flight, without ringing. Returns how many.
    pub fn post(&mut self) -> Result<u64, DriverError> {
        let before = self.tail;
        for flow in 0..VECTORS {
            if flow == 1 && self.peer.is_none() {
                continue;
            }
            while self.flows[flow].posted - self.flows[flow].handled < self.config.in_flight.min(SLOTS) {
                self.post_one(flow)?;
            }
        }
        self.layout().post(&mut self.shared_memory(), self.tail)?;
        Ok(self.tail - before)
    }

    /// Rings the device's doorbell.
    pub fn ring(&self, device: &dyn Hardware) -> Result<(), DriverError> {
        match &self.doorbell {
            Some(doorbell) if self.config.doorbell_eventfd => {
                signal(doorbell);
                Ok(())
            }
            _ => Ring::ring(&mut Registers(device)),
        }
    }

    /// Does what is due: handles interrupts that came, and those that should have. Returns how many blocks were handled.
    pub fn service(&mut self, device: &dyn Hardware) -> Result<u64, DriverError> {
        let mut handled = 0;
        for flow in 0..VECTORS {
            if drain(&self.vectors[flow]) {
                self.found.interrupts += 1;
                let count = self.handle(flow, device)?;
                self.found.spurious += u64::from(count == 0);
                handled += count;
                continue;
            }
            let done = self.done(flow)?;
            let waiting = done > self.flows[flow].handled;
            let since = waiting.then(|| self.flows[flow].waiting.unwrap_or_else(Instant::now));
            self.flows[flow].waiting = since;
            if since.is_some_and(|since| since.elapsed() > INTERRUPT_LIMIT) {
                self.found.interrupts_lost += 1;
                handled += self.handle(flow, device)?;
            }
        }
        Ok(handled)
    }

    /// Works until `blocks` more blocks were handled, keeping the ring full.
    ///
    /// # Errors
    /// They did not come within `limit`.
    pub fn run(&mut self, device: &dyn Hardware, blocks: u64, limit: Duration) -> Result<(), DriverError> {
        let end = Instant::now() + limit;
        let mut handled = 0;
        while handled < blocks {
            if self.post()? > 0 {
                self.ring(device)?;
            }
            handled += self.service(device)?;
            if handled < blocks {
                if Instant::now() > end {
                    let missing = blocks - handled;
                    return Err(DriverError::Stalled { wanted: blocks, missing, limit });
                }
                self.wait(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Handles what is in flight, posting nothing, until all of it has come.
    ///
    /// # Errors
    /// It did not come within `limit`.
    pub fn drain(&mut self, device: &dyn Hardware, limit: Duration) -> Result<(), DriverError> {
        let end = Instant::now() + limit;
        let wanted = self.in_flight();
        while self.in_flight() > 0 {
            if self.service(device)? == 0 {
                if Instant::now() > end {
                    return Err(DriverError::Stalled { wanted, missing: self.in_flight(), limit });
                }
                self.wait(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Looks at every block again that nothing in flight will replace.
    pub fn recheck(&mut self) -> Result<(), DriverError> {
        for flow in 0..VECTORS {
            for slot in 0..PLACES {
                let Some(expected) = self.flows[flow].slots[slot] else { continue };
                if expected.number <= self.flows[flow].handled {
                    self.check(flow, &expected)?;
                }
            }
        }
        Ok(())
    }

    /// Descriptors posted whose blocks were not handled yet.
    pub fn in_flight(&self) -> u64 {
        self.flows.iter().map(|flow| flow.posted - flow.handled).sum()
    }

    /// Blocks of `flow` that were handled.
    pub fn handled(&self, flow: usize) -> u64 {
        self.flows.get(flow).map_or(0, |flow| flow.handled)
    }

    /// The device's count of completed blocks of `flow`, in the driver's memory.
    pub fn done(&self, flow: usize) -> Result<u64, DriverError> {
        self.layout().done(&mut self.shared_memory(), flow)
    }

    /// Blocks and interrupts that were seen so far, and what was wrong with them.
    pub fn findings(&self) -> BlockFindings {
        self.found
    }

    /// The driver's memory, `RAM_SIZE` bytes, mapped at `ram_base`.
    pub fn ram(&self) -> (BorrowedFd<'_>, u64) {
        (self.ram.as_fd(), self.config.ram_base)
    }

    /// Number, within its memory, of the page that block `number` of flow 0 goes to.
    pub fn slot_page(number: u64) -> u64 {
        SLOT_BASE / PAGE + number.wrapping_sub(1) % SLOTS
    }

    /// Number, within its memory, of the page with the counts that the device writes.
    pub fn done_page() -> u64 {
        DONE / PAGE
    }

    /// Waits for an interrupt, at most `time`.
    pub fn wait(&self, time: Duration) {
        let mut fds = self.vectors.each_ref().map(|fd| PollFd::new(fd, PollFlags::IN));
        let time = Timespec::try_from(time).ok();
        // A wait that fails is as good as a short one.
        let _ = poll(&mut fds, time.as_ref());
    }

    fn layout(&self) -> Ring {
        let base = self.config.ram_base;
        Ring { base: base + RING, entries: RING_ENTRIES, tail: base + TAIL, done: base + DONE }
    }

    fn shared_memory(&self) -> AtDmaAddress<'_> {
        AtDmaAddress { memory: &self.memory, base: self.config.ram_base }
    }

    fn post_one(&mut self, flow: usize) -> Result<(), DriverError> {
        let base = self.config.ram_base;
        let number = self.flows[flow].posted + 1;
        let slot = (number - 1) % SLOTS;
        let source = SOURCES + (flow as u64 * SLOTS + slot) * PAGE;
        let len = self.config.block_len;
        let mut sum = 0u64;
        let mut bytes = Vec::with_capacity(len as usize);
        for i in 0..u64::from(len / 8) {
            let word =
                (number << 8 | flow as u64).wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(i << 20 | i);
            sum = sum.wrapping_add(word);
            bytes.extend(word.to_le_bytes());
        }
        self.memory.write(source, &bytes)?;
        let (target, flags) = match (flow, &self.peer) {
            (1, Some((peer, _))) => (peer.iova + slot * PAGE, P2P),
            _ => (base + SLOT_BASE + slot * PAGE, 0),
        };
        let cookie = number.rotate_left(32) ^ flow as u64 ^ 0xc00c_1e00;
        let expected = ExpectedBlock { number, cookie, len, flags, source_sum: sum };
        let descriptor = Descriptor { source: base + source, target, len, flags, cookie };
        self.layout().put(&mut self.shared_memory(), self.tail, &descriptor)?;
        self.tail += 1;
        self.flows[flow].posted = number;
        *self.flows[flow].place(number) = Some(expected);
        Ok(())
    }

    /// The interrupt handler: takes every block that is done, then acknowledges.
    fn handle(&mut self, flow: usize, device: &dyn Hardware) -> Result<u64, DriverError> {
        let done = self.done(flow)?;
        let Flow { handled, posted, .. } = self.flows[flow];
        if done < handled || done > posted {
            // Lost or doubled by the device: the numbers of both do not meet again.
            self.found.blocks_lost += done.abs_diff(done.clamp(handled, posted));
        }
        let done = done.clamp(handled, posted);
        for number in handled + 1..=done {
            match *self.flows[flow].place(number) {
                Some(expected) => self.check(flow, &expected)?,
                None => self.found.blocks_lost += 1,
            }
        }
        let count = done - handled;
        self.found.blocks += count;
        self.found.p2p_blocks += if flow == 1 { count } else { 0 };
        self.flows[flow].handled = done;
        self.flows[flow].waiting = None;
        Ring::acknowledge(&mut Registers(device), flow, done)?;
        Ok(count)
    }

    fn check(&mut self, flow: usize, expected: &ExpectedBlock) -> Result<(), DriverError> {
        let slot = (expected.number - 1) % SLOTS;
        let mut bytes = vec![0; expected.len as usize];
        match (flow, &self.peer) {
            (1, Some((_, mailbox))) => mailbox.read(slot * PAGE, &mut bytes)?,
            _ => self.memory.read(SLOT_BASE + slot * PAGE, &mut bytes)?,
        }
        match expected.check(&bytes) {
            Ok(0) => {}
            Ok(damaged) => {
                self.found.blocks_lost += 1;
                self.found.integrity = self.found.integrity.max(damaged);
            }
            Err(flaw) => {
                tracing::warn!(flow, number = expected.number, ?flaw, "a block is not as it must be");
                self.found.blocks_lost += 1;
            }
        }
        Ok(())
    }
}

/// The driver's memory, from `base` on.
struct AtDmaAddress<'a> {
    memory: &'a Mapping,
    base: u64,
}

impl SharedMemory for AtDmaAddress<'_> {
    type Error = DriverError;

    fn load(&mut self, address: u64) -> Result<u64, DriverError> {
        Ok(u64::from_le(self.memory.read_u64(address.wrapping_sub(self.base))?))
    }

    fn store(&mut self, address: u64, value: u64) -> Result<(), DriverError> {
        Ok(self.memory.write_u64(address.wrapping_sub(self.base), value.to_le())?)
    }
}

/// A device's registers, whose refusals say what was refused.
struct Registers<'a>(&'a dyn Hardware);

impl Registers<'_> {
    fn write(&self, register: u64, from: &[u8]) -> Result<(), DriverError> {
        let doing = match register {
            offset::DOORBELL => "a doorbell",
            offset::ACK0 | offset::ACK1 => "an acknowledgement",
            _ => "a register",
        };
        self.0.write(register, from).map_err(refused(doing))
    }
}

impl DeviceRegisters for Registers<'_> {
    type Error = DriverError;

    fn write32(&mut self, register: u64, value: u32) -> Result<(), DriverError> {
        self.write(register, &value.to_le_bytes())
    }

    fn write64(&mut self, register: u64, value: u64) -> Result<(), DriverError> {
        self.write(register, &value.to_le_bytes())
    }
}

impl Flow {
    /// The expectation of block `number`.
    fn place(&mut self, number: u64) -> &mut Option<ExpectedBlock> {
        let slot = usize::try_from(number.wrapping_sub(1) % SLOTS).unwrap_or(0);
        &mut self.slots[slot]
    }
}

fn refused(doing: &'static str) -> impl Fn(BoxError) -> DriverError + Copy {
    move |source| DriverError::Device { doing, source }
}
