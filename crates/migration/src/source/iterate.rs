//! P3: one pass over what is dirty, RAM and devices side by side.

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vfio_migration_engine::IterationReport;
use vfio_migration_memory::{GuestRam, Holes};
use vfio_migration_types::{Bitmap, PAGE_SIZE, Phase, RamOffset, Range, Run};
use vfio_migration_wire::{Bulk, Message, limits};

use crate::channel::limiter::Limiter;
use crate::device::send::PumpContext;
use crate::session::fail::InPhase;
use crate::session::work_error::{self, WorkError};

use crate::source::worker::{Counters, Worker};

impl Worker<'_> {
    pub(super) fn iterate(&mut self, iteration: u32) -> Result<IterationReport, WorkError> {
        let phase = Phase::Iterate;
        let begun = Instant::now();
        let wire_before = self.link.wire_bytes();
        if iteration > 1 {
            self.report_dirty(phase)?;
        }
        let pages = self.dirty.take();
        self.saboteur.remember(&self.ram, &pages);
        let holes = if iteration == 1 { Holes::Excluded } else { Holes::Possible };
        let sent = self.pump_all(&pages, holes, phase)?;
        self.ram_pages += sent;
        let end = Message::EndIteration { iteration };
        self.link.send(&end).map_err(|error| WorkError::sending(error, phase))?;
        let took = begun.elapsed();
        self.report_dirty(phase)?;
        Ok(IterationReport {
            wire_bytes: self.link.wire_bytes() - wire_before,
            took,
            ram_left: self.dirty.dirty_bytes(),
            ram_again: self.ram_again(phase)?,
            devices: self.device_progress(phase)?,
        })
    }

    /// Bytes of RAM that the final pass sends whatever is dirty.
    fn ram_again(&self, phase: Phase) -> Result<u64, WorkError> {
        if !self.writes_unlogged() {
            return Ok(0);
        }
        let extents = self.ram.data_extents().map_err(|error| error.in_phase(phase))?;
        Ok(extents.iter().map(|extent| extent.len()).sum())
    }

    /// Whether a device writes RAM that nobody logs.
    pub(super) fn writes_unlogged(&self) -> bool {
        self.options.allow_all_dirty && self.streams.iter().any(|stream| stream.device.dirty_log().is_none())
    }

    /// How long the destination may grant a device nothing. The engine's watchdog sees to it while the guest stands, but
    /// not during a final pass that ends in a digest, of which it does not know how long it may take.
    pub(super) fn patience(&self, last: bool) -> Duration {
        let work = vfio_migration_engine::work_timeout(self.options.peer_timeout);
        let stands_for_nothing = self.paused.as_ref().is_none_or(|paused| !paused.ran());
        if last && self.options.verify && !stands_for_nothing {
            work.min(self.options.downtime_limit)
        } else {
            work
        }
    }

    /// Sends `pages`, and a pass over every device, at once. Returns the pages sent.
    pub(super) fn pump_all(&mut self, pages: &Bitmap, holes: Holes, phase: Phase) -> Result<u64, WorkError> {
        let last = phase == Phase::Final;
        let context = PumpContext {
            link: &self.link,
            limiter: self.control.limiter(),
            interrupt: &self.wires.interrupt,
            patience: self.patience(last),
        };
        let sender = PageSender {
            ram: &self.ram,
            context,
            counters: self.counters,
            cap: (!last).then_some(context.limiter),
            checksum: last || self.wires.ram_crc.load(Ordering::Relaxed),
            copy: RefCell::default(),
            phase,
        };
        let mut sent = 0;
        let results = std::thread::scope(|scope| {
            let pumps: Vec<_> = self
                .streams
                .iter_mut()
                .filter(|stream| last || stream.session.is_some())
                .map(|stream| {
                    scope.spawn(
                        move || if last { stream.drain(context) } else { stream.precopy_pass(context) },
                    )
                })
                .collect();
            let ram = sender.send(pages, holes).map(|pages| sent = pages);
            let mut results = vec![ram];
            results.extend(
                pumps
                    .into_iter()
                    .map(|pump| pump.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))),
            );
            results
        });
        work_error::worst_of(results)?;
        Ok(sent)
    }
}

/// The way of RAM into the stream.
pub(super) struct PageSender<'a> {
    pub(super) ram: &'a GuestRam,
    pub(super) context: PumpContext<'a>,
    pub(super) counters: &'a Counters,
    /// The bandwidth cap, while the guest runs.
    pub(super) cap: Option<&'a Limiter>,
    /// Send from a copy, and checksum that.
    pub(super) checksum: bool,
    pub(super) copy: RefCell<Vec<u8>>,
    pub(super) phase: Phase,
}

impl PageSender<'_> {
    /// Sends the dirty pages, ascending: zero pages as such, and never touching a hole. Returns their number.
    pub(super) fn send(&self, pages: &Bitmap, holes: Holes) -> Result<u64, WorkError> {
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
                let scan = self.ram.scan(range, holes).map_err(|error| error.in_phase(self.phase))?;
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
                self.counters.ram_left.fetch_sub(
                    (window * PAGE_SIZE).min(self.counters.ram_left.load(Ordering::Relaxed)),
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
                    .map_err(|error| error.in_phase(self.phase))?;
                self.context.link.send_page_copy(first, &copy)
            } else {
                self.context.link.send_pages(self.ram, first, count)
            };
            sent.map_err(|error| WorkError::sending(error, self.phase))?;
            self.counters.ram_bytes.fetch_add(bytes, Ordering::Relaxed);
            first += u64::from(count);
        }
        Ok(())
    }

    fn zeros(&self, run: Run) -> Result<(), WorkError> {
        if run.count > 0 {
            let bulk = Bulk::ZeroPages { first: run.first, count: run.count };
            self.context.link.send_bulk(&bulk).map_err(|error| WorkError::sending(error, self.phase))?;
        }
        Ok(())
    }
}
