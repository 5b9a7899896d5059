//! Pages that are put back to what they held before, after the last copy of them has come.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use vfio_migration_memory::GuestRam;
use vfio_migration_types::{PAGE_SIZE, RamOffset};

use crate::session::lock::lock;

/// Most old copies kept: 64 MiB.
const MOST_COPIES: usize = 16_384;
/// Most pages put back: enough to be found, few enough for the guest to live.
const MOST_VICTIMS: usize = 64;
/// Pages looked at each time something else arrives.
const AT_ONCE: u64 = 1024;

/// Old copies of the pages of a stretch of RAM, taken as they arrive.
pub(super) struct StalePages {
    ram: Arc<GuestRam>,
    /// The stretch of RAM, as page numbers.
    stretch: Range<u64>,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// The content of each page when it was first seen with anything in it.
    copies: BTreeMap<u64, Vec<u8>>,
    /// The page to be looked at next.
    next: u64,
}

impl StalePages {
    pub(super) fn new(ram: Arc<GuestRam>, stretch: Range<RamOffset>) -> Self {
        let end = (stretch.end.0 / PAGE_SIZE).min(ram.size() / PAGE_SIZE);
        Self { ram, stretch: stretch.start.0 / PAGE_SIZE..end, seen: Mutex::default() }
    }

    /// Keeps what pages hold now that have not been seen before: copies that will be old one day.
    pub(super) fn remember(&self) {
        let mut seen = lock(&self.seen);
        for _ in 0..AT_ONCE {
            if seen.copies.len() >= MOST_COPIES || self.stretch.is_empty() {
                return;
            }
            let page = seen.next.clamp(self.stretch.start, self.stretch.end - 1);
            seen.next = if page + 1 < self.stretch.end { page + 1 } else { self.stretch.start };
            if !seen.copies.contains_key(&page)
                && let Some(copy) = self.held(page)
            {
                seen.copies.insert(page, copy);
            }
        }
    }

    /// Puts old copies in the place of pages that have changed since; where no copy is old enough, the zeros that every page
    /// held before its first.
    pub(super) fn put_back(&self) {
        let seen = lock(&self.seen);
        let old = |page: &u64| {
            let now = self.held(*page)?;
            seen.copies.get(page).filter(|copy| **copy != now).map(|copy| (*page, copy.clone()))
        };
        let mut victims: Vec<_> =
            self.stretch.clone().filter_map(|page| old(&page)).take(MOST_VICTIMS).collect();
        if victims.is_empty() {
            let zeros = vec![0; usize::try_from(PAGE_SIZE).unwrap_or(0)];
            let held = self.stretch.clone().filter(|page| self.held(*page).is_some());
            victims = held.take(MOST_VICTIMS).map(|page| (page, zeros.clone())).collect();
        }
        for (page, old) in victims {
            if let Err(error) = self.ram.write(RamOffset(page * PAGE_SIZE), &old) {
                tracing::warn!(%error, "a page could not be made stale");
            }
        }
    }

    /// The content of a page; `None` where that is all zero.
    fn held(&self, page: u64) -> Option<Vec<u8>> {
        if self.ram.is_zero(page) {
            return None;
        }
        let mut copy = vec![0; usize::try_from(PAGE_SIZE).unwrap_or(0)];
        self.ram.read(RamOffset(page * PAGE_SIZE), &mut copy).ok()?;
        Some(copy)
    }
}

impl fmt::Debug for StalePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StalePages").field("stretch", &self.stretch).finish_non_exhaustive()
    }
}
