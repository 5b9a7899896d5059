//! P9: the guest is the destination's; this side releases what it held.

use vfio_migration_types::{Failure, Phase, Side};

use crate::session::fail::InPhase;
use crate::session::parallel::for_each_device_parallel;
use crate::session::work_error::WorkError;

use crate::source::worker::Worker;

impl Worker {
    /// Ends the pause for good, the saving sessions (STOP_COPY to STOP, where a driver frees what it held: kept out of
    /// the downtime), and the logs.
    pub(super) fn clean_up(&mut self) -> Result<(), WorkError> {
        if let Some(paused) = self.paused.take() {
            paused.commit();
        }
        let ended = for_each_device_parallel(
            self.devices.iter_mut().filter_map(|device| device.session.take()),
            |session| session.end().map_err(|error| error.in_phase(Side::Source, Phase::Clean)),
        );
        self.dirty.stop(&self.devices);
        let failed: Option<Failure> = ended.into_iter().find_map(Result::err);
        failed.map_or(Ok(()), |failure| Err(failure.into()))
    }
}
