//! Listening at a unix socket of the file system that nobody can connect to who may not, from its first moment on.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::unix_peer::AllowedUnixPeers;

/// Mode of a socket file that only its owner, and root, may connect to.
const OWN: Mode = Mode::RUSR.union(Mode::WUSR);
/// Mode of one that anybody may connect to: whoever listens judges each of them by [`AllowedUnixPeers::check`].
const ANYBODY: Mode = OWN.union(Mode::RGRP).union(Mode::WGRP).union(Mode::ROTH).union(Mode::WOTH);

/// Binds a socket to `path` and listens. Where `allowed` names somebody the file lets anybody connect, since its mode has no
/// place for several users and groups: each connection is to be [checked](AllowedUnixPeers::check). Else the file is its owner's
/// alone, whatever the umask is. Nobody can connect before the file's mode is what it is to be.
///
/// # Errors
/// That of the system call that failed; EADDRINUSE where a file is there.
pub fn bind_unix(path: &Path, allowed: &AllowedUnixPeers) -> io::Result<UnixListener> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file gets what of this mode the umask leaves (`unix_bind_bsd` of Linux).
    rustix::fs::fchmod(&socket, OWN)?;
    rustix::net::bind(&socket, &unix_address(path)?)?;
    match open_up(&socket, path, allowed) {
        Ok(()) => Ok(socket.into()),
        Err(error) => {
            let _ = std::fs::remove_file(path);
            Err(error)
        }
    }
}

/// Most bytes of a unix socket's path: what `sockaddr_un` holds beside its end (unix(7)).
const LONGEST_PATH: usize = 107;

/// The address of a unix socket of the file system.
///
/// # Errors
/// The path is too long, which says how long it may be; or it has a zero byte in it.
pub fn unix_address(path: &Path) -> io::Result<SocketAddrUnix> {
    let long = path.as_os_str().len();
    if long > LONGEST_PATH {
        let text = format!("a socket's path has at most {LONGEST_PATH} bytes, and this one has {long}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(SocketAddrUnix::new(path)?)
}

/// Gives the file its mode, and listens: before that, whoever connects is refused.
fn open_up(socket: &OwnedFd, path: &Path, allowed: &AllowedUnixPeers) -> io::Result<()> {
    // By a descriptor, so that nobody puts another file there meanwhile whose mode is changed then.
    let file = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    let found = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::Socket {
        return Err(io::Error::other("another file has taken the socket's place"));
    }
    let wanted = if allowed.is_empty() { OWN } else { ANYBODY };
    if Mode::from_raw_mode(found.st_mode) != wanted {
        rustix::fs::chmod(format!("/proc/self/fd/{}", file.as_raw_fd()), wanted)?;
    }
    // As many may wait as the host lets (net.core.somaxconn).
    rustix::net::listen(socket, -1)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_file_is_its_owners_or_anybodys_and_can_be_connected_to() {
        let dir = tempfile::tempdir().unwrap();
        let group = AllowedUnixPeers { gids: [77].into(), ..AllowedUnixPeers::default() };
        for (name, allowed, mode) in [("own", AllowedUnixPeers::default(), 0o600), ("shared", group, 0o666)] {
            let path = dir.path().join(name);
            let listener = bind_unix(&path, &allowed).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, mode);
            let _stream = UnixStream::connect(&path).unwrap();
            listener.accept().unwrap();
            let again = bind_unix(&path, &allowed).unwrap_err();
            assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
            assert!(path.exists());
        }
    }
}
