//! The frame header: 32 bytes, frozen over all versions.

use crate::crc::Crc;
use crate::error::WireError;
use crate::kind::{Kind, OPTIONAL, bound};
use crate::limits;
use crate::preamble::{Foreign, PREAMBLE};

/// Bytes of a header.
pub const HEADER_LEN: usize = 32;

/// The first four bytes of a header, as a little-endian number: `"VMIG"`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"VMIG");

/// Flag: the header carries the CRC-32C of the payload. In version 1 every frame has it.
pub const FLAG_PAYLOAD_CRC: u16 = 1 << 0;
/// Flag: a body follows the payload, of a length that the payload gives. `PAGES`, and only it, has it.
pub const FLAG_BODY: u16 = 1 << 1;
/// Flag: the payload carries the CRC-32C of the body.
pub const FLAG_BODY_CRC: u16 = 1 << 2;

/// A header, checked: its payload may be allocated and read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// `None`: optional, unknown, to be skipped.
    pub(crate) kind: Option<Kind>,
    number: u16,
    flags: u16,
    payload_len: u32,
    sequence: u64,
    payload_crc: u32,
}

impl FrameHeader {
    /// Checks a header, of which `sequence` is the number due: the frames received before it on this stream.
    ///
    /// On success [`payload_len`](Self::payload_len) is within the limit of its type.
    pub fn parse(bytes: &[u8; HEADER_LEN], sequence: u64) -> Result<Self, WireError> {
        let raw = Raw::read(bytes);
        if raw.magic != MAGIC {
            return Err(WireError::Magic { found: raw.magic });
        }
        let found = Crc::of(&bytes[..HEADER_LEN - 4]).value();
        if found != raw.header_crc {
            return Err(WireError::HeaderCrc { announced: raw.header_crc, found });
        }
        if raw.sequence != sequence {
            return Err(WireError::Sequence { expected: sequence, found: raw.sequence });
        }
        let kind = Kind::known(raw.number);
        if kind.is_none() && raw.number & OPTIONAL == 0 {
            return Err(WireError::UnknownFrame(raw.number));
        }
        let frame = name(kind);
        check_flags(kind, raw.flags)?;
        if raw.channel != 0 {
            return Err(WireError::Channel { frame, channel: raw.channel });
        }
        if raw.reserved != 0 {
            return Err(WireError::Value { frame, field: "header.reserved", value: raw.reserved.into() });
        }
        check_length(kind, raw.payload_len.into())?;
        Ok(Self {
            kind,
            number: raw.number,
            flags: raw.flags,
            payload_len: raw.payload_len,
            sequence,
            payload_crc: raw.payload_crc,
        })
    }

    /// Bytes of payload behind the header, within the limit of the frame's type.
    pub fn payload_len(&self) -> usize {
        // A payload is at most 16 MiB and a little, by `parse`.
        self.payload_len as usize
    }

    /// Number of the frame's type.
    pub fn number(&self) -> u16 {
        self.number
    }

    /// Name of the frame's type, for errors and traces.
    pub fn name(&self) -> &'static str {
        name(self.kind)
    }

    /// Frames before this one in its direction.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether the payload of a page frame carries the CRC of the body.
    pub(crate) fn has_body_crc(&self) -> bool {
        self.flags & FLAG_BODY_CRC != 0
    }

    /// Compares a payload with the header: its length and its CRC.
    pub(crate) fn check_payload(&self, payload: &[u8]) -> Result<(), WireError> {
        if payload.len() != self.payload_len() {
            let due = self.payload_len;
            return Err(WireError::Length {
                frame: self.name(),
                len: payload.len() as u64,
                min: due,
                max: due,
            });
        }
        let found = Crc::of(payload).value();
        if found != self.payload_crc {
            return Err(WireError::PayloadCrc { frame: self.name(), announced: self.payload_crc, found });
        }
        Ok(())
    }
}

/// The header of a frame to be sent, whose payload has `len` bytes and this CRC. Refuses a payload beyond its limit.
pub(crate) fn seal(
    kind: Kind,
    flags: u16,
    len: u64,
    crc: Crc,
    sequence: u64,
) -> Result<[u8; HEADER_LEN], WireError> {
    let payload_len = check_length(Some(kind), len)?;
    let raw = Raw {
        magic: MAGIC,
        number: kind.facts().number,
        flags,
        payload_len,
        channel: 0,
        reserved: 0,
        sequence,
        payload_crc: crc.value(),
        header_crc: 0,
    };
    Ok(raw.write())
}

/// The fields in the order of their bytes; each lies at a multiple of its size.
struct Raw {
    magic: u32,
    number: u16,
    flags: u16,
    payload_len: u32,
    channel: u16,
    reserved: u16,
    sequence: u64,
    payload_crc: u32,
    header_crc: u32,
}

impl Raw {
    fn read(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            magic: u32::from_le_bytes(at::<0, 4>(bytes)),
            number: u16::from_le_bytes(at::<4, 2>(bytes)),
            flags: u16::from_le_bytes(at::<6, 2>(bytes)),
            payload_len: u32::from_le_bytes(at::<8, 4>(bytes)),
            channel: u16::from_le_bytes(at::<12, 2>(bytes)),
            reserved: u16::from_le_bytes(at::<14, 2>(bytes)),
            sequence: u64::from_le_bytes(at::<16, 8>(bytes)),
            payload_crc: u32::from_le_bytes(at::<24, 4>(bytes)),
            header_crc: u32::from_le_bytes(at::<28, 4>(bytes)),
        }
    }

    /// Writes the header; its own CRC is computed here.
    fn write(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&self.magic.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.number.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.channel.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.reserved.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.payload_crc.to_le_bytes());
        let crc = Crc::of(&bytes[..HEADER_LEN - 4]).value();
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    }
}

/// `N` bytes at a constant place, which is checked when compiled.
fn at<const OFFSET: usize, const N: usize>(bytes: &[u8; HEADER_LEN]) -> [u8; N] {
    const { assert!(OFFSET + N <= HEADER_LEN && OFFSET.is_multiple_of(N)) };
    let mut field = [0; N];
    field.copy_from_slice(&bytes[OFFSET..OFFSET + N]);
    field
}

fn name(kind: Option<Kind>) -> &'static str {
    kind.map_or("unknown optional frame", Kind::name)
}

/// A payload without a CRC, a body where none can be, and bits of later versions are all refused: a body whose
/// length is not known could not even be skipped.
fn check_flags(kind: Option<Kind>, flags: u16) -> Result<(), WireError> {
    let legal = match kind {
        Some(kind) if kind.has_body() => flags & !FLAG_BODY_CRC == FLAG_PAYLOAD_CRC | FLAG_BODY,
        _ => flags == FLAG_PAYLOAD_CRC,
    };
    if legal { Ok(()) } else { Err(WireError::Flags { frame: name(kind), flags }) }
}

fn check_length(kind: Option<Kind>, len: u64) -> Result<u32, WireError> {
    let (min, max) = match kind {
        Some(kind) => (kind.facts().min, kind.facts().max),
        None => (0, const { bound(limits::SKIPPED) }),
    };
    u32::try_from(len).ok().filter(|len| (min..=max).contains(len)).ok_or(WireError::Length {
        frame: name(kind),
        len,
        min,
        max,
    })
}

/// Checks a peer's first eight bytes; [`WireError::Foreign`] says what they look like instead.
pub fn check_preamble(bytes: &[u8; 8]) -> Result<(), WireError> {
    if *bytes == PREAMBLE { Ok(()) } else { Err(WireError::Foreign(Foreign::recognise(bytes))) }
}
