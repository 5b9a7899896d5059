//! The bytes of one connection: what a link's frames travel over.

use std::fmt;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, getpeername, sockopt};
use vfio_migration_memory::Pieces;

use crate::tls::error::TlsError;
use crate::tls::identity::PeerIdentity;
use crate::tls::security::{ConnectionSecurity, SecurityKind};

/// The reason why a transport does not move bytes.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum TransportError {
    #[error(transparent)]
    System(#[from] Errno),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A connected stream. Reads and writes block until they have moved something, and move what they can; a
/// [`shutdown`](Self::shutdown) from another thread ends them.
pub(crate) trait Transport: fmt::Debug + Send + Sync {
    /// Takes some of `parts`, in order; returns how many bytes.
    fn write(&self, parts: &[IoSlice<'_>]) -> Result<usize, TransportError>;

    /// Takes some of `head`, then of `body`, straight from memory; returns how many bytes. EFAULT: the memory's fault.
    fn write_pieces(&self, head: &[u8], body: &Pieces<'_>) -> Result<usize, TransportError>;

    /// Gives some bytes, at most as many as `into` holds; 0 at the end of the stream.
    fn read(&self, into: &mut [u8]) -> Result<usize, TransportError>;

    /// The same without waiting: EAGAIN when nothing is there.
    fn read_now(&self, into: &mut [u8]) -> Result<usize, TransportError>;

    /// Gives some bytes straight into memory, and advances `into` by them; 0 at the end of the stream. EFAULT: the memory's fault.
    fn read_pieces(&self, into: &mut Pieces<'_>) -> Result<usize, TransportError>;

    /// Sleeps until something can be read (or written), for at most `limit`. Says whether something can.
    fn wait(&self, flags: PollFlags, limit: Duration) -> bool;

    /// Ends one direction, or both; what has arrived can still be read.
    fn shutdown(&self, how: Shutdown);

    /// Whether the peer has proved to be one that may be here, and waits for our first word.
    fn is_proven(&self) -> bool;

    /// The descriptor, to be waited for together with others.
    fn fd(&self) -> BorrowedFd<'_>;

    /// The address at the other end, for a person to read.
    fn peer(&self) -> String;

    /// How it is secured, and what the peer has proved to be.
    fn security(&self) -> ConnectionSecurity;

    /// A secret for a use of its own (`label`, `context`) that both ends derive from the connection, and nobody else can; `None` where there
    /// is none.
    fn export(&self, label: &[u8], context: &[u8]) -> Option<[u8; 32]>;
}

/// A stream socket as it is: TCP, unix, or one that was handed over.
#[derive(Debug)]
pub(crate) struct Socket {
    socket: OwnedFd,
    /// What whoever handed it over says that its peer has proved.
    vouched: Option<PeerIdentity>,
    /// The address at the other end as it was when the connection was taken: of one that has ended, the system no longer says.
    peer: String,
}

/// The address at the other end of a connection, for a person to read.
fn peer_name(socket: &OwnedFd) -> String {
    if let Ok(Some(Ok(address))) = getpeername(socket).map(|address| address.map(SocketAddr::try_from)) {
        return format!("tcp:{address}");
    }
    match sockopt::socket_domain(socket) {
        Ok(AddressFamily::UNIX) => "a unix socket".to_owned(),
        Ok(AddressFamily::INET | AddressFamily::INET6) => "a TCP connection that has ended".to_owned(),
        Ok(AddressFamily::VSOCK) => "a vsock socket".to_owned(),
        Ok(family) => format!("a socket of address family {}", family.as_raw()),
        Err(errno) => format!("a socket of an unknown address family ({errno})"),
    }
}

impl Transport for Socket {
    fn write(&self, parts: &[IoSlice<'_>]) -> Result<usize, TransportError> {
        self.blocking(PollFlags::OUT, || {
            let mut control = SendAncillaryBuffer::default();
            rustix::net::sendmsg(&self.socket, parts, &mut control, SendFlags::NOSIGNAL)
        })
    }

    fn write_pieces(&self, head: &[u8], body: &Pieces<'_>) -> Result<usize, TransportError> {
        self.blocking(PollFlags::OUT, || body.send(self.fd(), head))
    }

    fn read(&self, into: &mut [u8]) -> Result<usize, TransportError> {
        self.blocking(PollFlags::IN, || {
            rustix::net::recv(&self.socket, &mut *into, RecvFlags::empty()).map(|(read, _)| read)
        })
    }

    fn read_now(&self, into: &mut [u8]) -> Result<usize, TransportError> {
        let read = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.socket, &mut *into, RecvFlags::DONTWAIT).map(|(read, _)| read)
        });
        Ok(read?)
    }

    fn read_pieces(&self, into: &mut Pieces<'_>) -> Result<usize, TransportError> {
        let read = self.blocking(PollFlags::IN, || into.receive(self.fd()))?;
        into.advance(read);
        Ok(read)
    }

    fn wait(&self, flags: PollFlags, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        let mut polled = [PollFd::from_borrowed_fd(self.fd(), flags)];
        rustix::event::poll(&mut polled, Some(&limit)).is_ok_and(|ready| ready > 0)
    }

    fn shutdown(&self, how: Shutdown) {
        let _ = rustix::net::shutdown(&self.socket, how);
    }

    fn is_proven(&self) -> bool {
        false
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn security(&self) -> ConnectionSecurity {
        let kind = match &self.vouched {
            Some(_) => SecurityKind::Vouched,
            None if self.is_unix() => SecurityKind::Unix,
            None => SecurityKind::PlainText,
        };
        ConnectionSecurity { kind, cipher: None, peer: self.vouched.clone() }
    }

    fn export(&self, _: &[u8], _: &[u8]) -> Option<[u8; 32]> {
        None
    }
}

impl Socket {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { peer: peer_name(&socket), socket, vouched: None }
    }

    /// A stream that whoever handed it over has secured, with the identity that its peer has proved to him.
    pub(crate) fn vouched(socket: OwnedFd, peer: PeerIdentity) -> Self {
        Self { peer: peer_name(&socket), socket, vouched: Some(peer) }
    }

    /// Whether it stays within the host.
    pub(crate) fn is_unix(&self) -> bool {
        sockopt::socket_domain(&self.socket) == Ok(AddressFamily::UNIX)
    }

    /// Whoever else holds a descriptor that was handed over may have made it non-blocking.
    fn blocking(
        &self,
        ready: PollFlags,
        mut call: impl FnMut() -> Result<usize, Errno>,
    ) -> Result<usize, TransportError> {
        loop {
            match call() {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut polled = [PollFd::from_borrowed_fd(self.fd(), ready)];
                    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None))?;
                }
                done => return Ok(done?),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Ends a connection so that the kernel forgets the other end: by a reset.
    fn reset(stream: TcpStream) {
        sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        drop(stream);
    }

    #[test]
    fn a_peer_that_has_left_is_known_by_its_own_name() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = || {
            let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, address) = listener.accept().unwrap();
            (stream, OwnedFd::from(accepted), address)
        };
        let ended = |socket: &OwnedFd| while getpeername(socket).is_ok() {};
        let (stream, accepted, address) = connected();
        let socket = Socket::new(accepted);
        reset(stream);
        ended(&socket.socket);
        assert_eq!(socket.peer(), format!("tcp:{address}"));
        // It left before it was taken.
        let (stream, accepted, _) = connected();
        reset(stream);
        ended(&accepted);
        assert_eq!(Socket::new(accepted).peer(), "a TCP connection that has ended");
        let (unix, other) = UnixStream::pair().unwrap();
        drop(other);
        assert_eq!(Socket::new(unix.into()).peer(), "a unix socket");
    }
}
