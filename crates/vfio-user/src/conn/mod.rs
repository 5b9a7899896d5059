//! One socket of a connection, used by both ends: whole messages in and out, requests matched with replies.
//!
//! A vfio-user socket may carry commands in both directions. Whoever waits on one, waits for two things: the replies to
//! its own requests, and the peer's commands. So reading is a role that one thread holds at a time, under the `rx` lock:
//!
//! * [`Conn::exchange`] holds it from sending a request until its reply is in. The peer's commands that arrive in between
//!   are handed to a closure (the client serves DMA there) or queued;
//! * [`Conn::next_command`] takes it when there is something to read and no exchange under way.
//!
//! While an exchange sends, it also reads when the socket is full in the sending direction: two peers that send large
//! requests at each other at once would wait for ever otherwise. What it reads is queued, since a reply cannot
//! be put into the middle of a message.
//!
//! Writing takes the `tx` lock for the length of a message. Lock order: `rx`, then `tx`.

mod error;
mod socket;

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

pub(crate) use self::error::ConnError;
use self::socket::{Received, read_full, send_some, wait};
use crate::codec::{Command, HEADER_SIZE, Header, Kind};

/// The largest payload of a refused message that is read and dropped to stay in step, in bytes. Beyond, the
/// sender is not worth the time.
const MAX_DRAIN: usize = 16 << 20;
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

/// A request to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SocketRequest<'a> {
    pub(crate) command: Command,
    /// The payload, in pieces.
    pub(crate) parts: &'a [&'a [u8]],
    pub(crate) fds: &'a [BorrowedFd<'a>],
    /// The longest reply payload that makes sense, in bytes.
    pub(crate) max_reply: usize,
    pub(crate) deadline: Instant,
}

/// What to do with a command of the peer that arrives during an exchange.
pub(crate) type OnCommand<'a> = Option<&'a dyn Fn(&SocketMessage) -> Vec<u8>>;

/// A socket and the state of its two directions.
#[derive(Debug)]
pub(crate) struct Conn {
    socket: UnixStream,
    rx: Mutex<Rx>,
    /// Signalled, under `rx`, when the thread that serves commands comes back for the next.
    served: Condvar,
    tx: Mutex<()>,
    death: Mutex<Option<String>>,
    next_id: AtomicU16,
    /// Signalled when an exchange leaves commands in the queue.
    queued: OwnedFd,
    /// Ends every wait when readable.
    interrupt: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
struct Rx {
    queue: VecDeque<SocketMessage>,
    queue_bytes: usize,
    max_body: usize,
    max_fds: usize,
    /// Bytes of messages that were read whole.
    consumed: u64,
    /// A command was handed out, and its taker has not come back for another.
    serving: bool,
    /// A buffer to use again.
    spare: Vec<u8>,
}

impl Conn {
    /// Takes over `socket`. Commands of the peer have at most `max_body` bytes of payload and `max_fds` descriptors.
    pub(crate) fn new(
        socket: UnixStream,
        max_body: usize,
        max_fds: u32,
        interrupt: Option<Arc<OwnedFd>>,
    ) -> Result<Self, Errno> {
        // Large pieces of migration data cross in fewer rounds; a smaller buffer does no harm.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, 1 << 20);
        Ok(Self {
            socket,
            rx: Mutex::new(Rx {
                queue: VecDeque::new(),
                queue_bytes: 0,
                max_body,
                max_fds: usize::try_from(max_fds).unwrap_or(usize::MAX),
                consumed: 0,
                serving: false,
                spare: Vec::new(),
            }),
            served: Condvar::new(),
            tx: Mutex::new(()),
            death: Mutex::new(None),
            next_id: AtomicU16::new(0),
            queued: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            interrupt,
        })
    }

    /// Changes the limits on what the peer may send.
    pub(crate) fn set_limits(&self, max_body: usize, max_fds: u32) {
        let mut rx = lock(&self.rx);
        rx.max_body = max_body;
        rx.max_fds = usize::try_from(max_fds).unwrap_or(usize::MAX);
    }

    /// The reason for which the connection is dead, if it is.
    pub(crate) fn death(&self) -> Option<String> {
        lock(&self.death).clone()
    }

    /// Ends the connection, for every thread that uses it. The first reason given stays.
    pub(crate) fn kill(&self, why: impl Into<String>) {
        lock(&self.death).get_or_insert_with(|| why.into());
        // Fails only on a socket that is shut down already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Whether the peer has closed its end, as the system knows without asking it. What it sent before may still be
    /// unread.
    pub(crate) fn peer_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(gone)
    }

