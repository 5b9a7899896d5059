//! Versions that a device's driver reports over devlink, the kernel's generic netlink interface for what is of the
//! device as a whole (`Documentation/networking/devlink/devlink-info.rst`; numbers of `include/uapi/linux/devlink.h`).
//!
//! Any user may ask. The kernel answers for devices of the caller's network namespace.

use std::collections::BTreeMap;
use std::time::Duration;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorMessage, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlasIterator,
};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::{GENERIC, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, recv, send, socket_with,
};
use vfio_migration_types::is_control;

/// The family that knows the others' numbers: `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_ATTR_FAMILY_ID` and
/// `CTRL_ATTR_FAMILY_NAME` of `include/uapi/linux/genetlink.h`.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// The command `DEVLINK_CMD_INFO_GET`.
const INFO_GET: u8 = 51;
const BUS_NAME: u16 = 1;
const DEV_NAME: u16 = 2;
const INFO_VERSION_RUNNING: u16 = 101;
const INFO_VERSION_NAME: u16 = 103;
const INFO_VERSION_VALUE: u16 = 104;

/// Most bytes of an answer; the kernel's are of a page or two.
const ANSWER_MAX: usize = 64 << 10;
/// The answer is there when the question has been sent; a driver whose device hangs is not waited for here.
const PATIENCE: Duration = Duration::from_secs(2);
/// Bytes of a `genlmsghdr`: command, version, two that are reserved.
const HEADER: usize = 4;
/// `DEVLINK_GENL_VERSION`; the controller does not look at it.
const VERSION: u8 = 1;

/// The reason why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DevlinkError {
    /// The system refused: ENOENT for a kernel without devlink, ENODEV for a device that has none, EOPNOTSUPP for a
    /// driver that reports nothing.
    #[error("devlink: {0}")]
    Refused(#[from] Errno),
    /// The answer is none.
    #[error("devlink gave an answer that makes no sense: {0}")]
    Nonsense(String),
}

impl From<DecodeError> for DevlinkError {
    fn from(error: DecodeError) -> Self {
        Self::Nonsense(error.to_string())
    }
}

/// Versions of what runs on the device `name` of bus `bus` (`pci`, `0000:01:00.0`) by their names, `fw` and the like.
///
/// # Errors
/// There is no devlink, no such device, or its driver reports nothing.
pub fn running_versions(bus: &str, name: &str) -> Result<BTreeMap<String, String>, DevlinkError> {
    let socket = NetlinkSocket::new()?;
    let family = socket.ask(CONTROLLER, GET_FAMILY, &[(FAMILY_NAME, "devlink")])?;
    let id = attributes(&family)?.into_iter().find(|(kind, _)| *kind == FAMILY_ID);
    let id = id.and_then(|(_, value)| Some(u16::from_ne_bytes(value.as_slice().try_into().ok()?)));
    let id = id.ok_or_else(|| DevlinkError::Nonsense("a family without a number".into()))?;
    versions(&socket.ask(id, INFO_GET, &[(BUS_NAME, bus), (DEV_NAME, name)])?)
}

/// The running versions of an answer to INFO_GET. Those with a name or value that is not printable are left out.
fn versions(answer: &[u8]) -> Result<BTreeMap<String, String>, DevlinkError> {
    let mut found = BTreeMap::new();
    for (kind, value) in attributes(answer)? {
        if kind != INFO_VERSION_RUNNING {
            continue;
        }
        let version = attributes(&value)?;
        let part =
            |wanted| version.iter().find(|(kind, _)| *kind == wanted).and_then(|(_, value)| text(value));
        if let (Some(name), Some(value)) = (part(INFO_VERSION_NAME), part(INFO_VERSION_VALUE)) {
            found.insert(name, value);
        }
    }
    Ok(found)
}

/// Attributes with their values, in order.
fn attributes(bytes: &[u8]) -> Result<Vec<(u16, Vec<u8>)>, DecodeError> {
    NlasIterator::new(bytes).map(|attribute| attribute.map(|it| (it.kind(), it.value().to_vec()))).collect()
}

/// A string that ends with a zero.
fn text(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes.strip_suffix(b"\0")?).ok()?;
    (!text.is_empty() && !text.contains(is_control)).then(|| text.to_owned())
}

/// A connection to the kernel.
struct NetlinkSocket(std::os::fd::OwnedFd);

