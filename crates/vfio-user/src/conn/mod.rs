//! One socket of a connection, used by both ends: whole messages in and out, requests matched with replies.
//!
//! A vfio-user socket may carry commands in both directions. Whoever waits on one, waits for two things: the replies to
//! its own requests, and the peer's commands. So reading is a role that one thread holds at a time, under the `rx` lock:
//!
//! * [`Conn::exchange`] holds it from sending a request until its reply is in. The peer's commands that arrive in between
//!   are handed to a closure (the client serves DMA there) or queued;
//! * [`Conn::next_command`] takes it when there is something to read and no exchange under way.
//!
//! Whoever cannot send since the socket is full, or another thread sends, reads meanwhile: two peers that send large
//! messages at each other would wait for ever otherwise. What is read is kept, since nothing can be put into the middle
//! of a message that is being sent.
//!
//! A wait that runs out of time leaves the stream in step: the rest of a message that was begun is sent before the next
//! one, the rest of one that was half read is read on, and the late answer is known by its number and dropped. No other
//! request is sent before that.
//!
//! Writing takes the `tx` lock for the length of a message. Lock order: `rx`, then `tx`; the other way round it is only tried.

mod error;
mod inbox;
mod sending;
mod socket;
#[cfg(test)]
mod tests;
mod turn;

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

pub(crate) use self::error::ConnError;
use self::inbox::{Awaited, MAX_DRAIN, Partial, Rx, matched};
pub(crate) use self::inbox::{SocketMessage, Unfit};
pub(crate) use self::socket::address;
use self::socket::{read_full, wait};
use self::turn::{Turns, lock_until};
use crate::codec::{Command, HEADER_SIZE, Header, Kind};
use crate::event::DropReason;

/// How often a lock that another thread holds while it sends or reads is tried again.
const TRY_AGAIN: Duration = Duration::from_millis(5);
/// How long a request is held back for the answer to the peer's command, which may itself wait for the request.
const HOLD: Duration = Duration::from_millis(20);

/// A request to be sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SocketRequest<'a> {
    pub(crate) command: Command,
    /// The payload, in pieces.
    pub(crate) parts: &'a [&'a [u8]],
    pub(crate) fds: &'a [BorrowedFd<'a>],
    /// The longest reply payload that makes sense, in bytes.
    pub(crate) max_reply: usize,
    /// How long the answer may take, from when nobody else uses the socket.
    pub(crate) limit: Duration,
    /// Time by which the answer is there all the same, whoever uses the socket before.
    pub(crate) until: Option<Instant>,
    /// Not before the command in service has been answered: QEMU 11.1 loses step over a command that comes before the
    /// reply to its own.
    pub(crate) after_reply: bool,
}

impl SocketRequest<'_> {
    /// Time by which what is waited for from now on is there.
    fn deadline(&self) -> Instant {
        let deadline = deadline(self.limit);
        self.until.map_or(deadline, |until| until.min(deadline))
    }
}

/// What to do with a command of the peer that arrives during an exchange.
pub(crate) type OnCommand<'a> = Option<&'a dyn Fn(&SocketMessage) -> Vec<u8>>;

/// A socket and the state of its two directions.
#[derive(Debug)]
pub(crate) struct Conn {
    socket: UnixStream,
    /// Whose request is under way. Taken before `rx`.
    turns: Turns,
    rx: Mutex<Rx>,
    /// Signalled, under `rx`, when the thread that serves commands comes back for the next.
    served: Condvar,
    /// What is to be sent before anything else: the rest of a message that was begun.
    tx: Mutex<Vec<u8>>,
    death: Mutex<Option<Death>>,
    next_id: AtomicU16,
    /// Signalled when an exchange leaves commands in the queue.
    queued: OwnedFd,
    /// Ends every wait when readable.
    interrupt: Option<Arc<OwnedFd>>,
    /// [`HOLD`].
    hold: Duration,
}

/// The end of a connection.
#[derive(Debug)]
struct Death {
    why: String,
    /// Why this end dropped the peer, if it did.
    drops_peer: Option<DropReason>,
}

