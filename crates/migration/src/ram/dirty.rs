//! The dirty set: the VMM's own sources and the devices' logs, in one bitmap.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vfio_migration_device::is_late;
use vfio_migration_memory::{DirtySource, GuestRam, report_all, start_all, stop_all};
use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE, Phase, RamOffset, Side, error_chain};

use crate::device_state::send::DeviceSender;
use crate::ram::send::RamCounters;
use crate::session::fail::{self, InPhase};
use crate::session::work_error::WorkError;

/// Every dirty log of a machine, and what they have reported that has not been sent.
#[derive(Debug)]
pub(crate) struct DirtyPages {
    /// The VMM's own sources.
    sources: Vec<Arc<dyn DirtySource>>,
    logging: bool,
    dirty: Bitmap,
}

impl DirtyPages {
    pub(crate) fn new(ram: &GuestRam) -> Self {
        Self { sources: Vec::new(), logging: false, dirty: Bitmap::new(ram.size(), Granule::PAGE) }
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

    /// Starts every log, then counts all of RAM that was ever written as dirty.
    pub(crate) fn start(
        &mut self,
        sources: Vec<Arc<dyn DirtySource>>,
        devices: &[DeviceSender],
        ram: &GuestRam,
    ) -> Result<(), WorkError> {
        let phase = Phase::Setup;
        self.sources = sources;
        // Before, not after: a start that fails half way, and cannot be taken back, is stopped with the rest. To stop a
        // log that never started succeeds.
        self.logging = true;
        start_all(&self.own()).map_err(|error| error.in_phase(Side::Source, phase))?;
        for device in devices {
            let Some(log) = device.device.dirty_log() else { continue };
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
        let sources: Vec<&dyn DirtySource> = self.sources.iter().map(AsRef::as_ref).collect();
        report_all(&sources, &mut self.dirty).map_err(|error| error.in_phase(Side::Source, phase))?;
        for device in devices {
            let Some(log) = device.device.dirty_log() else { continue };
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

    /// Counts all of RAM that was ever written as dirty: nobody logs what a device writes.
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
        if let Err(error) = stop_all(&self.own()) {
            tracing::warn!(error = %error_chain(&error), "a dirty log could not be stopped");
        }
        late
    }

    fn own(&self) -> Vec<&dyn DirtySource> {
        self.sources.iter().map(AsRef::as_ref).collect()
    }
}
