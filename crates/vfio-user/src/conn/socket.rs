//! Whole reads and writes with descriptors and a deadline, over a stream socket.

use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, recvmsg, sendmsg,
};

use super::error::ConnError;
use crate::codec::MAX_MSG_FDS;

/// Most bytes of a socket's path: what `sockaddr_un` holds beside its end (unix(7)).
const LONGEST_PATH: usize = 107;

/// The address of a socket of the file system. A path that is too long is refused by its length.
pub(crate) fn address(path: &Path) -> std::io::Result<SocketAddrUnix> {
    let long = path.as_os_str().len();
    if long > LONGEST_PATH {
        let text = format!("a socket's path has at most {LONGEST_PATH} bytes, and this one has {long}");
        return Err(std::io::Error::new(ErrorKind::InvalidInput, text));
    }
    Ok(SocketAddrUnix::new(path)?)
}

/// Room for the descriptors of one message, and one more, so that an excess is noticed.
const CONTROL_SPACE: usize = rustix::cmsg_space!(ScmRights(MAX_MSG_FDS as usize + 1));

/// Descriptors that came with a message.
#[derive(Debug, Default)]
pub(super) struct Received {
    pub(super) fds: Vec<OwnedFd>,
    /// More came than were allowed; they were closed.
    pub(super) excess: bool,
    /// This process could not take all that came: it has too many files open.
    pub(super) too_many_open: bool,
}

/// Result of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// Waits until the socket is ready as wanted, `interrupt` is readable, or the deadline passes.
pub(super) fn wait(
    socket: &UnixStream,
    interrupt: Option<BorrowedFd<'_>>,
    wanted: PollFlags,
    deadline: Instant,
) -> Result<Ready, ConnError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ConnError::Timeout);
        }
        let left = Timespec::try_from(left).map_err(|_| ConnError::Timeout)?;
        let mut fds = vec![PollFd::new(socket, wanted)];
        fds.extend(interrupt.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        match poll(&mut fds, Some(&left)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(ConnError::system("polling", errno)),
        }
        let mut events = fds.iter().map(PollFd::revents);
        let socket_events = events.next().unwrap_or(PollFlags::empty());
        if events.next().is_some_and(|events| !events.is_empty()) {
            return Err(ConnError::Interrupted);
        }
        let broken = socket_events.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        let ready = Ready {
            readable: socket_events.contains(PollFlags::IN) || broken,
            writable: socket_events.contains(PollFlags::OUT) || broken,
        };
        if ready.readable || ready.writable {
            return Ok(ready);
        }
    }
}

/// Reads until `into` is full, from `filled` on. `false`: the stream ended before its first byte.
pub(super) fn read_full(
    socket: &UnixStream,
    interrupt: Option<BorrowedFd<'_>>,
    into: &mut [u8],
    filled: &mut usize,
    received: &mut Received,
    max_fds: usize,
    deadline: Instant,
) -> Result<bool, ConnError> {
    while *filled < into.len() {
        let rest = into.get_mut(*filled..).unwrap_or_default();
        match receive(socket, rest, received, max_fds) {
            Ok(0) if *filled == 0 => return Ok(false),
            Ok(0) => return Err(ConnError::closed("the peer closed it in the middle of a message")),
            Ok(bytes) => *filled += bytes,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                wait(socket, interrupt, PollFlags::IN, deadline)?;
            }
            // A reset is how a peer that dies with unread data in its queue ends the stream.
            Err(Errno::CONNRESET) if *filled == 0 => return Ok(false),
            Err(errno) => return Err(ConnError::system("receiving", errno)),
        }
    }
    Ok(true)
}

fn receive(
    socket: &UnixStream,
    into: &mut [u8],
    received: &mut Received,
    max_fds: usize,
) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); CONTROL_SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(socket, &mut [IoSliceMut::new(into)], &mut control, flags)?;
    for item in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = item {
            received.fds.extend(fds);
        }
    }
    if received.fds.len() > max_fds {
        received.fds.clear();
        received.excess = true;
    } else if message.flags.contains(ReturnFlags::CTRUNC) {
        // There was room for one more than is allowed, so the kernel cut them short because it could not make them ours.
        received.fds.clear();
        received.too_many_open = true;
    }
    Ok(message.bytes)
}

/// Sends the front of `parts`, with `fds` at the first byte, without waiting; returns how many bytes went.
pub(super) fn send_some(
    socket: &UnixStream,
    parts: &[IoSlice<'_>],
    fds: &[BorrowedFd<'_>],
) -> Result<usize, Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    if fds.is_empty() {
        return sendmsg(socket.as_fd(), parts, &mut SendAncillaryBuffer::default(), flags);
    }
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(socket.as_fd(), parts, &mut control, flags)
}
