//! The place that sources connect to: a socket that listens, or the one connection that was handed over.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, sockopt};
use vfio_migration_types::{RateLimit, Told};

use crate::channel::connect::{ConnectError, as_it_is, check_chosen, check_stream, duplicate, leaves_host};
use crate::channel::handed::{HandedConnections, IncomingConnections};
use crate::channel::tls::Tls;
use crate::channel::transport::Transport;
use crate::tls::config::{Proof, Security};
use crate::tls::layout::TlsRole;
use crate::tls::server_configs::ServerConfigs;
use crate::unix_listener::bind_unix;
use crate::unix_peer::AllowedUnixPeers;
use crate::uri::Uri;

/// The place that sources connect to.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: ListenerSocket,
    uri: Uri,
    /// `None` of a unix socket alone.
    security: Option<Security>,
    /// What connections are taken with, where that is TLS: certificates that are being replaced may not fit each other for a moment.
    configs: Option<ServerConfigs>,
    backoff: Backoff,
    /// What is said of connections that cannot be taken: whoever comes, comes as often as he likes.
    problems: RateLimit<String>,
}

/// What is said of connections that cannot be taken, at most, and in what time.
const PROBLEMS: (u32, Duration) = (20, Duration::from_secs(60));

/// A socket that sources connect to, or the one connection that was handed over.
#[derive(Debug)]
enum ListenerSocket {
    Tcp(TcpListener),
    Unix {
        listener: UnixListener,
        /// `None` of a socket that was handed over: its file is not ours.
        _unlink: Option<Unlink>,
    },
    /// `None` once it has been used.
    Connected(Option<OwnedFd>, Uri),
    /// Of any kind, as the VMM accepts them.
    Handed(HandedConnections),
}

/// Shortest and longest time after which an accept that failed is tried again.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What a host lacks for a moment, descriptors or memory, must not end the wait for a guest.
#[derive(Debug, Default)]
struct Backoff {
    /// The pause under way, and when it ends; `None` while accepting works.
    pause: Option<(Duration, Instant)>,
}

impl Backoff {
    fn active(&self) -> bool {
        self.pause.is_some_and(|(_, until)| Instant::now() < until)
    }

    fn failed(&mut self) {
        let (shortest, longest) = BACKOFF;
        let pause = self.pause.map_or(shortest, |(pause, _)| pause.saturating_mul(2).min(longest));
        self.pause = Some((pause, Instant::now() + pause));
    }
}

/// Removes the socket file that we made.
#[derive(Debug)]
pub(crate) struct Unlink(PathBuf);

impl Drop for Unlink {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Listener {
    /// Binds, and returns the address: with the port that port 0 became. The file of a unix socket lets whoever may be among the
    /// `peers` connect.
    pub(crate) fn bind(
        uri: &Uri,
        security: Option<&Security>,
        peers: &AllowedUnixPeers,
    ) -> Result<(Self, Uri), ConnectError> {
        check_chosen(uri, security)?;
        let failed = |source| ConnectError::System { doing: "listening on", uri: uri.clone(), source };
        match uri {
            Uri::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                // As many as the system lets wait, as on unix sockets: none is kept there for long.
                rustix::net::listen(&listener, -1).map_err(|errno| failed(errno.into()))?;
                listener.set_nonblocking(true).map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                let local = Uri::Tcp { host: host.clone(), port };
                Ok((Self::of(ListenerSocket::Tcp(listener), &local, security)?, local))
            }
            Uri::Unix(path) => {
                remove_dead_socket(path);
                let listener = bind_unix(path, peers).map_err(failed)?;
                let unlink = Unlink(path.clone());
                listener.set_nonblocking(true).map_err(failed)?;
                let socket = ListenerSocket::Unix { listener, _unlink: Some(unlink) };
                Ok((Self::of(socket, uri, security)?, uri.clone()))
            }
            Uri::Fd(number) => {
                let socket = duplicate(*number)?;
                if sockopt::socket_acceptconn(&socket) == Ok(true) {
                    return Self::listening(socket, uri, security);
                }
                check_stream(&socket, *number)?;
                Ok((Self::connected(socket, uri, security)?, uri.clone()))
            }
        }
    }

