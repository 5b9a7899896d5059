//! The sample device as a guest's driver meets it: BARs to place, vectors to program, a ring to fill.

use vfio_migration_sim::driver::{Flaw, check_block};
use vfio_migration_sim::pci::{BAR0_SIZE, BAR2_SIZE, MSIX_CAP, MSIX_TABLE};
use vfio_migration_sim::regs::{ENABLE, VECTORS, offset};
use vfio_migration_sim::{DESCRIPTOR, P2P};

use crate::machine::{Machine, until};

/// Where the first function's BARs go, above RAM and below the firmware's flash; each slot has 16 MiB.
const WINDOW: u64 = 0xe000_0000;
/// Where the first function's own memory begins; each slot has 1 MiB.
const MEMORY: u64 = 0x10_0000;
const TAIL: u64 = 0x1000;
const DONE: u64 = 0x1010;
const MESSAGES: u64 = 0x1020;
const SOURCE: u64 = 0x2000;
const TARGETS: u64 = 0x1_0000;
/// Entries of the ring.
const ENTRIES: u64 = 16;
/// Bytes of a block.
const BLOCK: u64 = 1024;
/// What a vector's message is.
const MESSAGE: u32 = 0x4d53_4900;

/// A function on bus 0.
#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) slot: u32,
    /// Descriptors posted since it was enabled.
    posted: u64,
    /// The same by flow: the device counts blocks so.
    blocks: [u64; VECTORS],
}

/// A block that was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) at: u64,
    number: u64,
    cookie: u64,
    flags: u32,
    sum: u64,
}

impl Block {
    /// Looks at it in guest RAM. The device counts damage in its own state; that has to be none.
    pub(crate) fn check(&self, machine: &mut Machine) -> Result<u64, Flaw> {
        let mut bytes = vec![0; usize::try_from(BLOCK).unwrap()];
        machine.read(self.at, &mut bytes);
        check_block(&bytes, self.number, self.cookie, self.flags, self.sum)
    }
}

impl Function {
    /// The function in `slot`, with its BARs placed and its vectors connected.
    pub(crate) fn set_up(machine: &mut Machine, slot: u32) -> Self {
        let function = Self { slot, posted: 0, blocks: [0; VECTORS] };
        let low = |at: u64| u32::try_from(at).unwrap();
        machine.config_write(slot, 0x10, low(function.bar0()));
        machine.config_write(slot, 0x18, low(function.bar2()));
        machine.config_write(slot, 0x1c, 0);
        // Memory space and bus master.
        machine.config_write(slot, 0x04, 0x6);
        for vector in 0..VECTORS as u64 {
            let entry = function.bar0() + u64::from(MSIX_TABLE) + vector * 16;
            machine.write_u32(entry, low(function.message_at(vector)));
            machine.write_u32(entry + 4, 0);
            machine.write_u32(entry + 8, MESSAGE + low(vector));
            machine.write_u32(entry + 12, 0);
        }
        let cap = u32::try_from(MSIX_CAP).unwrap();
        let control = machine.config_read(slot, cap);
        machine.config_write(slot, cap, control | 1 << 31);
        function
    }

    pub(crate) fn bar0(&self) -> u64 {
        WINDOW + u64::from(self.slot) * 0x100_0000
    }

    pub(crate) fn bar2(&self) -> u64 {
        self.bar0() + 0x10_0000
    }

    fn memory(&self) -> u64 {
        MEMORY * u64::from(self.slot)
    }

    /// Where a vector's message goes: guest RAM, where the test sees it.
    fn message_at(&self, vector: u64) -> u64 {
        self.memory() + MESSAGES + vector * 4
    }

    /// Programs the ring and enables the device.
    pub(crate) fn enable(&self, machine: &mut Machine) {
        machine.write(self.memory() + TAIL, &[0; 0x40]);
        machine.write_u64(self.bar0() + offset::RING_BASE, self.memory());
        machine.write_u64(self.bar0() + offset::TAIL_ADDR, self.memory() + TAIL);
        machine.write_u64(self.bar0() + offset::DONE_ADDR, self.memory() + DONE);
        machine.write_u32(self.bar0() + offset::RING_SIZE, u32::try_from(ENTRIES).unwrap());
        machine.write_u32(self.bar0() + offset::CONTROL, ENABLE);
    }

    /// Has the device write `count` blocks, one after the other and through both flows by turns, waits for the interrupt of
    /// each, and looks at each. Every one has to be there.
    pub(crate) fn work(&mut self, machine: &mut Machine, count: u64) -> Vec<Block> {
        let blocks: Vec<Block> = (0..count).map(|_| self.one(machine)).collect();
        for block in &blocks {
            assert_eq!(block.check(machine), Ok(0), "{block:?} of slot {}", self.slot);
        }
        blocks
    }

    fn one(&mut self, machine: &mut Machine) -> Block {
        let index = self.posted;
        let vector = index % VECTORS as u64;
        let flow = usize::try_from(vector).unwrap();
        self.posted += 1;
        self.blocks[flow] += 1;
        let words: Vec<u64> = (0..BLOCK / 8).map(|n| (index << 32 | n).wrapping_mul(0x5851_f42d)).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        machine.write(self.memory() + SOURCE, &bytes);
        let block = Block {
            at: self.memory() + TARGETS + index % ENTRIES * 0x1000,
            number: self.blocks[flow],
            cookie: 0xc00c_1e00 + index,
            flags: if flow == 0 { 0 } else { P2P },
            sum: words.iter().fold(0, |sum, word| sum.wrapping_add(*word)),
        };
        let about = BLOCK | u64::from(block.flags) << 32;
        let entry = self.memory() + index % ENTRIES * DESCRIPTOR;
        for (at, word) in (entry..).step_by(8).zip([self.memory() + SOURCE, block.at, about, block.cookie]) {
            machine.write_u64(at, word);
        }
        let message = self.message_at(vector);
        machine.write_u32(message, 0);
        machine.write_u64(self.memory() + TAIL, self.posted);
        machine.write_u32(self.bar0() + offset::DOORBELL, 1);
        until("an interrupt", || (machine.read_u32(message) != 0).then_some(()));
        assert_eq!(machine.read_u32(message), MESSAGE + u32::try_from(vector).unwrap());
        assert_eq!(machine.read_u64(self.memory() + DONE + 8 * vector), self.blocks[flow], "blocks done");
        let ack = if flow == 0 { offset::ACK0 } else { offset::ACK1 };
        machine.write_u64(self.bar0() + ack, self.blocks[flow]);
        block
    }
}

const _: () = assert!(BAR0_SIZE <= 0x10_0000 && BAR2_SIZE <= 0xf0_0000);
