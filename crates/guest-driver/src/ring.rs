//! The ring of descriptors, and the words in memory by which driver and device count.

use crate::registers::{ENABLE, offset};

/// Bytes of a descriptor in the ring.
pub const DESCRIPTOR_LEN: u64 = 32;
/// Flag of a [`Descriptor`]: the block goes to another device's mailbox, and belongs to flow 1.
pub const P2P: u32 = 1 << 0;

/// The memory that driver and device both see, at the addresses that the device uses.
pub trait SharedMemory {
    /// A failed access.
    type Error;

    /// The word at `address`, which is aligned to 8; little endian in memory, as the device reads it.
    fn load(&mut self, address: u64) -> Result<u64, Self::Error>;
    /// Puts a word at `address`, which is aligned to 8; the device sees it before any register that is written later.
    fn store(&mut self, address: u64, value: u64) -> Result<(), Self::Error>;
}

/// BAR0 of one device.
pub trait DeviceRegisters {
    /// A failed access.
    type Error;

    /// Writes a register of 4 bytes.
    fn write32(&mut self, register: u64, value: u32) -> Result<(), Self::Error>;
    /// Writes a register of 8 bytes.
    fn write64(&mut self, register: u64, value: u64) -> Result<(), Self::Error>;
}

/// A block to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Address of the bytes that the device sums, as many as the block has.
    pub source: u64,
    /// Address that the block is written to.
    pub target: u64,
    /// Bytes of the block: a multiple of 64, from 128 to 65536.
    pub len: u32,
    /// [`P2P`], or none.
    pub flags: u32,
    /// Any number; the block repeats it.
    pub cookie: u64,
}

/// Where a driver keeps its ring, and the counts that go with it. What the driver has posted and handled it counts itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Address of the descriptors.
    pub base: u64,
    /// Number of descriptors that it has places for: a power of two from 2 to 4096.
    pub entries: u32,
    /// Address of the count of posted descriptors.
    pub tail: u64,
    /// Address of the device's two counts of completed blocks, flow 0 first.
    pub done: u64,
}

impl Ring {
    /// Tells the device of the ring, and enables it.
    pub fn start<R: DeviceRegisters>(&self, device: &mut R) -> Result<(), R::Error> {
        device.write64(offset::RING_BASE, self.base)?;
        device.write32(offset::RING_SIZE, self.entries)?;
        device.write64(offset::TAIL_ADDR, self.tail)?;
        device.write64(offset::DONE_ADDR, self.done)?;
        device.write32(offset::CONTROL, ENABLE)
    }

    /// Puts a descriptor into the place of the one that is posted as `index`, counted from 0 over both flows. The device does not
    /// look at it before it is [`post`](Self::post)ed.
    pub fn put<M: SharedMemory>(
        &self,
        memory: &mut M,
        index: u64,
        descriptor: &Descriptor,
    ) -> Result<(), M::Error> {
        let Descriptor { source, target, len, flags, cookie } = *descriptor;
        let at = self.base + index % u64::from(self.entries) * DESCRIPTOR_LEN;
        let about = u64::from(len) | u64::from(flags) << 32;
        [source, target, about, cookie]
            .into_iter()
            .zip(0..)
            .try_for_each(|(word, n)| memory.store(at + 8 * n, word))
    }

    /// Says that `posted` descriptors have been put, all in all. The device looks when its doorbell [rings](Self::ring).
    pub fn post<M: SharedMemory>(&self, memory: &mut M, posted: u64) -> Result<(), M::Error> {
        memory.store(self.tail, posted)
    }

    /// Rings the doorbell.
    pub fn ring<R: DeviceRegisters>(device: &mut R) -> Result<(), R::Error> {
        device.write32(offset::DOORBELL, 1)
    }

    /// Blocks of `flow` that the device has completed.
    pub fn done<M: SharedMemory>(&self, memory: &mut M, flow: usize) -> Result<u64, M::Error> {
        memory.load(self.done + 8 * flow as u64)
    }

    /// Says that the driver has handled `blocks` of `flow`: the vector is raised again when there are more.
    pub fn acknowledge<R: DeviceRegisters>(device: &mut R, flow: usize, blocks: u64) -> Result<(), R::Error> {
        device.write64(offset::ACK0 + 8 * flow as u64, blocks)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::collections::BTreeMap;
    use std::vec::Vec;

    use super::*;

    #[derive(Default)]
    struct Paper {
        memory: BTreeMap<u64, u64>,
        written: Vec<(u64, u64)>,
    }

    impl SharedMemory for Paper {
        type Error = ();

        fn load(&mut self, address: u64) -> Result<u64, ()> {
            self.memory.get(&address).copied().ok_or(())
        }

        fn store(&mut self, address: u64, value: u64) -> Result<(), ()> {
            self.memory.insert(address, value);
            Ok(())
        }
    }

    impl DeviceRegisters for Paper {
        type Error = ();

        fn write32(&mut self, register: u64, value: u32) -> Result<(), ()> {
            self.write64(register, value.into())
        }

        fn write64(&mut self, register: u64, value: u64) -> Result<(), ()> {
            self.written.push((register, value));
            Ok(())
        }
    }

    const RING: Ring = Ring { base: 0x1000, entries: 4, tail: 0x2000, done: 0x3000 };

    #[test]
    fn the_device_is_enabled_after_it_knows_of_its_ring() {
        let mut board = Paper::default();
        RING.start(&mut board).unwrap();
        assert_eq!(board.written, [(0x10, 0x1000), (0x18, 4), (0x20, 0x2000), (0x28, 0x3000), (0x08, 1)]);
    }

    #[test]
    fn descriptors_take_their_places_in_turn() {
        let mut board = Paper::default();
        let descriptor = Descriptor { source: 1, target: 2, len: 128, flags: P2P, cookie: 5 };
        RING.put(&mut board, 6, &descriptor).unwrap();
        let words: Vec<(u64, u64)> = board.memory.clone().into_iter().collect();
        assert_eq!(words, [(0x1040, 1), (0x1048, 2), (0x1050, 128 | 1 << 32), (0x1058, 5)]);
        RING.post(&mut board, 7).unwrap();
        assert_eq!(board.memory.get(&0x2000), Some(&7));
    }

    #[test]
    fn each_flow_has_its_own_count() {
        let mut board = Paper::default();
        board.memory.insert(0x3008, 9);
        assert_eq!(RING.done(&mut board, 0), Err(()));
        assert_eq!(RING.done(&mut board, 1), Ok(9));
        Ring::acknowledge(&mut board, 1, 9).unwrap();
        Ring::ring(&mut board).unwrap();
        assert_eq!(board.written, [(0x38, 9), (0x1000, 1)]);
    }
}