    /// A stream socket that listens already, and the address that it is bound to: `known` where that is none that can be written.
    pub(crate) fn listening(
        socket: OwnedFd,
        known: &Uri,
        security: Option<&Security>,
    ) -> Result<(Self, Uri), ConnectError> {
        let failed = |source| ConnectError::System { doing: "taking over", uri: known.clone(), source };
        let listens = sockopt::socket_acceptconn(&socket) == Ok(true);
        let domain = sockopt::socket_domain(&socket).ok().filter(|_| listens);
        let (socket, local) = match domain {
            Some(AddressFamily::UNIX) => {
                let listener = UnixListener::from(socket);
                listener.set_nonblocking(true).map_err(failed)?;
                let address = listener.local_addr().map_err(failed)?;
                let local = address.as_pathname().map_or(known.clone(), |path| Uri::Unix(path.to_owned()));
                (ListenerSocket::Unix { listener, _unlink: None }, local)
            }
            Some(AddressFamily::INET | AddressFamily::INET6) => {
                let listener = TcpListener::from(socket);
                listener.set_nonblocking(true).map_err(failed)?;
                let address = listener.local_addr().map_err(failed)?;
                let local = Uri::Tcp { host: address.ip().to_string(), port: address.port() };
                (ListenerSocket::Tcp(listener), local)
            }
            _ => return Err(ConnectError::NotListening(known.clone())),
        };
        Ok((Self::of(socket, &local, security)?, local))
    }

    /// The one connection that was handed over.
    pub(crate) fn connected(
        socket: OwnedFd,
        uri: &Uri,
        security: Option<&Security>,
    ) -> Result<Self, ConnectError> {
        Self::of(ListenerSocket::Connected(Some(socket), uri.clone()), uri, security)
    }

    /// Connections that the VMM accepts and hands over, and where it does. Its address says nothing to anybody.
    pub(crate) fn handed(
        security: Option<&Security>,
    ) -> Result<(Self, Uri, IncomingConnections), ConnectError> {
        let uri = Uri::Fd(-1);
        let (connections, handle) = HandedConnections::new().map_err(|errno| ConnectError::System {
            doing: "taking over connections as",
            uri: uri.clone(),
            source: errno.into(),
        })?;
        Ok((Self::of(ListenerSocket::Handed(connections), &uri, security)?, uri, handle))
    }

    fn of(socket: ListenerSocket, uri: &Uri, security: Option<&Security>) -> Result<Self, ConnectError> {
        let local = match &socket {
            ListenerSocket::Unix { .. } => true,
            ListenerSocket::Tcp(_) => false,
            ListenerSocket::Connected(socket, _) => {
                socket.as_ref().is_some_and(|socket| !leaves_host(socket))
            }
            // Of each that is none it has to be said, when it comes.
            ListenerSocket::Handed(_) => security.is_none(),
        };
        let mut configs = None;
        if !local {
            let security = security.ok_or_else(|| ConnectError::NotChosen(uri.clone()))?;
            // Before anybody connects, since only the operator can mend what is missing.
            let unprepared = |source| ConnectError::Unprepared { uri: uri.clone(), source };
            let made = ServerConfigs::new(security.clone()).map_err(unprepared)?;
            match made.latest() {
                Some(_) => security.warn_of_expiry(TlsRole::Server),
                None => security.warn_of_plain_text(uri),
            }
            configs = Some(made);
        }
        let (uri, security) = (uri.clone(), security.cloned());
        let problems = RateLimit::new(PROBLEMS.0, PROBLEMS.1);
        Ok(Self { socket, uri, security, configs, backoff: Backoff::default(), problems })
    }

    /// What connections prove of their peers here, and what they are, as a sentence goes on.
    pub(crate) fn proof(&self) -> (Proof, &'static str) {
        let security = self.security.as_ref();
        let proof = |of: fn(&Security) -> Proof| security.map_or(Proof::Nothing, of);
        let unix = (proof(Security::proof_over_unix), "over a unix socket");
        match &self.socket {
            ListenerSocket::Unix { .. } => unix,
            ListenerSocket::Connected(Some(socket), _) if !leaves_host(socket) => unix,
            ListenerSocket::Tcp(_) | ListenerSocket::Connected(..) | ListenerSocket::Handed(_) => {
                (proof(Security::proof), "in plain text")
            }
        }
    }

    /// Whether there is one connection, and no next one.
    pub(crate) fn is_connected(&self) -> bool {
        matches!(self.socket, ListenerSocket::Connected(..))
    }

