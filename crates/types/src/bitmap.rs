//! The dirty bitmap: one bit per granule, packed in little-endian order into 64-bit words, as KVM, VFIO device
//! logs, iommufd and vfio-user all report it.

use std::fmt;

/// The smallest granule, and the page size of the stream: 4 KiB.
pub const PAGE_SIZE: u64 = 4096;

/// The memory behind one bit, in bytes: a power of two, at least [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Granule(u32);

/// The size cannot be a granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes cannot be a dirty bitmap's granule (want a power of two, at least 4096)")]
pub struct GranuleError(u64);

impl Granule {
    /// The page size of RAM, 4 KiB.
    pub const PAGE: Self = Self(12);

    /// The granule of `bytes` bytes.
    pub fn new(bytes: u64) -> Result<Self, GranuleError> {
        if bytes < PAGE_SIZE || !bytes.is_power_of_two() {
            return Err(GranuleError(bytes));
        }
        Ok(Self(bytes.trailing_zeros()))
    }

    /// The granule's size in bytes.
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// The number of granules that cover `bytes` bytes.
    pub fn count(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}

impl fmt::Debug for Granule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Granule({})", self.bytes())
    }
}

/// A run of set bits: granules `first .. first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Index of the first granule.
    pub first: u64,
    /// Number of granules, at least one.
    pub count: u64,
}

/// The dirty granules of a stretch of memory, one bit each.
///
/// Bits past the last granule are always zero, so counting and comparing need no masks.
#[derive(Clone, PartialEq, Eq)]
pub struct Bitmap {
    granule: Granule,
    len: u64,
    words: Vec<u64>,
}

impl Bitmap {
    /// A clean bitmap for `bytes` bytes of memory.
    ///
    /// Allocates an eighth of a bit per granule: `bytes` must be the size of memory that exists, never a number
    /// from a peer.
    pub fn new(bytes: u64, granule: Granule) -> Self {
        let len = granule.count(bytes);
        let words = vec![0; index(len.div_ceil(64))];
        Self { granule, len, words }
    }

    /// The memory behind one bit.
    pub fn granule(&self) -> Granule {
        self.granule
    }

    /// The number of granules covered, dirty or not.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the bitmap covers nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The packed words: granule `n` is bit `n % 64` of word `n / 64`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether granule `n` is dirty; `false` past the end.
    pub fn test(&self, n: u64) -> bool {
        n < self.len && self.words[index(n / 64)] >> (n % 64) & 1 == 1
    }

    /// Marks granule `n`; past the end nothing happens.
    pub fn set(&mut self, n: u64) {
        if n < self.len {
            self.words[index(n / 64)] |= 1 << (n % 64);
        }
    }

    /// Marks granule `n` clean.
    pub fn clear(&mut self, n: u64) {
        if n < self.len {
            self.words[index(n / 64)] &= !(1 << (n % 64));
        }
    }

    /// Marks `count` granules from `first`, as far as the bitmap goes.
    pub fn set_range(&mut self, first: u64, count: u64) {
        self.each_mask(first, count, |word, mask| *word |= mask);
    }

    /// Unmarks `count` granules from `first`.
    pub fn clear_range(&mut self, first: u64, count: u64) {
        self.each_mask(first, count, |word, mask| *word &= !mask);
    }

    /// Marks every granule that a byte of `start .. start + bytes` lies in.
    pub fn set_bytes(&mut self, start: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let first = start / self.granule.bytes();
        let last = start.saturating_add(bytes - 1) / self.granule.bytes();
        self.set_range(first, last - first + 1);
    }

    /// Marks all granules dirty.
    pub fn set_all(&mut self) {
        self.set_range(0, self.len);
    }

    /// Marks all granules clean.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// Number of dirty granules.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether any granule is dirty.
    pub fn any(&self) -> bool {
        self.words.iter().any(|word| *word != 0)
    }

    /// Dirty bytes, whole granules.
    pub fn dirty_bytes(&self) -> u64 {
        self.count() * self.granule.bytes()
    }

