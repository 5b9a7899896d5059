//! Errors of bytes from a peer, and of values that no frame can carry.

use crate::preamble::Foreign;

/// An error of bytes that are no frame, or of a value that cannot become one. The stream cannot go on after any of
/// them.
///
/// `frame` is the frame's name in `docs/protocol.md`; `offset` counts from the start of its payload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The stream does not begin as ours do.
    #[error("the peer does not speak this migration protocol, but {0}")]
    Foreign(Foreign),
    /// No frame begins here: the peer and we disagree on where frames end.
    #[error("no frame begins here: magic {found:#010x}")]
    Magic {
        /// The four bytes found where the magic was due, as a number.
        found: u32,
    },
    /// The header was altered on its way.
    #[error("frame header damaged: its CRC-32C says {announced:#010x}, its bytes {found:#010x}")]
    HeaderCrc {
        /// The checksum in the header.
        announced: u32,
        /// The checksum of the header's bytes.
        found: u32,
    },
    /// A frame was lost, doubled or swapped.
    #[error("frame {found} came where frame {expected} was due: frames were lost, doubled or swapped")]
    Sequence {
        /// Number of the frame that was due.
        expected: u64,
        /// Number of the frame that came.
        found: u64,
    },
    /// A frame that must be understood and is not.
    #[error("frame type {0:#06x} is not known, and not optional")]
    UnknownFrame(u16),
    /// Flags that this type does not have, or lacks.
    #[error("{frame}: flags {flags:#06x} are not valid for it")]
    Flags {
        /// Name of the frame.
        frame: &'static str,
        /// The flags of its header.
        flags: u16,
    },
    /// A channel other than 0.
    #[error("{frame}: channel {channel}, where version 1 has only channel 0")]
    Channel {
        /// Name of the frame.
        frame: &'static str,
        /// The channel of its header.
        channel: u16,
    },
    /// A payload longer or shorter than its type can be, on either side. Found before anything is allocated.
    #[error("{frame}: a payload of {len} bytes, where {min} to {max} are legal")]
    Length {
        /// Name of the frame.
        frame: &'static str,
        /// Length of the payload, in bytes.
        len: u64,
        /// Least length of this type, in bytes.
        min: u32,
        /// Greatest length of this type, in bytes.
        max: u32,
    },
    /// The payload was altered on its way.
    #[error("{frame}: payload damaged: its CRC-32C says {announced:#010x}, its bytes {found:#010x}")]
    PayloadCrc {
        /// Name of the frame.
        frame: &'static str,
        /// The checksum in the header.
        announced: u32,
        /// The checksum of the payload's bytes.
        found: u32,
    },
    /// The body of a page frame was altered on its way.
    #[error("pages damaged: their CRC-32C says {announced:#010x}, their bytes {found:#010x}")]
    BodyCrc {
        /// The checksum in the payload.
        announced: u32,
        /// The checksum of the body's bytes.
        found: u32,
    },
    /// A field reaches past the end of the payload.
    #[error("{frame}: the payload ends inside '{field}' at byte {offset}")]
    Truncated {
        /// Name of the frame.
        frame: &'static str,
        /// Name of the field.
        field: &'static str,
        /// First byte of the field.
        offset: usize,
    },
    /// Bytes behind the last field.
    #[error("{frame}: {bytes} bytes left over at byte {offset}")]
    Trailing {
        /// Name of the frame.
        frame: &'static str,
        /// First byte behind the last field.
        offset: usize,
        /// Number of bytes left over.
        bytes: usize,
    },
    /// A number that its field cannot have, on either side.
    #[error("{frame}: '{field}' cannot be {value}")]
    Value {
        /// Name of the frame.
        frame: &'static str,
        /// Name of the field.
        field: &'static str,
        /// As received, or as asked to send.
        value: u64,
    },
    /// Reserved bytes that are not zero.
    #[error("{frame}: reserved bytes are not zero at byte {offset}")]
    Reserved {
        /// Name of the frame.
        frame: &'static str,
        /// The first reserved byte.
        offset: usize,
    },
    /// Text that is not UTF-8, or has characters that its field cannot have (control characters, in any).
    #[error("{frame}: '{field}' at byte {offset} is not legal text")]
    Text {
        /// Name of the frame.
        frame: &'static str,
        /// Name of the field.
        field: &'static str,
        /// First byte of the text.
        offset: usize,
    },
}
