//! The client: a VMM's end of a vfio-user connection.

mod device;
mod dma;
mod handshake;
mod migration;
mod recovery;
mod request;

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use vfio_migration_types::MigrationState;

pub use self::recovery::Recovery;
use crate::codec::{Extension, MAX_MSG_FDS};
use crate::conn::Conn;
use crate::error::ClientError;

/// Options of a [`Client`]. [`Default`] suits a VMM.
#[derive(Clone)]
pub struct ClientOptions {
    /// Limit on each request, from sending it to having its reply whole. 10 s.
    pub timeout: Duration,
    /// How long [`Client::connect`] goes on trying while the socket does not exist or refuses (a server binds before it listens). 5 s.
    pub connect_timeout: Duration,
    /// Most data in one message that this client takes and, where the server allows it, asks for. 1 MiB.
    pub max_data_xfer_size: u32,
    /// Most descriptors in one message that this client takes; at most 64. 64.
    pub max_msg_fds: u32,
    /// Whether to ask for a second socket for the server's DMA requests. They then do not wait behind replies. True.
    pub twin_socket: bool,
    /// Which parts of the extension to offer to the server. All.
    pub extension: Extension,
    /// Handler of the server's DMA_READ and DMA_WRITE; without one they are refused.
    pub dma: Option<Arc<dyn DmaHandler>>,
    /// What to do with a device that is found in another state than RUNNING. Recover it.
    pub on_connect: OnConnect,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            max_data_xfer_size: crate::codec::DEFAULT_MAX_DATA_XFER_SIZE,
            max_msg_fds: MAX_MSG_FDS,
            twin_socket: true,
            extension: Extension::ALL,
            dma: None,
            on_connect: OnConnect::Recover,
        }
    }
}

impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientOptions")
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("max_data_xfer_size", &self.max_data_xfer_size)
            .field("max_msg_fds", &self.max_msg_fds)
            .field("twin_socket", &self.twin_socket)
            .field("extension", &self.extension)
            .field("dma", &self.dma.is_some())
            .field("on_connect", &self.on_connect)
            .finish()
    }
}

/// What a client does, right after the version is negotiated, with a device that a former client left stopped.
///
/// Some servers refuse nearly everything, even RESET, until such a device is SET to RUNNING. But a device may also
/// hold the only copy of a guest's state, which must not be started on a guess: whoever keeps a journal of migrations
/// asks it before choosing [`Recover`](Self::Recover).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnConnect {
    /// Ask for the state and, if it is not RUNNING, do what [`Client::recover`] does.
    ///
    /// A server that knows no migration may lose step when asked (it answers the request and then takes its payload for
    /// another one). [`Client::connect`] notices, connects anew without asking and remembers that there is no migration;
    /// [`Client::from_stream`] cannot, and fails.
    Recover,
    /// Ask nothing, change nothing. For a device whose state is to be kept, and for servers known to have no migration.
    Leave,
}

/// Memory of the client, as a server may read and write it by DMA_READ and DMA_WRITE.
///
/// Called from a thread of the client, or from a thread that waits for a reply: an implementation must not call
/// the [`Client`] it serves. It checks that the range is mapped for the device; whoever logs dirty pages logs
/// `dma_write` here, since the server's own log does not hold these writes.
pub trait DmaHandler: Send + Sync {
    /// Fills `into` from the memory at bus address `iova`. The length is at most the client's `max_data_xfer_size`.
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno>;

    /// Writes `from` to the memory at bus address `iova`.
    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno>;
}

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
/// ([`ClientOptions::timeout`]). After a request that ran into it, or a broken frame, the connection is dead: every later call
/// fails with [`ClientError::ConnectionLost`]. A refusal by the server, or a reply that makes no sense in a sound frame, leaves it alive.
///
/// Dropping the client closes the connection and joins its threads.
pub struct Client {
    conn: Arc<Conn>,
    /// Where the DMA thread serves: the twin socket, or `conn`. `None` where there is no thread.
    serving: Option<Arc<Conn>>,
    timeout: Duration,
    negotiated: Negotiated,
    /// The `max_data_xfer_size` that the server was told.
    announced_xfer: u32,
    dma: Option<Arc<dyn DmaHandler>>,
    /// Number of DMA mappings.
    maps: std::sync::atomic::AtomicU32,
    no_migration: bool,
    found: Option<MigrationState>,
    stop: Arc<std::os::fd::OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Connects to the server that listens on `path`, negotiates, and treats the device as `on_connect` says.
    ///
    /// # Errors
    /// Nobody listened in time, the negotiation failed, or the device could not be recovered.
    pub fn connect(path: impl AsRef<Path>, options: ClientOptions) -> Result<Self, ClientError> {
        handshake::connect(path.as_ref(), options)
    }

    /// As [`connect`](Self::connect), over a stream that is connected already.
    pub fn from_stream(stream: UnixStream, options: ClientOptions) -> Result<Self, ClientError> {
        handshake::from_stream(stream, &options)
    }

    /// The terms agreed on with the server.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Whether the connection still works, as far as is known. Notices a server that hung up while nothing is asked of
    /// it; asks it nothing.
    pub fn is_alive(&self) -> bool {
        self.conn.death().is_none() && !self.conn.peer_hung_up()
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
