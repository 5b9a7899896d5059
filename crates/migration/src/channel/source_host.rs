//! Whose connection it is, where hosts are treated alike, however many connections one of them makes.

use std::net::{IpAddr, SocketAddr};

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
        Self::Address(ip(link).map_or_else(|| link.peer(), |ip| ip.to_string()))
    }
}

/// Where a connection comes from, before anybody has proved anything. Its fields are equal where nothing finer is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The user of a unix socket, the address of IPv4, or of IPv6 the /64, of which a host may have every address.
    pub(crate) network: String,
    /// The process, or the address.
    pub(crate) address: String,
}

impl Origin {
    pub(crate) fn of(link: &Link) -> Self {
        if let Some(process) = link.security().unix_peer {
            let pid = process.pid.map_or_else(String::new, |pid| pid.to_string());
            return Self { network: process.uid.to_string(), address: pid };
        }
        ip(link).map_or_else(|| Self { network: link.peer(), address: link.peer() }, Self::of_ip)
    }

    pub(crate) fn of_ip(ip: IpAddr) -> Self {
        let network = match ip.to_canonical() {
            IpAddr::V6(ip) => format!("{:x}", ip.to_bits() >> 64),
            ip => ip.to_string(),
        };
        Self { network, address: ip.to_canonical().to_string() }
    }
}

/// Each connection has a port of its own.
fn ip(link: &Link) -> Option<IpAddr> {
    let address: SocketAddr = link.peer().strip_prefix("tcp:")?.parse().ok()?;
    Some(address.ip())
}
