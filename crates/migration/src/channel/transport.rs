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
use vfio_migration_types::error_chain;

use crate::tls::error::TlsError;
use crate::tls::identity::PeerIdentity;
use crate::tls::security::{ConnectionSecurity, SecurityKind, SocketKind};
use crate::unix_peer::UnixPeer;

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

    /// Whether anything has come below what is read: the beginning of a handshake.
    fn has_heard(&self) -> bool {
        false
    }

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
    kind: SocketKind,
    /// The process at the other end, of a unix socket.
    unix_peer: Option<UnixPeer>,
    /// The address at the other end as it was when the connection was taken: of one that has ended, the system no longer says.
    peer: String,
}

fn kind(socket: &OwnedFd) -> SocketKind {
    match sockopt::socket_domain(socket) {
        Ok(AddressFamily::INET | AddressFamily::INET6) => SocketKind::Tcp,
        Ok(AddressFamily::UNIX) => SocketKind::Unix,
        Ok(AddressFamily::VSOCK) => SocketKind::Vsock,
        Ok(_) | Err(_) => SocketKind::Other,
    }
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
            None if self.kind == SocketKind::Unix => SecurityKind::Unix,
            None => SecurityKind::PlainText,
        };
        let (peer, socket, unix_peer) = (self.vouched.clone(), Some(self.kind), self.unix_peer.clone());
        ConnectionSecurity { kind, cipher: None, peer, socket, unix_peer }
    }

    fn export(&self, _: &[u8], _: &[u8]) -> Option<[u8; 32]> {
        None
    }
}

impl Socket {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        let kind = kind(&socket);
        let unix_peer = (kind == SocketKind::Unix).then(|| UnixPeer::of(&socket));
        let unix_peer = unix_peer.and_then(|known| {
            known.inspect_err(|error| tracing::warn!(error = %error_chain(error), "a peer is not known")).ok()
        });
        Self { peer: peer_name(&socket), socket, kind, unix_peer, vouched: None }
    }

    /// A stream that whoever handed it over has secured, with the identity that its peer has proved to him.
    pub(crate) fn vouched(socket: OwnedFd, peer: PeerIdentity) -> Self {
        Self { vouched: Some(peer), ..Self::new(socket) }
    }

    /// What it is.
    pub(crate) fn kind(&self) -> SocketKind {
        self.kind
    }

    /// Takes some of `parts`, in order, without waiting; returns how many bytes. EAGAIN when it takes none.
    pub(crate) fn write_now(&self, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.socket, parts, &mut SendAncillaryBuffer::default(), flags)
        })
    }

    /// Sleeps until something can be read (or written), or is to be told about the connection.
    pub(crate) fn wait_ready(&self, ready: PollFlags) -> Result<(), Errno> {
        let mut polled = [PollFd::from_borrowed_fd(self.fd(), ready)];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None)).map(drop)
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
                Err(Errno::AGAIN) => self.wait_ready(ready)?,
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
    use crate::unix_peer::{AllowedUnixPeers, UnixPeerError, own_user};

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

    /// A connection over a unix socket with a process of that user.
    fn with(uid: u32) -> ConnectionSecurity {
        let socket = OwnedFd::from(UnixStream::pair().unwrap().0);
        let security = Socket::new(socket).security();
        assert_eq!(security.socket, Some(SocketKind::Unix));
        let peer = security.unix_peer.expect("a pair is its maker's");
        assert_eq!((peer.uid, peer.pid), (own_user(), Some(std::process::id())));
        ConnectionSecurity { unix_peer: Some(UnixPeer { uid, ..peer }), ..security }
    }

    #[test]
    fn over_a_unix_socket_one_user_is_told_from_another() {
        let (one, other) = (own_user() + 54_001, own_user() + 54_002);
        let untold = ConnectionSecurity { unix_peer: None, ..with(one) };
        assert!(with(one).is_of(&with(one), false) && with(0).is_of(&with(one), false));
        assert!(!with(other).is_of(&with(one), true) && !untold.is_of(&with(one), true));
        assert!(with(other).is_of(&untold, false), "nobody is told from another where nothing is known");
        let nobody_else = AllowedUnixPeers::default();
        with(own_user()).check_unix_peer(&nobody_else).unwrap();
        assert!(with(one).check_unix_peer(&nobody_else).unwrap_err().to_string().contains("user 5"));
        assert!(matches!(untold.check_unix_peer(&nobody_else), Err(UnixPeerError::Untold)));
        // Whoever vouches for a connection has looked who is there, and over TCP nobody has a user.
        for kind in [SecurityKind::Vouched, SecurityKind::Tls, SecurityKind::PlainText] {
            ConnectionSecurity { kind, ..with(one) }.check_unix_peer(&nobody_else).unwrap();
        }
    }
}
