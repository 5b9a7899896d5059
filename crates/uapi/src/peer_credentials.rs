//! Who is at the other end of a unix socket, by the kernel's word: `SO_PEERCRED` and `SO_PEERGROUPS`.
//!
//! They are those of the moment at which the peer called connect(2), of a listener at which it called listen(2), and of a pair at
//! which it was made; what becomes of the process later changes nothing (unix(7), and `unix_listen`, `unix_stream_connect` and
//! `sk_getsockopt` of Linux).

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use crate::error::UapiError;

// asm-generic/socket.h
const SOL_SOCKET: c_int = 1;
const SO_PEERCRED: c_int = 17;
const SO_PEERGROUPS: c_int = 59;

/// Most supplementary groups that a process has: `NGROUPS_MAX` of linux/limits.h.
const GROUPS_MAX: usize = 65_536;
/// Groups that are asked for first.
const GROUPS: usize = 64;
/// What the kernel says of a user or a process that it does not know: the socket is not connected, or is no unix socket.
const NOBODY: u32 = u32::MAX;

/// The process at the other end of a unix socket, as its ids are in this process's own namespaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id; `None`: it is in another PID namespace, from which it is not seen here.
    pub pid: Option<u32>,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Supplementary group ids; none before Linux 4.13, which does not tell them.
    pub groups: Vec<u32>,
}

/// `struct ucred` of linux/socket.h.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Ucred {
    pid: i32,
    uid: u32,
    gid: u32,
}

/// The process at the other end of `socket`.
///
/// # Errors
/// ENOTCONN: nobody is, or it is no unix socket.
pub fn peer_credentials(socket: BorrowedFd<'_>) -> Result<PeerCredentials, UapiError> {
    let failed = |source| UapiError::System { doing: "asking who is at the other end of a socket", source };
    let mut ucred = [Ucred::default()];
    match get_option(socket, SO_PEERCRED, &mut ucred) {
        Ok(1) => {}
        Ok(_) => return Err(failed(Errno::INVAL)),
        Err((errno, _)) => return Err(failed(errno)),
    }
    let [Ucred { pid, uid, gid }] = ucred;
    if uid == NOBODY {
        return Err(failed(Errno::NOTCONN));
    }
    let groups = peer_groups(socket).map_err(failed)?;
    Ok(PeerCredentials { pid: u32::try_from(pid).ok().filter(|pid| *pid > 0), uid, gid, groups })
}

fn peer_groups(socket: BorrowedFd<'_>) -> Result<Vec<u32>, Errno> {
    let mut groups = vec![0; GROUPS];
    loop {
        match get_option(socket, SO_PEERGROUPS, &mut groups) {
            Ok(count) => {
                groups.truncate(count);
                return Ok(groups);
            }
            Err((Errno::RANGE, needed)) if needed > groups.len() && needed <= GROUPS_MAX => {
                groups.resize(needed, 0);
            }
            Err((Errno::NOPROTOOPT, _)) => return Ok(Vec::new()),
            Err((errno, _)) => return Err(errno),
        }
    }
}

/// Reads an option into `value`, plain integers; returns how many elements the kernel wrote, or, with its errno, how many it has.
fn get_option<T: Copy>(
    socket: BorrowedFd<'_>,
    name: c_int,
    value: &mut [T],
) -> Result<usize, (Errno, usize)> {
    // What std is linked with on Linux; none of the crates that are used here has SO_PEERGROUPS.
    unsafe extern "C" {
        fn getsockopt(socket: c_int, level: c_int, name: c_int, value: *mut c_void, len: *mut u32) -> c_int;
    }
    let mut len = u32::try_from(size_of_val(value)).unwrap_or(0);
    let elements = |len: u32| usize::try_from(len).unwrap_or(0).div_ceil(size_of::<T>());
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has so many, and of which any are a value; `len` lives on.
    let answer =
        unsafe { getsockopt(socket.as_raw_fd(), SOL_SOCKET, name, value.as_mut_ptr().cast(), &raw mut len) };
    if answer == 0 {
        return Ok(elements(len).min(value.len()));
    }
    let error = std::io::Error::last_os_error();
    Err((Errno::from_io_error(&error).unwrap_or(Errno::INVAL), elements(len)))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The groups of this process by /proc, which tells at most so many as fit.
    fn own_groups() -> Vec<u32> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("Groups:")).unwrap();
        line.split_whitespace().map(|group| group.parse().unwrap()).collect()
    }

    #[test]
    fn a_pair_is_known_as_its_own_maker() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = peer_credentials(one.as_fd()).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.gid, rustix::process::getegid().as_raw());
        assert_eq!(peer.groups, own_groups());
    }

    #[test]
    fn nobody_is_at_the_end_of_another_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        for (descriptor, errno) in [(tcp.as_fd(), Errno::NOTCONN), (file.as_fd(), Errno::NOTSOCK)] {
            let error = peer_credentials(descriptor).unwrap_err();
            assert!(matches!(error, UapiError::System { source, .. } if source == errno), "{error:?}");
        }
    }
}
