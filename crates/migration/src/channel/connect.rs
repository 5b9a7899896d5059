//! Getting a connection: to a listening destination, or from a source.

use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::uri::Uri;

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
    #[error("nobody connected within {0:?}")]
    NobodyCame(Duration),
    #[error("the one connection behind {0} has been used")]
    Used(Uri),
    #[error("cancelled")]
    Cancelled,
}

/// Connects to a destination.
pub(crate) fn connect(uri: &Uri, limit: Duration) -> Result<OwnedFd, ConnectError> {
    match uri {
        Uri::Tcp { host, port } => connect_tcp(uri, host, *port, limit),
        Uri::Unix(path) => connect_unix(uri, path, limit),
        Uri::Fd(number) => take_over(*number),
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
    let address = SocketAddrUnix::new(path).map_err(failed)?;
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

/// Duplicates a descriptor known by its number alone, in safe code: asks the kernel for our own descriptor.
fn take_over(number: RawFd) -> Result<OwnedFd, ConnectError> {
    let failed = |source: Errno| ConnectError::System {
        doing: "taking over",
        uri: Uri::Fd(number),
        source: source.into(),
    };
    let own = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty())
        .map_err(failed)?;
    let socket = rustix::process::pidfd_getfd(&own, number, rustix::process::PidfdGetfdFlags::empty())
        .map_err(failed)?;
    check_stream(&socket, number)?;
    Ok(socket)
}

pub(crate) fn check_stream(socket: &OwnedFd, number: RawFd) -> Result<(), ConnectError> {
    let stream = rustix::net::sockopt::socket_type(socket) == Ok(SocketType::STREAM);
    if !stream || rustix::net::getpeername(socket).is_err() {
        return Err(ConnectError::NotAStream(number));
    }
    // A caller's descriptor may be non-blocking; the session's threads block.
    let _ = rustix::io::ioctl_fionbio(socket, false);
    Ok(())
}

/// A socket that sources connect to, or the one connection that was handed over.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, Unlink),
    /// `None` once it has been used.
    Connected(Option<OwnedFd>, Uri),
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
    /// Binds, and returns the address: with the port that port 0 became.
    pub(crate) fn bind(uri: &Uri) -> Result<(Self, Uri), ConnectError> {
        let failed = |source| ConnectError::System { doing: "listening on", uri: uri.clone(), source };
        match uri {
            Uri::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port)).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let port = listener.local_addr().map_err(failed)?.port();
                Ok((Self::Tcp(listener), Uri::Tcp { host: host.clone(), port }))
            }
            Uri::Unix(path) => {
                remove_dead_socket(path);
                let listener = UnixListener::bind(path).map_err(failed)?;
                let unlink = Unlink(path.clone());
                listener.set_nonblocking(true).map_err(failed)?;
                Ok((Self::Unix(listener, unlink), uri.clone()))
            }
            Uri::Fd(number) => Ok((Self::Connected(Some(take_over(*number)?), uri.clone()), uri.clone())),
        }
    }

    /// Fails once there is no connection to come.
    pub(crate) fn check(&self) -> Result<(), ConnectError> {
        match self {
            Self::Connected(None, uri) => Err(ConnectError::Used(uri.clone())),
            _ => Ok(()),
        }
    }

    /// The next connection, if one waits.
    pub(crate) fn try_accept(&mut self) -> Result<Option<OwnedFd>, ConnectError> {
        let accepted = match self {
            Self::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                Ok(OwnedFd::from(stream))
            }),
            Self::Unix(listener, _) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                Ok(OwnedFd::from(stream))
            }),
            Self::Connected(socket, _) => return Ok(socket.take()),
        };
        match accepted {
            Ok(socket) => Ok(Some(socket)),
            Err(error) => match error.kind() {
                // A peer that went away between its connect and our accept is nobody.
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {
                    Ok(None)
                }
                _ => {
                    let uri = Uri::Fd(-1);
                    Err(ConnectError::System {
                        doing: "accepting on",
                        uri: self.uri().unwrap_or(uri),
                        source: error,
                    })
                }
            },
        }
    }

    fn uri(&self) -> Option<Uri> {
        match self {
            Self::Tcp(listener) => {
                let address = listener.local_addr().ok()?;
                Some(Uri::Tcp { host: address.ip().to_string(), port: address.port() })
            }
            Self::Unix(_, unlink) => Some(Uri::Unix(unlink.0.clone())),
            Self::Connected(_, uri) => Some(uri.clone()),
        }
    }

    /// Sleeps until a connection may be waiting or one of `others` can be read, for at most as long as a cancel may
    /// wait.
    pub(crate) fn wait<'a>(&'a self, others: impl Iterator<Item = BorrowedFd<'a>>) {
        let own = match self {
            Self::Tcp(listener) => Some(listener.as_fd()),
            Self::Unix(listener, _) => Some(listener.as_fd()),
            Self::Connected(..) => None,
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
