//! A device's way to client memory that it has no descriptor for.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::codec::{Command, DmaAccess, Kind};
use crate::conn::{Conn, ConnError, SocketMessage, SocketRequest};

/// Reads and writes the client's memory by DMA_READ and DMA_WRITE.
///
/// May be used from any thread, inside the methods of [`Backend`](super::Backend) too; one request is under way at a
/// time. It fails with ENOTCONN once the client has left.
#[derive(Clone)]
pub struct DmaChannel {
    conn: Arc<Conn>,
    /// Most bytes of one request, or of its answer.
    max: usize,
    limit: Duration,
}

impl DmaChannel {
    pub(super) fn new(conn: Arc<Conn>, max: usize, limit: Duration) -> Self {
        Self { conn, max: max.max(1), limit }
    }

    /// Fills `into` from the client's memory at bus address `iova`, in pieces of the size that the client takes.
    ///
    /// # Errors
    /// The client's own errno; EIO if it gave none; EPROTO for a reply that makes no sense; ETIMEDOUT for one that is late, before
    /// which nothing else is asked; ENOTCONN. What was read before a failure is in `into`.
    pub fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        let mut at = iova;
        for piece in into.chunks_mut(self.max) {
            let count = piece.len() as u64;
            let ask = DmaAccess { address: at, count };
            let reply = self.request(Command::DMA_READ, &[&ask.to_vec()], DmaAccess::SIZE + piece.len())?;
            let (echo, data) = DmaAccess::decode_with_rest(&reply.body).map_err(|_| Errno::PROTO)?;
            if echo.count != count || data.len() != piece.len() {
                return Err(Errno::PROTO);
            }
            piece.copy_from_slice(data);
            self.conn.recycle(reply);
            at = at.wrapping_add(count);
        }
        Ok(())
    }

    /// Writes `from` to the client's memory at bus address `iova`, in pieces of the size that the client takes.
    ///
    /// # Errors
    /// As for [`read`](Self::read). What was written before a failure stays, and one that is late may still be written.
    pub fn write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        let mut at = iova;
        for piece in from.chunks(self.max) {
            let count = piece.len() as u64;
            let ask = DmaAccess { address: at, count };
            let reply = self.request(Command::DMA_WRITE, &[&ask.to_vec(), piece], DmaAccess::SIZE)?;
            // The specification has a count of 4 bytes in this reply, implementations one of 8.
            let echoed = reply.body.get(8..12).and_then(|raw| raw.try_into().ok()).map(u32::from_ne_bytes);
            if echoed.map(u64::from) != Some(count) {
                return Err(Errno::PROTO);
            }
            at = at.wrapping_add(count);
        }
        Ok(())
    }

    fn request(&self, command: Command, parts: &[&[u8]], max_reply: usize) -> Result<SocketMessage, Errno> {
        if self.conn.death().is_some() {
            return Err(Errno::NOTCONN);
        }
        let request = SocketRequest {
            command,
            parts,
            fds: &[],
            max_reply,
            limit: self.limit,
            until: None,
            after_reply: true,
        };
        let reply = self.conn.exchange(&request, None).map_err(|error| match error {
            // Late, and not gone: its answer is known by its number, and dropped when it comes.
            ConnError::Timeout | ConnError::Behind => Errno::TIMEDOUT,
            ConnError::Violation(_) => Errno::PROTO,
            _ => Errno::NOTCONN,
        })?;
        match reply.header.kind {
            Kind::Error(errno) => {
                let errno = i32::try_from(errno).ok().filter(|errno| (1..4096).contains(errno));
                Err(errno.map_or(Errno::IO, Errno::from_raw_os_error))
            }
            _ => Ok(reply),
        }
    }
}

impl fmt::Debug for DmaChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaChannel").field("max", &self.max).field("death", &self.conn.death()).finish()
    }
}
