//! The sample device as a guest's driver meets it: BARs to place, vectors to program, a ring to fill.

use std::convert::Infallible;

use vfio_migration_guest_driver::registers::VECTORS;
use vfio_migration_guest_driver::{
    Descriptor, DeviceRegisters, ExpectedBlock, Flaw, P2P, Ring, SharedMemory,
};
use vfio_migration_sim::pci::{BAR0_SIZE, BAR2_SIZE, MSIX_CAP, MSIX_TABLE};

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
const ENTRIES: u32 = 16;
/// Bytes of a block.
const BLOCK: u32 = 1024;
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
    expected: ExpectedBlock,
}

impl Block {
    /// Looks at it in guest RAM. The device counts damage in its own state; that has to be none.
    pub(crate) fn check(&self, machine: &mut Machine) -> Result<u64, Flaw> {
        let mut bytes = vec![0; BLOCK as usize];
        machine.read(self.at, &mut bytes);
        self.expected.check(&bytes)
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
        let Ok(()) = self.ring().start(&mut Bar0 { machine, at: self.bar0() });
    }

    fn ring(&self) -> Ring {
        let memory = self.memory();
        Ring { base: memory, entries: ENTRIES, tail: memory + TAIL, done: memory + DONE }
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
        let words: Vec<u64> =
            (0..u64::from(BLOCK / 8)).map(|n| (index << 32 | n).wrapping_mul(0x5851_f42d)).collect();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let (source, target) =
            (self.memory() + SOURCE, self.memory() + TARGETS + index % u64::from(ENTRIES) * 0x1000);
        machine.write(source, &bytes);
        let (cookie, flags) = (0xc00c_1e00 + index, if flow == 0 { 0 } else { P2P });
        let descriptor = Descriptor { source, target, len: BLOCK, flags, cookie };
        let Ok(()) = self.ring().put(machine, index, &descriptor);
        let message = self.message_at(vector);
        machine.write_u32(message, 0);
        let Ok(()) = self.ring().post(machine, self.posted);
        let Ok(()) = Ring::ring(&mut Bar0 { machine, at: self.bar0() });
        until("an interrupt", || (machine.read_u32(message) != 0).then_some(()));
        assert_eq!(machine.read_u32(message), MESSAGE + u32::try_from(vector).unwrap());
        assert_eq!(self.ring().done(machine, flow), Ok(self.blocks[flow]), "blocks done");
        let Ok(()) = Ring::acknowledge(&mut Bar0 { machine, at: self.bar0() }, flow, self.blocks[flow]);
        let source_sum = words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
        let expected = ExpectedBlock { number: self.blocks[flow], cookie, len: BLOCK, flags, source_sum };
        Block { at: target, expected }
    }
}

/// BAR0 of a function, where it lies for the guest.
struct Bar0<'a> {
    machine: &'a mut Machine,
    at: u64,
}

impl DeviceRegisters for Bar0<'_> {
    type Error = Infallible;

    fn write32(&mut self, register: u64, value: u32) -> Result<(), Infallible> {
        self.machine.write_u32(self.at + register, value);
        Ok(())
    }

    fn write64(&mut self, register: u64, value: u64) -> Result<(), Infallible> {
        self.machine.write_u64(self.at + register, value);
        Ok(())
    }
}

impl SharedMemory for Machine {
    type Error = Infallible;

    fn load(&mut self, address: u64) -> Result<u64, Infallible> {
        Ok(self.read_u64(address))
    }

    fn store(&mut self, address: u64, value: u64) -> Result<(), Infallible> {
        self.write_u64(address, value);
        Ok(())
    }
}

const _: () = assert!(BAR0_SIZE <= 0x10_0000 && BAR2_SIZE <= 0xf0_0000);
