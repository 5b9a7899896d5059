//! The bulk internal state: pages that the device keeps changing, and that say themselves whether they are whole.
//!
//! Page `i` holds `{i, generation, sum, payload…}`: the payload follows from the first two, and the sum covers all
//! words but itself. So a page that was damaged on its way, or landed in another's place, is found by looking at it
//! alone. A *stale* page is whole; it is found by the sum over all generations, which travels at the stream's end.

use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE};

/// A page, in bytes.
pub(crate) const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE);

/// The pages, what is wrong with them, and which of them a saving session has still to send.
#[derive(Debug)]
pub(crate) struct BulkState {
    bytes: Vec<u8>,
    /// Sum over all pages of `mix(i, generation)`.
    generations: u64,
    /// Pages found damaged and not rewritten since, so that each is counted once.
    damaged: Bitmap,
    /// Number of pages ever found damaged.
    pub(crate) integrity: u64,
    /// Pages changed since the open saving session sent them. `None` without a session.
    pub(crate) tracking: Option<Bitmap>,
    /// The device was told to declare its initial pre-copy data anew; the session has yet to notice.
    pub(crate) reinit: bool,
    /// The device stands still: nothing here may change.
    pub(crate) frozen: bool,
    /// The next page of the sweep over everything that follows a migration.
    pub(crate) sweep: Option<u64>,
    check_cursor: u64,
    random: u64,
}

impl BulkState {
    /// Fresh state of `size` bytes, a multiple of the page size.
    pub(crate) fn new(size: u64) -> Self {
        let len = usize::try_from(size).unwrap_or(usize::MAX);
        let bitmap = Bitmap::new(size, Granule::PAGE);
        let mut bulk = Self {
            bytes: vec![0; len],
            generations: 0,
            damaged: bitmap,
            integrity: 0,
            tracking: None,
            reinit: false,
            frozen: false,
            sweep: None,
            check_cursor: 0,
            random: 0x5eed_5eed_5eed_5eed,
        };
        bulk.renew();
        bulk
    }

    /// Back to fresh, healthy state.
    pub(crate) fn renew(&mut self) {
        self.generations = 0;
        for (i, page) in (0u64..).zip(self.bytes.chunks_exact_mut(PAGE)) {
            fill(page, i, 1);
            self.generations = self.generations.wrapping_add(mix(i, 1));
        }
        self.damaged.clear_all();
        self.integrity = 0;
        self.sweep = None;
    }

    pub(crate) fn pages(&self) -> u64 {
        self.damaged.len()
    }

    /// Sum over the generations of all pages, as the stream's end carries it.
    pub(crate) fn generations(&self) -> u64 {
        self.generations
    }

    /// The bytes of `count` pages from `first`, as far as there are any.
    pub(crate) fn run(&self, first: u64, count: u64) -> &[u8] {
        let (start, end) = (first.min(self.pages()), first.saturating_add(count).min(self.pages()));
        self.bytes.get(index(start) * PAGE..index(end) * PAGE).unwrap_or_default()
    }

    /// Changes `count` pages, picked at random. A page is looked at before it is overwritten, so that no damage is
    /// painted over.
    pub(crate) fn churn(&mut self, count: u64) {
        if self.frozen || self.pages() == 0 {
            return;
        }
        for _ in 0..count {
            // xorshift64: any spread will do.
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            let i = self.random % self.pages();
            self.check(i);
            let page = page_mut(&mut self.bytes, i);
            let old = word(page, 1);
            let new = old.wrapping_add(1);
            fill(page, i, new);
            self.generations = self.generations.wrapping_sub(mix(i, old)).wrapping_add(mix(i, new));
            self.damaged.clear(i);
            if let Some(tracking) = &mut self.tracking {
                tracking.set(i);
            }
        }
    }

    /// Looks at the next `count` pages, round and round.
    pub(crate) fn check_some(&mut self, count: u64) {
        for _ in 0..count.min(self.pages()) {
            self.check(self.check_cursor);
            self.check_cursor = (self.check_cursor + 1) % self.pages();
        }
    }

    /// Goes on with the sweep for `count` pages. Returns whether there is more of it.
    pub(crate) fn sweep_some(&mut self, count: u64) -> bool {
        let Some(first) = self.sweep else { return false };
        let end = first.saturating_add(count).min(self.pages());
        for i in first..end {
            self.check(i);
        }
        self.sweep = (end < self.pages()).then_some(end);
        self.sweep.is_some()
    }

    /// Puts pages from a stream in place, whatever is in them: `false`, and nothing is done, when they do not fit.
    pub(crate) fn load(&mut self, first: u64, pages: &[u8]) -> bool {
        let count = pages.len() / PAGE;
        let end = first.checked_add(count as u64);
        if !pages.len().is_multiple_of(PAGE) || end.is_none_or(|end| end > self.pages()) {
            return false;
        }
        for (i, new) in (first..).zip(pages.chunks_exact(PAGE)) {
            let page = page_mut(&mut self.bytes, i);
            self.generations =
                self.generations.wrapping_sub(mix(i, word(page, 1))).wrapping_add(mix(i, word(new, 1)));
            page.copy_from_slice(new);
            self.damaged.clear(i);
        }
        true
    }

