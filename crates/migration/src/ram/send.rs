//! The way of RAM into the stream: dirty pages by runs, zero pages as such, and no hole touched.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use vfio_migration_memory::{GuestRam, Holes};
use vfio_migration_types::{Bitmap, Failure, PAGE_SIZE, Phase, RamOffset, Range, Run, Side, error_chain};
use vfio_migration_wire::{Bulk, limits};

use crate::channel::limiter::{Limiter, SendContext};
use crate::session::fail::InPhase;
use crate::session::work_error::WorkError;

/// RAM sent and left, in bytes, for whoever looks from outside.
#[derive(Debug, Default)]
pub(crate) struct RamCounters {
    pub(crate) bytes: AtomicU64,
    pub(crate) left: AtomicU64,
}

/// Sends pages: one pass over what is dirty.
pub(crate) struct PageSender<'a> {
    pub(crate) ram: &'a GuestRam,
    pub(crate) context: SendContext<'a>,
    pub(crate) counters: &'a RamCounters,
    /// The bandwidth cap, while the guest runs.
    pub(crate) cap: Option<&'a Limiter>,
    /// Send from a copy, and checksum that.
    pub(crate) checksum: bool,
    pub(crate) copy: RefCell<Vec<u8>>,
    pub(crate) phase: Phase,
}

impl PageSender<'_> {
    /// Sends the dirty pages, ascending: zero pages as such, and never touching a hole. Returns their number.
    pub(crate) fn send(&self, pages: &Bitmap, holes: Holes) -> Result<u64, WorkError> {
        let mut zero = Run { first: 0, count: 0 };
        let mut sent = 0;
        for run in pages.runs() {
            let mut at = run.first;
            let end = run.first + run.count;
            while at < end {
                self.context.interrupt.check()?;
                // A window at a time, so that what was looked at is still in the cache when it is sent.
                let window = (end - at).min(u64::from(limits::PAGES));
                let Ok(range) = Range::new(RamOffset(at * PAGE_SIZE), window * PAGE_SIZE) else { break };
                let scan =
                    self.ram.scan(range, holes).map_err(|error| error.in_phase(Side::Source, self.phase))?;
                for piece in scan {
                    let first = piece.range.start().0 / PAGE_SIZE;
                    let count = piece.range.len() / PAGE_SIZE;
                    sent += count;
                    if !piece.zero {
                        self.data(first, count)?;
                    } else if zero.first + zero.count == first {
                        zero.count += count;
                    } else {
                        self.zeros(zero)?;
                        zero = Run { first, count };
                    }
                }
                at += window;
                self.counters.left.fetch_sub(
                    (window * PAGE_SIZE).min(self.counters.left.load(Ordering::Relaxed)),
                    Ordering::Relaxed,
                );
            }
        }
        self.zeros(zero)?;
        Ok(sent)
    }

    fn data(&self, mut first: u64, count: u64) -> Result<(), WorkError> {
        let end = first + count;
        while first < end {
            let most = u64::from(limits::PAGES) * PAGE_SIZE;
            let most = self.cap.map_or(most, |cap| cap.frame_size(most)) / PAGE_SIZE;
            let count = u32::try_from((end - first).min(most)).unwrap_or(limits::PAGES);
            let bytes = u64::from(count) * PAGE_SIZE;
            if let Some(cap) = self.cap {
                cap.take(bytes, self.context.interrupt)?;
            }
            self.context.interrupt.check()?;
            let sent = if self.checksum {
                let mut copy = self.copy.borrow_mut();
                copy.resize(usize::try_from(bytes).unwrap_or(0), 0);
                self.ram
                    .read(RamOffset(first * PAGE_SIZE), &mut copy)
                    .map_err(|error| error.in_phase(Side::Source, self.phase))?;
                self.context.link.send_page_copy(first, &copy)
            } else {
                let run = Range::new(RamOffset(first * PAGE_SIZE), bytes)
                    .map_err(|error| Failure::new(Side::Source, self.phase, error_chain(&error)))?;
                let body =
                    self.ram.pieces(&[run]).map_err(|error| error.in_phase(Side::Source, self.phase))?;
                self.context.link.send_pages(first, count, body)
            };
            sent.map_err(|error| WorkError::sending(error, Side::Source, self.phase))?;
            self.counters.bytes.fetch_add(bytes, Ordering::Relaxed);
            first += u64::from(count);
        }
        Ok(())
    }

    fn zeros(&self, run: Run) -> Result<(), WorkError> {
        if run.count > 0 {
            let bulk = Bulk::ZeroPages { first: run.first, count: run.count };
            self.context
                .link
                .send_bulk(&bulk)
                .map_err(|error| WorkError::sending(error, Side::Source, self.phase))?;
        }
        Ok(())
    }
}
