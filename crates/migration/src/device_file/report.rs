//! The report of a device that was saved or restored.

use std::path::PathBuf;
use std::time::Duration;

use vfio_migration_compat::DeviceManifest;
use vfio_migration_types::MigrationState;

/// A device that was saved or restored.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceReport {
    /// The device's manifest, as it declares it.
    pub device: DeviceManifest,
    /// Path of the file.
    pub file: PathBuf,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// BLAKE3 digest of the file without its last 32 bytes, which are it.
    pub file_digest: [u8; 32],
    /// Bytes of state read before the device was stopped; of a restored device, those that came before it would have
    /// been.
    pub precopy: u64,
    /// Bytes of state read while the device was stopped.
    pub stopcopy: u64,
    /// BLAKE3 digest of the state, all bytes in order.
    pub state_digest: [u8; 32],
    /// Each transition since the control was new, in order.
    pub arcs: Vec<DeviceArc>,
    /// From the call to its end.
    pub took: Duration,
    /// The state that the device reports afterwards.
    pub left_in: MigrationState,
}

/// A transition that a device made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceArc {
    /// State that it left.
    pub from: MigrationState,
    /// State that it came to.
    pub to: MigrationState,
    /// Whether it was a reset, not an arc.
    pub reset: bool,
    /// Time that the transition took.
    pub took: Duration,
}
