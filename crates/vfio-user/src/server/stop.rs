//! Ending a server from another thread.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::ServerError;

/// Ends [`Server::serve`](super::Server::serve) from another thread. Clones end the same.
#[derive(Clone, Debug)]
pub struct StopHandle {
    pub(super) event: Arc<OwnedFd>,
    /// To be read where even a poll fails for want of resources.
    stopped: Arc<AtomicBool>,
}

impl StopHandle {
    /// A handle that has not been used.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new() -> Result<Self, ServerError> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = event.map_err(|errno| ServerError::io("making an eventfd", errno))?;
        Ok(Self { event: Arc::new(event), stopped: Arc::default() })
    }

    /// Ends every `serve` with this handle, now and later. One write to an eventfd.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // Can fail only by overflow, when it is signalled already.
        let _ = rustix::io::write(&*self.event, &1u64.to_ne_bytes());
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}
