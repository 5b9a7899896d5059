//! The read half of a connection, for one thread. Small reads go through a buffer; bodies of pages go straight into memory.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use vfio_migration_memory::Pieces;
use vfio_migration_types::Side;
use vfio_migration_wire::{
    Foreign, Frame, FrameHeader, HEADER_LEN, Message, OPTIONAL, PREAMBLE, WireError, check_preamble,
};

use crate::channel::error::ChannelError;
use crate::channel::link::Link;
use crate::channel::transport::TransportError;

/// Reads the frames of a connection, in order.
#[derive(Debug)]
pub(crate) struct Reader {
    link: Arc<Link>,
    /// The side that sends: a failure that it reports is its own.
    peer: Side,
    greeted: bool,
    sequence: u64,
    buffer: Vec<u8>,
    at: usize,
    payload: Vec<u8>,
}

/// The step that fails, for its error.
const RECEIVING: &str = "receiving from the peer";

/// Longest payload of a first message: HELLO and QUERY, and the answers to QUERY, are far shorter.
const FIRST_PAYLOAD: usize = 64 << 10;

/// Bytes read ahead at most: what of a body lies in the buffer is copied once.
const READ_AHEAD: usize = 64 << 10;

impl Reader {
    /// Reads what `peer` sends. To be made once per connection.
    pub(crate) fn new(link: &Arc<Link>, peer: Side) -> Self {
        Self {
            link: Arc::clone(link),
            peer,
            greeted: false,
            sequence: 0,
            buffer: Vec::new(),
            at: 0,
            payload: Vec::new(),
        }
    }

