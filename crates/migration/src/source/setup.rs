//! P2: every dirty log is started, then every device that can begins its pre-copy.

use std::sync::atomic::Ordering;

use vfio_migration_engine::DeviceProgress;
use vfio_migration_types::{Phase, Side};

use crate::session::fail::InPhase;
use crate::session::parallel::for_each_device_parallel;
use crate::session::work_error::{self, WorkError};

use crate::source::worker::Worker;

impl Worker {
    pub(super) fn set_up(&mut self) -> Result<Vec<DeviceProgress>, WorkError> {
        let allowed = self.plan.may_be_unseen();
        self.dirty.start(self.machine.dirty_sources(), &self.devices, &self.ram, allowed)?;
        // The first pass sends all of it.
        self.counters.ram.left.store(self.dirty.left(), Ordering::Relaxed);
        let results = for_each_device_parallel(
            self.devices.iter_mut().filter(|device| device.flags().pre_copy),
            |device| {
                let session = device
                    .device
                    .begin_precopy()
                    .map_err(|error| error.in_phase(Side::Source, Phase::Setup))?;
                device.session = Some(session);
                Ok(())
            },
        );
        work_error::worst_of(results)?;
        self.device_progress(Phase::Setup)
    }
}
