//! Accepting clients: also while the system is short of what one needs, and beside connections that say nothing.

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::backend::Backend;
use super::options::ServerOptions;
use super::session::connection;
use super::stop::StopHandle;
use crate::conn::{Conn, ConnError, SocketMessage};
use crate::error::ServerError;
use crate::event::{DropReason, ServerEvent};

/// Connections that may be silent at once. For one more the one silent longest is dropped.
const MOST: usize = 16;
/// Silence for which none is dropped for another's sake: a client says its version at once.
const LEAST_PATIENCE: Duration = Duration::from_millis(250);

/// The shortest and the longest pause after a client could not be accepted. Nothing tells when it could be.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// A listening socket, and the connections whose first message has not come.
pub(super) struct Acceptor<'a> {
    listener: &'a UnixListener,
    options: &'a ServerOptions,
    /// Is told what becomes of them.
    backend: &'a dyn Backend,
    stop: &'a StopHandle,
    shortage: Shortage,
    /// The oldest first.
    waiting: Vec<SilentConnection>,
}

/// A connection whose first message is not there whole.
struct SilentConnection {
    conn: Conn,
    since: Instant,
}

impl<'a> Acceptor<'a> {
    pub(super) fn new(
        listener: &'a UnixListener,
        options: &'a ServerOptions,
        backend: &'a dyn Backend,
        stop: &'a StopHandle,
    ) -> Self {
        Self { listener, options, backend, stop, shortage: Shortage::default(), waiting: Vec::new() }
    }

    /// Waits for the next client, and its first message; `None` once `stop` was used.
    ///
    /// # Errors
    /// The listening socket is of no more use. What the system is short of passes, and is no error.
    pub(super) fn next_client(&mut self) -> Result<Option<(Conn, SocketMessage)>, ServerError> {
        while !self.stop.is_stopped() {
            if let Some(client) = self.greeted() {
                return Ok(Some(client));
            }
            if !self.accept()? {
                self.wait();
            }
        }
        Ok(None)
    }

    /// The first whose message is there whole. Never waits; drops those that had their time.
    fn greeted(&mut self) -> Option<(Conn, SocketMessage)> {
        let limit = self.options.handshake_timeout;
        let mut at = 0;
        while let Some(one) = self.waiting.get(at) {
            let why = match one.conn.try_command(Duration::ZERO) {
                Ok(Some(message)) => return Some((self.waiting.remove(at).conn, message)),
                // Nothing, or a part: what has come of it is kept.
                Ok(None) | Err(ConnError::Timeout) if one.since.elapsed() < limit => {
                    at += 1;
                    continue;
                }
                Ok(None) | Err(ConnError::Timeout) => Some(DropReason::NoVersion(limit)),
                Err(error) => error.drops_peer(),
            };
            self.waiting.remove(at);
            self.tell_drop(why);
        }
        None
    }

    /// Takes in one connection, if one waits and there is room.
    fn accept(&mut self) -> Result<bool, ServerError> {
        const DOING: &str = "accepting a client";
        if self.shortage.pause_left().is_some() || self.full_for().is_some() {
            return Ok(false);
        }
        let error = match self.listener.accept() {
            Ok((stream, _)) => {
                self.shortage = Shortage::default();
                self.take_in(stream);
                return Ok(true);
            }
            Err(error) => error,
        };
        match Errno::from_io_error(&error) {
            // The client left before it was accepted, or a signal came.
            Some(Errno::AGAIN | Errno::CONNABORTED | Errno::INTR) => {}
            Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP) => {
                return Err(ServerError::io(DOING, error));
            }
            _ => self.fall_short(DOING, error),
        }
        Ok(false)
    }

    fn tell_drop(&self, why: Option<DropReason>) {
        if let Some(why) = why {
            self.backend.server_event(&ServerEvent::ClientDropped(why));
        }
    }

    /// Begins a pause, since the system is short of something. The first is told.
    fn fall_short(&mut self, doing: &str, error: impl Into<std::io::Error>) {
        if self.shortage.begin_pause() {
            self.backend.server_event(&ServerEvent::NotAccepted(ServerError::io(doing, error)));
        }
    }

    fn take_in(&mut self, stream: UnixStream) {
        if self.waiting.len() >= MOST {
            self.waiting.remove(0);
            self.tell_drop(Some(DropReason::TooManySilent));
        }
        match connection(stream, self.stop) {
            Ok(conn) => self.waiting.push(SilentConnection { conn, since: Instant::now() }),
            Err(error) => self.tell_drop(error.drops_peer()),
        }
    }

    /// How long there is no room for one more; `None` where there is.
    fn full_for(&self) -> Option<Duration> {
        let oldest = self.waiting.first().filter(|_| self.waiting.len() >= MOST)?;
        Some(LEAST_PATIENCE.saturating_sub(oldest.since.elapsed())).filter(|left| !left.is_zero())
    }

    /// Waits until there is somebody to accept or something to read, a time has passed, or `stop` is used.
    fn wait(&mut self) {
        let limit = self.options.handshake_timeout;
        let held_back = self.shortage.pause_left().max(self.full_for());
        let oldest = self.waiting.first().map(|one| limit.saturating_sub(one.since.elapsed()));
        let timeout = [held_back, oldest].into_iter().flatten().min();
        let mut fds = vec![PollFd::from_borrowed_fd(self.stop.event.as_fd(), PollFlags::IN)];
        // It would be readable all the time.
        fds.extend(held_back.is_none().then(|| PollFd::new(self.listener, PollFlags::IN)));
        fds.extend(self.waiting.iter().map(|one| PollFd::new(&one.conn, PollFlags::IN)));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let polled = poll(&mut fds, timeout.as_ref());
        drop(fds);
        match polled {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                self.fall_short("waiting for a client", errno);
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

    /// Begins a pause, longer than the one before. Whether it is the first.
    fn begin_pause(&mut self) -> bool {
        let (shortest, longest) = PAUSE;
        let before = self.pause;
        let pause = before.map_or(shortest, |(pause, _)| pause.saturating_mul(2).min(longest));
        self.pause = Some((pause, Instant::now() + pause));
        before.is_none()
    }
}
