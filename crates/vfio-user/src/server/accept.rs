//! Accepting clients, also while the system is short of what one needs.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vfio_migration_types::error_chain;

use super::stop::StopHandle;
use crate::error::ServerError;

/// The shortest and the longest pause after a client could not be accepted. Nothing tells when it could be.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// A listening socket, and what its clients wait for.
pub(super) struct Acceptor<'a> {
    listener: &'a UnixListener,
    stop: &'a StopHandle,
    shortage: Shortage,
}

impl<'a> Acceptor<'a> {
    pub(super) fn new(listener: &'a UnixListener, stop: &'a StopHandle) -> Self {
        Self { listener, stop, shortage: Shortage::default() }
    }

    /// Waits for the next client; `None` once `stop` was used.
    ///
    /// # Errors
    /// The listening socket is of no more use. What the system is short of passes, and is no error.
    pub(super) fn next_client(&mut self) -> Result<Option<UnixStream>, ServerError> {
        while !self.stop.is_stopped() {
            if let Some(stream) = self.accept()? {
                return Ok(Some(stream));
            }
            self.wait();
        }
        Ok(None)
    }

    fn accept(&mut self) -> Result<Option<UnixStream>, ServerError> {
        if self.shortage.pause_left().is_some() {
            return Ok(None);
        }
        let error = match self.listener.accept() {
            Ok((stream, _)) => {
                self.shortage = Shortage::default();
                return Ok(Some(stream));
            }
            Err(error) => error,
        };
        const DOING: &str = "accepting a client";
        match Errno::from_io_error(&error) {
            // The client left before it was accepted, or a signal came.
            Some(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => {}
            Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP) => {
                return Err(ServerError::io(DOING, error));
            }
            _ => self.shortage.met(DOING, error),
        }
        Ok(None)
    }

    /// Waits until there is somebody to accept, a pause is over, or `stop` is used.
    fn wait(&mut self) {
        let left = self.shortage.pause_left();
        let mut fds = vec![PollFd::from_borrowed_fd(self.stop.event.as_fd(), PollFlags::IN)];
        // It would be readable all through a pause.
        fds.extend(left.is_none().then(|| PollFd::new(self.listener, PollFlags::IN)));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                self.shortage.met("waiting for a client", errno);
                std::thread::sleep(self.shortage.pause_left().unwrap_or_default());
            }
        }
    }
}

/// What the system is short of, so that clients have to wait.
#[derive(Default)]
struct Shortage {
    /// The pause under way, and when it ends; `None` while there is enough.
    pause: Option<(Duration, Instant)>,
}

impl Shortage {
    fn pause_left(&self) -> Option<Duration> {
        let (_, until) = self.pause?;
        Some(until.saturating_duration_since(Instant::now())).filter(|left| !left.is_zero())
    }

    /// Begins a pause, each longer than the one before. The first is told.
    fn met(&mut self, doing: &str, error: impl Into<std::io::Error>) {
        let (shortest, longest) = PAUSE;
        let pause = match self.pause {
            Some((pause, _)) => pause.saturating_mul(2).min(longest),
            None => {
                let error = error_chain(&ServerError::io(doing, error));
                tracing::warn!("a client could not be accepted; trying again: {error}");
                shortest
            }
        };
        self.pause = Some((pause, Instant::now() + pause));
    }
}
