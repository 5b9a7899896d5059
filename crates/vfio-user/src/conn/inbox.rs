//! What one socket has given so far: a message that is half read, commands that wait, the answer that is due.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::thread::ThreadId;

use super::error::ConnError;
use super::socket::Received;
use crate::codec::{Command, HEADER_SIZE, Header, Kind};

/// The largest payload of a refused message that is read and dropped to stay in step, in bytes. Beyond, the
/// sender is not worth the time.
pub(super) const MAX_DRAIN: usize = 16 << 20;
/// The most commands that are queued while a request of our own is under way.
const MAX_QUEUE: usize = 256;
/// The most payload bytes in that queue.
const MAX_QUEUE_BYTES: usize = 16 << 20;

/// One whole message of the socket, with its descriptors.
#[derive(Debug)]
pub(crate) struct SocketMessage {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Why it cannot be granted, whatever it asks.
    pub(crate) unfit: Option<Unfit>,
}

/// Why a whole message is of no use. What it carried too much was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// Its payload is above the limit.
    PayloadTooLong,
    /// It came with more descriptors than were negotiated.
    ExcessFds,
    /// Its descriptors could not be taken, since this process has too many open. The peer did nothing wrong.
    NoRoomForFds,
}

/// The request that was sent and not answered. One is under way at a time. It outlives the wait for it: an answer that
/// comes late is known by it, and dropped.
#[derive(Clone, Copy, Debug)]
pub(super) struct Awaited {
    pub(super) id: u16,
    pub(super) command: Command,
    /// The longest reply payload that makes sense, in bytes.
    pub(super) max_reply: usize,
}

/// A message whose rest has not come.
#[derive(Debug, Default)]
pub(super) struct Partial {
    pub(super) raw: [u8; HEADER_SIZE],
    /// Bytes of the header that are in.
    pub(super) head: usize,
    pub(super) header: Option<Header>,
    /// The payload, or as much as is read at a time of one that is dropped.
    pub(super) body: Vec<u8>,
    /// Bytes of the payload that are in.
    pub(super) filled: usize,
    pub(super) too_long: bool,
    pub(super) received: Received,
}

#[derive(Debug)]
pub(super) struct Rx {
    pub(super) queue: VecDeque<SocketMessage>,
    queue_bytes: usize,
    pub(super) max_body: usize,
    pub(super) max_fds: usize,
    /// Bytes of messages that were read whole.
    pub(super) consumed: u64,
    /// A command was handed out, and its taker has not come back for another.
    pub(super) serving: bool,
    /// Who took it; `None` once a request was held back for it in vain.
    pub(super) taker: Option<ThreadId>,
    pub(super) partial: Option<Partial>,
    pub(super) awaited: Option<Awaited>,
    /// The answer to it, read while something else was done.
    pub(super) answer: Option<SocketMessage>,
    /// A buffer to use again.
    pub(super) spare: Vec<u8>,
}

impl Rx {
    pub(super) fn new(max_body: usize, max_fds: usize) -> Self {
        Self {
            queue: VecDeque::new(),
            queue_bytes: 0,
            max_body,
            max_fds,
            consumed: 0,
            serving: false,
            taker: None,
            partial: None,
            awaited: None,
            answer: None,
            spare: Vec::new(),
        }
    }

    /// Notes that the calling thread has a command to serve.
    pub(super) fn hand_out(&mut self) {
        self.serving = true;
        self.taker = Some(std::thread::current().id());
    }

    /// Keeps a message for whoever it is for.
    pub(super) fn place(&mut self, message: SocketMessage) -> Result<(), ConnError> {
        match message.header.kind {
            Kind::Command { .. } => self.push(message),
            _ if self.awaited.is_some() && self.answer.is_none() => {
                self.answer = Some(message);
                Ok(())
            }
            _ => Err(ConnError::Violation(format!(
                "a reply to {} that nobody asked for",
                message.header.command
            ))),
        }
    }

    fn push(&mut self, message: SocketMessage) -> Result<(), ConnError> {
        self.queue_bytes += message.body.len();
        self.queue.push_back(message);
        if self.queue.len() > MAX_QUEUE || self.queue_bytes > MAX_QUEUE_BYTES {
            return Err(ConnError::Violation("more commands at once than can be queued".into()));
        }
        Ok(())
    }

    /// Whether another command of any size can be queued. What is not read waits in the socket.
    pub(super) fn has_room(&self) -> bool {
        self.queue.len() < MAX_QUEUE && self.queue_bytes.saturating_add(self.max_body) <= MAX_QUEUE_BYTES
    }

    pub(super) fn pop(&mut self) -> Option<SocketMessage> {
        let message = self.queue.pop_front()?;
        self.queue_bytes = self.queue_bytes.saturating_sub(message.body.len());
        Some(message)
    }

    pub(super) fn keep_spare(&mut self, body: Vec<u8>) {
        if body.capacity() > self.spare.capacity() && body.capacity() <= MAX_DRAIN {
            self.spare = body;
        }
    }
}

/// The answer, if it is one to the request that was awaited.
pub(super) fn matched(message: SocketMessage, awaited: Awaited) -> Result<SocketMessage, ConnError> {
    let Awaited { id, command, max_reply } = awaited;
    let Header { id: got, command: answered, .. } = message.header;
    if got != id || answered != command {
        return Err(ConnError::Violation(format!(
            "a reply to {answered} number {got} where one to {command} number {id} is due"
        )));
    }
    if message.body.len() > max_reply && message.header.kind == Kind::Reply {
        return Err(ConnError::Violation(format!(
            "{} bytes in reply to {command}, where {max_reply} are the most",
            message.body.len()
        )));
    }
    let broken = match message.unfit {
        Some(Unfit::PayloadTooLong) => Some("too long a payload"),
        Some(Unfit::ExcessFds) => Some("more descriptors than were negotiated"),
        // Whoever asked is told; the connection stays good.
        Some(Unfit::NoRoomForFds) | None => None,
    };
    if let (Some(why), Kind::Reply) = (broken, message.header.kind) {
        return Err(ConnError::Violation(format!("{why} in reply to {command}")));
    }
    Ok(message)
}
