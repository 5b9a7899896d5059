//! The sockets that were passed to a `vm` over its control socket, until a session has them.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::net::{SocketType, getpeername, sockopt};
use vfio_migration::Uri;

use crate::address::{Address, SocketName};
use crate::control::refused::Refused;
use crate::inherited;

/// Most sockets that are kept.
const KEPT_MAX: usize = 16;

/// The sockets that no session has had yet, by their names.
#[derive(Debug, Default)]
pub(super) struct PassedSockets(Mutex<BTreeMap<SocketName, Kept>>);

#[derive(Debug)]
struct Kept {
    socket: Arc<OwnedFd>,
    /// A session that is to have it is beginning.
    claimed: bool,
}

impl PassedSockets {
    /// Keeps `socket` under `name`, which must be free, for one session.
    pub(super) fn keep(&self, name: SocketName, socket: OwnedFd) -> Result<(), Refused> {
        let stream = sockopt::socket_type(&socket) == Ok(SocketType::STREAM);
        if !stream || getpeername(&socket).is_err() {
            return Err(Refused::generic("the descriptor is not a connected stream socket; it is closed"));
        }
        let mut kept = self.lock();
        if kept.contains_key(&name) {
            return Err(Refused::generic(format!(
                "there is a descriptor {name} already: closefd closes it; the new one is closed"
            )));
        }
        if kept.len() >= KEPT_MAX {
            return Err(Refused::generic(format!(
                "{KEPT_MAX} descriptors are kept, and no more: closefd closes one; the new one is closed"
            )));
        }
        kept.insert(name, Kept { socket: socket.into(), claimed: false });
        Ok(())
    }

    /// Closes the socket of this name.
    pub(super) fn close(&self, name: &SocketName) -> Result<(), Refused> {
        let mut kept = self.lock();
        match kept.get(name) {
            None => Err(unknown(name)),
            Some(Kept { claimed: true, .. }) => Err(in_use(name)),
            Some(_) => {
                kept.remove(name);
                Ok(())
            }
        }
    }

    /// Closes all of them.
    pub(super) fn end(&self) {
        self.lock().clear();
    }

    /// Claims `address` for a session. Of addresses, only a descriptor can be refused.
    pub(super) fn claim(&self, address: &Address) -> Result<AddressClaim<'_>, Refused> {
        match address {
            Address::Uri(uri) => {
                let claim = inherited::claim(uri).map_err(|failure| Refused::generic(failure.text))?;
                let endpoint = Endpoint { uri: uri.clone(), _socket: None };
                Ok(AddressClaim { endpoint, hold: Hold::Started(claim) })
            }
            Address::Passed(name) => {
                let mut kept = self.lock();
                let found = kept.get_mut(name).ok_or_else(|| unknown(name))?;
                if std::mem::replace(&mut found.claimed, true) {
                    return Err(in_use(name));
                }
                let endpoint =
                    Endpoint { uri: Uri::Fd(found.socket.as_raw_fd()), _socket: Some(found.socket.clone()) };
                Ok(AddressClaim {
                    endpoint,
                    hold: Hold::Passed(PassedClaim { of: self, name: name.clone() }),
                })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SocketName, Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown(name: &SocketName) -> Refused {
    Refused::generic(format!("there is no descriptor {name}: getfd passes one, for one session"))
}

fn in_use(name: &SocketName) -> Refused {
    Refused::generic(format!("the descriptor {name} is another session's, which is beginning"))
}

/// The other end of a session, to be held while the session uses its address: the number of a socket that was passed is its
/// own as long as it is open.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    uri: Uri,
    _socket: Option<Arc<OwnedFd>>,
}

impl Endpoint {
    /// Not a field that others see: a closure that uses it would take it along without the socket.
    pub(super) fn uri(&self) -> &Uri {
        &self.uri
    }
}

/// An address that a session is to have. Dropped before there is one, it leaves a socket for another.
#[derive(Debug)]
#[must_use]
pub(super) struct AddressClaim<'p> {
    endpoint: Endpoint,
    hold: Hold<'p>,
}

#[derive(Debug)]
enum Hold<'p> {
    Started(inherited::Claim),
    Passed(PassedClaim<'p>),
}

#[derive(Debug)]
struct PassedClaim<'p> {
    of: &'p PassedSockets,
    name: SocketName,
}

impl AddressClaim<'_> {
    pub(super) fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    /// There is a session: a socket is not for another.
    pub(super) fn spend(self) {
        match self.hold {
            Hold::Started(claim) => claim.spend(),
            Hold::Passed(claim) => {
                // Before the claim is dropped, which looks for it.
                let taken = claim.of.lock().remove(&claim.name);
                drop(taken);
            }
        }
    }
}

impl Drop for PassedClaim<'_> {
    fn drop(&mut self) {
        // After the session has it, it is no longer there.
        if let Some(kept) = self.of.lock().get_mut(&self.name) {
            kept.claimed = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn name(text: &str) -> SocketName {
        text.parse().unwrap()
    }

    fn connected() -> OwnedFd {
        UnixStream::pair().unwrap().0.into()
    }

    #[test]
    fn only_connected_stream_sockets_are_kept_under_free_names_up_to_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let sockets = PassedSockets::default();
        for wrong in [
            OwnedFd::from(UnixListener::bind(dir.path().join("listener")).unwrap()),
            UnixDatagram::pair().unwrap().0.into(),
            std::fs::File::open("/dev/null").unwrap().into(),
            std::io::pipe().unwrap().0.into(),
        ] {
            let refused = sockets.keep(name("a"), wrong).unwrap_err();
            assert!(refused.desc.contains("not a connected stream socket"), "{}", refused.desc);
        }
        sockets.keep(name("a"), connected()).unwrap();
        assert!(sockets.keep(name("a"), connected()).unwrap_err().desc.contains("already"));
        for n in 1..KEPT_MAX {
            sockets.keep(name(&format!("a{n}")), connected()).unwrap();
        }
        assert!(sockets.keep(name("b"), connected()).unwrap_err().desc.contains("16 descriptors are kept"));
        sockets.close(&name("a")).unwrap();
        assert!(sockets.close(&name("a")).unwrap_err().desc.contains("no descriptor a"));
        sockets.keep(name("b"), connected()).unwrap();
        sockets.end();
        assert!(sockets.close(&name("b")).is_err());
    }

    #[test]
    fn a_socket_is_for_the_first_session_that_begins() {
        let sockets = PassedSockets::default();
        let address: Address = "fd:a".parse().unwrap();
        sockets.keep(name("a"), connected()).unwrap();
        let claim = sockets.claim(&address).unwrap();
        assert!(sockets.claim(&address).unwrap_err().desc.contains("another session's"));
        assert!(sockets.close(&name("a")).unwrap_err().desc.contains("another session's"));
        drop(claim);
        let claim = sockets.claim(&address).unwrap();
        let endpoint = claim.endpoint();
        claim.spend();
        assert!(matches!(endpoint.uri, Uri::Fd(number) if number >= 3));
        assert!(sockets.claim(&address).unwrap_err().desc.contains("no descriptor a"));
        sockets.keep(name("a"), connected()).unwrap();
    }
}