    /// Fails once there is no connection to come.
    pub(crate) fn check(&self) -> Result<(), ConnectError> {
        match &self.socket {
            ListenerSocket::Connected(None, uri) => Err(ConnectError::Used(uri.clone())),
            ListenerSocket::Handed(handed) if handed.have_ended() => Err(ConnectError::NoneHanded),
            _ => Ok(()),
        }
    }

    /// The next connection, if one waits, with certificates that are `read_anew` if they have changed, or as they were. What goes wrong
    /// with an accept passes: it is logged, and tried again a little later.
    pub(crate) fn try_accept(&mut self, read_anew: bool) -> Option<Box<dyn Transport>> {
        let overdue = self.problems.overdue(Instant::now());
        Self::tell(&self.uri, overdue);
        self.accept().and_then(|socket| self.secure(socket, read_anew))
    }

    /// The connection over `socket`, whose handshake, if it has one, is still to come.
    fn secure(&mut self, socket: OwnedFd, read_anew: bool) -> Option<Box<dyn Transport>> {
        let security = self.security.as_ref();
        if security.is_none() && leaves_host(&socket) {
            self.problem(ConnectError::NotChosen(self.uri.clone()).to_string());
            return None;
        }
        if !security.is_some_and(|security| security.is_tls() && leaves_host(&socket)) {
            return Some(as_it_is(socket, security));
        }
        let configs = self.configs.as_mut()?;
        let read = if read_anew { configs.refresh(SystemTime::now()) } else { Ok(()) };
        let latest = configs.latest();
        if let Err(error) = read {
            self.problem(format!(
                "certificates cannot be read again, and the ones that were read before are used: {error}"
            ));
        }
        match Tls::accepted(socket, latest?) {
            Ok(tls) => Some(Box::new(tls)),
            Err(error) => {
                self.problem(format!("a connection could not be taken: {error}"));
                None
            }
        }
    }

    fn problem(&mut self, text: String) {
        let told = self.problems.take(text, Instant::now());
        Self::tell(&self.uri, told);
    }

    fn tell(uri: &Uri, problem: Option<Told<String>>) {
        match problem {
            Some(Told { what, left_out: 0 }) => tracing::warn!(%uri, "{what}"),
            Some(Told { what, left_out }) => tracing::warn!(%uri, "{what} (and {left_out} more before it)"),
            None => {}
        }
    }

    fn accept(&mut self) -> Option<OwnedFd> {
        if self.backoff.active() {
            return None;
        }
        let accepted = match &mut self.socket {
            ListenerSocket::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                Ok(OwnedFd::from(stream))
            }),
            ListenerSocket::Unix { listener, .. } => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok(OwnedFd::from(stream))
            }),
            ListenerSocket::Connected(socket, _) => return socket.take(),
            ListenerSocket::Handed(handed) => return handed.next(),
        };
        match accepted {
            Ok(socket) => {
                self.backoff = Backoff::default();
                Some(socket)
            }
            Err(error) => {
                match error.kind() {
                    // A peer that went away between its connect and our accept is nobody.
                    io::ErrorKind::WouldBlock
                    | io::ErrorKind::Interrupted
                    | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        if self.backoff.pause.is_none() {
                            let text = format!("a connection could not be accepted; trying again: {error}");
                            self.problem(text);
                        }
                        self.backoff.failed();
                    }
                }
                None
            }
        }
    }

    /// Sleeps until a connection may be waiting, or one of `others` can be read; for at most as long as a cancel may wait.
    pub(crate) fn wait<'a>(&'a self, others: impl Iterator<Item = BorrowedFd<'a>>) {
        let own = match &self.socket {
            // It would be readable all the time.
            _ if self.backoff.active() => None,
            ListenerSocket::Tcp(listener) => Some(listener.as_fd()),
            ListenerSocket::Unix { listener, .. } => Some(listener.as_fd()),
            ListenerSocket::Connected(..) => None,
            ListenerSocket::Handed(handed) => Some(handed.as_fd()),
        };
        let all = own.into_iter().chain(others);
        let mut polled: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let slice = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let _ = rustix::event::poll(&mut polled, Some(&slice));
    }
}

/// A socket file to which nobody listens any more is in the way of a bind, and of nobody else.
fn remove_dead_socket(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    if is_socket
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        let _ = std::fs::remove_file(path);
    }
}
