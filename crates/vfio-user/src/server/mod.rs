//! The server: a device's end of vfio-user connections.

mod accept;
mod argsz;
mod backend;
mod commands;
mod dma;
mod features;
mod options;
mod session;
mod stop;

use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use self::accept::Acceptor;
pub use self::backend::{Backend, IrqRequest, IrqRequestData};
pub use self::dma::DmaChannel;
pub use self::options::ServerOptions;
pub use self::stop::StopHandle;
use crate::conn::address;
use crate::error::ServerError;
use crate::event::{DropReason, ServerEvent};

/// A listening socket for a device's clients. Its socket file is removed on drop, if it is still this server's.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket file, to know it again.
    file: Option<(u64, u64)>,
    options: ServerOptions,
}

impl Server {
    /// Listens on `path`. A socket file there on which nobody answers is removed.
    ///
    /// # Errors
    /// Another server answers on `path`, something else lies there, or the system refuses.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, ServerError> {
        Self::bind_with(path, ServerOptions::default())
    }

    /// As [`bind`](Self::bind), with options.
    pub fn bind_with(path: impl AsRef<Path>, options: ServerOptions) -> Result<Self, ServerError> {
        let path = path.as_ref();
        address(path)
            .map_err(|source| ServerError::io(format!("listening on {}", path.display()), source))?;
        remove_stale(path)?;
        let doing = || format!("listening on {}", path.display());
        let listener = UnixListener::bind(path).map_err(|source| match source.kind() {
            ErrorKind::AddrInUse => ServerError::InUse(path.display().to_string()),
            _ => ServerError::io(doing(), source),
        })?;
        listener.set_nonblocking(true).map_err(|source| ServerError::io(doing(), source))?;
        let file = std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
        Ok(Self { listener, path: path.to_owned(), file, options })
    }

    /// Path of the listening socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves `backend` to one client at a time, each until it leaves, until `stop` is used. A client that breaks the
    /// protocol is dropped, and the next served; others wait in the listening queue. Whoever connects and does not say its version is
    /// waited for [beside the others](ServerOptions::handshake_timeout): the first that says it is served.
    ///
    /// Where the system is short of something that a client needs, descriptors above all, it tells so once and tries again until
    /// there is some. What a server has to tell, of clients that it drops too, it tells [`Backend::server_event`].
    ///
    /// # Errors
    /// The listening socket is of no more use: something has shut it down or closed it.
    pub fn serve(&self, backend: &dyn Backend, stop: &StopHandle) -> Result<(), ServerError> {
        let mut acceptor = Acceptor::new(&self.listener, &self.options, backend, stop);
        while let Some((conn, first)) = acceptor.next_client()? {
            session::serve(conn, &first, backend, &self.options, stop);
        }
        Ok(())
    }

    /// Serves one client on a connected stream until it leaves or `stop` is used, if it says its version in time.
    pub fn serve_stream(
        stream: UnixStream,
        backend: &dyn Backend,
        options: &ServerOptions,
        stop: &StopHandle,
    ) {
        let conn = session::connection(stream, stop);
        let greeted = conn.and_then(|conn| {
            let late = || DropReason::NoVersion(options.handshake_timeout);
            let first = conn.first_command(options.handshake_timeout).map_err(|error| error.or_late(late))?;
            Ok((conn, first))
        });
        match greeted {
            Ok((conn, first)) => session::serve(conn, &first, backend, options, stop),
            Err(error) => {
                if let Some(why) = error.drops_peer() {
                    backend.server_event(&ServerEvent::ClientDropped(why));
                }
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let now = std::fs::symlink_metadata(&self.path).ok().map(|meta| (meta.dev(), meta.ino()));
        if now.is_some() && now == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket file on which nobody answers.
fn remove_stale(path: &Path) -> Result<(), ServerError> {
    let name = || path.display().to_string();
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(ServerError::NotASocket(name())),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(ServerError::io(format!("looking at {}", name()), error)),
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        // It answers, or (EAGAIN) its queue is full, or it cannot be told.
        Ok(_) => return Err(ServerError::InUse(name())),
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ServerError::InUse(name())),
        Err(error) => return Err(ServerError::io(format!("trying the socket {}", name()), error)),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(ServerError::io(format!("removing the stale socket {}", name()), error))
        }
        _ => Ok(()),
    }
}
