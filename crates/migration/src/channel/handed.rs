//! Connections that a VMM accepts itself and hands over, one after another.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::channel::connect::check_stream;

/// Connections that may wait to be taken; a session under way takes them too.
const MOST: usize = 64;

/// Where a VMM that accepts connections itself hands them over to its [`Destination`](crate::Destination). Any thread may.
#[derive(Clone)]
pub struct IncomingConnections {
    queue: SyncSender<OwnedFd>,
    wake: Arc<OwnedFd>,
}

/// Why a connection was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotHandedOver {
    /// It is no connected stream socket.
    #[error("it is no connected stream socket")]
    NotAStream,
    /// As many wait as may: their sources are not being heard.
    #[error("{MOST} connections wait already")]
    Full,
    /// The destination is gone.
    #[error("there is no destination any more")]
    Gone,
}

impl IncomingConnections {
    /// Hands over a connected stream socket: what comes on it is a source, or one that asks what became of its COMMIT. It is closed where
    /// it is not taken.
    ///
    /// # Errors
    /// It is none, or there is no place for it.
    pub fn hand_over(&self, connection: OwnedFd) -> Result<(), NotHandedOver> {
        let number = std::os::fd::AsRawFd::as_raw_fd(&connection);
        check_stream(&connection, number).map_err(|_| NotHandedOver::NotAStream)?;
        self.queue.try_send(connection).map_err(|error| match error {
            TrySendError::Full(_) => NotHandedOver::Full,
            TrySendError::Disconnected(_) => NotHandedOver::Gone,
        })?;
        // Whoever waits looks again before long, woken or not.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        Ok(())
    }
}

impl fmt::Debug for IncomingConnections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IncomingConnections(..)")
    }
}

/// The other end.
#[derive(Debug)]
pub(crate) struct HandedConnections {
    queue: Receiver<OwnedFd>,
    wake: Arc<OwnedFd>,
    /// Nobody is left who could hand one over.
    ended: bool,
}

impl HandedConnections {
    /// Both ends.
    pub(crate) fn new() -> Result<(Self, IncomingConnections), Errno> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, queue) = sync_channel(MOST);
        let handed = Self { queue, wake: Arc::clone(&wake), ended: false };
        Ok((handed, IncomingConnections { queue: sender, wake }))
    }

    /// The next one, if one waits.
    pub(crate) fn next(&mut self) -> Option<OwnedFd> {
        // Before the look, so that none that comes behind it is slept over.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        match self.queue.try_recv() {
            Ok(connection) => Some(connection),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                self.ended = true;
                None
            }
        }
    }

    /// Whether none can come any more.
    pub(crate) fn have_ended(&self) -> bool {
        self.ended
    }
}

impl AsFd for HandedConnections {
    /// Readable when one may wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
