//! P3: one pass over what is dirty, RAM and devices side by side.

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vfio_migration_engine::IterationReport;
use vfio_migration_memory::Holes;
use vfio_migration_types::{Bitmap, Phase, Side};
use vfio_migration_wire::Message;

use crate::channel::limiter::SendContext;
use crate::ram::send::PageSender;
use crate::session::threads::task;
use crate::session::work_error::{self, WorkError};
use crate::source::worker::Worker;

impl Worker {
    pub(super) fn iterate(&mut self, iteration: u32) -> Result<IterationReport, WorkError> {
        let phase = Phase::Iterate;
        let begun = Instant::now();
        let wire_before = self.link.wire_bytes();
        if iteration > 1 {
            self.report_dirty(phase)?;
        }
        let pages = self.dirty.take();
        let holes = if iteration == 1 { Holes::Excluded } else { Holes::Possible };
        let sent = self.send_all(&pages, holes, phase)?;
        self.ram_pages += sent;
        let end = Message::EndIteration { iteration };
        self.link.send(&end).map_err(|error| WorkError::sending(error, Side::Source, phase))?;
        let took = begun.elapsed();
        self.report_dirty(phase)?;
        Ok(IterationReport {
            wire_bytes: self.link.wire_bytes() - wire_before,
            took,
            ram_left: self.dirty.left(),
            ram_again: self.dirty.unseen(&self.devices, &self.ram, phase)?,
            devices: self.device_progress(phase)?,
        })
    }

    /// Adds what every dirty source saw since the last time.
    pub(super) fn report_dirty(&mut self, phase: Phase) -> Result<(), WorkError> {
        self.dirty.report(&self.devices, &self.counters.ram, phase)
    }

    /// Sends `pages`, and a pass over every device, at once. Returns the pages sent.
    pub(super) fn send_all(&mut self, pages: &Bitmap, holes: Holes, phase: Phase) -> Result<u64, WorkError> {
        let last = phase == Phase::Final;
        let context = SendContext {
            link: &self.link,
            limiter: self.plan.control.limiter(),
            interrupt: &self.shared.interrupt,
            patience: self.patience(last),
        };
        let sender = PageSender {
            ram: &self.ram,
            context,
            counters: &self.counters.ram,
            cap: (!last).then_some(context.limiter),
            checksum: last || self.shared.ram_crc.load(Ordering::Relaxed),
            copy: RefCell::default(),
            phase,
        };
        let mut sent = 0;
        let results = std::thread::scope(|scope| {
            let devices: Vec<_> = self
                .devices
                .iter_mut()
                .filter(|device| last || device.session.is_some())
                .map(|device| {
                    task(scope, "device", move || {
                        if last { device.drain(context) } else { device.precopy_pass(context) }
                    })
                })
                .collect();
            let ram = sender.send(pages, holes).map(|pages| sent = pages);
            let mut results = vec![ram];
            results.extend(devices.into_iter().filter_map(|device| device.finish()));
            results
        });
        work_error::worst_of(results)?;
        Ok(sent)
    }
}
