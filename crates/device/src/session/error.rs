//! Errors of a device's sessions.

use vfio_migration_types::MigrationState;

/// A cause that the session found itself; the source of a [`DeviceError`](crate::DeviceError) or of a
/// [`TransitionError`](crate::TransitionError).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The session is over without our doing.
    #[error(
        "the session was lost: the device is in {0}, as after a reset (a guest's function-level reset, or error recovery)"
    )]
    Lost(MigrationState),
    /// A session is open already.
    #[error("a session is open on the device already, and its data stream cannot be had again")]
    Open,
    /// A state that belongs to a session.
    #[error("that state belongs to a session")]
    State,
    /// RESUMING is left by finishing or by a reset.
    #[error("a resuming session is left by finishing it or by a reset")]
    Resuming,
    /// The device opened no session.
    #[error("the device gave no data stream")]
    NoStream,
    /// The device opened a session inside of one.
    #[error("the device opened a second session inside the first")]
    SecondStream,
    /// A read into nothing.
    #[error("a read into an empty buffer")]
    EmptyBuffer,
    /// The device took an odd number of bytes.
    #[error("the device took {taken} of {offered} bytes")]
    OddWrite {
        /// Number of bytes that it claims to have taken.
        taken: usize,
        /// Bytes that it was given.
        offered: usize,
    },
    /// After a reset the device is not RUNNING.
    #[error("it is in {0} even after a reset")]
    ResetLeft(MigrationState),
}
