//! Getting a connection: to a listening destination, or from a source.

use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use vfio_migration_types::{RateLimit, Told};

use crate::channel::tls::Tls;
use crate::channel::transport::{Socket, Transport, TransportError};
use crate::session::abandon::{Unanswered, answer_unless};
use crate::tls::config::{Proof, Security};
use crate::tls::error::TlsError;
use crate::tls::layout::TlsRole;
use crate::tls::server_configs::ServerConfigs;
use crate::unix_listener::{bind_unix, unix_address};
use crate::unix_peer::{AllowedUnixPeers, UnixPeerError};
use crate::uri::Uri;

/// The remedy of [`ConnectError::NotChosen`].
pub(crate) const CHOOSE: &str = "--tls-creds DIR secures it, with a folder that `vfio-migrate tls` makes; --insecure-plaintext says aloud that it \
is to go as it is (the library's options: `security`)";

/// The reason why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("{doing} {uri} failed")]
    System {
        doing: &'static str,
        uri: Uri,
        #[source]
        source: io::Error,
    },
    #[error("{uri} did not take the connection within {limit:?}")]
    TimedOut { uri: Uri, limit: Duration },
    #[error("the name {host} has no address")]
    NoAddress { host: String },
    #[error("descriptor {0} is not a connected stream socket")]
    NotAStream(RawFd),
    #[error("what was handed over as {0} is no stream socket that listens")]
    NotListening(Uri),
    #[error("nobody connected within {0:?}")]
    NobodyCame(Duration),
    #[error("the one connection behind {0} has been used")]
    Used(Uri),
    #[error("{0} is no unix socket, and nothing says how it is to be secured")]
    NotChosen(Uri),
    #[error("there is no secure connection to {uri}")]
    Insecure {
        uri: Uri,
        #[source]
        source: TransportError,
    },
    #[error("{uri} closed the connection before there was a session")]
    Closed {
        uri: Uri,
        #[source]
        source: Errno,
    },
    #[error("{uri} cannot be listened on securely")]
    Unprepared {
        uri: Uri,
        #[source]
        source: TlsError,
    },
    #[error("nothing is sent to {uri}")]
    Stranger {
        uri: Uri,
        #[source]
        source: UnixPeerError,
    },
    #[error("cancelled")]
    Cancelled,
    #[error("there is no thread to connect on")]
    NoThread(#[source] io::Error),
}

/// Whether connections at `uri` are others than over a unix socket, so that each side has to say how they are secured: by
/// [`SourceOptions::security`](crate::SourceOptions::security) and
/// [`DestinationOptions::security`](crate::DestinationOptions::security).
///
/// A descriptor that is no socket needs nothing: it is refused as what it is.
pub fn needs_security(uri: &Uri) -> bool {
    match uri {
        Uri::Tcp { .. } => true,
        Uri::Unix(_) => false,
        Uri::Fd(number) => {
            duplicate(*number).is_ok_and(|fd| sockopt::socket_domain(&fd).is_ok() && leaves_host(&fd))
        }
    }
}

/// Refuses to go on where somebody has to say how a connection is secured, and nobody has.
pub(crate) fn check_chosen(uri: &Uri, security: Option<&Security>) -> Result<(), ConnectError> {
    if security.is_none() && needs_security(uri) {
        return Err(ConnectError::NotChosen(uri.clone()));
    }
    Ok(())
}

/// Nobody is on the way of a unix socket.
fn leaves_host(socket: impl AsFd) -> bool {
    sockopt::socket_domain(socket) != Ok(AddressFamily::UNIX)
}

/// Connects to a destination, and secures the connection, within `limit`, and unless it is `given_up`. Over a unix socket it must
/// be one of the `peers`.
pub(crate) fn connect(
    uri: &Uri,
    security: Option<&Security>,
    peers: &AllowedUnixPeers,
    limit: Duration,
    given_up: impl Fn() -> bool,
) -> Result<Box<dyn Transport>, ConnectError> {
    let (wanted, security, peers) = (uri.clone(), security.cloned(), peers.clone());
    let until = Instant::now() + limit;
    // Neither a name's resolution nor a connect ends when it is told to.
    within(uri, limit, given_up, move || {
        let socket = match &wanted {
            Uri::Tcp { host, port } => {
                // What is wrong with our own files is nothing that the other side has to hear of.
                let secrets = secrets(&wanted, security.as_ref())?;
                let socket = connect_tcp(&wanted, host, *port, limit)?;
                let left = until.saturating_duration_since(Instant::now());
                return over(socket, &wanted, security.as_ref(), secrets, left);
            }
            Uri::Unix(path) => connect_unix(&wanted, path, limit)?,
            Uri::Fd(number) => take_over(*number)?,
        };
        secured(socket, &wanted, security.as_ref(), &peers, until.saturating_duration_since(Instant::now()))
    })
}

