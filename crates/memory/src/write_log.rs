//! The VMM's own writes to guest RAM, as a dirty source.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Mutex, PoisonError};

use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE, RamOffset, Range};

use crate::dirty::{Coverage, DirtySource};
use crate::error::MemoryError;

/// A log of writes that neither the hypervisor nor a device logs: DMA_WRITE served for a device, message-only
/// regions, emulated devices.
///
/// Lock-free for those who mark. **Mark after the write**, never before: a report between a mark and its write would
/// take the mark away, and the page would be sent as it was.
pub struct WriteLog {
    name: String,
    pages: u64,
    words: Vec<AtomicU64>,
    running: AtomicBool,
    /// Start and stop one at a time.
    control: Mutex<()>,
}

impl WriteLog {
    /// A log called `name`, not yet started, for `bytes` bytes of RAM: one bit of memory per 4 KiB.
    pub fn new(name: impl Into<String>, bytes: u64) -> Self {
        let pages = bytes.div_ceil(PAGE_SIZE);
        let words = (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { name: name.into(), pages, words, running: AtomicBool::new(false), control: Mutex::new(()) }
    }

    /// Marks the `len` bytes at `offset` as written. To be called after the write, from any thread; costs a fence while
    /// the log does not run. What lies past the end of RAM is ignored.
    pub fn mark(&self, offset: RamOffset, len: u64) {
        // Without it, this thread's write to RAM could become visible after its look at `running`, and a migration
        // that starts in between would neither find the mark nor copy the write. Pairs with the fence in `start`.
        fence(Ordering::SeqCst);
        if len == 0 || !self.running.load(Ordering::Relaxed) {
            return;
        }
        let last = (offset.0.saturating_add(len - 1) / PAGE_SIZE).min(self.pages.saturating_sub(1));
        let mut page = offset.0 / PAGE_SIZE;
        while page <= last && page < self.pages {
            let bit = page % 64;
            let count = (64 - bit).min(last - page + 1);
            let mask = (u64::MAX >> (64 - count)) << bit;
            if let Some(word) = self.word(page) {
                word.fetch_or(mask, Ordering::AcqRel);
            }
            page += count;
        }
    }

    fn word(&self, page: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(page / 64).ok()?)
    }
}

impl DirtySource for WriteLog {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn coverage(&self) -> Coverage {
        let bytes = self.pages.saturating_mul(PAGE_SIZE);
        let seen = Range::new(RamOffset(0), bytes).into_iter().collect();
        Coverage::Regions { seen, why: format!("it was made for {bytes:#x} bytes of RAM") }
    }

    fn start(&self) -> Result<(), MemoryError> {
        let _one = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        if self.running.load(Ordering::Relaxed) {
            return Err(MemoryError::AlreadyLogging { source_name: self.name() });
        }
        self.words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        self.running.store(true, Ordering::SeqCst);
        // Whoever looked at `running` too early to see this wrote before it: the first pass over memory, which
        // comes after it, sees that write.
        fence(Ordering::SeqCst);
        Ok(())
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        if !self.running.load(Ordering::Relaxed) {
            return Err(MemoryError::NotLogging { source_name: self.name() });
        }
        for (start, word) in (0u64..).step_by(64).zip(&self.words) {
            if word.load(Ordering::Relaxed) != 0 {
                let dirty = word.swap(0, Ordering::AcqRel);
                into.or_scaled(start * PAGE_SIZE, &[dirty], Granule::PAGE);
            }
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), MemoryError> {
        let _one = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }
}

impl fmt::Debug for WriteLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteLog")
            .field("name", &self.name)
            .field("pages", &self.pages)
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}
