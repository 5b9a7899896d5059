//! A connection to a server, and the terms agreed on with it.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::options::DmaHandler;
use super::question::{QuestionLimit, Questions};
use crate::codec::Extension;
use crate::conn::Conn;
use crate::migration_state::MigrationState;

/// The terms that client and server agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Negotiated {
    /// Protocol version of the server: (major, minor).
    pub version: (u16, u16),
    /// Most descriptors that the server takes in one message.
    pub max_msg_fds: u32,
    /// Most data in one message: the lesser of what both take.
    pub max_data_xfer_size: u32,
    /// Most DMA mappings at a time.
    pub max_dma_maps: u32,
    /// Page sizes of DMA mappings, OR-ed.
    pub pgsizes: u64,
    /// Whether the server's DMA requests have a socket of their own.
    pub twin_socket: bool,
    /// Whether REGION_WRITE_MULTI may be used.
    pub write_multiple: bool,
    /// Parts of the extension that are in force.
    pub extension: Extension,
}

/// A connection to a vfio-user server.
///
/// Every method may be called from any thread; one request is under way at a time, and each has a deadline
/// ([`timeout`](super::ClientOptions::timeout)), which begins when no other is under way; [`limit_question`](Self::limit_question)
/// counts that wait too. After one that ran into it
/// ([`Timeout`](crate::ClientError::Timeout)) the server is late, not gone: its late answer is dropped when it comes, and
/// until then requests wait for it within their own limit, unsent. A server that hangs up, or a broken frame, ends the
/// connection: every later call fails with [`ConnectionLost`](crate::ClientError::ConnectionLost). A refusal by the server, or a
/// reply that makes no sense in a sound frame, leaves it alive.
///
/// Dropping the client closes the connection and joins its threads.
pub struct Client {
    pub(super) conn: Arc<Conn>,
    /// Where the DMA thread serves: the twin socket, or `conn`. `None` where there is no thread.
    pub(super) serving: Option<Arc<Conn>>,
    pub(super) timeout: Duration,
    pub(super) transition_timeout: Duration,
    /// Time by which all is to be answered, and how long that was when it was set.
    pub(super) all_until: Mutex<Option<(Instant, Duration)>>,
    pub(super) questions: Arc<Questions>,
    pub(super) negotiated: Negotiated,
    /// The `max_data_xfer_size` that the server was told.
    pub(super) announced_xfer: u32,
    pub(super) dma: Option<Arc<dyn DmaHandler>>,
    /// Number of DMA mappings.
    pub(super) maps: AtomicU32,
    /// The server loses step over commands that it does not know, so that only [the first](super::request::BASICS) are sent:
    /// the published crate `vfio_user`, up to 0.1.7 at least, refuses those without an errno and takes their payload for
    /// the next message.
    pub(super) basics_only: bool,
    pub(super) found: Option<MigrationState>,
    /// Requests that were sent after the negotiation.
    pub(super) requests: AtomicU64,
    pub(super) stop: Arc<OwnedFd>,
    pub(super) thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Gives all that is asked from now on so long together, whatever each request may take; `None`: each its own limit, and no more.
    ///
    /// An operation that somebody waits for is many requests: their number is bounded, but not what a server takes for each.
    pub fn limit_all(&self, limit: Option<Duration>) {
        let until = limit.and_then(|limit| Some((Instant::now().checked_add(limit)?, limit)));
        *self.all_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    /// Gives all that the calling thread asks, until what is returned is dropped, `limit` together, from now on: instead of the limit on
    /// each request, and with the time for which others' requests are waited for. What is not answered by then is
    /// [late](crate::ClientError::Timeout).
    ///
    /// For who was told how long at most an answer is waited for. A guest's own accesses need no such limit: they wait until what
    /// is asked before them is over.
    #[must_use]
    pub fn limit_question(&self, limit: Duration) -> QuestionLimit {
        self.questions.ask(limit)
    }

    /// Limit on each request, [as it was asked for](super::ClientOptions::timeout).
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Limit on a change of the migration state and on RESET, [as it was asked for](super::ClientOptions::transition_timeout).
    pub fn transition_timeout(&self) -> Duration {
        self.transition_timeout
    }

    /// The terms agreed on with the server.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Whether the connection still works, as far as is known. Notices a server that hung up while nothing is asked of
    /// it; asks it nothing.
    pub fn is_alive(&self) -> bool {
        self.lost().is_none()
    }

    /// Why the connection no longer works: the server hung up, or broke the protocol. `None` while it works, as far as
    /// is known: a server that is late with an answer is not lost.
    pub fn lost(&self) -> Option<String> {
        self.conn.death().or_else(|| self.conn.peer_hung_up().then(|| "its server hung up".into()))
    }

    /// Number of requests sent since the negotiation. Every method of a client sends a number that what it is asked to do
    /// bounds, whatever the server answers; this is for tests of that.
    pub fn requests_sent(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// The state in which the device was found on connecting; `None` if it was not asked or has no migration.
    pub fn state_at_connect(&self) -> Option<MigrationState> {
        self.found
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("negotiated", &self.negotiated)
            .field("death", &self.conn.death())
            .finish()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // The thread waits on this descriptor besides its socket; a write to an eventfd of ours cannot fail.
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        self.conn.kill("the client was closed");
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
