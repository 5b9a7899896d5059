//! The dirty set: the VMM's own sources and the devices' logs, in one bitmap.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vfio_migration_device::is_late;
use vfio_migration_memory::{Coverage, DirtySource, GuestRam, report_all, start_all, stop_all};
use vfio_migration_types::{
    Bitmap, DeviceId, Failure, Granule, PAGE_SIZE, Phase, RamOffset, Range, Side, error_chain,
};

use crate::device_state::send::DeviceSender;
use crate::ram::send::RamCounters;
use crate::ram::uncovered::gaps;
use crate::session::fail::{self, InPhase};
use crate::session::work_error::WorkError;

/// Every dirty log of a machine, and what they have reported that has not been sent.
#[derive(Debug)]
pub(crate) struct DirtyPages {
    /// The VMM's own sources.
    sources: Vec<Arc<dyn DirtySource>>,
    logging: bool,
    dirty: Bitmap,
    /// Parts of RAM to which nobody logs the writes, of those who may write it all.
    uncovered: Bitmap,
}

impl DirtyPages {
    pub(crate) fn new(ram: &GuestRam) -> Self {
        let empty = || Bitmap::new(ram.size(), Granule::PAGE);
        Self { sources: Vec::new(), logging: false, dirty: empty(), uncovered: empty() }
    }

    /// Whether a log may run.
    pub(crate) fn is_logging(&self) -> bool {
        self.logging
    }

    /// Bytes of the pages that are dirty.
    pub(crate) fn left(&self) -> u64 {
        self.dirty.dirty_bytes()
    }

    /// Takes the dirty set, which is empty afterwards: its pages are about to be sent.
    pub(crate) fn take(&mut self) -> Bitmap {
        self.dirty.take()
    }

    /// Starts every log that sees anything, then counts all of RAM that was ever written as dirty. `allowed`: some of it may
    /// be written unseen, and is sent once more in the downtime.
    pub(crate) fn start(
        &mut self,
        sources: Vec<Arc<dyn DirtySource>>,
        devices: &[DeviceSender],
        ram: &GuestRam,
        allowed: bool,
    ) -> Result<(), WorkError> {
        let phase = Phase::Setup;
        self.sources = sources;
        for (device, found) in self.look_for_uncovered(devices, ram) {
            // Found now, and not in the plan: what a source sees has changed since.
            if !allowed {
                let failure = Failure::new(Side::Source, phase, found).with_remedy(LOG_IT);
                return Err(match device {
                    Some(device) => WorkError::Failed(failure.of_device(&device)),
                    None => WorkError::Failed(failure),
                });
            }
        }
        // Before, not after: a start that fails half way, and cannot be taken back, is stopped with the rest. To stop a
        // log that never started succeeds.
        self.logging = true;
        start_all(&self.own()).map_err(|error| error.in_phase(Side::Source, phase))?;
        for device in devices {
            let Some(log) = seeing(device) else { continue };
            log.start()
                .map_err(|error| fail::with_device(&device.id, error.in_phase(Side::Source, phase)))?;
        }
        // Only now: what is data was found after logging began, so a hole that fills up later is logged.
        self.add_everything(ram, phase)
    }

    /// Adds what every log saw since the last time.
    pub(crate) fn report(
        &mut self,
        devices: &[DeviceSender],
        counters: &RamCounters,
        phase: Phase,
    ) -> Result<(), WorkError> {
        // Not by `own`, which borrows all of this.
        let sources: Vec<&dyn DirtySource> = self.sources.iter().map(AsRef::as_ref).filter(sees).collect();
        report_all(&sources, &mut self.dirty).map_err(|error| error.in_phase(Side::Source, phase))?;
        for device in devices {
            let Some(log) = seeing(device) else { continue };
            log.report(&mut self.dirty)
                .map_err(|error| fail::with_device(&device.id, error.in_phase(Side::Source, phase)))?;
        }
        counters.left.store(self.left(), Ordering::Relaxed);
        Ok(())
    }

    /// Names of the logs that the page at `offset` is for to report, the devices' first.
    pub(crate) fn covering(&self, devices: &[DeviceSender], offset: RamOffset) -> Vec<String> {
        let logs = devices.iter().filter_map(|device| device.device.dirty_log());
        let logs = logs.map(|log| log as &dyn DirtySource).chain(self.own());
        logs.filter(|log| log.covers(offset)).map(DirtySource::name).collect()
    }

    /// Bytes of RAM that [`add_unseen`](Self::add_unseen) would add.
    pub(crate) fn unseen(
        &self,
        devices: &[DeviceSender],
        ram: &GuestRam,
        phase: Phase,
    ) -> Result<u64, WorkError> {
        let unlogged = unlogged(devices);
        if !unlogged && !self.uncovered.any() {
            return Ok(0);
        }
        let extents = ram.data_extents().map_err(|error| error.in_phase(Side::Source, phase))?;
        if unlogged {
            return Ok(extents.iter().map(Range::len).sum());
        }
        Ok(self.uncovered_data(&extents).dirty_bytes())
    }