/// A source's connection over `socket`, secured if it is no unix socket, else to one of the `peers`.
pub(crate) fn secured(
    socket: OwnedFd,
    uri: &Uri,
    security: Option<&Security>,
    peers: &AllowedUnixPeers,
    limit: Duration,
) -> Result<Box<dyn Transport>, ConnectError> {
    if !leaves_host(&socket) {
        let transport = as_it_is(socket, security);
        let stranger = |source| ConnectError::Stranger { uri: uri.clone(), source };
        transport.security().check_unix_peer(peers).map_err(stranger)?;
        return Ok(transport);
    }
    let secrets = secrets(uri, security)?;
    over(socket, uri, security, secrets, limit)
}

/// What a connection is secured with, and the name that its other end must prove; `None`: it goes as it is.
type Secrets = Option<(Arc<ClientConfig>, ServerName<'static>)>;

fn secrets(uri: &Uri, security: Option<&Security>) -> Result<Secrets, ConnectError> {
    let security = security.ok_or_else(|| ConnectError::NotChosen(uri.clone()))?;
    let insecure = |source: TlsError| ConnectError::Insecure { uri: uri.clone(), source: source.into() };
    let Some(config) = security.client().map_err(insecure)? else { return Ok(None) };
    security.warn_of_expiry(TlsRole::Client);
    let host = match uri {
        Uri::Tcp { host, .. } => host.as_str(),
        Uri::Unix(_) | Uri::Fd(_) => "",
    };
    Ok(Some((config, security.server_name(host).map_err(insecure)?)))
}

fn over(
    socket: OwnedFd,
    uri: &Uri,
    security: Option<&Security>,
    secrets: Secrets,
    limit: Duration,
) -> Result<Box<dyn Transport>, ConnectError> {
    let Some((config, name)) = secrets else {
        if let Some(security) = security {
            security.warn_of_plain_text(uri);
        }
        return Ok(as_it_is(socket, security));
    };
    let insecure = |source: TransportError| match source {
        // A receiver that refuses says so by an alert, or ends the handshake; this one is gone with its listener.
        TransportError::System(source @ (Errno::CONNRESET | Errno::PIPE)) => {
            ConnectError::Closed { uri: uri.clone(), source }
        }
        source => ConnectError::Insecure { uri: uri.clone(), source },
    };
    let must_ask = security.is_some_and(Security::has_to_be_asked);
    Tls::connect(socket, config, name, must_ask, limit)
        .map(|tls| Box::new(tls) as Box<dyn Transport>)
        .map_err(insecure)
}

fn as_it_is(socket: OwnedFd, security: Option<&Security>) -> Box<dyn Transport> {
    Box::new(match security {
        Some(Security::Vouched(peer)) => Socket::vouched(socket, peer.clone()),
        _ => Socket::new(socket),
    })
}

/// Time behind the limit in which `work`, most of which keeps to the limit itself, may still say what it waited for.
const BEHIND: Duration = Duration::from_secs(1);

fn within(
    uri: &Uri,
    limit: Duration,
    given_up: impl Fn() -> bool,
    work: impl FnOnce() -> Result<Box<dyn Transport>, ConnectError> + Send + 'static,
) -> Result<Box<dyn Transport>, ConnectError> {
    match answer_unless(given_up, Some(limit + BEHIND), work) {
        Ok(connected) => connected,
        Err(Unanswered::GivenUp) => Err(ConnectError::Cancelled),
        Err(Unanswered::Late) => Err(ConnectError::TimedOut { uri: uri.clone(), limit }),
        Err(Unanswered::NoThread(error)) => Err(ConnectError::NoThread(error.0)),
    }
}

/// Tries each address of the name in turn, within one limit for all.
fn connect_tcp(uri: &Uri, host: &str, port: u16, limit: Duration) -> Result<OwnedFd, ConnectError> {
    let failed = |source| ConnectError::System { doing: "connecting to", uri: uri.clone(), source };
    let end = Instant::now() + limit;
    let mut last = ConnectError::NoAddress { host: host.to_owned() };
    for address in (host, port).to_socket_addrs().map_err(failed)? {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ConnectError::TimedOut { uri: uri.clone(), limit });
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => {
                stream.set_nodelay(true).map_err(failed)?;
                return Ok(stream.into());
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                last = ConnectError::TimedOut { uri: uri.clone(), limit };
            }
            Err(error) => last = failed(error),
        }
    }
    Err(last)
}

