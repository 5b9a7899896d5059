//! What a block must look like.

const MAGIC: u64 = 0x4b43_4f4c_4253_4d56;
/// Words before the payload: magic, number, cookie, length and flags, sum of the source, damage, times that initial data was
/// declared anew, sum of all others.
const HEAD: usize = 8;
const DAMAGE: usize = 5;
const REINITS: usize = 6;
const TOTAL: usize = 7;

/// A block that was asked for, as the device must write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpectedBlock {
    /// Its number in its flow, from 1.
    pub number: u64,
    /// Of its [`Descriptor`](crate::Descriptor).
    pub cookie: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Of its descriptor.
    pub flags: u32,
    /// Sum of the source's words, little endian, wrapping.
    pub source_sum: u64,
}

/// A flaw of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flaw {
    /// No block at all, or a piece of one.
    NoBlock,
    /// Another block: its number.
    Number(u64),
    /// The words do not add up.
    Sum,
    /// Not the cookie, length or flags that were asked for.
    About,
    /// The device summed other source bytes.
    Source,
    /// The payload is not its number's: the word.
    Payload(usize),
}

impl ExpectedBlock {
    /// Compares what is in memory with it. Returns how many pages of its own state the device says are damaged.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn check(&self, block: &[u8]) -> Result<u64, Flaw> {
        let mut head = [0; HEAD];
        let mut sum = 0u64;
        let mut payload = None;
        for (i, word) in words(block).enumerate() {
            match head.get_mut(i) {
                Some(place) => *place = word,
                None if word != self.payload(i) => payload = payload.or(Some(i)),
                None => {}
            }
            sum = sum.wrapping_add(word);
        }
        let [magic, number, cookie, about, source_sum, damage, _reinits, total] = head;
        if block.len() < 8 * HEAD || magic != MAGIC {
            return Err(Flaw::NoBlock);
        }
        if number != self.number {
            return Err(Flaw::Number(number));
        }
        if sum.wrapping_sub(total) != total {
            return Err(Flaw::Sum);
        }
        if cookie != self.cookie || about != self.about() || block.len() != self.len as usize {
            return Err(Flaw::About);
        }
        if source_sum != self.source_sum {
            return Err(Flaw::Source);
        }
        payload.map_or(Ok(damage), |i| Err(Flaw::Payload(i)))
    }

    /// Word `i` as a device writes it that found no damage and never declared its initial data anew.
    pub fn word(&self, i: usize) -> u64 {
        match i {
            TOTAL => (0..self.len as usize / 8)
                .filter(|i| *i != TOTAL)
                .fold(0, |sum, i| sum.wrapping_add(self.word(i))),
            0 => MAGIC,
            1 => self.number,
            2 => self.cookie,
            3 => self.about(),
            4 => self.source_sum,
            DAMAGE | REINITS => 0,
            _ => self.payload(i),
        }
    }

    fn about(&self) -> u64 {
        u64::from(self.len) | u64::from(self.flags) << 32
    }

    fn payload(&self, i: usize) -> u64 {
        self.number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((i as u64) << 32 | i as u64)
    }
}

fn words(block: &[u8]) -> impl Iterator<Item = u64> {
    block.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: ExpectedBlock =
        ExpectedBlock { number: 3, cookie: 77, len: 128, flags: 1, source_sum: 1000 };

    /// By hand, and not by [`ExpectedBlock::word`].
    fn good() -> [u64; 16] {
        let mut words = [0; 16];
        words[..8].copy_from_slice(&[0x4b43_4f4c_4253_4d56, 3, 77, 128 | 1 << 32, 1000, 0, 2, 0]);
        for i in 8u64..16 {
            words[usize::try_from(i).unwrap()] = 3u64.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (i << 32 | i);
        }
        words[7] = words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
        words
    }

    fn bytes(words: [u64; 16]) -> [u8; 128] {
        let mut bytes = [0; 128];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn check(words: [u64; 16]) -> Result<u64, Flaw> {
        ASKED.check(&bytes(words))
    }

    /// Alters a word and puts the sum right again.
    fn altered(at: usize, by: u64) -> [u64; 16] {
        let mut words = good();
        words[at] = words[at].wrapping_add(by);
        words[7] = words[7].wrapping_add(by);
        words
    }

    #[test]
    fn every_kind_of_flaw_is_told() {
        assert_eq!(check(good()), Ok(0));
        assert_eq!(check(altered(5, 4)), Ok(4));
        assert_eq!(check(altered(0, 1)), Err(Flaw::NoBlock));
        assert_eq!(check(altered(1, 1)), Err(Flaw::Number(4)));
        assert_eq!(check(altered(2, 1)), Err(Flaw::About));
        assert_eq!(check(altered(3, 64)), Err(Flaw::About));
        assert_eq!(check(altered(4, 1)), Err(Flaw::Source));
        assert_eq!(check(altered(12, 1)), Err(Flaw::Payload(12)));
        assert_eq!(ASKED.check(&bytes(good())[..56]), Err(Flaw::NoBlock));
        assert_eq!(ASKED.check(&[]), Err(Flaw::NoBlock));
        let mut words = good();
        words[9] ^= 1;
        assert_eq!(check(words), Err(Flaw::Sum));
    }

    #[test]
    fn a_block_of_another_length_is_not_the_one() {
        let shorter = ExpectedBlock { len: 64, ..ASKED };
        assert_eq!(shorter.check(&bytes(good())), Err(Flaw::About));
    }

    #[test]
    fn the_words_are_those_that_are_checked() {
        let mut words = good();
        words[6] = 0;
        words[7] -= 2;
        assert_eq!(core::array::from_fn(|i| ASKED.word(i)), words);
        assert_eq!(check(words), Ok(0));
    }
}
