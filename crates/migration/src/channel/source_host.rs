//! Whose connection it is, where hosts are treated alike, however many connections one of them makes.

use std::net::SocketAddr;

use crate::channel::link::Link;
use crate::tls::identity::Pin;

/// The host of a source, as far as its connection tells it from others: by its key, else by its user, else by its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SourceHost {
    Key(Pin),
    User(u32),
    Address(String),
}

impl SourceHost {
    pub(crate) fn of(link: &Link) -> Self {
        let security = link.security();
        if let Some(peer) = security.peer {
            return Self::Key(peer.pin);
        }
        if let Some(process) = security.unix_peer {
            return Self::User(process.uid);
        }
        let peer = link.peer();
        // Each connection has a port of its own.
        let address = peer.strip_prefix("tcp:").and_then(|address| address.parse().ok());
        Self::Address(address.map_or(peer, |address: SocketAddr| address.ip().to_string()))
    }
}
