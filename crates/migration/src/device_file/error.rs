//! Reasons why a device was not saved, or not restored.

use std::fmt;

use vfio_migration_compat::Reason;
use vfio_migration_device::{CapabilitiesError, DeviceError};
use vfio_migration_memory::MemoryError;
use vfio_migration_types::{DeviceId, Failure, MigrationState};

use crate::reasons::sentences;
use crate::snapshot::SnapshotError;

/// A device that was not saved, or not restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceFileError {
    /// The device has no migration. It was not touched.
    #[error("it cannot be migrated: {0}")]
    NotMigratable(String),
    /// The device holds a state that is neither whole nor running. It was not touched.
    #[error(
        "device {device} is in {state}, so there is no whole state to be saved; a reset helps, and loading a state \
         (`vfio-migrate restore`) resets it first"
    )]
    NoWholeState {
        /// The device that was to be saved.
        device: DeviceId,
        /// The state that it is in.
        state: MigrationState,
    },
    /// The file is another machine's. The device was not touched.
    #[error(
        "the file holds a machine of kind '{kind}', not a device alone: `vfio-migrate vm --restore` is for whole VMs"
    )]
    OfMachine {
        /// The kind of machine that the file holds.
        kind: String,
    },
    /// The file is of another device. This one was not touched.
    #[error("the file (the source) and the device (the destination) do not fit: {}", sentences(.0))]
    OtherDevice(Vec<Reason>),
    /// The device does not answer as it should.
    #[error("the device does not say how it is")]
    Device(#[from] DeviceError),
    /// The file could not be written.
    #[error("the file cannot be written")]
    File(#[source] SnapshotError),
    /// There is no memory for it.
    #[error("there is no memory to do it with")]
    Memory(#[from] MemoryError),
    /// The work was cancelled; the fate of the device is in it.
    #[error("cancelled; {0}")]
    Cancelled(DeviceFate),
    /// The work failed on the way.
    #[error("{failure}; {fate}")]
    Failed {
        /// The failure, with its cause.
        failure: Box<Failure>,
        /// The fate of the device afterwards.
        fate: DeviceFate,
    },
    /// The file is whole and on disk, but the device did not go back to what it was.
    #[error("the file is whole, but the device could not go on: {failure}; {fate}")]
    WholeFile {
        /// The failure, with its cause.
        failure: Box<Failure>,
        /// The fate of the device afterwards.
        fate: DeviceFate,
    },
}

impl From<CapabilitiesError> for DeviceFileError {
    fn from(error: CapabilitiesError) -> Self {
        match error {
            CapabilitiesError::NotMigratable(why) => Self::NotMigratable(why.0),
            CapabilitiesError::Device(error) => Self::Device(error),
        }
    }
}

/// The fate of a device, after work on it failed or was cancelled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceFate {
    /// The device that was worked on.
    pub device: DeviceId,
    /// Whether it was reset, so that what it held is gone.
    pub reset: bool,
    /// The state that it reports to be in; `None` when it reports none.
    pub now: Option<MigrationState>,
}

impl fmt::Display for DeviceFate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {} ", self.device)?;
        if self.reset {
            f.write_str("was reset, and ")?;
        }
        match self.now {
            Some(now) => write!(f, "is in {now}"),
            None => f.write_str("does not say which state it is in"),
        }
    }
}
