//! One connection as a stream of frames, written by any thread.
//!
//! A frame is written under a lock, whole. Whoever wants the link to end, from whatever thread and whatever the
//! others are blocked in, calls [`Link::shutdown`]; every blocked read and write then returns.

use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::Shutdown;
use vfio_migration_memory::Pieces;
use vfio_migration_types::{PAGE_SIZE, error_chain};
use vfio_migration_wire::{Bulk, Crc, Message, PREAMBLE, encode, encode_bulk};

use crate::channel::error::ChannelError;
use crate::channel::transport::Transport;
use crate::session::lock::lock;
use crate::tls::security::ConnectionSecurity;

/// A connection. Closed when the last holder drops it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(super) transport: Box<dyn Transport>,
    write: Mutex<WriteHalf>,
    start: Instant,
    /// Time of the last frame that came, in milliseconds since `start`.
    pub(super) received_at: AtomicU64,
    sent_at: AtomicU64,
    wire_bytes: AtomicU64,
    /// Time at which the write under way began, in milliseconds since `start`, plus one; 0: none.
    writing: AtomicU64,
    /// The reason why writing ended, for who reports the end of the link.
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
    /// Takes a connection, and sends the preamble: the side that connects.
    pub(crate) fn new(transport: Box<dyn Transport>) -> Result<Arc<Self>, ChannelError> {
        let link = Self::accepted(transport);
        link.welcome()?;
        Ok(link)
    }

    /// Takes the connection of somebody who connected. Nothing is sent before the peer's preamble has been read.
    pub(crate) fn accepted(transport: Box<dyn Transport>) -> Arc<Self> {
        Arc::new(Self {
            transport,
            write: Mutex::new(WriteHalf { sequence: 0, broken: false, pong: None, reserved: true }),
            start: Instant::now(),
            received_at: AtomicU64::new(0),
            sent_at: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            writing: AtomicU64::new(0),
            broken: Mutex::new(None),
        })
    }

    /// Sends the preamble, unless it has been sent. That the peer is gone is no failure yet: it may have said why, which is
    /// still to be read.
    pub(crate) fn welcome(&self) -> Result<(), ChannelError> {
        let mut half = lock(&self.write);
        if std::mem::take(&mut half.reserved) {
            let sent = self.write_all(&[&PREAMBLE]);
            self.writing.store(0, Ordering::Relaxed);
            match sent {
                Err(error @ ChannelError::System { source: Errno::PIPE | Errno::CONNRESET, .. }) => {
                    half.broken = true;
                    lock(&self.broken).get_or_insert_with(|| error_chain(&error));
                }
                sent => sent?,
            }
        }
        Ok(())
    }

    /// Ends the connection for a reason of our own, which is reported as the reason.
    pub(crate) fn give_up(&self, why: &str) {
        lock(&self.broken).get_or_insert_with(|| why.to_owned());
        self.shutdown();
    }

    /// Ends the connection in both directions; what has arrived can still be read.
    pub(crate) fn shutdown(&self) {
        self.transport.shutdown(Shutdown::Both);
    }

    /// Closes the writing direction, so that the peer reads to the end.
    pub(crate) fn shutdown_write(&self) {
        self.transport.shutdown(Shutdown::Write);
    }

    /// Whether the peer sends nothing more.
    pub(crate) fn has_hung_up(&self) -> bool {
        self.transport.wait(PollFlags::RDHUP, Duration::ZERO)
    }

    /// Counts the peer's silence from now on: nobody has listened to it.
    pub(crate) fn begin_to_listen(&self) {
        self.received_at.store(self.millis(), Ordering::Relaxed);
    }

    /// Time for which the peer has been silent.
    pub(crate) fn silence(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.received_at.load(Ordering::Relaxed)))
    }

    /// Time for which the write under way, of whatever thread, has been waiting for the peer to take it.
    pub(crate) fn blocked(&self) -> Duration {
        match self.writing.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            began => self.start.elapsed().saturating_sub(Duration::from_millis(began - 1)),
        }
    }

    /// The address at the other end, for a person to read.
    pub(crate) fn peer(&self) -> String {
        self.transport.peer()
    }

    /// How the connection is secured, and what the peer has proved to be.
    pub(crate) fn security(&self) -> ConnectionSecurity {
        self.transport.security()
    }

    /// A secret that both ends derive from the connection; `None` where it has none.
    pub(crate) fn export(&self, label: &[u8], context: &[u8]) -> Option<[u8; 32]> {
        self.transport.export(label, context)
    }

    /// Everything written so far, headers included.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }

    /// The reason why writing ended, if it did.
    pub(crate) fn write_error(&self) -> Option<String> {
        lock(&self.broken).clone()
    }

    /// Sends a control message.
    pub(crate) fn send(&self, message: &Message) -> Result<(), ChannelError> {
        self.send_locked(lock(&self.write), message)
    }

    /// Sends a ping if nothing has been sent for `idle` and nobody is writing (then the peer receives that anyway). Never
    /// the first message, which is HELLO or QUERY. Never waits: a peer that does not read has enough to receive.
    pub(crate) fn keep_alive(&self, idle: Duration) {
        let quiet =
            self.start.elapsed().saturating_sub(Duration::from_millis(self.sent_at.load(Ordering::Relaxed)));
        let mut half = match self.write.try_lock() {
            Ok(half) => half,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        if half.sequence == 0 {
            return;
        }
        // A socket that is writable has room for far more than a ping.
        if !self.transport.wait(PollFlags::OUT, Duration::ZERO) {
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
    pub(super) fn pinged(&self, token: u64) {
        if let Ok(mut half) = self.write.try_lock() {
            half.pong = Some(token);
        }
    }

    /// Sends bulk that has no body. Returns the bytes put on the wire.
    pub(crate) fn send_bulk(&self, bulk: &Bulk<'_>) -> Result<u64, ChannelError> {
        let mut half = lock(&self.write);
        half.check()?;
        let frame = encode_bulk(bulk, half.sequence)?;
        self.written(half, self.write_all(&frame.parts()), frame.wire_len())
    }

    /// Sends `count` pages from page `first`, which `body` is, straight from memory and without a checksum: the guest may
    /// write them meanwhile. Returns the bytes put on the wire.
    pub(crate) fn send_pages(
        &self,
        first: u64,
        count: u32,
        mut body: Pieces<'_>,
    ) -> Result<u64, ChannelError> {
        let mut half = lock(&self.write);
        half.check()?;
        let frame = encode_bulk(&Bulk::Pages { first, count, crc: None }, half.sequence)?;
        let sent = self.write_body(frame.head(), &mut body);
        self.written(half, sent, frame.wire_len())
    }

    /// Sends pages, whole ones, from a copy, with a checksum of the copy. Returns the bytes put on the wire.
    pub(crate) fn send_page_copy(&self, first: u64, copy: &[u8]) -> Result<u64, ChannelError> {
        let count = u32::try_from(copy.len() as u64 / PAGE_SIZE).unwrap_or(u32::MAX);
        // Before the lock: others may write meanwhile.
        let crc = Some(Crc::of(copy).value());
        let mut half = lock(&self.write);
        half.check()?;
        let frame = encode_bulk(&Bulk::Pages { first, count, crc }, half.sequence)?;
        self.written(half, self.write_all(&[frame.head(), copy]), frame.wire_len())
    }

    fn send_locked(
        &self,
        mut half: MutexGuard<'_, WriteHalf>,
        message: &Message,
    ) -> Result<(), ChannelError> {
        half.check()?;
        let frame = encode(message, half.sequence)?;
        let len = frame.len() as u64;
        self.written(half, self.write_all(&[&frame]), len).map(drop)
    }

    fn written(
        &self,
        mut half: MutexGuard<'_, WriteHalf>,
        sent: Result<(), ChannelError>,
        len: u64,
    ) -> Result<u64, ChannelError> {
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
                lock(&self.broken).get_or_insert_with(|| error_chain(&error));
                // The reader learns of it by an end of the stream, after all that the peer sent before.
                self.shutdown();
                Err(error)
            }
        }
    }

    fn write_all(&self, parts: &[&[u8]]) -> Result<(), ChannelError> {
        let mut slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
        let mut rest = slices.as_mut_slice();
        IoSlice::advance_slices(&mut rest, 0);
        self.writing.store(self.millis() + 1, Ordering::Relaxed);
        while !rest.is_empty() {
            let sent = self.transport.write(rest).map_err(ChannelError::of("sending to the peer"))?;
            IoSlice::advance_slices(&mut rest, sent);
        }
        Ok(())
    }

    fn write_body(&self, mut head: &[u8], body: &mut Pieces<'_>) -> Result<(), ChannelError> {
        self.writing.store(self.millis() + 1, Ordering::Relaxed);
        while !head.is_empty() || body.left() > 0 {
            let sent =
                self.transport.write_pieces(head, body).map_err(ChannelError::of("sending to the peer"))?;
            let of_head = sent.min(head.len());
            head = head.get(of_head..).unwrap_or_default();
            body.advance(sent - of_head);
        }
        Ok(())
    }

    pub(super) fn millis(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl WriteHalf {
    fn check(&mut self) -> Result<(), ChannelError> {
        if self.broken || self.reserved { Err(ChannelError::Closed) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;

    use vfio_migration_memory::{GuestRam, RamSpec};
    use vfio_migration_types::{Gpa, Phase, RamOffset, Range, Side};
    use vfio_migration_wire::{Frame, limits};

    use super::*;
    use crate::channel::reader::Reader;
    use crate::channel::transport::{Socket, TransportError};
    use crate::session::work_error::WorkError;

    const PAGES: u64 = 2 * limits::PAGES as u64;

    fn socket(stream: UnixStream) -> Box<dyn Transport> {
        Box::new(Socket::new(stream.into()))
    }

    fn ram() -> GuestRam {
        GuestRam::new("test", &[RamSpec { gpa: Gpa(0), len: PAGES * PAGE_SIZE }]).unwrap()
    }

    fn filled() -> GuestRam {
        let ram = ram();
        (0..ram.size() / 8).for_each(|word| ram.write_u64(RamOffset(word * 8), word | 1).unwrap());
        ram
    }

    fn pages(first: u64, count: u64) -> Range<RamOffset> {
        Range::new(RamOffset(first * PAGE_SIZE), count * PAGE_SIZE).unwrap()
    }

    fn send(link: &Link, ram: &GuestRam, first: u64) -> Result<u64, ChannelError> {
        let body = ram.pieces(&[pages(first, limits::PAGES.into())]).unwrap();
        link.send_pages(first, limits::PAGES, body)
    }

    /// Whoever handed a descriptor over may still hold it, and have made it non-blocking.
    #[test]
    fn pages_pass_a_socket_that_was_made_non_blocking() {
        let (source, destination) = (filled(), ram());
        let (a, b) = UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        b.set_nonblocking(true).unwrap();
        let there = Link::accepted(socket(b));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let here = Link::new(socket(a)).unwrap();
                for first in [0, limits::PAGES.into()] {
                    send(&here, &source, first).unwrap();
                }
            });
            let mut reader = Reader::new(&there, Side::Source);
            for _ in 0..2 {
                let Frame::Bulk(Bulk::Pages { first, count, crc: None }) = reader.next().unwrap() else {
                    panic!("no pages came")
                };
                reader.body(&mut destination.pieces(&[pages(first, count.into())]).unwrap()).unwrap();
            }
        });
        assert_eq!(source.digest().unwrap(), destination.digest().unwrap());
    }

    /// A session whose threads get no processor for a while must not begin with a ping.
    #[test]
    fn nothing_is_sent_before_the_first_message() {
        let (a, mut b) = UnixStream::pair().unwrap();
        let link = Link::new(socket(a)).unwrap();
        link.keep_alive(Duration::ZERO);
        link.send(&Message::Begin { lease: [1; 16] }).unwrap();
        link.keep_alive(Duration::ZERO);
        link.shutdown();
        let mut sent = Vec::new();
        b.read_to_end(&mut sent).unwrap();
        let begin = encode(&Message::Begin { lease: [1; 16] }, 0).unwrap();
        let ping = encode(&Message::Ping { token: 1 }, 1).unwrap();
        assert_eq!(sent, [PREAMBLE.as_slice(), &begin, &ping].concat());
    }

    #[test]
    fn an_end_inside_a_body_says_how_much_is_missing() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&PREAMBLE).unwrap();
        let frame = encode_bulk(&Bulk::Pages { first: 0, count: 3, crc: None }, 0).unwrap();
        a.write_all(frame.head()).unwrap();
        a.write_all(&[1; 5000]).unwrap();
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let mut reader = Reader::new(&Link::accepted(socket(b)), Side::Source);
        reader.next().unwrap();
        let error = reader.body(&mut ram().pieces(&[pages(0, 3)]).unwrap()).unwrap_err();
        assert!(matches!(error, ChannelError::Cut { missing: 7288 }), "{error:?}");
    }

    #[test]
    fn a_blocked_sender_gives_up_when_its_link_is_shut_down() {
        let source = filled();
        let (a, mut b) = UnixStream::pair().unwrap();
        let link = Link::new(socket(a)).unwrap();
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| send(&link, &source, 0));
            // Some of the frame has come, so the sender is inside; nobody reads the rest.
            b.read_exact(&mut [0; PREAMBLE.len() + 1]).unwrap();
            link.shutdown();
            let error = sender.join().unwrap().unwrap_err();
            assert!(matches!(error, ChannelError::System { source: Errno::PIPE, .. }), "{error:?}");
            assert!(matches!(WorkError::sending(error, Side::Source, Phase::Final), WorkError::Link));
        });
    }

    /// A socket over which memory cannot be moved.
    #[derive(Debug)]
    struct NoMemory(Socket);

    impl Transport for NoMemory {
        fn write(&self, parts: &[IoSlice<'_>]) -> Result<usize, TransportError> {
            self.0.write(parts)
        }

        fn write_pieces(&self, _: &[u8], _: &Pieces<'_>) -> Result<usize, TransportError> {
            Err(Errno::FAULT.into())
        }

        fn read(&self, into: &mut [u8]) -> Result<usize, TransportError> {
            self.0.read(into)
        }

        fn read_now(&self, into: &mut [u8]) -> Result<usize, TransportError> {
            self.0.read_now(into)
        }

        fn read_pieces(&self, _: &mut Pieces<'_>) -> Result<usize, TransportError> {
            Err(Errno::FAULT.into())
        }

        fn wait(&self, flags: PollFlags, limit: Duration) -> bool {
            self.0.wait(flags, limit)
        }

        fn shutdown(&self, how: Shutdown) {
            self.0.shutdown(how);
        }

        fn is_proven(&self) -> bool {
            self.0.is_proven()
        }

        fn fd(&self) -> BorrowedFd<'_> {
            self.0.fd()
        }

        fn peer(&self) -> String {
            self.0.peer()
        }

        fn security(&self) -> ConnectionSecurity {
            self.0.security()
        }

        fn export(&self, label: &[u8], context: &[u8]) -> Option<[u8; 32]> {
            self.0.export(label, context)
        }
    }

    #[test]
    fn a_fault_of_memory_is_no_lost_connection() {
        let (a, _b) = UnixStream::pair().unwrap();
        let link = Link::accepted(Box::new(NoMemory(Socket::new(a.into()))));
        link.welcome().unwrap();
        let error = send(&link, &filled(), 0).unwrap_err();
        assert!(matches!(error, ChannelError::Memory { source: Errno::FAULT, .. }), "{error:?}");
        let WorkError::Failed(failure) = WorkError::sending(error, Side::Source, Phase::Iterate) else {
            panic!("told as a lost connection")
        };
        assert!(failure.text.contains("guest memory") && failure.errno == Some(14), "{failure:?}");
    }
}