    /// The next frame, pings and optional frames left out. The body of page frames must be taken by
    /// [`body`](Self::body) before the next call.
    pub(crate) fn next(&mut self) -> Result<Frame<'_>, ChannelError> {
        let header = loop {
            let header = self.header()?;
            let mut payload = std::mem::take(&mut self.payload);
            payload.resize(header.payload_len(), 0);
            let read = self.exactly(&mut payload);
            self.payload = payload;
            read?;
            if !matches!(header.name(), "PING" | "PONG") && header.number() & OPTIONAL == 0 {
                break header;
            }
            if let Frame::Message(Message::Ping { token }) = Frame::decode(&header, &self.payload, self.peer)?
            {
                self.link.pinged(token);
            }
        };
        Ok(Frame::decode(&header, &self.payload, self.peer)?)
    }

    /// Reads and throws away until the connection ends, so that closing it does not destroy our last message on its way.
    pub(crate) fn drain(&mut self) {
        while matches!(self.fill(), Ok(read) if read > 0) {}
    }

    /// The first frame of the connection, if it has arrived whole: reads what is there, and never waits. `None`: not yet.
    pub(crate) fn first(&mut self) -> Result<Option<Message>, ChannelError> {
        loop {
            if let Some(message) = self.first_of_buffer()? {
                return Ok(Some(message));
            }
            if !self.more()? {
                // A source over TLS says nothing before it is told that its certificate is taken.
                if self.link.transport.is_proven() {
                    self.link.welcome()?;
                }
                return Ok(None);
            }
        }
    }

    /// Sleeps until something can be read, or for `limit`. Says whether something can.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        self.link.transport.wait(PollFlags::IN, limit)
    }

    /// Whether the peer has sent anything yet.
    pub(crate) fn has_heard(&self) -> bool {
        !self.buffer.is_empty() || self.link.transport.has_heard()
    }

    /// The socket, to be waited for.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.link.transport.fd()
    }

    fn first_of_buffer(&mut self) -> Result<Option<Message>, ChannelError> {
        let mut rest = self.buffer.get(self.at..).unwrap_or_default();
        if !self.greeted {
            let Some((preamble, behind)) = rest.split_first_chunk() else { return Ok(None) };
            check_preamble(preamble)?;
            self.link.welcome()?;
            self.greeted = true;
            self.at += PREAMBLE.len();
            rest = behind;
        }
        let Some((header, rest)) = rest.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let header = FrameHeader::parse(header, self.sequence)?;
        if header.payload_len() > FIRST_PAYLOAD {
            return Err(ChannelError::Unexpected);
        }
        let Some(payload) = rest.get(..header.payload_len()) else { return Ok(None) };
        let Frame::Message(message) = Frame::decode(&header, payload, self.peer)? else {
            return Err(ChannelError::Unexpected);
        };
        self.sequence += 1;
        self.at += HEADER_LEN + header.payload_len();
        Ok(Some(message))
    }

    /// Appends to the buffer what has arrived; returns whether anything has.
    fn more(&mut self) -> Result<bool, ChannelError> {
        let had = self.buffer.len();
        let mut buffer = std::mem::take(&mut self.buffer);
        // No more than a first message can be: what is behind it waits in the socket.
        buffer.resize(had + 4096, 0);
        let read = self.link.transport.read_now(buffer.get_mut(had..).unwrap_or_default());
        buffer.truncate(had + *read.as_ref().unwrap_or(&0));
        self.buffer = buffer;
        match read {
            Ok(0) => Err(ChannelError::Closed),
            Ok(_) => {
                self.heard();
                Ok(true)
            }
            Err(TransportError::System(Errno::AGAIN)) => Ok(false),
            Err(error) => Err(ChannelError::of(RECEIVING)(error)),
        }
    }

    /// Reads the body of a page frame, of which `into` is as long, straight into memory.
    pub(crate) fn body(&mut self, into: &mut Pieces<'_>) -> Result<(), ChannelError> {
        self.at += into.fill(self.buffer.get(self.at..).unwrap_or_default());
        while into.left() > 0 {
            if self.link.transport.read_pieces(into).map_err(ChannelError::of(RECEIVING))? == 0 {
                return Err(ChannelError::Cut { missing: into.left() });
            }
            self.heard();
        }
        Ok(())
    }

    /// Reads the body of a page frame into a buffer of its length: for who has no guest memory.
    pub(crate) fn body_into(&mut self, into: &mut [u8]) -> Result<(), ChannelError> {
        self.exactly(into)
    }

    fn header(&mut self) -> Result<FrameHeader, ChannelError> {
        if !self.greeted {
            let mut preamble = [0; PREAMBLE.len()];
            if let Err(error) = self.first_of(&mut preamble) {
                // An alert of TLS is shorter than a preamble.
                return Err(match check_preamble(&preamble) {
                    Err(foreign @ WireError::Foreign(Foreign::Tls)) => foreign.into(),
                    _ => error,
                });
            }
            check_preamble(&preamble)?;
            self.link.welcome()?;
            self.greeted = true;
        }
        let mut bytes = [0; HEADER_LEN];
        self.first_of(&mut bytes)?;
        let header = FrameHeader::parse(&bytes, self.sequence)?;
        self.sequence += 1;
        Ok(header)
    }

    /// Like [`exactly`](Self::exactly), but an end before the first byte is a close, not a cut.
    fn first_of(&mut self, into: &mut [u8]) -> Result<(), ChannelError> {
        if self.at == self.buffer.len() && self.fill()? == 0 {
            return Err(ChannelError::Closed);
        }
        self.exactly(into)
    }

    fn exactly(&mut self, into: &mut [u8]) -> Result<(), ChannelError> {
        let mut done = 0;
        while done < into.len() {
            let ready = self.buffer.len() - self.at;
            let rest = &mut into[done..];
            if ready > 0 {
                let take = ready.min(rest.len());
                rest[..take].copy_from_slice(&self.buffer[self.at..self.at + take]);
                self.at += take;
                done += take;
            } else if rest.len() >= READ_AHEAD {
                match self.receive(rest)? {
                    0 => return Err(ChannelError::Cut { missing: rest.len() as u64 }),
                    read => done += read,
                }
            } else if self.fill()? == 0 {
                return Err(ChannelError::Cut { missing: rest.len() as u64 });
            }
        }
        Ok(())
    }

    fn fill(&mut self) -> Result<usize, ChannelError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(READ_AHEAD, 0);
        let read = self.receive(&mut buffer);
        buffer.truncate(*read.as_ref().unwrap_or(&0));
        self.buffer = buffer;
        self.at = 0;
        read
    }

    fn receive(&self, into: &mut [u8]) -> Result<usize, ChannelError> {
        let read = self.link.transport.read(into).map_err(ChannelError::of(RECEIVING))?;
        self.heard();
        Ok(read)
    }

    fn heard(&self) {
        self.link.received_at.store(self.link.millis(), Ordering::Relaxed);
    }
}
