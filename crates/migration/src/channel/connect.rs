//! Getting a connection to a destination, and securing it.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;

use crate::channel::tls::Tls;
use crate::channel::transport::{Socket, Transport, TransportError};
use crate::connection_factory::ConnectionFactory;
use crate::session::abandon::{Unanswered, answer_unless};
use crate::tls::config::Security;
use crate::tls::error::TlsError;
use crate::tls::layout::TlsRole;
use crate::unix_listener::unix_address;
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
    #[error("nobody is left who could hand a connection over")]
    NoneHanded,
    #[error("no further connection could be made")]
    Factory(#[source] io::Error),
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
pub(crate) fn leaves_host(socket: impl AsFd) -> bool {
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

/// The same, over a connection that the VMM makes.
pub(crate) fn by_factory(
    factory: &ConnectionFactory,
    uri: &Uri,
    security: Option<&Security>,
    peers: &AllowedUnixPeers,
    limit: Duration,
    given_up: impl Fn() -> bool,
) -> Result<Box<dyn Transport>, ConnectError> {
    let (factory, wanted, security, peers) = (factory.clone(), uri.clone(), security.cloned(), peers.clone());
    let until = Instant::now() + limit;
    within(uri, limit, given_up, move || {
        let socket = factory.make(limit).map_err(ConnectError::Factory)?;
        check_stream(&socket, std::os::fd::AsRawFd::as_raw_fd(&socket))?;
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

pub(crate) fn as_it_is(socket: OwnedFd, security: Option<&Security>) -> Box<dyn Transport> {
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
pub(crate) fn duplicate(number: RawFd) -> Result<OwnedFd, ConnectError> {
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