    /// A digest of all bytes.
    pub(crate) fn digest(&self) -> [u8; 32] {
        *blake3::hash(&self.bytes).as_bytes()
    }

    fn check(&mut self, i: u64) {
        let page = self.run(i, 1);
        let whole = page.len() == PAGE && word(page, 0) == i && word(page, 2) == sum(page);
        if !whole && !self.damaged.test(i) {
            self.damaged.set(i);
            self.integrity += 1;
            tracing::warn!(page = i, "damage found in the internal state");
        }
    }
}

/// Writes page `i` of `generation`.
fn fill(page: &mut [u8], i: u64, generation: u64) {
    let seed = mix(i, generation);
    let mut total = i.wrapping_add(generation);
    for (k, to) in (3u64..).zip(page[24..].chunks_exact_mut(8)) {
        let word = seed.wrapping_add(k.wrapping_mul(GOLDEN));
        total = total.wrapping_add(word);
        to.copy_from_slice(&word.to_le_bytes());
    }
    for (to, word) in page[..24].chunks_exact_mut(8).zip([i, generation, total]) {
        to.copy_from_slice(&word.to_le_bytes());
    }
}

/// The sum of all words of a page but its third.
fn sum(page: &[u8]) -> u64 {
    let all = page.chunks_exact(8).fold(0u64, |sum, bytes| sum.wrapping_add(from_le(bytes)));
    all.wrapping_sub(word(page, 2))
}

fn word(page: &[u8], n: usize) -> u64 {
    page.get(n * 8..n * 8 + 8).map_or(0, from_le)
}

fn from_le(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Two words to one, well spread (the finaliser of splitmix64).
fn mix(i: u64, generation: u64) -> u64 {
    let mut z = i.wrapping_mul(GOLDEN) ^ generation.rotate_left(32).wrapping_add(GOLDEN);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// A page that the caller knows to exist.
fn page_mut(bytes: &mut [u8], i: u64) -> &mut [u8] {
    let at = index(i) * PAGE;
    &mut bytes[at..at + PAGE]
}

/// A page number of memory that exists.
#[expect(clippy::cast_possible_truncation, reason = "64-bit hosts only; the page exists in memory")]
fn index(n: u64) -> usize {
    n as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_and_changed_pages_are_whole() {
        let mut bulk = BulkState::new(64 * PAGE_SIZE);
        bulk.tracking = Some(Bitmap::new(64 * PAGE_SIZE, Granule::PAGE));
        let before = bulk.digest();
        bulk.churn(20);
        assert_ne!(bulk.digest(), before);
        let changed = bulk.tracking.as_ref().map_or(0, Bitmap::count);
        assert!((1..=20).contains(&changed));
        bulk.check_some(1000);
        assert_eq!(bulk.integrity, 0);
        bulk.frozen = true;
        let before = bulk.digest();
        bulk.churn(20);
        assert_eq!(bulk.digest(), before, "frozen");
    }

    #[test]
    fn each_damaged_page_is_counted_once_and_never_painted_over() {
        let mut bulk = BulkState::new(4 * PAGE_SIZE);
        bulk.bytes[2 * PAGE + 999] ^= 1;
        bulk.check_some(8);
        assert_eq!(bulk.integrity, 1);
        bulk.bytes[PAGE] ^= 1;
        bulk.churn(64);
        assert_eq!(bulk.integrity, 2, "churn looked before it wrote");
        bulk.sweep = Some(0);
        assert!(bulk.sweep_some(3));
        assert!(!bulk.sweep_some(3));
        assert_eq!(bulk.integrity, 2, "both were rewritten whole");
        let other = BulkState::new(4 * PAGE_SIZE);
        assert!(bulk.load(0, other.run(1, 1)), "a page in another's place");
        bulk.check_some(4);
        assert_eq!(bulk.integrity, 3);
    }

    #[test]
    fn loading_keeps_the_sum_of_generations_and_bounds() {
        let mut source = BulkState::new(8 * PAGE_SIZE);
        source.churn(50);
        let mut copy = BulkState::new(8 * PAGE_SIZE);
        assert_ne!(copy.generations(), source.generations());
        assert!(copy.load(0, source.run(0, 8)));
        assert_eq!(copy.generations(), source.generations());
        assert_eq!(copy.digest(), source.digest());
        assert!(!copy.load(8, source.run(0, 1)));
        assert!(!copy.load(u64::MAX, source.run(0, 1)));
        assert!(!copy.load(0, &[0; 100]));
        let mut none = BulkState::new(0);
        none.churn(3);
        none.check_some(3);
        assert_eq!((none.pages(), none.generations()), (0, 0));
    }
}
