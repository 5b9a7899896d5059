//! One connection as a stream of frames: a write half that any thread may use, a read half for one thread.
//!
//! A frame is written under a lock, whole. Whoever wants the link to end, from whatever thread and whatever the
//! others are blocked in, calls [`Link::shutdown`]; every blocked read and write then returns.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};
use vfio_migration_memory::{GuestRam, MemoryError};
use vfio_migration_types::{PAGE_SIZE, RamOffset, Range};
use vfio_migration_wire::{
    Bulk, Crc, Frame, FrameHeader, HEADER_LEN, Message, OPTIONAL, PREAMBLE, WireError, check_preamble,
    encode, encode_bulk,
};

use crate::control::lock;
use crate::session::fail::sentence;

/// Why the link cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("the peer closed the connection")]
    Closed,
    #[error("the connection ended inside a frame, with {missing} bytes missing")]
    Cut { missing: u64 },
    #[error("{doing} failed")]
    System {
        doing: &'static str,
        #[source]
        source: Errno,
    },
    #[error("the peer's stream is damaged")]
    Wire(#[from] WireError),
    #[error("bulk data came where only a control message can")]
    Unexpected,
    #[error("guest memory")]
    Memory(#[from] MemoryError),
}

/// A connection. Closed when the last holder drops it.
#[derive(Debug)]
pub(crate) struct Link {
    fd: OwnedFd,
    write: Mutex<WriteHalf>,
    start: Instant,
    /// Milliseconds since `start`.
    received_at: AtomicU64,
    sent_at: AtomicU64,
    wire_bytes: AtomicU64,
    /// When the write under way began, in milliseconds since `start`, plus one; 0: none.
    writing: AtomicU64,
    /// Why writing ended, for who reports the end of the link.
    broken: Mutex<Option<String>>,
}

#[derive(Debug)]
struct WriteHalf {
    sequence: u64,
    /// A frame was cut short: nothing may follow.
    broken: bool,
    /// A ping to be answered, by whoever writes next.
    pong: Option<u64>,
    /// Our preamble waits for the peer's: a stranger gets no answer, so nothing may be written before.
    reserved: bool,
}

impl Link {
    /// Takes a connected stream socket, and sends the preamble: the side that connects.
    pub(crate) fn new(fd: OwnedFd) -> Result<Arc<Self>, LinkError> {
        let link = Self::accepted(fd);
        link.welcome()?;
        Ok(link)
    }

    /// Takes a stream socket of somebody who connected. Nothing is sent before the peer's preamble has been read.
    pub(crate) fn accepted(fd: OwnedFd) -> Arc<Self> {
        Arc::new(Self {
            fd,
            write: Mutex::new(WriteHalf { sequence: 0, broken: false, pong: None, reserved: true }),
            start: Instant::now(),
            received_at: AtomicU64::new(0),
            sent_at: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            writing: AtomicU64::new(0),
            broken: Mutex::new(None),
        })
    }

    /// Sends the preamble, unless it has been sent.
    fn welcome(&self) -> Result<(), LinkError> {
        let mut half = lock(&self.write);
        if std::mem::take(&mut half.reserved) {
            let sent = self.write_all(&[&PREAMBLE]);
            self.writing.store(0, Ordering::Relaxed);
            sent?;
        }
        Ok(())
    }

    /// The read half. To be made once.
    pub(crate) fn reader(self: &Arc<Self>) -> Reader {
        Reader {
            link: Arc::clone(self),
            greeted: false,
            sequence: 0,
            buffer: Vec::new(),
            at: 0,
            payload: Vec::new(),
        }
    }

    /// Ends the connection for a reason of our own, which is told as the reason.
    pub(crate) fn give_up(&self, why: &str) {
        lock(&self.broken).get_or_insert_with(|| why.to_owned());
        self.shutdown();
    }

    /// Ends the connection in both directions; what has arrived can still be read.
    pub(crate) fn shutdown(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Both);
    }

    /// Says that nothing more will be written, so that the peer reads to the end.
    pub(crate) fn shutdown_write(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    /// How long the peer has been silent.
    pub(crate) fn silence(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.received_at.load(Ordering::Relaxed)))
    }

    /// How long the write under way, of whatever thread, has been waiting for the peer to take it.
    pub(crate) fn blocked(&self) -> Duration {
        match self.writing.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            began => self.start.elapsed().saturating_sub(Duration::from_millis(began - 1)),
        }
    }

    /// Everything written so far, headers included.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }

    /// Why writing ended, if it did.
    pub(crate) fn write_error(&self) -> Option<String> {
        lock(&self.broken).clone()
    }

    /// Sends a control message.
    pub(crate) fn send(&self, message: &Message) -> Result<(), LinkError> {
        self.send_locked(lock(&self.write), message)
    }

    /// Sends a ping if nothing has been sent for `idle` and nobody is writing (then the peer hears us anyway). Never
    /// waits: a peer that does not read has enough to hear of us.
    pub(crate) fn keep_alive(&self, idle: Duration) {
        let quiet =
            self.start.elapsed().saturating_sub(Duration::from_millis(self.sent_at.load(Ordering::Relaxed)));
        let mut half = match self.write.try_lock() {
            Ok(half) => half,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        // A socket that is writable has room for far more than a ping.
        if !poll(self.fd.as_fd(), PollFlags::OUT, Duration::ZERO) {
            return;
        }
        let message = match half.pong.take() {
            Some(token) => Message::Pong { token },
            None if quiet >= idle => Message::Ping { token: half.sequence },
            None => return,
        };
        let _ = self.send_locked(half, &message);
    }

    /// Remembers a ping of the peer; [`keep_alive`](Self::keep_alive) answers it. The read half must never wait for
    /// the write half, or two peers could wait for each other.
    fn pinged(&self, token: u64) {
        if let Ok(mut half) = self.write.try_lock() {
            half.pong = Some(token);
        }
    }

    /// Sends bulk that has no body. Returns the bytes put on the wire.
    pub(crate) fn send_bulk(&self, bulk: &Bulk<'_>) -> Result<u64, LinkError> {
        let mut half = lock(&self.write);
        half.check()?;
        let frame = encode_bulk(bulk, half.sequence)?;
        self.written(half, self.write_all(&frame.parts()), frame.wire_len())
    }

    /// Sends `count` pages from page `first`, straight from guest memory, without a checksum: the guest may write them
    /// meanwhile. Returns the bytes put on the wire.
    pub(crate) fn send_pages(&self, ram: &GuestRam, first: u64, count: u32) -> Result<u64, LinkError> {
        let pages = page_range(ram, first, count)?;
        let mut half = lock(&self.write);
        half.check()?;
        let frame = encode_bulk(&Bulk::Pages { first, count, crc: None }, half.sequence)?;
        self.writing.store(self.millis() + 1, Ordering::Relaxed);
        let sent = ram.send(self.fd.as_fd(), frame.head(), pages).map_err(LinkError::from);
        self.written(half, sent, frame.wire_len())
    }

    /// Sends pages, whole ones, from a copy, with a checksum of the copy. Returns the bytes put on the wire.
    pub(crate) fn send_page_copy(&self, first: u64, copy: &[u8]) -> Result<u64, LinkError> {
        let count = u32::try_from(copy.len() as u64 / PAGE_SIZE).unwrap_or(u32::MAX);
        // Before the lock: others may write meanwhile.
        let crc = Some(Crc::of(copy).value());
        let mut half = lock(&self.write);
        half.check()?;
        let frame = encode_bulk(&Bulk::Pages { first, count, crc }, half.sequence)?;
        self.written(half, self.write_all(&[frame.head(), copy]), frame.wire_len())
    }

    fn send_locked(&self, mut half: MutexGuard<'_, WriteHalf>, message: &Message) -> Result<(), LinkError> {
        half.check()?;
        let frame = encode(message, half.sequence)?;
        let len = frame.len() as u64;
        self.written(half, self.write_all(&[&frame]), len).map(drop)
    }

    fn written(
        &self,
        mut half: MutexGuard<'_, WriteHalf>,
        sent: Result<(), LinkError>,
        len: u64,
    ) -> Result<u64, LinkError> {
        self.writing.store(0, Ordering::Relaxed);
        match sent {
            Ok(()) => {
                half.sequence += 1;
                self.wire_bytes.fetch_add(len, Ordering::Relaxed);
                self.sent_at.store(self.millis(), Ordering::Relaxed);
                Ok(len)
            }
            Err(error) => {
                half.broken = true;
                lock(&self.broken).get_or_insert_with(|| sentence(&error));
                // The reader learns of it by an end of the stream, after all that the peer said before.
                self.shutdown();
                Err(error)
            }
        }
    }

    fn write_all(&self, parts: &[&[u8]]) -> Result<(), LinkError> {
        let mut done = 0;
        let total: usize = parts.iter().map(|part| part.len()).sum();
        self.writing.store(self.millis() + 1, Ordering::Relaxed);
        while done < total {
            let mut skip = done;
            let mut slices = Vec::with_capacity(parts.len());
            for part in parts {
                let from = skip.min(part.len());
                skip -= from;
                if let Some(rest) = part.get(from..).filter(|rest| !rest.is_empty()) {
                    slices.push(IoSlice::new(rest));
                }
            }
            let mut control = SendAncillaryBuffer::default();
            match rustix::net::sendmsg(&self.fd, &slices, &mut control, SendFlags::NOSIGNAL) {
                Ok(sent) => done += sent,
                Err(Errno::INTR) => {}
                Err(source) => return Err(LinkError::System { doing: "sending to the peer", source }),
            }
        }
        Ok(())
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl WriteHalf {
    fn check(&mut self) -> Result<(), LinkError> {
        if self.broken || self.reserved { Err(LinkError::Closed) } else { Ok(()) }
    }
}

/// The read half. Small reads go through a buffer; bodies of pages go straight into guest memory.
#[derive(Debug)]
pub(crate) struct Reader {
    link: Arc<Link>,
    greeted: bool,
    sequence: u64,
    buffer: Vec<u8>,
    at: usize,
    payload: Vec<u8>,
}

/// Longest payload of a first message: HELLO and QUERY, and the answers to QUERY, are far shorter.
const FIRST_PAYLOAD: usize = 64 << 10;

/// Bytes read ahead at most: what of a body lies in the buffer is copied once.
const READ_AHEAD: usize = 64 << 10;

impl Reader {
    /// The next frame, pings and optional frames left out. The body of page frames must be taken by
    /// [`body`](Self::body) before the next call.
    pub(crate) fn next(&mut self) -> Result<Frame<'_>, LinkError> {
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
            if let Frame::Message(Message::Ping { token }) = Frame::decode(&header, &self.payload)? {
                self.link.pinged(token);
            }
        };
        Ok(Frame::decode(&header, &self.payload)?)
    }

    /// Reads and throws away until the connection ends, so that closing it does not destroy our last word on its way.
    pub(crate) fn drain(&mut self) {
        while matches!(self.fill(), Ok(read) if read > 0) {}
    }

    /// The first frame of the connection, if it has arrived whole: reads what is there, and never waits. `None`: not yet.
    pub(crate) fn first(&mut self) -> Result<Option<Message>, LinkError> {
        loop {
            if let Some(message) = self.first_of_buffer()? {
                return Ok(Some(message));
            }
            if !self.more()? {
                return Ok(None);
            }
        }
    }

    /// Sleeps until something can be read, or for `limit`. Says whether something can.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        poll(self.link.fd.as_fd(), PollFlags::IN, limit)
    }

    /// The socket, to be waited for.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.link.fd.as_fd()
    }

    fn first_of_buffer(&mut self) -> Result<Option<Message>, LinkError> {
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
            return Err(LinkError::Unexpected);
        }
        let Some(payload) = rest.get(..header.payload_len()) else { return Ok(None) };
        let Frame::Message(message) = Frame::decode(&header, payload)? else {
            return Err(LinkError::Unexpected);
        };
        self.sequence += 1;
        self.at += HEADER_LEN + header.payload_len();
        Ok(Some(message))
    }

    /// Appends to the buffer what has arrived; says whether anything has.
    fn more(&mut self) -> Result<bool, LinkError> {
        let had = self.buffer.len();
        let mut buffer = std::mem::take(&mut self.buffer);
        // No more than a first message can be: what is behind it waits in the socket.
        buffer.resize(had + 4096, 0);
        let read = loop {
            match rustix::net::recv(&self.link.fd, &mut buffer[had..], RecvFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                other => break other.map(|(read, _)| read),
            }
        };
        buffer.truncate(had + *read.as_ref().unwrap_or(&0));
        self.buffer = buffer;
        match read {
            Ok(0) => Err(LinkError::Closed),
            Ok(_) => {
                self.heard();
                Ok(true)
            }
            Err(Errno::AGAIN) => Ok(false),
            Err(source) => Err(LinkError::System { doing: "receiving from the peer", source }),
        }
    }

    /// Reads the body of a page frame into guest memory.
    pub(crate) fn body(
        &mut self,
        ram: &GuestRam,
        first: u64,
        count: u32,
        crc: Option<u32>,
    ) -> Result<(), LinkError> {
        let pages = page_range(ram, first, count)?;
        let mut at = pages.start().0;
        let ready = self.buffer.len() - self.at;
        let take = ready.min(as_usize(pages.len()));
        ram.write(RamOffset(at), &self.buffer[self.at..self.at + take])?;
        self.at += take;
        at += take as u64;
        let odd = as_usize((pages.end() - at) % PAGE_SIZE);
        if odd != 0 {
            // The buffer is empty, and must stay so: what follows is read past it.
            let mut rest = [0; 4096];
            self.directly(&mut rest[..odd])?;
            ram.write(RamOffset(at), &rest[..odd])?;
            at += odd as u64;
        }
        if let Ok(rest) = Range::new(RamOffset(at), pages.end() - at) {
            ram.receive(self.link.fd.as_fd(), rest)?;
            self.heard();
        }
        if let Some(announced) = crc {
            // Read back from where the guest will find it.
            let mut found = Crc::new();
            let mut piece = [0; 16 << 10];
            let mut at = pages.start().0;
            while at < pages.end() {
                let len = as_usize(pages.end() - at).min(piece.len());
                ram.read(RamOffset(at), &mut piece[..len])?;
                found.update(&piece[..len]);
                at += len as u64;
            }
            found.check_body(announced)?;
        }
        Ok(())
    }

    /// Reads the body of a page frame into a buffer of its length: for who has no guest memory.
    pub(crate) fn body_into(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
        self.exactly(into)
    }

    fn header(&mut self) -> Result<FrameHeader, LinkError> {
        if !self.greeted {
            let mut preamble = [0; PREAMBLE.len()];
            self.first_of(&mut preamble)?;
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
    fn first_of(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
        if self.at == self.buffer.len() && self.fill()? == 0 {
            return Err(LinkError::Closed);
        }
        self.exactly(into)
    }

    fn exactly(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
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
                match self.receive_into(|link| receive(link, rest))? {
                    0 => return Err(LinkError::Cut { missing: rest.len() as u64 }),
                    read => done += read,
                }
            } else if self.fill()? == 0 {
                return Err(LinkError::Cut { missing: rest.len() as u64 });
            }
        }
        Ok(())
    }

    /// Fills `into` from the socket, past the buffer.
    fn directly(&mut self, into: &mut [u8]) -> Result<(), LinkError> {
        let mut done = 0;
        while let Some(rest) = into.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let missing = rest.len() as u64;
            match self.receive_into(|link| receive(link, rest))? {
                0 => return Err(LinkError::Cut { missing }),
                read => done += read,
            }
        }
        Ok(())
    }

    fn fill(&mut self) -> Result<usize, LinkError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(READ_AHEAD, 0);
        let read = self.receive_into(|link| receive(link, &mut buffer));
        buffer.truncate(*read.as_ref().unwrap_or(&0));
        self.buffer = buffer;
        self.at = 0;
        read
    }

    fn receive_into(
        &mut self,
        mut call: impl FnMut(&Link) -> Result<usize, Errno>,
    ) -> Result<usize, LinkError> {
        loop {
            match call(&self.link) {
                Ok(read) => {
                    self.heard();
                    return Ok(read);
                }
                Err(Errno::INTR) => {}
                Err(source) => return Err(LinkError::System { doing: "receiving from the peer", source }),
            }
        }
    }

    fn heard(&self) {
        self.link.received_at.store(self.link.millis(), Ordering::Relaxed);
    }
}

