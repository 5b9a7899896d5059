//! The driver of the sample device, and the checker of what it does.

use std::convert::Infallible;

use vfio_migration_guest_driver::registers::{ENABLE, MAGIC, offset};
use vfio_migration_guest_driver::{Descriptor, DeviceRegisters, ExpectedBlock, P2P, Ring, SharedMemory};
use vfio_migration_types::DEVICES_MAX;

use super::cpu::Cpu;
use super::orders::{BootOrders, ProgramFailure, word};
use crate::guest::SAMPLE_DEVICE;
use crate::guest::map::{
    DATA, DEVICE_DONE, DEVICE_RING, DEVICE_SLOTS, DEVICE_SOURCES, DEVICE_STRIDE, DEVICE_TAIL, DEVICE_TARGETS,
    DEVICES, REPORT, RING_SIZE, SLOTS,
};
use crate::layout::LAPIC_BASE;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Vector of the first device's first flow; two per device.
const FIRST_VECTOR: u32 = 0x40;
/// A completed block whose interrupt has not come after so long, in nanoseconds of running, has lost it.
const LOST_AFTER: u64 = 1_000_000_000;
/// Blocks of the past that are compared again in a turn.
const CHECKS_PER_TURN: u64 = 8;

/// Variable: the slot that is compared next.
const SLOT: u64 = DATA + 0x800;
/// Variables of the devices.
const VARIABLES: u64 = DATA + 0x1000;
const VARIABLES_LEN: u64 = 0x200;

const RING_ENTRIES: u32 = 64;
const _: () = assert!(RING_ENTRIES as u64 == RING_SIZE);

/// A device, by its index: addresses and nothing else.
#[derive(Clone, Copy, Debug)]
struct DrivenDevice<'a> {
    cpu: &'a Cpu,
    index: u64,
}

/// One of the two flows of a device.
#[derive(Clone, Copy, Debug)]
struct Flow<'a> {
    device: DrivenDevice<'a>,
    flow: u64,
}

/// Finds the devices and starts them.
pub(super) fn start(cpu: &Cpu, orders: &BootOrders) -> Result<(), ProgramFailure> {
    let mut found = 0;
    for slot in 0..32u32 {
        let first = 0x8000_0000 | slot << 11;
        // Function 0 says whether its slot has more; of an empty slot all bits read as ones.
        let header = config_read(cpu, first, 0xc);
        let functions = if header >> 16 & 0x80 != 0 && header != u32::MAX { 8 } else { 1 };
        for config in (0..functions).map(|function| first | function << 8) {
            if config_read(cpu, config, 0) == SAMPLE_DEVICE && found < u64::from(DEVICES_MAX) {
                DrivenDevice { cpu, index: found }.prepare(config)?;
                found += 1;
            }
        }
    }
    if found != orders.devices {
        return Err(ProgramFailure { code: 2, detail: found });
    }
    (0..found).try_for_each(|index| DrivenDevice { cpu, index }.start(orders))
}

/// A turn: takes interrupts, looks for lost ones, takes what is done, posts anew, and compares some of what was done.
pub(super) fn serve(cpu: &Cpu, orders: &BootOrders, run_clock: u64) -> Result<(), ProgramFailure> {
    for message in cpu.backend.take_interrupts() {
        let target = message.data.checked_sub(FIRST_VECTOR).map(u64::from);
        match target.filter(|target| message.address == LAPIC_BASE && *target < 2 * orders.devices) {
            Some(target) => {
                Flow { device: DrivenDevice { cpu, index: target / 2 }, flow: target % 2 }.interrupt()
            }
            None => return Err(ProgramFailure { code: 0x200, detail: message.data.into() }),
        }
    }
    for index in 0..orders.devices {
        let device = DrivenDevice { cpu, index };
        for flow in device.flows() {
            flow.look_for_lost(run_clock);
            flow.take(orders)?;
        }
        device.post(orders);
    }
    let posted = (0..orders.devices).map(|index| cpu.load64(DrivenDevice { cpu, index }.posted()));
    if let Some(least) = posted.min() {
        cpu.store64(REPORT + 8 * word::LEAST_POSTED, least);
    }
    for _ in 0..CHECKS_PER_TURN.min(orders.devices * 2 * SLOTS) {
        check_next(cpu, orders);
    }
    Ok(())
}