/// A unix socket whose backlog is full blocks a blocking connect for ever, so this one does not block.
fn connect_unix(uri: &Uri, path: &Path, limit: Duration) -> Result<OwnedFd, ConnectError> {
    let failed = |source: Errno| ConnectError::System {
        doing: "connecting to",
        uri: uri.clone(),
        source: source.into(),
    };
    let end = Instant::now() + limit;
    let address = unix_address(path).map_err(|source| ConnectError::System {
        doing: "connecting to",
        uri: uri.clone(),
        source,
    })?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < end => std::thread::sleep(Duration::from_millis(10)),
            Err(Errno::AGAIN) => return Err(ConnectError::TimedOut { uri: uri.clone(), limit }),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    rustix::io::ioctl_fionbio(&socket, false).map_err(failed)?;
    Ok(socket)
}

/// The connection behind a descriptor that was handed over.
fn take_over(number: RawFd) -> Result<OwnedFd, ConnectError> {
    let socket = duplicate(number)?;
    check_stream(&socket, number)?;
    Ok(socket)
}

/// Duplicates a descriptor known by its number alone, in safe code: asks the kernel for our own descriptor.
fn duplicate(number: RawFd) -> Result<OwnedFd, ConnectError> {
    let failed = |source: Errno| ConnectError::System {
        doing: "taking over",
        uri: Uri::Fd(number),
        source: source.into(),
    };
    let own = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())
        .map_err(failed)?;
    rustix::process::pidfd_getfd(&own, number, rustix::process::PidfdGetfdFlags::empty()).map_err(failed)
}

pub(crate) fn check_stream(socket: &OwnedFd, number: RawFd) -> Result<(), ConnectError> {
    let stream = sockopt::socket_type(socket) == Ok(SocketType::STREAM);
    if !stream || rustix::net::getpeername(socket).is_err() {
        return Err(ConnectError::NotAStream(number));
    }
    // A caller's descriptor may be non-blocking; the session's threads block.
    let _ = rustix::io::ioctl_fionbio(socket, false);
    Ok(())
}

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

    fn of(socket: ListenerSocket, uri: &Uri, security: Option<&Security>) -> Result<Self, ConnectError> {
        let local = match &socket {
            ListenerSocket::Unix { .. } => true,
            ListenerSocket::Tcp(_) => false,
            ListenerSocket::Connected(socket, _) => {
                socket.as_ref().is_some_and(|socket| !leaves_host(socket))
            }
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
            ListenerSocket::Tcp(_) | ListenerSocket::Connected(..) => {
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// A name server that does not answer blocks getaddrinfo(3), which nothing interrupts.
    #[test]
    fn a_name_that_is_not_resolved_is_given_up_and_has_a_limit() {
        let uri: Uri = "tcp:host:1".parse().unwrap();
        let hang = || {
            let (answer, never) = mpsc::channel();
            let work = move || never.recv().unwrap_or(Err(ConnectError::Cancelled));
            (answer, work)
        };
        let (_answer, work) = hang();
        let given_up = within(&uri, Duration::from_secs(60), || true, work);
        assert!(matches!(given_up, Err(ConnectError::Cancelled)));
        let (_answer, work) = hang();
        let late = within(&uri, Duration::from_millis(1), || false, work);
        assert!(matches!(late, Err(ConnectError::TimedOut { .. })));
    }
}
