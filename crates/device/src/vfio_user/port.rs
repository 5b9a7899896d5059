//! The messages of a migration session: the data travels by MIG_DATA_READ and MIG_DATA_WRITE.

use std::sync::Arc;

use vfio_migration_types::MigrationState;
use vfio_user_peer::Client;

use super::states::{peer_state, shared_state};
use crate::contract::PrecopyProgress;
use crate::reset_callback::ResetCallback;
use crate::session::port::{Port, PortError, PortStream};

/// The connection, for states.
#[derive(Debug)]
pub(super) struct ServerPort {
    pub(super) client: Arc<Client>,
    /// The VMM's own reset, of a device that it runs itself.
    pub(super) reset: Option<ResetCallback>,
}

/// The connection, for the data of the session that is open on it.
#[derive(Debug)]
struct ServerStream(Arc<Client>);

impl Port for ServerPort {
    fn state(&self) -> Result<MigrationState, PortError> {
        Ok(shared_state(self.client.mig_state()?))
    }

    fn set_state(
        &self,
        from: MigrationState,
        to: MigrationState,
    ) -> Result<Option<Box<dyn PortStream>>, PortError> {
        self.client.set_mig_state(peer_state(to))?;
        let opens = (to.is_saving() && !from.is_saving()) || to == MigrationState::Resuming;
        Ok(opens.then(|| Box::new(ServerStream(self.client.clone())) as Box<dyn PortStream>))
    }

    fn reset(&self) -> Result<(), PortError> {
        match &self.reset {
            Some(reset) => Ok(reset.reset()?),
            None => Ok(self.client.reset_to_running()?),
        }
    }
}

impl PortStream for ServerStream {
    fn read(&self, buf: &mut [u8]) -> Result<usize, PortError> {
        Ok(self.0.mig_data_read(buf)?)
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, PortError> {
        self.0.mig_data_write(bytes)?;
        Ok(bytes.len())
    }

    fn precopy_info(&self) -> Result<Option<PrecopyProgress>, PortError> {
        if !self.0.negotiated().extension.precopy_info {
            return Ok(None);
        }
        let info = self.0.precopy_info()?;
        Ok(Some(PrecopyProgress {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            reinit: info.reinit,
        }))
    }
}
