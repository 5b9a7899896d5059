//! What a client asks of its connection, and what it offers to the server.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::codec::{DEFAULT_MAX_DATA_XFER_SIZE, Extension};

/// Options of a [`Client`](super::Client). [`Default`] suits a VMM.
#[derive(Clone)]
pub struct ClientOptions {
    /// Limit on each request, from when no other is under way to having its reply whole. 10 s.
    pub timeout: Duration,
    /// The same for SETs of the migration state and for RESET. 30 s.
    pub transition_timeout: Duration,
    /// Limit on all that is asked, from connecting until [`Client::limit_all`](super::Client::limit_all) says otherwise, however many requests
    /// that takes. None.
    pub limit_all: Option<Duration>,
    /// How long [`Client::connect`](super::Client::connect) goes on trying while the socket does not exist or refuses (a server binds before it listens). 5 s.
    pub connect_timeout: Duration,
    /// Most data in one message that this client takes and, where the server allows it, asks for. 1 MiB.
    pub max_data_xfer_size: u32,
    /// Most descriptors in one message that this client takes; at most 64. 16, as QEMU has it.
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
            transition_timeout: Duration::from_secs(30),
            limit_all: None,
            connect_timeout: Duration::from_secs(5),
            max_data_xfer_size: DEFAULT_MAX_DATA_XFER_SIZE,
            max_msg_fds: 16,
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
            .field("transition_timeout", &self.transition_timeout)
            .field("limit_all", &self.limit_all)
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
    /// Ask for the state and, if it is not RUNNING, do what [`Client::recover`](super::Client::recover) does.
    ///
    /// A server that knows no migration may lose step when asked (it answers the request and then takes its payload for
    /// another one). [`Client::connect`](super::Client::connect) notices, connects anew and from then on sends nothing but what every server
    /// knows, commands 1 to 5, 7 to 10 and 13; [`Client::from_stream`](super::Client::from_stream) cannot, and fails.
    Recover,
    /// Change nothing. For a device whose state is to be kept. [`Client::connect`](super::Client::connect) asks whether the device has
    /// migration, for the same reason; [`Client::from_stream`](super::Client::from_stream) asks nothing.
    Leave,
}

/// Memory of the client, as a server may read and write it by DMA_READ and DMA_WRITE.
///
/// Called from a thread of the client, or from a thread that waits for a reply: an implementation must not call
/// the [`Client`](super::Client) it serves. It checks that the range is mapped for the device; whoever logs dirty pages logs
/// `dma_write` here, since the server's own log does not hold these writes.
pub trait DmaHandler: Send + Sync {
    /// Fills `into` from the memory at bus address `iova`. The length is at most the client's `max_data_xfer_size`.
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno>;

    /// Writes `from` to the memory at bus address `iova`.
    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno>;
}
