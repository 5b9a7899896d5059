//! P2: every dirty log is started, then every device that can begins its pre-copy.

use vfio_migration_engine::DeviceProgress;
use vfio_migration_memory::{DirtySource, start_all};
use vfio_migration_types::{PAGE_SIZE, Phase};

use crate::session::fail::{self, InPhase};
use crate::session::parallel::for_each_device_parallel;
use crate::session::work_error::{self, WorkError};

use crate::source::worker::Worker;

impl Worker<'_> {
    pub(super) fn set_up(&mut self) -> Result<Vec<DeviceProgress>, WorkError> {
        self.sources = self.machine.dirty_sources();
        // Before, not after: a start that fails half way, and cannot be taken back, is stopped with the rest. To stop a
        // log that never started succeeds.
        self.logging = true;
        let own: Vec<&dyn DirtySource> = self.sources.iter().map(AsRef::as_ref).collect();
        start_all(&own).map_err(|error| error.in_phase(Phase::Setup))?;
        for stream in &self.streams {
            let Some(log) = stream.device.dirty_log() else { continue };
            log.start().map_err(|error| fail::blame(&stream.id, error.in_phase(Phase::Setup)))?;
        }
        // Only now: what is data was found after logging began, so a hole that fills up later is logged.
        for extent in self.ram.data_extents().map_err(|error| error.in_phase(Phase::Setup))? {
            self.dirty.set_range(extent.start().0 / PAGE_SIZE, extent.len() / PAGE_SIZE);
        }
        let results = for_each_device_parallel(
            self.streams.iter_mut().filter(|stream| stream.flags().pre_copy),
            |stream| {
                let session = stream.device.begin_precopy().map_err(|error| error.in_phase(Phase::Setup))?;
                stream.session = Some(session);
                Ok(())
            },
        );
        work_error::worst_of(results)?;
        self.device_progress(Phase::Setup)
    }
}
