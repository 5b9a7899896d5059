//! Frames as a whole: encoding and decoding.

use vfio_migration_types::Side;

use crate::crc::Crc;
use crate::error::WireError;
use crate::header::{FrameHeader, HEADER_LEN, seal};
use crate::kind::Kind;
use crate::message::{Bulk, Message};
use crate::{bulk_codec, message_codec};

/// A frame as received.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Frame<'a> {
    /// A control message, for the engine.
    Message(Message),
    /// Bulk, borrowed from the payload. [`Bulk::body_len`] bytes follow on the stream.
    Bulk(Bulk<'a>),
    /// An optional frame of a later version, of this type: there is nothing to do.
    Skipped(u16),
}

impl<'a> Frame<'a> {
    /// Decodes the payload behind `header`: exactly [`FrameHeader::payload_len`] bytes, which came `from` that side. A
    /// [`Failure`](vfio_migration_types::Failure) in it arose there: the side does not travel.
    pub fn decode(header: &FrameHeader, payload: &'a [u8], from: Side) -> Result<Self, WireError> {
        header.check_payload(payload)?;
        match header.kind {
            None => Ok(Self::Skipped(header.number())),
            Some(
                kind @ (Kind::Pages | Kind::ZeroPages | Kind::DeviceData | Kind::DeviceEnd | Kind::Section),
            ) => bulk_codec::decode(kind, header.has_body_crc(), payload).map(Self::Bulk),
            Some(kind) => message_codec::decode(kind, payload, from).map(Self::Message),
        }
    }
}

/// A control message as one whole frame, to be sent as it is.
///
/// `sequence` is the number of frames sent before in this direction; count up only once the frame is sure to be written.
///
/// # Errors
///
/// A value that version 1 cannot carry: a manifest or a list of devices beyond its limit, a device index out of range, a
/// version range inside out. Sentences and names of errors and refusals are never in the way: they are cut to their
/// limit, and control characters in them become spaces, because they end on somebody's terminal.
pub fn encode(message: &Message, sequence: u64) -> Result<Vec<u8>, WireError> {
    let mut bytes = vec![0; HEADER_LEN];
    let kind = message_codec::encode(message, &mut bytes)?;
    put_header(kind, 0, &mut bytes, &[], sequence)?;
    Ok(bytes)
}

/// Bulk as a frame, without copying what it carries. `sequence` as in [`encode`].
///
/// # Errors
///
/// A value that version 1 cannot carry; see [`limits`](crate::limits).
pub fn encode_bulk<'a>(bulk: &Bulk<'a>, sequence: u64) -> Result<BulkFrame<'a>, WireError> {
    let mut head = Vec::with_capacity(HEADER_LEN + bulk_codec::LONGEST_HEAD);
    head.resize(HEADER_LEN, 0);
    let (kind, flags, bytes) = bulk_codec::encode(bulk, &mut head)?;
    put_header(kind, flags, &mut head, bytes, sequence)?;
    Ok(BulkFrame { head, bytes, body_len: bulk.body_len() })
}

/// A bulk frame to be written: head, then bytes, then the body.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub struct BulkFrame<'a> {
    head: Vec<u8>,
    bytes: &'a [u8],
    body_len: u64,
}

impl<'a> BulkFrame<'a> {
    /// The header and the fixed fields of the payload.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// The rest of the payload: the caller's own bytes, or none.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Head and bytes, to be written with one `writev`.
    pub fn parts(&self) -> [&[u8]; 2] {
        [&self.head, self.bytes]
    }

    /// Bytes of pages that the caller writes behind both, straight from guest memory.
    pub fn body_len(&self) -> u64 {
        self.body_len
    }

    /// Bytes on the wire, header and body included.
    pub fn wire_len(&self) -> u64 {
        (self.head.len() + self.bytes.len()) as u64 + self.body_len
    }
}

/// Fills the room left for the header at the front of `head`, for a payload of the rest of it and `tail`.
fn put_header(kind: Kind, flags: u16, head: &mut [u8], tail: &[u8], sequence: u64) -> Result<(), WireError> {
    let (room, fixed) = head.split_at_mut(HEADER_LEN);
    let mut crc = Crc::of(fixed);
    crc.update(tail);
    let len = fixed.len() as u64 + tail.len() as u64;
    let flags = flags | crate::header::FLAG_PAYLOAD_CRC;
    room.copy_from_slice(&seal(kind, flags, len, crc, sequence)?);
    Ok(())
}
