//! DMA windows of a device, and the guest RAM of them that changed hands while a log runs.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vfio_migration_types::{Iova, RamOffset, Range};

/// One DMA mapping: a range of addresses, and the memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DmaWindow {
    pub(super) iova: Range<Iova>,
    /// The device may write.
    pub(super) write: bool,
    /// Its begin in guest RAM; `None` for something else, a BAR.
    pub(super) ram: Option<RamOffset>,
}

/// The DMA mappings of a device.
#[derive(Debug, Default)]
pub(super) struct DmaWindows {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    windows: Vec<DmaWindow>,
    /// Guest RAM that was mapped or unmapped, and the change at which it last was: no log that started before is sure to hold
    /// its writes. Several devices' logs may look at it.
    moved: Vec<(u64, RamOffset, u64)>,
    changes: u64,
}

impl DmaWindows {
    pub(super) fn add(&self, window: DmaWindow) {
        let mut state = self.lock();
        state.note(window);
        state.windows.push(window);
    }

    pub(super) fn remove(&self, iova: Range<Iova>) -> Option<DmaWindow> {
        let mut state = self.lock();
        let at = state.windows.iter().position(|window| window.iova == iova)?;
        let window = state.windows.swap_remove(at);
        state.note(window);
        Some(window)
    }

    /// A mapping of guest RAM that shares addresses with `iova`.
    pub(super) fn overlapping(&self, iova: Range<Iova>) -> Option<DmaWindow> {
        self.lock().windows.iter().find(|window| window.iova.overlaps(&iova)).copied()
    }

    pub(super) fn contains(&self, iova: Range<Iova>) -> bool {
        self.lock().windows.iter().any(|window| window.iova == iova)
    }

    /// Guest RAM that the device may write now, for a log that is about to start, and the number of the last change.
    pub(super) fn begin(&self) -> (Vec<(Range<Iova>, RamOffset)>, u64) {
        let state = self.lock();
        (state.ram().collect(), state.changes)
    }

    /// Guest RAM that the device may write now.
    pub(super) fn ram(&self) -> Vec<(Range<Iova>, RamOffset)> {
        self.lock().ram().collect()
    }

    /// Whether any guest RAM is mapped, for reading alone too.
    pub(super) fn knows_ram(&self) -> bool {
        self.lock().windows.iter().any(|window| window.ram.is_some())
    }

    /// Guest RAM that changed hands since change `since`, with its length in bytes.
    pub(super) fn moved(&self, since: u64) -> Vec<(RamOffset, u64)> {
        let state = self.lock();
        let later = state.moved.iter().filter(|(change, ..)| *change > since);
        later.map(|(_, ram, bytes)| (*ram, *bytes)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn ram(&self) -> impl Iterator<Item = (Range<Iova>, RamOffset)> + '_ {
        let windows = self.windows.iter().filter(|window| window.write);
        windows.filter_map(|window| Some((window.iova, window.ram?)))
    }

    fn note(&mut self, window: DmaWindow) {
        if let Some(ram) = window.ram.filter(|_| window.write) {
            let bytes = window.iova.len();
            self.moved.retain(|(_, at, len)| (*at, *len) != (ram, bytes));
            self.changes += 1;
            self.moved.push((self.changes, ram, bytes));
        }
    }
}