impl NetlinkSocket {
    fn new() -> Result<Self, Errno> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(GENERIC))?;
        // To the kernel: messages of nobody else are received.
        connect(&socket, &SocketAddrNetlink::new(0, 0))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// The attributes that a command of a family answers with.
    fn ask(&self, family: u16, command: u8, attributes: &[(u16, &str)]) -> Result<Vec<u8>, DevlinkError> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST;
        let question = Generic { family, command, attributes: strings(attributes) };
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(question));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        retry_on_intr(|| send(&self.0, &bytes, SendFlags::empty()))?;
        let mut answer = vec![0; ANSWER_MAX];
        let (taken, length) = retry_on_intr(|| recv(&self.0, answer.as_mut_slice(), RecvFlags::TRUNC))?;
        if length > taken {
            return Err(DevlinkError::Nonsense(format!("it has {length} bytes")));
        }
        answer.truncate(taken);
        match NetlinkMessage::<Generic>::deserialize(&answer)?.payload {
            NetlinkPayload::InnerMessage(answer) if answer.family == family => Ok(answer.attributes),
            NetlinkPayload::Error(ErrorMessage { code: Some(code), .. }) => {
                Err(DevlinkError::Refused(Errno::from_raw_os_error(code.get().saturating_neg())))
            }
            other => Err(DevlinkError::Nonsense(format!("{other:?}"))),
        }
    }
}

/// A message of a generic family.
#[derive(Debug)]
struct Generic {
    family: u16,
    command: u8,
    attributes: Vec<u8>,
}

impl NetlinkSerializable for Generic {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (header, attributes) = buffer.split_at_mut(HEADER);
        header.copy_from_slice(&[self.command, VERSION, 0, 0]);
        attributes.copy_from_slice(&self.attributes);
    }
}

impl NetlinkDeserializable for Generic {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        let (head, attributes) = payload.split_at_checked(HEADER).ok_or("a message without its header")?;
        let command = head.first().copied().unwrap_or_default();
        Ok(Self { family: header.message_type, command, attributes: attributes.to_vec() })
    }
}

fn strings(attributes: &[(u16, &str)]) -> Vec<u8> {
    let attributes: Vec<_> = attributes
        .iter()
        .map(|(kind, text)| DefaultNla::new(*kind, [text.as_bytes(), b"\0"].concat()))
        .collect();
    let mut bytes = vec![0; attributes.as_slice().buffer_len()];
    attributes.as_slice().emit(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(kind: u16, parts: &[(u16, &str)]) -> Vec<u8> {
        let nested = DefaultNla::new(kind, strings(parts));
        let mut bytes = vec![0; nested.buffer_len()];
        nested.emit(&mut bytes);
        bytes
    }

    #[test]
    fn running_versions_are_read() {
        const FIXED: u16 = 100;
        let (name, value) = (INFO_VERSION_NAME, INFO_VERSION_VALUE);
        let answer = [
            strings(&[(BUS_NAME, "pci"), (DEV_NAME, "0000:01:00.0")]),
            version(FIXED, &[(name, "board.id"), (value, "7")]),
            version(INFO_VERSION_RUNNING, &[(name, "fw"), (value, "22.41.1000")]),
            version(INFO_VERSION_RUNNING, &[(value, "1"), (name, "fw.mgmt")]),
            version(INFO_VERSION_RUNNING, &[(name, "fw.app"), (value, "a\nb")]),
            version(INFO_VERSION_RUNNING, &[(name, "fw.undi")]),
        ]
        .concat();
        let wanted =
            [("fw", "22.41.1000"), ("fw.mgmt", "1")].map(|(name, value)| (name.into(), value.into()));
        assert_eq!(versions(&answer).unwrap(), BTreeMap::from(wanted));
    }

    #[test]
    fn answers_that_are_cut_off_are_none() {
        let (name, value) = (INFO_VERSION_NAME, INFO_VERSION_VALUE);
        let answer = version(INFO_VERSION_RUNNING, &[(name, "fw"), (value, "22.41.1000")]);
        // The last byte is padding.
        for cut in 1..answer.len() - 1 {
            assert!(versions(&answer[..cut]).is_err(), "{cut}");
        }
        for byte in 0..answer.len() {
            let mut damaged = answer.clone();
            damaged[byte] ^= 0xff;
            // No panic, whatever it says.
            let _ = versions(&damaged);
        }
    }

    #[test]
    fn a_device_that_is_not_there_is_refused() {
        // ENOENT where the kernel has no devlink.
        match running_versions("pci", "no such device") {
            Err(DevlinkError::Refused(Errno::NODEV | Errno::NOENT)) => {}
            other => panic!("{other:?}"),
        }
    }
}
