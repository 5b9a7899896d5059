//! Reasons why a snapshot could not be written, or is none.

use std::path::PathBuf;

use vfio_migration_compat::ManifestError;
use vfio_migration_types::DeviceId;
use vfio_migration_wire::WireError;

use crate::error::{Aborted, MigrateError};
use crate::regular_file::FileError;

/// A file that is no whole snapshot, or could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A file operation failed.
    #[error("{doing} {path} failed")]
    File {
        /// The file operation that failed, as a verb.
        doing: &'static str,
        /// The file that it failed on.
        path: PathBuf,
        /// The cause, with its errno.
        #[source]
        source: std::io::Error,
    },
    /// What is at the path, or is not, does not let a file be read or written there.
    #[error(transparent)]
    Unfit(#[from] FileError),
    /// A device gives more state than it is allowed to; it may have no end.
    #[error(
        "device {device} gave more than {limit} bytes of state, which is the limit; --state-limit SIZE sets another, if this \
         can have an end"
    )]
    StateLimit {
        /// The device that gave it.
        device: DeviceId,
        /// Most bytes that are taken of it.
        limit: u64,
    },
    /// Not the beginning of a snapshot.
    #[error("it is no snapshot: it does not begin as one")]
    Magic,
    /// A layout that this program does not know.
    #[error("it is a snapshot of layout {0}, and this program reads layout 1")]
    Version(u8),
    /// Bytes are missing or too many.
    #[error("the snapshot is cut short or too long: {0}")]
    Length(String),
    /// The digest of the whole file does not fit.
    #[error("the snapshot is damaged: its digest does not fit its bytes")]
    Digest,
    /// A frame is damaged.
    #[error("frame {frame} of the snapshot is damaged")]
    Frame {
        /// Number of the frame, from 0.
        frame: u64,
        /// The fault of the frame.
        #[source]
        source: WireError,
    },
    /// The manifest cannot be read.
    #[error("the manifest in the snapshot cannot be read")]
    Manifest(#[from] ManifestError),
    /// Sound frames that make no snapshot together.
    #[error("the snapshot contradicts itself: {0}")]
    Content(String),
}

/// The reason why a machine was not saved. No file is left, but for [`NotResumed`](Self::NotResumed).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The file; the guest is as it was.
    #[error("the snapshot cannot be written")]
    File(#[from] SnapshotError),
    /// The machine could not be read out; the error says what became of the guest.
    #[error("the machine cannot be saved")]
    Session(#[from] MigrateError),
    /// The file is whole, and the guest is not as it was: it could not go on and is paused here, or a device of it lost its state.
    #[error("the snapshot is whole, but the guest is not as it was before")]
    NotResumed(#[source] GuestNotResumed),
}

/// A machine that was saved and did not go on as it was: what is left of it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GuestNotResumed(pub Box<Aborted>);
