//! Serving the server's DMA requests.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;

use super::connection::Client;
use super::options::DmaHandler;
use crate::codec::{Command, DmaAccess, HEADER_SIZE, Header, Kind};
use crate::conn::{Conn, ConnError, SocketMessage, deadline};
use crate::error::ClientError;

/// Bytes of payload that a DMA request may have beside its data.
pub(super) const HEAD: usize = DmaAccess::SIZE;

impl Client {
    /// Waits until every DMA request that has arrived so far was served, within [`timeout`](super::ClientOptions).
    ///
    /// A DMA_WRITE that wants no reply may be on the twin socket, unread, when the reply to a later request of the
    /// client's own is in. Whoever has just been told that the device has stopped, and looks at what it wrote, calls this
    /// first.
    ///
    /// # Errors
    /// They were not served in time, or the connection ended with some of them unserved.
    pub fn dma_settled(&self) -> Result<(), ClientError> {
        let Some(serving) = &self.serving else { return Ok(()) };
        let question = self.questions.of_this_thread();
        let (until, after) = question.map_or_else(
            || (deadline(self.timeout), self.timeout),
            |question| (question.until, question.limit),
        );
        serving.wait_until_served(until).map_err(|error| match error {
            ConnError::Timeout => ClientError::Timeout { command: Command::DMA_WRITE, after, sent: true },
            other => ClientError::ConnectionLost { why: other.why() },
        })
    }
}

/// The whole reply to a command of the server; empty if it wants none.
pub(super) fn answer(message: &SocketMessage, handler: Option<&dyn DmaHandler>, max: u32) -> Vec<u8> {
    let Header { id, command, kind, .. } = message.header;
    let (kind_out, body) = match perform(message, handler, max) {
        Ok(body) => (Kind::Reply, body),
        // EINVAL would be 22; a real errno always, since 0 tells the server nothing.
        Err(errno) => (Kind::Error(errno.raw_os_error().unsigned_abs()), Vec::new()),
    };
    if kind == (Kind::Command { no_reply: true }) {
        return Vec::new();
    }
    let size = u32::try_from(HEADER_SIZE + body.len()).unwrap_or(u32::MAX);
    let mut reply = Header { id, command, size, kind: kind_out }.encode().to_vec();
    reply.extend_from_slice(&body);
    reply
}

fn perform(message: &SocketMessage, handler: Option<&dyn DmaHandler>, max: u32) -> Result<Vec<u8>, Errno> {
    let command = message.header.command;
    if !matches!(command, Command::DMA_READ | Command::DMA_WRITE) {
        return Err(Errno::OPNOTSUPP);
    }
    if message.unfit.is_some() || !message.fds.is_empty() {
        return Err(Errno::INVAL);
    }
    let handler = handler.ok_or(Errno::OPNOTSUPP)?;
    let (access, data) = DmaAccess::decode_with_rest(&message.body).map_err(|_| Errno::INVAL)?;
    let in_space = access.count == 0 || access.address.checked_add(access.count - 1).is_some();
    if access.count > u64::from(max) || !in_space {
        return Err(Errno::INVAL);
    }
    let count = usize::try_from(access.count).map_err(|_| Errno::INVAL)?;
    let mut reply = access.to_vec();
    if command == Command::DMA_READ {
        if !data.is_empty() {
            return Err(Errno::INVAL);
        }
        reply.resize(HEAD + count, 0);
        handler.dma_read(access.address, reply.get_mut(HEAD..).unwrap_or_default())?;
    } else {
        if data.len() != count {
            return Err(Errno::INVAL);
        }
        handler.dma_write(access.address, data)?;
    }
    Ok(reply)
}

/// Starts the thread that serves DMA requests: on the twin socket, or on the main one while no request of the client's
/// is under way. It ends when the connection does.
pub(super) fn spawn(
    conn: Arc<Conn>,
    handler: Option<Arc<dyn DmaHandler>>,
    max: u32,
    limit: Duration,
) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("vfio-user-dma".into()).spawn(move || {
        loop {
            let message = match conn.next_command(limit) {
                Ok(message) => message,
                // A server that is late with the rest of a message.
                Err(ConnError::Timeout) => continue,
                Err(_) => return,
            };
            let whole = answer(&message, handler.as_deref(), max);
            conn.recycle(message);
            match conn.send_whole(&whole, limit) {
                Ok(()) | Err(ConnError::Timeout) => {}
                Err(_) => return,
            }
        }
    })
}

/// The twin socket of a connection.
pub(super) fn twin(fd: OwnedFd, max_body: usize, stop: Arc<OwnedFd>) -> Result<Arc<Conn>, Errno> {
    Conn::new(UnixStream::from(fd), max_body, 0, Some(stop)).map(Arc::new)
}
