//! The migration stream: typed messages, frames, limits, and the codec between them.
//!
//! Pure: bytes in, messages out; no socket, no clock, no thread. The layout is documented in `docs/protocol.md`,
//! precisely enough to write a peer in another language. This crate does *not* know which message may come when:
//! that is the engine's.
//!
//! # A stream
//!
//! Each direction of the connection begins with [`PREAMBLE`]; frames follow without a gap. A frame is a header of
//! [`HEADER_LEN`] bytes, a payload, and, for [`Bulk::Pages`] alone, a body of whole pages that goes straight from and
//! into guest memory. Each direction counts its frames from 0: a frame lost, doubled or swapped shows.
//!
//! # Writing
//!
//! [`encode`] gives a control message as one buffer. [`encode_bulk`] gives a [`BulkFrame`]: a small head, the caller's own bytes
//! behind it, uncopied (write both with one `writev`), and the length of the body that the caller writes next.
//!
//! # Reading
//!
//! ```
//! use vfio_migration_types::Side;
//! use vfio_migration_wire::{Bulk, Frame, FrameHeader, HEADER_LEN, Message, WireError, encode};
//!
//! fn next(stream: &mut &[u8], sequence: &mut u64) -> Result<Option<Message>, WireError> {
//!     // 1. A header: everything in it is checked before anything is allocated.
//!     let (head, rest) = stream.split_first_chunk::<HEADER_LEN>().expect("a real reader reports an EOF here");
//!     let header = FrameHeader::parse(head, *sequence)?;
//!     *sequence += 1;
//!     // 2. A payload, no longer than the limit of its type.
//!     let (payload, rest) = rest.split_at(header.payload_len());
//!     *stream = rest;
//!     match Frame::decode(&header, payload, Side::Source)? {
//!         Frame::Message(message) => Ok(Some(message)),
//!         // 3. Page frames alone have a body; read it straight into guest memory.
//!         Frame::Bulk(bulk) => {
//!             *stream = &stream[usize::try_from(bulk.body_len()).unwrap()..];
//!             Ok(None)
//!         }
//!         // An optional frame of a later version. It still counted in the sequence.
//!         Frame::Skipped(_) | _ => Ok(None),
//!     }
//! }
//!
//! let bytes = encode(&Message::Ping { token: 7 }, 0)?;
//! assert_eq!(next(&mut bytes.as_slice(), &mut 0)?, Some(Message::Ping { token: 7 }));
//! # Ok::<(), WireError>(())
//! ```
//!
//! Decoding is strict: one message has one encoding. Reserved bytes are zero, booleans 0 or 1, text is UTF-8 without control
//! characters, and nothing is left over at the end of a payload.
#![forbid(unsafe_code)]

mod bulk_codec;
mod crc;
mod cursor;
mod error;
mod frame;
mod header;
mod kind;
pub mod limits;
mod message;
mod message_codec;
mod preamble;
mod reason_codec;
mod version;

pub use crc::Crc;
pub use error::WireError;
pub use frame::{BulkFrame, Frame, encode, encode_bulk};
pub use header::{
    FLAG_BODY, FLAG_BODY_CRC, FLAG_PAYLOAD_CRC, FrameHeader, HEADER_LEN, MAGIC, check_preamble,
};
pub use kind::{FrameType, OPTIONAL};
pub use message::{
    Accept, Applied, Bulk, Commit, DeviceEnd, DeviceTotal, Final, FinalEnd, Hello, HelloReply, Lease,
    Message, Offer, RamDigests, Ready, Reason, Running, VersionRange,
};
pub use preamble::{Foreign, PREAMBLE};
pub use version::{
    FEATURE_ASK, FEATURE_RAM_CRC, FEATURE_REHEARSE, FEATURE_VERIFY, FEATURES, PROTOCOL_VERSION, VERSIONS,
    negotiate,
};