    /// Counts as dirty, with every writer stopped, what was ever written of the RAM to which somebody's writes are not logged.
    /// Whether there is such.
    pub(crate) fn add_unseen(
        &mut self,
        devices: &[DeviceSender],
        ram: &GuestRam,
        phase: Phase,
    ) -> Result<bool, WorkError> {
        if unlogged(devices) {
            self.add_everything(ram, phase)?;
            return Ok(true);
        }
        // What a source sees may have changed since it was started; now it is too late to refuse.
        for (device, found) in self.look_for_uncovered(devices, ram) {
            tracing::info!(?device, "{found}; all of that is sent once more");
        }
        if !self.uncovered.any() {
            return Ok(false);
        }
        let extents = ram.data_extents().map_err(|error| error.in_phase(Side::Source, phase))?;
        let unseen = self.uncovered_data(&extents);
        self.dirty.or(&unseen);
        Ok(true)
    }

    /// The uncovered parts that were ever written.
    fn uncovered_data(&self, extents: &[Range<RamOffset>]) -> Bitmap {
        let mut data = Bitmap::new(self.uncovered.len() * PAGE_SIZE, Granule::PAGE);
        for run in self.uncovered.runs() {
            for extent in extents {
                let start = extent.start().0.max(run.first * PAGE_SIZE);
                let end = extent.end().min((run.first + run.count) * PAGE_SIZE);
                if start < end {
                    data.set_bytes(start, end - start);
                }
            }
        }
        data
    }

    /// Adds what is uncovered now, and gives a sentence for each part.
    fn look_for_uncovered(
        &mut self,
        devices: &[DeviceSender],
        ram: &GuestRam,
    ) -> Vec<(Option<DeviceId>, String)> {
        let mut found = Vec::new();
        for source in &self.sources {
            found.extend(gaps(&**source, ram).into_iter().map(|gap| (None, gap)));
        }
        for device in devices {
            let Some(log) = device.device.dirty_log() else { continue };
            found.extend(gaps(log, ram).into_iter().map(|gap| (Some(device.id.clone()), gap)));
        }
        for (_, gap) in &found {
            self.uncovered.set_bytes(gap.part.start().0, gap.part.len());
        }
        found.into_iter().map(|(device, gap)| (device, gap.text)).collect()
    }

    /// Counts all of RAM that was ever written as dirty.
    pub(crate) fn add_everything(&mut self, ram: &GuestRam, phase: Phase) -> Result<(), WorkError> {
        for extent in ram.data_extents().map_err(|error| error.in_phase(Side::Source, phase))? {
            self.dirty.set_range(extent.start().0 / PAGE_SIZE, extent.len() / PAGE_SIZE);
        }
        Ok(())
    }

    /// Ends every log. What fails is logged: a log that goes on costs time, not correctness. Returns the devices that have not
    /// answered: each stops its log when it does.
    pub(crate) fn stop<'d>(&mut self, devices: &'d [DeviceSender]) -> Vec<&'d DeviceSender> {
        let mut late = Vec::new();
        if !std::mem::take(&mut self.logging) {
            return late;
        }
        for device in devices.iter().rev() {
            let Some(Err(error)) = device.device.dirty_log().map(DirtySource::stop) else { continue };
            tracing::warn!(error = %error_chain(&error), "a dirty log could not be stopped");
            late.extend(is_late(&error).then_some(device));
        }
        // All of them: what one sees may have changed since it was started.
        let sources: Vec<&dyn DirtySource> = self.sources.iter().map(AsRef::as_ref).collect();
        if let Err(error) = stop_all(&sources) {
            tracing::warn!(error = %error_chain(&error), "a dirty log could not be stopped");
        }
        late
    }

    fn own(&self) -> Vec<&dyn DirtySource> {
        self.sources.iter().map(AsRef::as_ref).filter(sees).collect()
    }
}

/// What to do about RAM to which writes are not logged.
const LOG_IT: &str = "have those writes logged, or allow one full copy of that part while the guest is paused (--allow-all-dirty)";

/// Whether a source is to be started: one that sees nothing may refuse to.
fn sees(source: &&dyn DirtySource) -> bool {
    !matches!(source.coverage(), Coverage::Nothing(_))
}

/// The log of a device that has one which sees anything.
fn seeing(device: &DeviceSender) -> Option<&dyn DirtySource> {
    device.device.dirty_log().map(|log| log as &dyn DirtySource).filter(sees)
}

/// Whether a device has no log.
fn unlogged(devices: &[DeviceSender]) -> bool {
    devices.iter().any(|device| device.device.dirty_log().is_none())
}
