//! The machine's network card, brought up with an address. There is no `ip` in the image.
//!
//! Layouts and numbers are those of `linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_link.h`, `linux/if_addr.h` and
//! `linux/if.h`, in the machine's own byte order.

use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, connect, recv, send, socket};

use crate::check::Outcome;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const IFF_UP: u32 = 1;
const AF_INET: u8 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// Both machines are in one network of this prefix.
const PREFIX: u8 = 24;

/// The name of the network card, if there is one. The loopback has no device behind it.
pub(crate) fn card() -> Option<String> {
    let mut cards = fs::read_dir("/sys/class/net").ok()?.flatten();
    let card = cards.find(|entry| entry.path().join("device").exists())?;
    card.file_name().into_string().ok()
}

/// Gives the network card `address`, and brings it up.
pub(crate) fn up(address: Ipv4Addr) -> Outcome {
    let card = card().ok_or("there is no network card: is its module loaded?")?;
    let index: u32 = fs::read_to_string(format!("/sys/class/net/{card}/ifindex"))?.trim().parse()?;
    let socket = socket(AddressFamily::NETLINK, SocketType::DGRAM, None)?;
    connect(&socket, &SocketAddrNetlink::new(0, 0))?;
    for (what, request) in [
        ("an address", request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &new_address(index, address))),
        ("the link up", request(RTM_NEWLINK, 0, &link_up(index))),
    ] {
        ask(&socket, &request).map_err(|error| format!("{card}: {what}: {error}"))?;
    }
    Ok(())
}

/// `struct ifinfomsg`.
fn link_up(index: u32) -> Vec<u8> {
    // Family and kind are left open.
    let mut bytes = vec![0; 4];
    // The flags, and which of them to change.
    for word in [index, IFF_UP, IFF_UP] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes
}

/// `struct ifaddrmsg`, and the address in two attributes: ours, and the network's, which is the same where the link has
/// many ends.
fn new_address(index: u32, address: Ipv4Addr) -> Vec<u8> {
    let mut bytes = vec![AF_INET, PREFIX, 0, 0];
    bytes.extend(index.to_ne_bytes());
    for kind in [IFA_LOCAL, IFA_ADDRESS] {
        bytes.extend(8u16.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(address.octets());
    }
    bytes
}

/// `struct nlmsghdr`, and what follows it.
fn request(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    // Sequence and sender: there is one request at a time.
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

/// Sends a request and hears what became of it: `struct nlmsgerr`, whose number is 0 for a success.
fn ask(socket: &OwnedFd, request: &[u8]) -> Outcome {
    send(socket, request, SendFlags::empty())?;
    let mut answer = [0; 512];
    let (length, _) = recv(socket, &mut answer, RecvFlags::empty())?;
    let answer = answer.get(..length).unwrap_or_default();
    let (Some(&[low, high]), Some(&[a, b, c, d])) = (answer.get(4..6), answer.get(16..20)) else {
        return Err(format!("an answer of {length} bytes").into());
    };
    match (u16::from_ne_bytes([low, high]), i32::from_ne_bytes([a, b, c, d])) {
        (NLMSG_ERROR, 0) => Ok(()),
        (NLMSG_ERROR, number) => Err(Errno::from_raw_os_error(-number).into()),
        (kind, _) => Err(format!("an answer of kind {kind}").into()),
    }
}
