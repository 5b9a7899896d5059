//! The file of a control socket: what may be in its way, and that only our own is ever removed.

use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The file of a socket that we bound. Dropping it removes the file, if it is still ours.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Place {
    /// Binds `path`. A socket file that nobody listens on any more is replaced; any other file is left alone.
    pub(super) fn bind(path: &Path) -> Result<(Self, UnixListener)> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                clear(path)?;
                UnixListener::bind(path)
            }
            other => other,
        }?;
        Ok((Self { path: path.into(), identity: identity(path)? }, listener))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity) {
            // Nothing depends on the file being gone: the next bind replaces a dead one.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket file whose listener is gone; says what else is in the way.
fn clear(path: &Path) -> Result<()> {
    let refuse = |why: &str| Err(Error::new(ErrorKind::AddrInUse, why));
    if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
        return refuse("there is a file of another kind, which is left alone");
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) => Err(error),
        Ok(_) => refuse("another process listens there"),
    }
}

fn identity(path: &Path) -> Result<(u64, u64)> {
    let data = std::fs::symlink_metadata(path)?;
    Ok((data.dev(), data.ino()))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        let error = Place::bind(&path).unwrap_err();
        assert!(error.to_string().contains("left alone"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Place::bind(&link).is_err());
        assert!(link.exists() && path.exists());
    }

    #[test]
    fn only_our_own_socket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let (place, listener) = Place::bind(&path).unwrap();
        std::fs::rename(&path, dir.path().join("kept")).unwrap();
        let (_other, _) = Place::bind(&path).unwrap();
        drop((place, listener));
        assert!(path.exists(), "the file that took the path is not ours");
    }
}
