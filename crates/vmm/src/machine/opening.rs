//! Steps of opening a device, each of which may keep the VMM waiting.

use rustix::io::Errno;

/// A step of opening a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpeningStep {
    /// Nobody listens at the socket of its server, which is waited for.
    Listen {
        /// Why it could not be connected to: ECONNREFUSED, or ENOENT where there is no socket.
        errno: Errno,
    },
    /// It is connected to, and asked what it is.
    Open,
    /// It is reset.
    Reset,
}