    /// Waits until every command that has arrived so far was served, by the one thread that calls
    /// [`next_command`](Self::next_command) or by an exchange. Commands that arrive meanwhile are not waited for.
    pub(crate) fn wait_until_served(&self, deadline: Instant) -> Result<(), ConnError> {
        // Bytes go unread unnoticed: nobody tells when a message begins to be read.
        const LOOK_AGAIN: Duration = Duration::from_millis(1);
        let mut rx = lock(&self.rx);
        // Under `rx` no message is half read.
        let unread = rustix::io::ioctl_fionread(&self.socket)
            .map_err(|errno| ConnError::closed(format!("asking for unread bytes: {errno}")))?;
        let target = rx.consumed.saturating_add(unread);
        loop {
            if rx.consumed >= target && !rx.serving && rx.queue.is_empty() {
                return Ok(());
            }
            self.check_alive()?;
            if Instant::now() >= deadline {
                return Err(ConnError::Timeout);
            }
            (rx, _) = self.served.wait_timeout(rx, LOOK_AGAIN).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Sends a request and waits for its reply, refusals included. Any error means that the connection is dead.
    pub(crate) fn exchange(
        &self,
        request: &SocketRequest<'_>,
        serve: OnCommand<'_>,
    ) -> Result<SocketMessage, ConnError> {
        let mut rx = lock(&self.rx);
        self.check_alive()?;
        let result = self.exchange_locked(&mut rx, request, serve);
        if let Err(error) = &result {
            self.kill(error.why());
        }
        if !rx.queue.is_empty() {
            let _ = rustix::io::write(&self.queued, &1u64.to_ne_bytes());
        }
        result
    }

    /// Waits, without limit, for a command of the peer; once one begins it must be whole within `limit`.
    /// Any error means that the connection is dead.
    pub(crate) fn next_command(&self, limit: Duration) -> Result<SocketMessage, ConnError> {
        loop {
            let result = self.try_command(limit);
            match result {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(error) => {
                    self.kill(error.why());
                    return Err(error);
                }
            }
            self.idle()?;
        }
    }

    /// Answers `message` unless it wants no answer. An error means that the connection is dead.
    pub(crate) fn reply(
        &self,
        to: &Header,
        kind: Kind,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(), ConnError> {
        if to.kind == (Kind::Command { no_reply: true }) {
            return Ok(());
        }
        self.check_alive()?;
        let deadline = deadline(limit);
        let tx = lock(&self.tx);
        let result = self.send(None, to.id, to.command, kind, &[body], fds, deadline);
        drop(tx);
        result.inspect_err(|error| self.kill(error.why()))
    }

    /// Sends the bytes of a whole message, if any. An error means that the connection is dead.
    pub(crate) fn send_whole(&self, message: &[u8], limit: Duration) -> Result<(), ConnError> {
        if message.is_empty() {
            return Ok(());
        }
        let _tx = lock(&self.tx);
        let result = self.send_bytes(None, &mut [IoSlice::new(message)], &[], deadline(limit));
        result.inspect_err(|error| self.kill(error.why()))
    }

    /// Gives a message's buffer back for the next.
    pub(crate) fn recycle(&self, message: SocketMessage) {
        if let Ok(mut rx) = self.rx.try_lock() {
            rx.keep_spare(message.body);
        }
    }

    fn check_alive(&self) -> Result<(), ConnError> {
        self.death().map_or(Ok(()), |why| Err(ConnError::Closed(why)))
    }

    fn exchange_locked(
        &self,
        rx: &mut Rx,
        request: &SocketRequest<'_>,
        serve: OnCommand<'_>,
    ) -> Result<SocketMessage, ConnError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let kind = Kind::Command { no_reply: false };
        let SocketRequest { command, parts, fds, deadline, .. } = *request;
        let tx = lock(&self.tx);
        self.send(Some(rx), id, command, kind, parts, fds, deadline)?;
        drop(tx);
        if let Some(serve) = serve {
            while let Some(message) = rx.pop() {
                self.serve_locked(rx, &message, serve, deadline)?;
            }
        }
        loop {
            let message = self.read(rx, request.max_reply, deadline)?;
            match (message.header.kind, serve) {
                (Kind::Command { .. }, Some(serve)) => self.serve_locked(rx, &message, serve, deadline)?,
                (Kind::Command { .. }, None) => rx.push(message)?,
                _ => return self.matched(message, id, request),
            }
        }
    }

    fn serve_locked(
        &self,
        rx: &mut Rx,
        message: &SocketMessage,
        serve: &dyn Fn(&SocketMessage) -> Vec<u8>,
        deadline: Instant,
    ) -> Result<(), ConnError> {
        let reply = serve(message);
        if reply.is_empty() {
            return Ok(());
        }
        let _tx = lock(&self.tx);
        self.send_bytes(Some(rx), &mut [IoSlice::new(&reply)], &[], deadline)
    }

    fn matched(
        &self,
        message: SocketMessage,
        id: u16,
        request: &SocketRequest<'_>,
    ) -> Result<SocketMessage, ConnError> {
        let Header { id: got, command, .. } = message.header;
        if got != id || command != request.command {
            return Err(ConnError::Violation(format!(
                "a reply to {command} number {got} where one to {} number {id} is due",
                request.command
            )));
        }
        if message.body.len() > request.max_reply && message.header.kind == Kind::Reply {
            return Err(ConnError::Violation(format!(
                "{} bytes in reply to {}, where {} are the most",
                message.body.len(),
                request.command,
                request.max_reply
            )));
        }
        let broken = match message.unfit {
            Some(Unfit::PayloadTooLong) => Some("too long a payload"),
            Some(Unfit::ExcessFds) => Some("more descriptors than were negotiated"),
            // Whoever asked is told; the connection stays good.
            Some(Unfit::NoRoomForFds) | None => None,
        };
        if let (Some(why), Kind::Reply) = (broken, message.header.kind) {
            return Err(ConnError::Violation(format!("{why} in reply to {}", request.command)));
        }
        Ok(message)
    }

    /// A command from the queue or the socket, without waiting for one to begin.
    fn try_command(&self, limit: Duration) -> Result<Option<SocketMessage>, ConnError> {
        let mut rx = lock(&self.rx);
        rx.serving = false;
        self.served.notify_all();
        if let Some(message) = rx.pop() {
            rx.serving = true;
            return Ok(Some(message));
        }
        self.check_alive()?;
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(ConnError::closed(format!("poll: {errno}"))),
        }
        let message = self.read(&mut rx, 0, deadline(limit))?;
        match message.header.kind {
            Kind::Command { .. } => {
                rx.serving = true;
                Ok(Some(message))
            }
            Kind::Reply | Kind::Error(_) => Err(ConnError::Violation(format!(
                "a reply to {} that nobody asked for",
                message.header.command
            ))),
        }
    }

    /// Waits for anything to happen on the socket or in the queue.
    fn idle(&self) -> Result<(), ConnError> {
        let mut fds =
            vec![PollFd::new(&self.socket, PollFlags::IN), PollFd::new(&self.queued, PollFlags::IN)];
        fds.extend(self.interrupt.as_ref().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(ConnError::closed(format!("poll: {errno}"))),
        }
        if fds.get(2).is_some_and(|fd| !fd.revents().is_empty()) {
            return Err(ConnError::Interrupted);
        }
        if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) {
            // Nonblocking: another thread may have been faster.
            let _ = rustix::io::read(&self.queued, &mut [0u8; 8]);
        }
        Ok(())
    }

