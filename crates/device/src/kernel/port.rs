//! The system calls of a migration session.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::retry_on_intr;
use vfio_migration_types::MigrationState;
use vfio_migration_uapi as uapi;

use crate::contract::PrecopyProgress;
use crate::reset_callback::ResetCallback;
use crate::session::port::{Port, PortError, PortStream};

/// The calls of an open device, for its sessions.
#[derive(Debug)]
pub(super) struct DevicePort {
    pub(super) device: Arc<OwnedFd>,
    /// The kernel took the opt-in to honest pre-copy flags.
    pub(super) reinit: bool,
    /// The VMM's own reset, of a device that it runs itself.
    pub(super) reset: Option<ResetCallback>,
}

/// The data descriptor of a session.
#[derive(Debug)]
struct DataFd {
    data: OwnedFd,
    reinit: bool,
}

impl Port for DevicePort {
    fn state(&self) -> Result<MigrationState, PortError> {
        Ok(uapi::device_state((*self.device).as_fd())?)
    }

    fn set_state(
        &self,
        _from: MigrationState,
        to: MigrationState,
    ) -> Result<Option<Box<dyn PortStream>>, PortError> {
        let data = uapi::set_device_state((*self.device).as_fd(), to)?;
        Ok(data.map(|data| Box::new(DataFd { data, reinit: self.reinit }) as Box<dyn PortStream>))
    }

    fn reset(&self) -> Result<(), PortError> {
        match &self.reset {
            Some(reset) => Ok(reset.reset()?),
            None => Ok(uapi::reset((*self.device).as_fd())?),
        }
    }
}

impl PortStream for DataFd {
    fn read(&self, buf: &mut [u8]) -> Result<usize, PortError> {
        Ok(retry_on_intr(|| rustix::io::read(&self.data, &mut *buf))?)
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, PortError> {
        Ok(retry_on_intr(|| rustix::io::write(&self.data, bytes))?)
    }

    fn precopy_info(&self) -> Result<Option<PrecopyProgress>, PortError> {
        let info = uapi::precopy_info(self.data.as_fd())?;
        Ok(Some(PrecopyProgress {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            // Without the opt-in the kernel echoes whatever was in the flags.
            reinit: info.reinit && self.reinit,
        }))
    }
}