fn config_read(cpu: &Cpu, config: u32, register: u32) -> u32 {
    cpu.port_out(CONFIG_ADDRESS, config | register);
    cpu.port_in(CONFIG_DATA)
}

fn config_write(cpu: &Cpu, config: u32, register: u32, value: u32) {
    cpu.port_out(CONFIG_ADDRESS, config | register);
    cpu.port_out(CONFIG_DATA, value);
}

/// Compares the block of the next slot, if it holds one.
fn check_next(cpu: &Cpu, orders: &BootOrders) {
    let number = cpu.load64(SLOT);
    let next = (number + 1) % (orders.devices * 2 * SLOTS);
    cpu.store64(SLOT, next);
    if next == 0 {
        cpu.add(REPORT + 8 * word::BLOCK_PASSES, 1);
    }
    let (flow, slot) = (number / SLOTS, number % SLOTS);
    let flow = Flow { device: DrivenDevice { cpu, index: flow / 2 }, flow: flow % 2 };
    let block = cpu.load64(flow.slot_entry(slot));
    if block != 0 {
        flow.check(orders, block);
    }
}

impl<'a> DrivenDevice<'a> {
    fn variable(self, index: u64) -> u64 {
        VARIABLES + self.index * VARIABLES_LEN + 8 * index
    }

    fn bar0(self) -> u64 {
        self.cpu.load64(self.variable(0))
    }

    fn mailbox(self) -> u64 {
        self.cpu.load64(self.variable(1))
    }

    /// Address of the count of posted descriptors.
    fn posted(self) -> u64 {
        self.variable(2)
    }

    fn memory(self) -> u64 {
        DEVICES + self.index * DEVICE_STRIDE
    }

    fn ring(self) -> Ring {
        let memory = self.memory();
        Ring {
            base: memory + DEVICE_RING,
            entries: RING_ENTRIES,
            tail: memory + DEVICE_TAIL,
            done: memory + DEVICE_DONE,
        }
    }

    fn flows(self) -> [Flow<'a>; 2] {
        [Flow { device: self, flow: 0 }, Flow { device: self, flow: 1 }]
    }

    /// BARs, and memory decode on.
    fn prepare(self, config: u32) -> Result<(), ProgramFailure> {
        let cpu = self.cpu;
        let bar0 = u64::from(config_read(cpu, config, 0x10) & !0xf);
        let low = u64::from(config_read(cpu, config, 0x18) & !0xf);
        let mailbox = u64::from(config_read(cpu, config, 0x1c)) << 32 | low;
        if bar0 == 0 || mailbox == 0 {
            return Err(ProgramFailure { code: 3, detail: self.index });
        }
        cpu.store64(self.variable(0), bar0);
        cpu.store64(self.variable(1), mailbox);
        cpu.store64(self.variable(3), config.into());
        config_write(cpu, config, 4, config_read(cpu, config, 4) & 0xffff | 6);
        Ok(())
    }

    /// Sets interrupts and registers up and lets the device go.
    fn start(self, orders: &BootOrders) -> Result<(), ProgramFailure> {
        let cpu = self.cpu;
        let config = u32::try_from(cpu.load64(self.variable(3))).unwrap_or(0);
        let mut capability = config_read(cpu, config, 0x34) & 0xfc;
        let mut left = 48;
        let msix = loop {
            if capability == 0 || left == 0 {
                return Err(ProgramFailure { code: 4, detail: self.index });
            }
            left -= 1;
            let header = config_read(cpu, config, capability);
            if header & 0xff == 0x11 {
                break capability;
            }
            capability = header >> 8 & 0xfc;
        };
        let table = config_read(cpu, config, msix + 4);
        if table & 7 != 0 {
            return Err(ProgramFailure { code: 5, detail: self.index });
        }
        let bar0 = self.bar0();
        let vector = FIRST_VECTOR + 2 * u32::try_from(self.index).unwrap_or(0);
        for flow in 0..2u32 {
            let entry = bar0 + u64::from(table) + 16 * u64::from(flow);
            cpu.store32(entry, 0xfee0_0000);
            cpu.store32(entry + 4, 0);
            cpu.store32(entry + 8, vector + flow);
            cpu.store32(entry + 12, 0);
        }
        let control = config_read(cpu, config, msix);
        config_write(cpu, config, msix, control & !0x4000_0000 | 0x8000_0000);

        let magic = cpu.load32(bar0);
        if magic != MAGIC {
            return Err(ProgramFailure { code: 6, detail: magic.into() });
        }
        for source in 0..RING_SIZE {
            for index in 1..u64::from(orders.block_len / 8) {
                let at = self.memory() + DEVICE_SOURCES + source * 4096 + 8 * index;
                cpu.store64(at, index.wrapping_mul(GOLDEN));
            }
        }
        let Ok(()) = self.ring().start(&mut Bar0 { cpu, at: bar0 });
        let status = cpu.load32(bar0 + offset::STATUS);
        if status & ENABLE == 0 {
            return Err(ProgramFailure { code: 8, detail: status.into() });
        }
        Ok(())
    }