    /// Reads one message. A payload over the limits is dropped and the message marked unfit.
    fn read(&self, rx: &mut Rx, max_reply: usize, deadline: Instant) -> Result<SocketMessage, ConnError> {
        let interrupt = self.interrupt.as_ref().map(|fd| fd.as_fd());
        let mut received = Received::default();
        let mut raw = [0; HEADER_SIZE];
        if !read_full(&self.socket, interrupt, &mut raw, &mut received, rx.max_fds, deadline)? {
            return Err(ConnError::closed("the peer closed it"));
        }
        let header = Header::decode(&raw).map_err(|error| ConnError::Violation(error.to_string()))?;
        let len = header.body_len();
        let limit = match header.kind {
            Kind::Command { .. } => rx.max_body,
            Kind::Reply => max_reply,
            // A refusal has no payload. One that has is read past, and its payload is of no interest.
            Kind::Error(_) => 0,
        };
        let mut message = SocketMessage { header, body: Vec::new(), fds: Vec::new(), unfit: None };
        if len > limit {
            if len > MAX_DRAIN {
                let command = header.command;
                return Err(ConnError::Violation(format!("{command} with {len} bytes of payload")));
            }
            message.unfit = Some(Unfit::PayloadTooLong);
            self.drain(rx, len, &mut received, deadline)?;
        } else if len > 0 {
            let mut body = std::mem::take(&mut rx.spare);
            body.resize(len, 0);
            if !read_full(&self.socket, interrupt, &mut body, &mut received, rx.max_fds, deadline)? {
                return Err(ConnError::closed("the peer closed it in the middle of a message"));
            }
            message.body = body;
        }
        if received.excess {
            message.unfit = Some(Unfit::ExcessFds);
        } else if received.too_many_open {
            message.unfit = Some(Unfit::NoRoomForFds);
        }
        message.fds = received.fds;
        rx.consumed = rx.consumed.saturating_add((HEADER_SIZE + len) as u64);
        Ok(message)
    }

