//! Ending a server from another thread.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::error::ServerError;

/// Ends [`Server::serve`](super::Server::serve) from another thread. Clones end the same.
#[derive(Clone, Debug)]
pub struct StopHandle {
    pub(super) event: Arc<OwnedFd>,
}

impl StopHandle {
    /// A handle that has not been used.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new() -> Result<Self, ServerError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.map_err(|errno| ServerError::io("making an eventfd", errno))?;
        Ok(Self { event: Arc::new(event) })
    }

    /// Ends every `serve` with this handle, now and later. One write to an eventfd.
    pub fn stop(&self) {
        // Can fail only by overflow, when it is signalled already.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopped(&self) -> bool {
        let mut fds = [PollFd::new(&*self.event, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1))
    }
}
