//! Whether a listening unix socket has a client already.

use std::path::Path;

/// The kernel's list of the unix sockets of this network namespace (proc_pid_net(5)).
const LIST: &str = "/proc/net/unix";
/// State of a socket of the list that is connected and was accepted, as `SS_CONNECTED` in linux/net.h.
const CONNECTED: &str = "03";

/// Whether somebody is connected to the socket at `path`, and was accepted. A server in another network namespace, or one
/// that bound a name that is not this path, is not seen.
pub(crate) fn has_client(path: &Path) -> bool {
    let Ok(list) = std::fs::read(LIST) else { return false };
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let resolved = path.canonicalize().unwrap_or_else(|_| path.into());
    let named = |name: &str| {
        let name = Path::new(name);
        // One that is relative is so to a folder that is not known here.
        [path, &absolute, &resolved]
            .iter()
            .any(|path| if name.is_relative() { path.ends_with(name) } else { *path == name })
    };
    connected(&String::from_utf8_lossy(&list), named)
}

/// The accepted end of a connection has the name of the socket that accepted it.
fn connected(list: &str, named: impl Fn(&str) -> bool) -> bool {
    list.lines().skip(1).any(|line| {
        // Num RefCount Protocol Flags Type St Inode Path
        let mut fields = line.split_ascii_whitespace();
        let state = fields.nth(5);
        // A name may have blanks.
        let name = line
            .split_once(" /")
            .map(|(_, name)| format!("/{name}"))
            .or_else(|| fields.nth(1).map(Into::into));
        state == Some(CONNECTED) && name.is_some_and(|name| named(&name))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_client_is_seen_once_it_was_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a socket");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(!has_client(&path));
        let waiting = UnixStream::connect(&path).unwrap();
        assert!(!has_client(&path), "it waits to be accepted");
        let (accepted, _) = listener.accept().unwrap();
        assert!(has_client(&path));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(has_client(&link));
        assert!(!has_client(&dir.path().join("another")));
        drop((accepted, waiting));
        assert!(!has_client(&path));
    }

    #[test]
    fn a_relative_name_is_one_of_that_name_anywhere() {
        let list = "Num RefCount Protocol Flags Type St Inode Path\n\
                    0000: 00000003 00000000 00000000 0001 03 44960\n\
                    0000: 00000003 00000000 00000000 0001 03 44961 a.sock\n";
        assert!(connected(list, |name| Path::new("/tmp/a.sock").ends_with(name)));
        assert!(!connected(list, |name| Path::new("/tmp/ba.sock").ends_with(name)));
    }
}