fn poll(fd: BorrowedFd<'_>, flags: PollFlags, limit: Duration) -> bool {
    let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
    let mut polled = [PollFd::from_borrowed_fd(fd, flags)];
    rustix::event::poll(&mut polled, Some(&limit)).is_ok_and(|ready| ready > 0)
}

fn receive(link: &Link, into: &mut [u8]) -> Result<usize, Errno> {
    rustix::net::recv(&link.fd, into, RecvFlags::empty()).map(|(read, _)| read)
}

fn page_range(ram: &GuestRam, first: u64, count: u32) -> Result<Range<RamOffset>, LinkError> {
    let start = first.checked_mul(PAGE_SIZE);
    let len = u64::from(count) * PAGE_SIZE;
    let end = start.and_then(|start| start.checked_add(len));
    match (start, end) {
        (Some(start), Some(end)) if end <= ram.size() => Range::new(RamOffset(start), len).map_err(|_| {
            LinkError::Memory(MemoryError::OutOfBounds { offset: start, len, size: ram.size() })
        }),
        _ => Err(LinkError::Memory(MemoryError::OutOfBounds {
            offset: first.saturating_mul(PAGE_SIZE),
            len,
            size: ram.size(),
        })),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "lengths of memory that is mapped, on 64-bit hosts")]
fn as_usize(bytes: u64) -> usize {
    bytes as usize
}
