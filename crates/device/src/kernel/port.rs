//! The system calls that a session makes, behind two small traits: what the kernel's answers mean can then be tested
//! without a kernel.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_types::MigrationState;
use vfio_migration_uapi::{self as uapi, PrecopyInfo, UapiError};

/// The migration state machine of an open device.
pub(super) trait Port: fmt::Debug + Send + Sync {
    /// GET of the state.
    fn state(&self) -> Result<MigrationState, UapiError>;
    /// SET of the state, with the data stream when an arc opened one.
    fn set_state(&self, to: MigrationState) -> Result<Option<Box<dyn Stream>>, UapiError>;
    /// `VFIO_DEVICE_RESET`.
    fn reset(&self) -> Result<(), UapiError>;
}

/// The data descriptor of a session. Each call is one system call.
pub(super) trait Stream: fmt::Debug + Send {
    /// read(2).
    fn read(&self, buf: &mut [u8]) -> Result<usize, Errno>;
    /// write(2): may take less than all.
    fn write(&self, bytes: &[u8]) -> Result<usize, Errno>;
    /// `VFIO_MIG_GET_PRECOPY_INFO`.
    fn precopy_info(&self) -> Result<PrecopyInfo, UapiError>;
}

impl Port for Arc<OwnedFd> {
    fn state(&self) -> Result<MigrationState, UapiError> {
        uapi::device_state((**self).as_fd())
    }

    fn set_state(&self, to: MigrationState) -> Result<Option<Box<dyn Stream>>, UapiError> {
        let data = uapi::set_device_state((**self).as_fd(), to)?;
        Ok(data.map(|fd| Box::new(fd) as Box<dyn Stream>))
    }

    fn reset(&self) -> Result<(), UapiError> {
        uapi::reset((**self).as_fd())
    }
}

impl Stream for OwnedFd {
    fn read(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::read(self, buf)
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        rustix::io::write(self, bytes)
    }

    fn precopy_info(&self) -> Result<PrecopyInfo, UapiError> {
        uapi::precopy_info(self.as_fd())
    }
}
