//! What a block must look like: written from the device's contract, not from its code.

/// A block that the driver asked for, as it must come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) number: u64,
    pub(crate) cookie: u64,
    pub(crate) len: u32,
    pub(crate) flags: u32,
    pub(crate) sum: u64,
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

impl Expected {
    pub(crate) fn check(&self, block: &[u8]) -> Result<u64, Flaw> {
        check_block(block, self.number, self.cookie, self.flags, self.sum)
    }
}

/// Checks a block in memory against what was asked for. Returns the device's count of damaged state pages.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn check_block(block: &[u8], number: u64, cookie: u64, flags: u32, source_sum: u64) -> Result<u64, Flaw> {
    let words: Vec<u64> =
        block.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes)).collect();
    let [magic, got, its_cookie, about, sum, integrity, _reinits, total] =
        words.get(..8).ok_or(Flaw::NoBlock)?
    else {
        return Err(Flaw::NoBlock);
    };
    if *magic != 0x4b43_4f4c_4253_4d56 {
        return Err(Flaw::NoBlock);
    }
    if *got != number {
        return Err(Flaw::Number(*got));
    }
    let others = words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word)).wrapping_sub(*total);
    if others != *total {
        return Err(Flaw::Sum);
    }
    if *its_cookie != cookie || *about != block.len() as u64 | u64::from(flags) << 32 {
        return Err(Flaw::About);
    }
    if *sum != source_sum {
        return Err(Flaw::Source);
    }
    for (i, word) in words.iter().enumerate().skip(8) {
        let place = (i as u64) << 32 | i as u64;
        if *word != number.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ place {
            return Err(Flaw::Payload(i));
        }
    }
    Ok(*integrity)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Vec<u64> {
        let mut words = vec![0x4b43_4f4c_4253_4d56, 3, 77, 128 | 1 << 32, 1000, 0, 2, 0];
        words.extend((8u64..16).map(|i| 3u64.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (i << 32 | i)));
        words[7] = words.iter().fold(0u64, |sum, word| sum.wrapping_add(*word));
        words
    }

    fn check(words: &[u64]) -> Result<u64, Flaw> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        check_block(&bytes, 3, 77, 1, 1000)
    }

    /// Alters a word and puts the sum right again.
    fn altered(at: usize, by: u64) -> Vec<u64> {
        let mut words = good();
        words[at] = words[at].wrapping_add(by);
        words[7] = words[7].wrapping_add(by);
        words
    }

    #[test]
    fn every_kind_of_flaw_is_told() {
        assert_eq!(check(&good()), Ok(0));
        assert_eq!(check(&altered(5, 4)), Ok(4));
        assert_eq!(check(&altered(0, 1)), Err(Flaw::NoBlock));
        assert_eq!(check(&altered(1, 1)), Err(Flaw::Number(4)));
        assert_eq!(check(&altered(2, 1)), Err(Flaw::About));
        assert_eq!(check(&altered(3, 64)), Err(Flaw::About));
        assert_eq!(check(&altered(4, 1)), Err(Flaw::Source));
        assert_eq!(check(&altered(12, 1)), Err(Flaw::Payload(12)));
        assert_eq!(check(&good()[..7]), Err(Flaw::NoBlock));
        let mut words = good();
        words[9] ^= 1;
        assert_eq!(check(&words), Err(Flaw::Sum));
    }
}
