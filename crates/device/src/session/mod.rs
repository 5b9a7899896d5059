//! Migration sessions over whatever serves the device: its state machine, and the stream of a session, with what each
//! answer means.
//!
//! A back end brings the calls alone ([`port`]); the rules are here, so that a device of the kernel and one of a
//! vfio-user server are treated alike, and the rules can be tested without either.

pub(crate) mod error;
pub(crate) mod port;
mod resuming;
mod saving;
pub(crate) mod state_machine;
#[cfg(test)]
mod tests;
