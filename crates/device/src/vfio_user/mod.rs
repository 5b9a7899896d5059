//! The vfio-user back end: a device that another process emulates.
//!
//! What the protocol lacks (P2P, pre-copy progress, a size estimate, a manifest) is there when the server speaks the
//! `x-vfio-migrate` extension, and absent, not guessed, when it does not.

pub(crate) mod adopt;
pub(crate) mod device;
mod dirty;
mod dma;
mod hardware;
mod migrate;
mod port;
mod states;
