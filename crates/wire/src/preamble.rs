//! The first eight bytes of each direction, by which a peer that speaks something else is recognised at once.

use std::fmt;

/// The first bytes of each side, before its first frame. The last byte is the framing: it changes only if a later
/// version could not even keep the frame header and HELLO.
pub const PREAMBLE: [u8; 8] = *b"VFIOMIG\x01";

/// The guess at what a peer speaks that does not speak this protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Foreign {
    /// This protocol, in a framing of another generation.
    Framing(u8),
    /// An HTTP client or server.
    Http,
    /// TLS, where the stream was to be plain.
    Tls,
    /// An SSH client or server.
    Ssh,
    /// A QEMU migration stream.
    Qemu,
    /// A client of a vfio-user device server.
    VfioUser,
    /// JSON, for example a monitor or control connection.
    Json,
    /// None of these: the first bytes as they came.
    Unknown([u8; 8]),
}

impl Foreign {
    /// A guess, for the error text: nothing is decided by it.
    pub(crate) fn recognise(bytes: &[u8; 8]) -> Self {
        const HTTP: [&[u8]; 7] = [b"GET ", b"PUT ", b"POST ", b"HEAD ", b"HTTP/", b"PRI * ", b"OPTIONS "];
        let [.., framing] = *bytes;
        // vfio-user: u16 message id, u16 command (VERSION is 1), u32 message size, header of 16 bytes included.
        let [_, _, command_low, command_high, size @ ..] = *bytes;
        if bytes.starts_with(b"VFIOMIG") {
            Self::Framing(framing)
        } else if HTTP.iter().any(|start| bytes.starts_with(start)) {
            Self::Http
        } else if bytes.starts_with(&[0x16, 0x03]) || bytes.starts_with(&[0x15, 0x03]) {
            Self::Tls
        } else if bytes.starts_with(b"SSH-") {
            Self::Ssh
        } else if bytes.starts_with(b"QEVM") {
            Self::Qemu
        } else if bytes.starts_with(b"{") {
            Self::Json
        } else if [command_low, command_high] == [1, 0] && (16..1 << 20).contains(&u32::from_le_bytes(size)) {
            Self::VfioUser
        } else {
            Self::Unknown(*bytes)
        }
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Framing(generation) => {
                write!(f, "framing {generation} of this protocol, where only {} is known", PREAMBLE[7])
            }
            Self::Http => f.write_str("HTTP"),
            Self::Tls => f.write_str(
                "TLS, on a connection that is not set up for it: --tls-creds DIR does that, on both sides",
            ),
            Self::Ssh => f.write_str("SSH"),
            Self::Qemu => f.write_str("a QEMU migration stream"),
            Self::VfioUser => f.write_str("vfio-user"),
            Self::Json => f.write_str("JSON, as a control socket does"),
            Self::Unknown(bytes) => {
                write!(f, "something unknown (it begins with \"{}\")", bytes.escape_ascii())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::WireError;
    use crate::header::check_preamble;

    #[test]
    fn strangers_are_named() {
        assert_eq!(check_preamble(&PREAMBLE), Ok(()));
        for (bytes, want) in [
            (*b"VFIOMIG\x02", Foreign::Framing(2)),
            (*b"GET / HT", Foreign::Http),
            (*b"HTTP/1.1", Foreign::Http),
            (*b"\x16\x03\x01\x02\x00\x01\x00\x01", Foreign::Tls),
            (*b"SSH-2.0-", Foreign::Ssh),
            (*b"QEVM\0\0\0\x03", Foreign::Qemu),
            (*b"{\"QMP\": ", Foreign::Json),
            (*b"\x01\x00\x01\x00\x40\x00\x00\x00", Foreign::VfioUser),
            ([0; 8], Foreign::Unknown([0; 8])),
            (*b"vfiomig\x01", Foreign::Unknown(*b"vfiomig\x01")),
        ] {
            assert_eq!(check_preamble(&bytes), Err(WireError::Foreign(want)));
        }
        let shown = Foreign::Unknown(*b"\x1b[2J\r\n\xff!").to_string();
        assert!(shown.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '), "{shown}");
    }
}
