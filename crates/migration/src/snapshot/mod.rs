//! A machine to and from a file: the same session, with a file at its other end.
//!
//! Saving runs a whole [`Source`](crate::Source), engine and all, against a [recorder](record) that answers as a
//! destination does and writes what it receives. Restoring runs a whole [`Destination`](crate::Destination) against a
//! [player](play) that sends what the file holds as a source would. So nothing of the order in which devices are
//! stopped, read and loaded exists twice. The layout of the file is in `docs/snapshot.md`.

mod check;
mod error;
mod estimate;
mod file;
mod play;
mod record;
mod restore;
mod save;

pub use error::{GuestNotResumed, SaveError, SnapshotError};
pub use restore::Snapshot;
pub use save::{SaveOptions, Saved, save};

use std::path::Path;

use vfio_migration_wire::DeviceTotal;

/// The state of a device in a file, as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceState {
    /// Number of bytes.
    pub bytes: u64,
    /// BLAKE3 digest of all bytes, in the order in which the device gave them.
    pub digest: [u8; 32],
}

/// A file as the other end of a session: `file:` and its whole path.
pub(crate) fn file_peer(path: &Path) -> String {
    let whole = std::path::absolute(path);
    format!("file:{}", whole.as_deref().unwrap_or(path).display())
}

fn states(totals: &[DeviceTotal]) -> Vec<DeviceState> {
    totals
        .iter()
        .map(|DeviceTotal { bytes, digest }| DeviceState { bytes: *bytes, digest: *digest })
        .collect()
}