    /// ORs in packed `words` whose first bit is granule `first` of this bitmap, at this granule.
    ///
    /// What lies past the end is dropped: reports are rounded up to whole words.
    pub fn or_words(&mut self, first: u64, words: &[u64]) {
        let (skip, shift) = (first / 64, first % 64);
        for (at, word) in (skip..).zip(words) {
            self.or_word(at, word << shift);
            if shift != 0 {
                self.or_word(at + 1, word >> (64 - shift));
            }
        }
    }

    /// ORs in packed `words` of another `granule`, whose first bit is the memory at byte `start` of this bitmap's
    /// memory.
    pub fn or_scaled(&mut self, start: u64, words: &[u64], granule: Granule) {
        if granule == self.granule && start.is_multiple_of(self.granule.bytes()) {
            return self.or_words(start / self.granule.bytes(), words);
        }
        let bytes = granule.bytes();
        for (base, word) in (0u64..).step_by(64).zip(words) {
            let mut rest = *word;
            while rest != 0 {
                let bit = u64::from(rest.trailing_zeros());
                self.set_bytes(start.saturating_add((base + bit).saturating_mul(bytes)), bytes);
                rest &= rest - 1;
            }
        }
    }

    /// ORs in another bitmap of the same memory, whatever its granule.
    pub fn or(&mut self, other: &Self) {
        self.or_scaled(0, &other.words, other.granule);
    }

    /// Hands out what is dirty and leaves this bitmap clean.
    pub fn take(&mut self) -> Self {
        let clean = vec![0; self.words.len()];
        Self { granule: self.granule, len: self.len, words: std::mem::replace(&mut self.words, clean) }
    }

    /// The runs of dirty granules, ascending and maximal.
    pub fn runs(&self) -> Runs<'_> {
        Runs { bitmap: self, at: 0 }
    }

    fn or_word(&mut self, at: u64, bits: u64) {
        let tail = self.len % 64;
        let last = self.words.len().saturating_sub(1);
        let at = index(at);
        if let Some(word) = self.words.get_mut(at) {
            *word |= if at == last && tail != 0 { bits & ((1 << tail) - 1) } else { bits };
        }
    }

    fn each_mask(&mut self, first: u64, count: u64, mut apply: impl FnMut(&mut u64, u64)) {
        let end = first.saturating_add(count).min(self.len);
        let mut at = first;
        while at < end {
            let bit = at % 64;
            let here = (64 - bit).min(end - at);
            let ones = if here == 64 { u64::MAX } else { (1 << here) - 1 };
            apply(&mut self.words[index(at / 64)], ones << bit);
            at += here;
        }
    }
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bitmap({} of {} dirty, {:?})", self.count(), self.len, self.granule)
    }
}

/// Iterator over the dirty runs of a [`Bitmap`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    bitmap: &'a Bitmap,
    at: u64,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let first = self.seek(self.at, 0)?;
        let end = self.seek(first, u64::MAX).unwrap_or(self.bitmap.len);
        self.at = end;
        Some(Run { first, count: end - first })
    }
}

impl Runs<'_> {
    /// First granule at or after `from` whose bit is set in the bitmap XOR `flip`.
    fn seek(&self, from: u64, flip: u64) -> Option<u64> {
        if from >= self.bitmap.len {
            return None;
        }
        let mut mask = u64::MAX << (from % 64);
        for (at, word) in (from / 64..).zip(&self.bitmap.words[index(from / 64)..]) {
            let bits = (word ^ flip) & mask;
            if bits != 0 {
                let found = at * 64 + u64::from(bits.trailing_zeros());
                return (found < self.bitmap.len).then_some(found);
            }
            mask = u64::MAX;
        }
        None
    }
}

/// A word index: the words are in memory, so their count fits.
#[expect(
    clippy::cast_possible_truncation,
    reason = "64-bit hosts only; the words of the map exist in memory"
)]
fn index(n: u64) -> usize {
    n as usize
}