    /// Posts descriptors until enough are in flight, and rings the doorbell.
    fn post(self, orders: &BootOrders) {
        let cpu = self.cpu;
        let before = cpu.load64(self.posted());
        let handled: u64 = self.flows().map(|flow| cpu.load64(flow.handled())).iter().sum();
        let mut posted = before;
        while posted.saturating_sub(handled) < orders.in_flight {
            let flow = Flow { device: self, flow: if orders.p2p { posted % 2 } else { 0 } };
            let number = cpu.load64(flow.issued()) + 1;
            cpu.store64(flow.issued(), number);
            // What the slot held is overwritten from now on.
            cpu.store64(flow.slot_entry(number % SLOTS), 0);
            let source = self.memory() + DEVICE_SOURCES + posted % RING_SIZE * 4096;
            cpu.store64(source, flow.cookie(number));
            let descriptor = Descriptor {
                source,
                target: flow.target(orders, number % SLOTS),
                len: orders.block_len,
                flags: flow.flags(),
                cookie: flow.cookie(number),
            };
            let Ok(()) = self.ring().put(&mut &*cpu, posted, &descriptor);
            posted += 1;
        }
        if posted != before {
            cpu.store64(self.posted(), posted);
            let Ok(()) = self.ring().post(&mut &*cpu, posted);
            let Ok(()) = Ring::ring(&mut Bar0 { cpu, at: self.bar0() });
        }
    }
}