impl AsFd for Conn {
    /// The socket, to be waited for.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
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
            turns: Turns::default(),
            rx: Mutex::new(Rx::new(max_body, usize::try_from(max_fds).unwrap_or(usize::MAX))),
            served: Condvar::new(),
            tx: Mutex::new(Vec::new()),
            death: Mutex::new(None),
            next_id: AtomicU16::new(0),
            queued: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            interrupt,
            hold: HOLD,
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
        lock(&self.death).as_ref().map(|death| death.why.clone())
    }

    /// Ends the connection, for every thread that uses it. The first reason given stays.
    pub(crate) fn kill(&self, why: impl Into<String>) {
        self.die(Death { why: why.into(), drops_peer: None });
    }

    /// Ends the connection because of `error`, as [`kill`](Self::kill) does.
    pub(crate) fn end(&self, error: &ConnError) {
        self.die(Death { why: error.why(), drops_peer: error.drops_peer() });
    }

    /// The reason for which this end ended the connection, where the peer would have stayed.
    pub(crate) fn dropped_for(&self) -> Option<DropReason> {
        lock(&self.death).as_ref()?.drops_peer.clone()
    }

    fn die(&self, death: Death) {
        lock(&self.death).get_or_insert(death);
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
        let unread = rustix::io::ioctl_fionread(&self.socket)
            .map_err(|errno| ConnError::system("asking for unread bytes", errno))?;
        // What is half read is in neither.
        let begun = rx.partial.as_ref().map_or(0, |partial| (partial.head + partial.filled) as u64);
        let target = rx.consumed.saturating_add(begun).saturating_add(unread);
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

    /// Sends a request and waits for its reply, refusals included. Its time begins when nobody else uses the socket; before,
    /// the answer to an earlier one that is late gets as long. All of that ends at [`SocketRequest::until`]. Any error but [`ConnError::Timeout`] and [`ConnError::Behind`]
    /// means that the connection is dead.
    pub(crate) fn exchange(
        &self,
        request: &SocketRequest<'_>,
        serve: OnCommand<'_>,
    ) -> Result<SocketMessage, ConnError> {
        let _turn = self.turns.take(request.until)?;
        let mut rx = lock_until(&self.rx, request.until)?;
        if request.after_reply {
            rx = self.wait_for_reply(rx);
        }
        self.check_alive()?;
        let result = self.exchange_locked(&mut rx, request, serve);
        let late = matches!(result, Err(ConnError::Timeout | ConnError::Behind));
        if let (Err(error), false) = (&result, late) {
            self.end(error);
        }
        if late || !rx.queue.is_empty() {
            let _ = rustix::io::write(&self.queued, &1u64.to_ne_bytes());
        }
        result
    }

    /// Waits until the peer's command in service, if there is one, has been answered: for a moment only, since it may itself
    /// wait for what is held back here, and not at all in its own service.
    fn wait_for_reply<'a>(&'a self, mut rx: MutexGuard<'a, Rx>) -> MutexGuard<'a, Rx> {
        let begun = Instant::now();
        let other =
            |rx: &Rx| rx.serving && rx.taker.is_some_and(|taker| taker != std::thread::current().id());
        while other(&rx) {
            let left = self.hold.saturating_sub(begun.elapsed());
            if left.is_zero() {
                // It waits for us: what follows is not held back any more.
                rx.taker = None;
                break;
            }
            (rx, _) = self.served.wait_timeout(rx, left).unwrap_or_else(PoisonError::into_inner);
        }
        rx
    }

    /// Waits, without limit, for a command of the peer; once one begins it must be whole within `limit`.
    /// Any error but [`ConnError::Timeout`] means that the connection is dead.
    pub(crate) fn next_command(&self, limit: Duration) -> Result<SocketMessage, ConnError> {
        loop {
            let result = self.try_command(limit);
            match result {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(ConnError::Timeout) => return Err(ConnError::Timeout),
                Err(error) => {
                    self.end(&error);
                    return Err(error);
                }
            }
            self.idle()?;
        }
    }

    /// Waits for the peer's first command, which must be whole within `limit`. An error means that the connection is dead.
    pub(crate) fn first_command(&self, limit: Duration) -> Result<SocketMessage, ConnError> {
        let until = deadline(limit);
        let interrupt = self.interrupt.as_ref().map(|fd| fd.as_fd());
        loop {
            let waited = wait(&self.socket, interrupt, PollFlags::IN, until);
            let first =
                waited.and_then(|_| self.try_command(until.saturating_duration_since(Instant::now())));
            match first {
                Ok(Some(message)) => return Ok(message),
                Ok(None) => {}
                Err(error) => {
                    self.end(&error);
                    return Err(error);
                }
            }
        }
    }

    /// Answers `message` unless it wants no answer. What a peer has not taken within `limit` is sent before anything else. An
    /// error means that the connection is dead.
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
        let mut tx = lock(&self.tx);
        // Descriptors go with the first byte, and are not kept for later.
        let mut owed = fds.is_empty();
        let result =
            self.send(None, &mut tx, to.id, to.command, kind, &[body], fds, deadline(limit), &mut owed);
        drop(tx);
        match result {
            Err(ConnError::Timeout) if owed => Ok(()),
            result => result.inspect_err(|error| self.end(error)),
        }
    }

    /// Sends the bytes of a whole message, if any. After [`ConnError::Timeout`] what is left of it is sent before anything
    /// else; any other error means that the connection is dead.
    pub(crate) fn send_whole(&self, message: &[u8], limit: Duration) -> Result<(), ConnError> {
        if message.is_empty() {
            return Ok(());
        }
        let mut tx = lock(&self.tx);
        let result =
            self.send_bytes(None, &mut tx, &mut [IoSlice::new(message)], &[], deadline(limit), &mut true);
        drop(tx);
        result.inspect_err(|error| {
            if !matches!(error, ConnError::Timeout) {
                self.end(error);
            }
        })
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
        if rx.awaited.is_some() {
            self.answer(rx, serve, request.deadline()).map_err(|error| match error {
                ConnError::Timeout => ConnError::Behind,
                other => other,
            })?;
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let kind = Kind::Command { no_reply: false };
        let SocketRequest { command, parts, fds, max_reply, .. } = *request;
        let mut tx = self.lock_tx(rx)?;
        let deadline = request.deadline();
        let mut begun = false;
        let sent = self.send(Some(rx), &mut tx, id, command, kind, parts, fds, deadline, &mut begun);
        drop(tx);
        if begun {
            rx.awaited = Some(Awaited { id, command, max_reply });
        }
        sent?;
        self.answer(rx, serve, deadline)
    }

    /// The answer to the request that is awaited. The peer's commands are served meanwhile, those that were kept first: the
    /// peer may answer only when they are.
    fn answer(
        &self,
        rx: &mut Rx,
        serve: OnCommand<'_>,
        deadline: Instant,
    ) -> Result<SocketMessage, ConnError> {
        loop {
            if let Some(serve) = serve {
                while let Some(message) = rx.pop() {
                    self.serve_locked(rx, &message, serve, deadline)?;
                }
            }
            if let Some(message) = rx.answer.take() {
                return match rx.awaited.take() {
                    Some(awaited) => matched(message, awaited),
                    None => Err(ConnError::Violation("a reply that nobody asked for".into())),
                };
            }
            self.send_rest(rx, deadline)?;
            // Whoever waits for the right to send reads meanwhile.
            if rx.answer.is_some() || (serve.is_some() && !rx.queue.is_empty()) {
                continue;
            }
            let message = self.read(rx, deadline)?;
            rx.place(message)?;
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
        let mut tx = self.lock_tx(rx)?;
        self.send_bytes(Some(rx), &mut tx, &mut [IoSlice::new(&reply)], &[], deadline, &mut true)
    }

    /// A command from the queue or the socket, without waiting for one to begin. Once one begins it must be whole within `limit`;
    /// after [`ConnError::Timeout`] what has come of it is kept, and the rest read by the next call.
    pub(crate) fn try_command(&self, limit: Duration) -> Result<Option<SocketMessage>, ConnError> {
        let mut rx = lock(&self.rx);
        rx.serving = false;
        self.served.notify_all();
        if let Some(message) = rx.pop() {
            rx.hand_out();
            return Ok(Some(message));
        }
        self.check_alive()?;
        match self.send_rest(&mut rx, Instant::now()) {
            Ok(()) | Err(ConnError::Timeout) => {}
            Err(error) => return Err(error),
        }
        // Whoever waits for the right to send reads meanwhile.
        if let Some(message) = rx.pop() {
            rx.hand_out();
            return Ok(Some(message));
        }
        let mut fds = [PollFd::new(&self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(ConnError::system("polling", errno)),
        }
        let message = match self.read(&mut rx, deadline(limit)) {
            // The rest of an answer that is late; nobody waits for it.
            Err(ConnError::Timeout) if rx.awaited.is_some() => return Ok(None),
            message => message?,
        };
        rx.place(message)?;
        if let Some(message) = rx.answer.take() {
            // Whoever asked has given up; nobody waits for it.
            if let Some(awaited) = rx.awaited.take() {
                matched(message, awaited)?;
            }
            return Ok(None);
        }
        let message = rx.pop();
        if message.is_some() {
            rx.hand_out();
        }
        Ok(message)
    }

    /// Waits for anything to happen on the socket or in the queue.
    fn idle(&self) -> Result<(), ConnError> {
        let unsent = self.tx.try_lock().is_ok_and(|tx| !tx.is_empty());
        let wanted = if unsent { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(&self.socket, wanted), PollFd::new(&self.queued, PollFlags::IN)];
        fds.extend(self.interrupt.as_ref().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(ConnError::system("polling", errno)),
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

    /// Reads one message. A payload over the limits is dropped and the message marked unfit. What is in when time runs out
    /// is kept for the next call.
    fn read(&self, rx: &mut Rx, deadline: Instant) -> Result<SocketMessage, ConnError> {
        let mut partial = rx.partial.take().unwrap_or_default();
        let header = match self.read_on(rx, &mut partial, deadline) {
            Ok(header) => header,
            Err(error) => {
                if matches!(error, ConnError::Timeout) && partial.head > 0 {
                    rx.partial = Some(partial);
                }
                return Err(error);
            }
        };
        let Partial { mut body, received, too_long, .. } = partial;
        if too_long {
            body = Vec::new();
        }
        let unfit = match (received.excess, received.too_many_open, too_long) {
            (true, ..) => Some(Unfit::ExcessFds),
            (_, true, _) => Some(Unfit::NoRoomForFds),
            (.., true) => Some(Unfit::PayloadTooLong),
            _ => None,
        };
        rx.consumed = rx.consumed.saturating_add((HEADER_SIZE + header.body_len()) as u64);
        Ok(SocketMessage { header, body, fds: received.fds, unfit })
    }

    fn read_on(&self, rx: &mut Rx, partial: &mut Partial, deadline: Instant) -> Result<Header, ConnError> {
        let interrupt = self.interrupt.as_ref().map(|fd| fd.as_fd());
        let cut_off = || ConnError::closed("the peer closed it in the middle of a message");
        let Partial { raw, head, header, body, filled, too_long, received } = partial;
        if !read_full(&self.socket, interrupt, raw, head, received, rx.max_fds, deadline)? {
            return Err(ConnError::closed("the peer closed it"));
        }
        let header = match *header {
            Some(header) => header,
            None => {
                let found = Header::decode(raw).map_err(|error| ConnError::Violation(error.to_string()))?;
                let len = found.body_len();
                let limit = match found.kind {
                    Kind::Command { .. } => rx.max_body,
                    Kind::Reply => rx.awaited.map_or(0, |awaited| awaited.max_reply),
                    // A refusal has no payload. One that has is read past, and its payload is of no interest.
                    Kind::Error(_) => 0,
                };
                *too_long = len > limit;
                if *too_long && len > MAX_DRAIN {
                    let command = found.command;
                    return Err(ConnError::Violation(format!("{command} with {len} bytes of payload")));
                }
                if *too_long {
                    body.resize(len.min(64 << 10), 0);
                } else if len > 0 {
                    *body = std::mem::take(&mut rx.spare);
                    body.resize(len, 0);
                }
                *header = Some(found);
                found
            }
        };
        while *too_long && *filled < header.body_len() {
            let piece = body.len().min(header.body_len() - *filled);
            let mut got = 0;
            let into = body.get_mut(..piece).unwrap_or_default();
            let whole = read_full(&self.socket, interrupt, into, &mut got, received, rx.max_fds, deadline);
            *filled += got;
            if !whole? {
                return Err(cut_off());
            }
        }
        if !*too_long && !read_full(&self.socket, interrupt, body, filled, received, rx.max_fds, deadline)? {
            return Err(cut_off());
        }
        Ok(header)
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
