//! What a server grants its clients.

use std::time::Duration;

use crate::codec::{DEFAULT_MAX_DATA_XFER_SIZE, DEFAULT_MAX_DMA_MAPS, DEFAULT_PGSIZES};

/// The most descriptors in one message that a server takes: QEMU's client refuses a server that announces more.
pub(super) const LARGEST_MSG_FDS: u32 = 16;

/// Options of a [`Server`](super::Server).
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// How long a command may take from its first byte to its last: after it the client is dropped. Also how long the server
    /// waits for a client that does not read a reply, or does not answer a DMA request: such a client is late, and stays; the
    /// request fails with ETIMEDOUT. How long a client may be silent that has said its version is not limited. 10 s.
    pub message_timeout: Duration,
    /// How long a connection has to say its version: until that message is there whole it is no client, and keeps no other from
    /// becoming one. After it the connection is dropped. 5 s.
    pub handshake_timeout: Duration,
    /// Most data in one message. 1 MiB.
    pub max_data_xfer_size: u32,
    /// Most descriptors in one message; at most 16. 8, as libvfio-user has it. No client is told more than it announced itself.
    pub max_msg_fds: u32,
    /// Most DMA mappings at a time. 65535.
    pub max_dma_maps: u32,
    /// Page sizes of DMA mappings, OR-ed; mappings are aligned to the smallest. 4 KiB.
    pub pgsizes: u64,
    /// Whether to make a twin socket for clients that ask for one. True.
    pub twin_socket: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            message_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(5),
            max_data_xfer_size: DEFAULT_MAX_DATA_XFER_SIZE,
            max_msg_fds: 8,
            max_dma_maps: DEFAULT_MAX_DMA_MAPS,
            pgsizes: DEFAULT_PGSIZES,
            twin_socket: true,
        }
    }
}