    fn drain(
        &self,
        rx: &Rx,
        mut len: usize,
        received: &mut Received,
        deadline: Instant,
    ) -> Result<(), ConnError> {
        let interrupt = self.interrupt.as_ref().map(|fd| fd.as_fd());
        let mut sink = vec![0; len.min(64 << 10)];
        while len > 0 {
            let piece = sink.len().min(len);
            let into = sink.get_mut(..piece).unwrap_or_default();
            if !read_full(&self.socket, interrupt, into, received, rx.max_fds, deadline)? {
                return Err(ConnError::closed("the peer closed it in the middle of a message"));
            }
            len -= piece;
        }
        Ok(())
    }

    /// Sends one message. The caller holds `tx`, and lends `rx` if it holds that too.
    #[expect(clippy::too_many_arguments, reason = "a message's fields, used in two places")]
    fn send(
        &self,
        rx: Option<&mut Rx>,
        id: u16,
        command: Command,
        kind: Kind,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), ConnError> {
        let len = parts.iter().fold(HEADER_SIZE, |len, part| len.saturating_add(part.len()));
        let size = u32::try_from(len).map_err(|_| ConnError::Violation(format!("{len} bytes to be sent")))?;
        let header = Header { id, command, size, kind }.encode();
        let mut slices: Vec<IoSlice<'_>> = std::iter::once(&header[..])
            .chain(parts.iter().copied())
            .filter(|part| !part.is_empty())
            .map(IoSlice::new)
            .collect();
        self.send_bytes(rx, &mut slices, fds, deadline)
    }

    fn send_bytes(
        &self,
        mut rx: Option<&mut Rx>,
        mut slices: &mut [IoSlice<'_>],
        mut fds: &[BorrowedFd<'_>],
        deadline: Instant,
    ) -> Result<(), ConnError> {
        let interrupt = self.interrupt.as_ref().map(|fd| fd.as_fd());
        while !slices.is_empty() {
            match send_some(&self.socket, slices, fds) {
                Ok(sent) => {
                    // Descriptors go with the first byte.
                    fds = &[];
                    IoSlice::advance_slices(&mut slices, sent);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let wanted = if rx.is_some() { PollFlags::OUT | PollFlags::IN } else { PollFlags::OUT };
                    let ready = wait(&self.socket, interrupt, wanted, deadline)?;
                    if let (Some(rx), true, false) = (rx.as_deref_mut(), ready.readable, ready.writable) {
                        let message = self.read(rx, 0, deadline)?;
                        rx.push_command(message)?;
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnError::closed("the peer closed it")),
                Err(errno) => return Err(ConnError::closed(format!("sending: {errno}"))),
            }
        }
        Ok(())
    }
}

impl Rx {
    fn push_command(&mut self, message: SocketMessage) -> Result<(), ConnError> {
        match message.header.kind {
            Kind::Command { .. } => self.push(message),
            _ => {
                Err(ConnError::Violation(format!("a reply to {} before it was sent", message.header.command)))
            }
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

    fn pop(&mut self) -> Option<SocketMessage> {
        let message = self.queue.pop_front()?;
        self.queue_bytes = self.queue_bytes.saturating_sub(message.body.len());
        Some(message)
    }

    fn keep_spare(&mut self, body: Vec<u8>) {
        if body.capacity() > self.spare.capacity() && body.capacity() <= MAX_DRAIN {
            self.spare = body;
        }
    }
}

/// The moment `limit` from now; a limit too long to be counted is as good as a year.
pub(crate) fn deadline(limit: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
    Instant::now() + limit.min(YEAR)
}

/// Poisoning is ignored: no invariant spans a panic here, and a panicking handler must not take the others along.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
