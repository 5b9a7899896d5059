//! One connection as a stream of frames, written by any thread.
//!
//! A frame is written under a lock, whole. Whoever wants the link to end, from whatever thread and whatever the
//! others are blocked in, calls [`Link::shutdown`]; every blocked read and write then returns.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::Shutdown;
use vfio_migration_memory::Pieces;
use vfio_migration_types::PAGE_SIZE;
use vfio_migration_wire::{Bulk, Crc, Message, PREAMBLE, encode, encode_bulk};

use crate::channel::error::ChannelError;
use crate::channel::transport::{Socket, Transport};
use crate::session::fail::sentence;
use crate::session::lock::lock;

/// A connection. Closed when the last holder drops it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(super) transport: Box<dyn Transport>,
    write: Mutex<WriteHalf>,
    start: Instant,
    /// Milliseconds since `start`.
    pub(super) received_at: AtomicU64,
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
    pub(crate) fn new(fd: OwnedFd) -> Result<Arc<Self>, ChannelError> {
        let link = Self::accepted(fd);
        link.welcome()?;
        Ok(link)
    }

    /// Takes a stream socket of somebody who connected. Nothing is sent before the peer's preamble has been read.
    pub(crate) fn accepted(fd: OwnedFd) -> Arc<Self> {
        Arc::new(Self {
            transport: Box::new(Socket(fd)),
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
    pub(super) fn welcome(&self) -> Result<(), ChannelError> {
        let mut half = lock(&self.write);
        if std::mem::take(&mut half.reserved) {
            let sent = self.write_all(&[&PREAMBLE]);
            self.writing.store(0, Ordering::Relaxed);
            sent?;
        }
        Ok(())
    }

    /// Ends the connection for a reason of our own, which is told as the reason.
    pub(crate) fn give_up(&self, why: &str) {
        lock(&self.broken).get_or_insert_with(|| why.to_owned());
        self.shutdown();
    }

    /// Ends the connection in both directions; what has arrived can still be read.
    pub(crate) fn shutdown(&self) {
        self.transport.shutdown(Shutdown::Both);
    }

    /// Says that nothing more will be written, so that the peer reads to the end.
    pub(crate) fn shutdown_write(&self) {
        self.transport.shutdown(Shutdown::Write);
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
    pub(crate) fn send(&self, message: &Message) -> Result<(), ChannelError> {
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
                lock(&self.broken).get_or_insert_with(|| sentence(&error));
                // The reader learns of it by an end of the stream, after all that the peer said before.
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
