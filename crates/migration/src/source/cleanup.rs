//! P9: the guest is the destination's; this side lets go of what it held.

use vfio_migration_types::Phase;
use vfio_migration_wire::PeerError;

use crate::fail::InPhase;
use crate::stop::Stop;
use crate::together::together;

use super::worker::Worker;

impl Worker<'_> {
    /// Ends the pause for good, the saving sessions (STOP_COPY to STOP, where a driver frees what it held: kept out of
    /// the downtime), and the logs.
    pub(super) fn clean_up(&mut self) -> Result<(), Stop> {
        if let Some(paused) = self.paused.take() {
            paused.commit();
        }
        let ended = together(self.streams.iter_mut().filter_map(|stream| stream.session.take()), |session| {
            session.end().map_err(|error| error.in_phase(Phase::Clean))
        });
        self.stop_logging();
        let failed: Option<PeerError> = ended.into_iter().find_map(Result::err);
        failed.map_or(Ok(()), |failure| Err(failure.into()))
    }
}
