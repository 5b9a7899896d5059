//! The registers: BAR0 page 0 as the guest's driver sees it, and the counters behind it that travel in a migration.

use vfio_migration_guest_driver::registers::{ENABLE, INTEGRITY_ERROR, MAGIC, RING_ERROR, VECTORS, offset};

use crate::error::{SimError, invalid};

/// Bytes of the registers' encoding in a migration stream.
pub(crate) const ENCODED: usize = 8 + 16 * 8;

/// Everything in the device that is neither bulk state nor mailbox.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    pub(crate) enabled: bool,
    pub(crate) ring_error: bool,
    pub(crate) ring_base: u64,
    pub(crate) ring_size: u32,
    pub(crate) tail_addr: u64,
    pub(crate) done_addr: u64,
    pub(crate) ack: [u64; VECTORS],
    pub(crate) blocks: [u64; VECTORS],
    pub(crate) head: u64,
    /// The last value read from `tail_addr`.
    pub(crate) tail: u64,
    /// A doorbell came for which `tail_addr` was not yet read.
    pub(crate) doorbell: bool,
    /// The vector was raised and not acknowledged since.
    pub(crate) outstanding: [bool; VECTORS],
    /// Raises so far.
    pub(crate) raises: [u64; VECTORS],
    /// The raise found no eventfd to go to: sent when one is connected, like a set bit of the PBA.
    pub(crate) unsent: [bool; VECTORS],
    pub(crate) reinits: u64,
}

/// Effect of a register write beyond storing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// The engine has new work or new orders.
    Kick,
    /// The engine was switched off: the writer may take its memory back once this has taken effect.
    Quiesce,
    /// A vector may be raised again.
    Raise(usize),
    /// New initial pre-copy data.
    Reinit,
}

/// Values of read-only registers that live elsewhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) version: (u16, u16),
    pub(crate) state_size: u64,
    pub(crate) integrity: u64,
}

impl Registers {
    /// Reads 4 or 8 aligned bytes; anything else, and what is no register, reads as 0.
    pub(crate) fn read(&self, at: u64, into: &mut [u8], facts: Facts) {
        into.fill(0);
        match into.len() {
            4 if at.is_multiple_of(4) => {
                let word = self.word(at & !7, facts).to_le_bytes();
                let (low, high) = word.split_at(4);
                into.copy_from_slice(if at.is_multiple_of(8) { low } else { high });
            }
            8 if at.is_multiple_of(8) => into.copy_from_slice(&self.word(at, facts).to_le_bytes()),
            _ => {}
        }
    }

    /// Writes 4 or 8 aligned bytes; anything else, and what cannot be written, is ignored.
    pub(crate) fn write(&mut self, at: u64, from: &[u8]) -> Effect {
        if let Ok(bytes) = <[u8; 8]>::try_from(from) {
            if !at.is_multiple_of(8) {
                return Effect::None;
            }
            let value = u64::from_le_bytes(bytes);
            if let Some(wide) = self.wide(at) {
                *wide = value;
                return self.written(at);
            }
            let (low, high) = from.split_at(4);
            let first = self.write(at, low);
            return match self.write(at + 4, high) {
                Effect::None => first,
                effect => effect,
            };
        }
        let Ok(bytes) = <[u8; 4]>::try_from(from) else { return Effect::None };
        if !at.is_multiple_of(4) {
            return Effect::None;
        }
        let value = u32::from_le_bytes(bytes);
        if let Some(wide) = self.wide(at & !7) {
            let keep = if at.is_multiple_of(8) { 0xffff_ffff_0000_0000 } else { 0xffff_ffff };
            let shift = if at.is_multiple_of(8) { 0 } else { 32 };
            *wide = *wide & keep | u64::from(value) << shift;
            return self.written(at & !7);
        }
        match at {
            offset::CONTROL => {
                let enable = value & ENABLE != 0;
                let was = std::mem::replace(&mut self.enabled, enable);
                if enable && !was {
                    self.ring_error = false;
                    self.doorbell = true;
                }
                if enable { Effect::Kick } else { Effect::Quiesce }
            }
            offset::RING_SIZE => {
                self.ring_size = value;
                Effect::None
            }
            offset::REINIT if value == 1 => {
                self.reinits += 1;
                Effect::Reinit
            }
            _ => Effect::None,
        }
    }

