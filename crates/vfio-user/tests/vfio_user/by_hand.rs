//! Messages written and read by hand, by servers that keep no rules.
#![expect(unreachable_pub, reason = "only the files of this program reach it")]

use std::io::Read;
use std::os::unix::net::UnixStream;

use vfio_user_peer::codec::{Header, Kind};

/// The next message; `None` once the other end has closed.
pub fn read_message(stream: &mut UnixStream) -> Option<(Header, Vec<u8>)> {
    let mut raw = [0; 16];
    stream.read_exact(&mut raw).ok()?;
    let header = Header::decode(&raw).unwrap();
    let mut body = vec![0; header.body_len()];
    stream.read_exact(&mut body).ok()?;
    Some((header, body))
}

/// A message with `header`'s id and command.
pub fn message(header: Header, kind: Kind, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + body.len()).unwrap();
    let mut out = Header { size, kind, ..header }.encode().to_vec();
    out.extend_from_slice(body);
    out
}