impl Flow<'_> {
    fn variable(self, index: u64) -> u64 {
        self.device.variable(8 + 8 * self.flow + index)
    }

    /// Completed blocks as the handler last read them.
    fn seen(self) -> u64 {
        self.variable(0)
    }

    /// Address of the count of completed blocks that were taken.
    fn handled(self) -> u64 {
        self.variable(1)
    }

    fn issued(self) -> u64 {
        self.variable(2)
    }

    /// Run clock when DONE was first found ahead of what was seen; 0 if it is not.
    fn waiting(self) -> u64 {
        self.variable(3)
    }

    /// The device's count of completed blocks.
    fn done(self) -> u64 {
        let Ok(done) = self.device.ring().done(&mut &*self.device.cpu, self.index());
        done
    }

    fn index(self) -> usize {
        usize::from(self.flow != 0)
    }

    fn slot_entry(self, slot: u64) -> u64 {
        self.device.memory() + DEVICE_SLOTS + 8 * SLOTS * self.flow + 8 * slot
    }

    fn target(self, orders: &BootOrders, slot: u64) -> u64 {
        let base = if self.flow == 0 {
            self.device.memory() + DEVICE_TARGETS
        } else {
            let index = (self.device.index + 1) % orders.devices;
            DrivenDevice { index, ..self.device }.mailbox()
        };
        base + slot * 4096
    }

    fn flags(self) -> u32 {
        if self.flow == 0 { 0 } else { P2P }
    }

    fn cookie(self, number: u64) -> u64 {
        (number ^ self.device.index << 56 ^ self.flow << 55).wrapping_mul(GOLDEN)
    }

    /// Handles one interrupt of the flow.
    fn interrupt(self) {
        let cpu = self.device.cpu;
        let done = self.done();
        let counter = if done == cpu.load64(self.seen()) { word::SPURIOUS } else { word::INTERRUPTS };
        cpu.add(REPORT + 8 * counter, 1);
        self.acknowledge(done);
    }

    fn acknowledge(self, done: u64) {
        let cpu = self.device.cpu;
        cpu.store64(self.waiting(), 0);
        cpu.store64(self.seen(), done);
        let Ok(()) = Ring::acknowledge(&mut Bar0 { cpu, at: self.device.bar0() }, self.index(), done);
    }

    /// A flow whose count is ahead of what its handler saw, and stays so for a second of running, has lost its
    /// interrupt. It is counted and served by hand, so that the guest goes on.
    fn look_for_lost(self, run_clock: u64) {
        let cpu = self.device.cpu;
        let done = self.done();
        let waiting = cpu.load64(self.waiting());
        if done == cpu.load64(self.seen()) {
            if waiting != 0 {
                cpu.store64(self.waiting(), 0);
            }
        } else if waiting == 0 {
            cpu.store64(self.waiting(), run_clock.max(1));
        } else if run_clock.saturating_sub(waiting) >= LOST_AFTER {
            tracing::warn!(
                device = self.device.index,
                flow = self.flow,
                "software guest: an interrupt is lost"
            );
            cpu.add(REPORT + 8 * word::INTERRUPTS_LOST, 1);
            self.acknowledge(done);
        }
    }

    /// Takes and compares the blocks completed since the last turn.
    fn take(self, orders: &BootOrders) -> Result<(), ProgramFailure> {
        let cpu = self.device.cpu;
        let (handled, seen) = (cpu.load64(self.handled()), cpu.load64(self.seen()));
        if seen > cpu.load64(self.issued()) || seen < handled || seen - handled > RING_SIZE {
            return Err(ProgramFailure { code: 7, detail: self.device.index });
        }
        for number in handled + 1..=seen {
            cpu.store64(self.slot_entry(number % SLOTS), number);
            self.check(orders, number);
        }
        cpu.store64(self.handled(), seen);
        cpu.add(REPORT + 8 * word::DMA_BLOCKS, seen - handled);
        if self.flow == 1 {
            cpu.add(REPORT + 8 * word::P2P_BLOCKS, seen - handled);
        }
        Ok(())
    }

    /// Compares block `number` with what it must be. A wrong one counts once: its slot is given up.
    fn check(self, orders: &BootOrders, number: u64) {
        let cpu = self.device.cpu;
        let mut bytes = vec![0; usize::try_from(orders.block_len.min(4096)).unwrap_or(4096)];
        cpu.load(self.target(orders, number % SLOTS), &mut bytes);
        cpu.add(REPORT + 8 * word::BLOCKS_CHECKED, 1);
        let verdict = self.expected(orders, number).check(&bytes);
        if verdict != Ok(0) {
            tracing::warn!(
                device = self.device.index,
                flow = self.flow,
                number,
                ?verdict,
                "software guest: a block is lost"
            );
            cpu.add(REPORT + 8 * word::BLOCKS_LOST, 1);
            // It is right, and says that the device's internal state is not.
            if verdict.is_ok() {
                cpu.add(REPORT + 8 * word::INTEGRITY, 1);
            }
            cpu.store64(self.slot_entry(number % SLOTS), 0);
        }
    }

    fn expected(self, orders: &BootOrders, number: u64) -> ExpectedBlock {
        let (len, flags, cookie) = (orders.block_len, self.flags(), self.cookie(number));
        let words = u64::from(len / 8);
        // The source: the cookie, then multiples of a constant.
        let source_sum = cookie.wrapping_add(GOLDEN.wrapping_mul(words * words.saturating_sub(1) / 2));
        ExpectedBlock { number, cookie, len, flags, source_sum }
    }
}

/// BAR0 of a device, where it lies for the guest.
struct Bar0<'a> {
    cpu: &'a Cpu,
    at: u64,
}

impl DeviceRegisters for Bar0<'_> {
    type Error = Infallible;

    fn write32(&mut self, register: u64, value: u32) -> Result<(), Infallible> {
        self.cpu.store32(self.at + register, value);
        Ok(())
    }

    fn write64(&mut self, register: u64, value: u64) -> Result<(), Infallible> {
        self.cpu.store64(self.at + register, value);
        Ok(())
    }
}

impl SharedMemory for &Cpu {
    type Error = Infallible;

    fn load(&mut self, address: u64) -> Result<u64, Infallible> {
        Ok(self.load64(address))
    }

    fn store(&mut self, address: u64, value: u64) -> Result<(), Infallible> {
        self.store64(address, value);
        Ok(())
    }
}