    /// Whether `vector` is to be raised now: the driver has something to handle and was not told since it last
    /// acknowledged. If so the raise is counted; the caller sends it.
    pub(crate) fn take_raise(&mut self, vector: usize) -> bool {
        let raise = self.blocks[vector] > self.ack[vector] && !self.outstanding[vector];
        if raise {
            self.outstanding[vector] = true;
            self.raises[vector] += 1;
        }
        raise
    }

    /// The registers as they are in the stream.
    pub(crate) fn encode(&self, integrity: u64) -> [u8; ENCODED] {
        let bits = [
            self.enabled,
            self.ring_error,
            self.doorbell,
            self.outstanding[0],
            self.outstanding[1],
            self.unsent[0],
            self.unsent[1],
        ];
        let flags = bits.iter().enumerate().fold(0, |flags, (n, bit)| flags | u32::from(*bit) << n);
        let words = [
            self.ring_base,
            self.tail_addr,
            self.done_addr,
            self.ack[0],
            self.ack[1],
            self.blocks[0],
            self.blocks[1],
            self.head,
            self.tail,
            self.raises[0],
            self.raises[1],
            self.reinits,
            integrity,
            0,
            0,
            0,
        ];
        let mut bytes = [0; ENCODED];
        bytes[..4].copy_from_slice(&flags.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.ring_size.to_le_bytes());
        for (to, word) in bytes[8..].chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The inverse of [`encode`](Self::encode): the registers, and the integrity count.
    pub(crate) fn decode(bytes: &[u8]) -> Result<(Self, u64), SimError> {
        if bytes.len() != ENCODED {
            return Err(invalid("the registers have another length"));
        }
        let (head, rest) = bytes.split_at(8);
        let mut halves =
            head.chunks_exact(4).map(|half| half.iter().rev().fold(0, |n, byte| n << 8 | u32::from(*byte)));
        let mut words =
            rest.chunks_exact(8).map(|word| word.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte)));
        let mut half = || halves.next().unwrap_or(0);
        let mut word = || words.next().unwrap_or(0);
        let flags = half();
        let bit = |n: u32| flags >> n & 1 == 1;
        let ring_size = half();
        if flags >> 7 != 0 {
            return Err(invalid("the registers have unknown flags"));
        }
        let registers = Self {
            enabled: bit(0),
            ring_error: bit(1),
            doorbell: bit(2),
            outstanding: [bit(3), bit(4)],
            unsent: [bit(5), bit(6)],
            ring_size,
            ring_base: word(),
            tail_addr: word(),
            done_addr: word(),
            ack: [word(), word()],
            blocks: [word(), word()],
            head: word(),
            tail: word(),
            raises: [word(), word()],
            reinits: word(),
        };
        let integrity = word();
        if registers.head != registers.blocks[0].wrapping_add(registers.blocks[1]) {
            return Err(invalid("the registers contradict each other: HEAD is not BLOCKS0 + BLOCKS1"));
        }
        Ok((registers, integrity))
    }

    fn word(&self, at: u64, facts: Facts) -> u64 {
        let two = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        match at {
            offset::MAGIC => two(MAGIC, u32::from(facts.version.0) << 16 | u32::from(facts.version.1)),
            offset::CONTROL => {
                let control = if self.enabled { ENABLE } else { 0 };
                let ring = if self.ring_error { RING_ERROR } else { 0 };
                let integrity = if facts.integrity > 0 { INTEGRITY_ERROR } else { 0 };
                two(control, control | ring | integrity)
            }
            offset::RING_BASE => self.ring_base,
            offset::RING_SIZE => u64::from(self.ring_size),
            offset::TAIL_ADDR => self.tail_addr,
            offset::DONE_ADDR => self.done_addr,
            offset::ACK0 => self.ack[0],
            offset::ACK1 => self.ack[1],
            offset::STATE_SIZE => facts.state_size,
            offset::BLOCKS0 => self.blocks[0],
            offset::BLOCKS1 => self.blocks[1],
            offset::HEAD => self.head,
            _ => 0,
        }
    }

    /// The writable u64 register at `at`.
    fn wide(&mut self, at: u64) -> Option<&mut u64> {
        match at {
            offset::RING_BASE => Some(&mut self.ring_base),
            offset::TAIL_ADDR => Some(&mut self.tail_addr),
            offset::DONE_ADDR => Some(&mut self.done_addr),
            offset::ACK0 => Some(&mut self.ack[0]),
            offset::ACK1 => Some(&mut self.ack[1]),
            _ => None,
        }
    }

    fn written(&mut self, at: u64) -> Effect {
        let vector = match at {
            offset::ACK0 => 0,
            offset::ACK1 => 1,
            _ => return Effect::None,
        };
        self.outstanding[vector] = false;
        Effect::Raise(vector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: Facts = Facts { version: (1, 2), state_size: 0x1_0000_2000, integrity: 1 };

    fn read32(registers: &Registers, at: u64) -> u32 {
        let mut bytes = [0; 4];
        registers.read(at, &mut bytes, FACTS);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn registers_read_in_both_widths() {
        let mut registers = Registers::default();
        assert_eq!(read32(&registers, offset::MAGIC), MAGIC);
        assert_eq!(read32(&registers, offset::VERSION), 0x0001_0002);
        assert_eq!(read32(&registers, offset::STATE_SIZE), 0x2000);
        assert_eq!(read32(&registers, offset::STATE_SIZE + 4), 1);
        assert_eq!(read32(&registers, offset::STATUS), INTEGRITY_ERROR);
        registers.write(offset::RING_BASE, &0x1234_5678_9abc_def0_u64.to_le_bytes());
        registers.write(offset::RING_BASE + 4, &7u32.to_le_bytes());
        assert_eq!(registers.ring_base, 0x7_9abc_def0);
        registers.write(offset::RING_SIZE, &64u64.to_le_bytes());
        assert_eq!(registers.ring_size, 64);
        assert_eq!(registers.write(offset::CONTROL, &1u64.to_le_bytes()), Effect::Kick);
        assert!(registers.enabled);
        assert_eq!(registers.write(offset::MAGIC, &1u32.to_le_bytes()), Effect::None);
        assert_eq!(registers.write(offset::ACK1 + 1, &1u32.to_le_bytes()), Effect::None);
        let mut odd = [0xff; 2];
        registers.read(0, &mut odd, FACTS);
        assert_eq!(odd, [0; 2]);
    }

    #[test]
    fn a_vector_is_raised_again_only_after_an_acknowledgement() {
        let mut registers = Registers { blocks: [1, 0], ..Registers::default() };
        assert!(registers.take_raise(0));
        registers.blocks[0] = 5;
        assert!(!registers.take_raise(0), "the last raise is not acknowledged");
        assert_eq!(registers.write(offset::ACK0, &1u64.to_le_bytes()), Effect::Raise(0));
        assert!(registers.take_raise(0), "more was done than acknowledged");
        registers.write(offset::ACK0, &5u64.to_le_bytes());
        assert!(!registers.take_raise(0), "everything is acknowledged");
        assert!(!registers.take_raise(1));
    }

    #[test]
    fn the_encoding_keeps_everything() {
        let registers = Registers {
            enabled: true,
            ring_error: true,
            ring_base: 1,
            ring_size: 2,
            tail_addr: 3,
            done_addr: 4,
            ack: [5, 6],
            blocks: [7, 8],
            head: 15,
            tail: 16,
            doorbell: true,
            outstanding: [false, true],
            raises: [9, 10],
            unsent: [true, false],
            reinits: 11,
        };
        assert_eq!(Registers::decode(&registers.encode(12)), Ok((registers.clone(), 12)));
        assert!(Registers::decode(&registers.encode(12)[1..]).is_err());
        let liar = Registers { head: 14, ..registers };
        assert!(Registers::decode(&liar.encode(0)).is_err());
    }
}
