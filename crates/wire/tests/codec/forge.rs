//! Frames built by hand from `docs/protocol.md`, right or wrong, with checksums that are always right: what a
//! hostile peer would send. Shares no code with the encoder.

use vfio_migration_types::Side;
use vfio_migration_wire::{Frame, FrameHeader, HEADER_LEN, WireError};

/// The fields of a header; the checksums are computed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Forged<'a> {
    pub(crate) number: u16,
    pub(crate) flags: u16,
    pub(crate) channel: u16,
    pub(crate) reserved: u16,
    pub(crate) sequence: u64,
    pub(crate) payload: &'a [u8],
}

impl<'a> Forged<'a> {
    /// A frame with nothing wrong in its header.
    pub(crate) fn new(number: u16, payload: &'a [u8]) -> Self {
        let flags = if number == 0x0100 { 3 } else { 1 };
        Self { number, flags, channel: 0, reserved: 0, sequence: 0, payload }
    }

    pub(crate) fn header(&self) -> [u8; HEADER_LEN] {
        self.header_announcing(self.payload.len() as u32)
    }

    /// With a payload length that may be a lie.
    pub(crate) fn header_announcing(&self, payload_len: u32) -> [u8; HEADER_LEN] {
        let mut bytes = Vec::new();
        bytes.extend(b"VMIG");
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(payload_len.to_le_bytes());
        bytes.extend(self.channel.to_le_bytes());
        bytes.extend(self.reserved.to_le_bytes());
        bytes.extend(self.sequence.to_le_bytes());
        bytes.extend(castagnoli(self.payload).to_le_bytes());
        bytes.extend(castagnoli(&bytes).to_le_bytes());
        bytes.try_into().unwrap()
    }

    pub(crate) fn decode(&self) -> Result<Frame<'a>, WireError> {
        let header = FrameHeader::parse(&self.header(), self.sequence)?;
        assert_eq!(header.payload_len(), self.payload.len());
        Frame::decode(&header, self.payload, Side::Source)
    }
}

/// Decodes a whole frame without a body, the `sequence`th.
pub(crate) fn decode(frame: &[u8], sequence: u64) -> Result<Frame<'_>, WireError> {
    let (head, payload) = frame.split_first_chunk::<HEADER_LEN>().unwrap();
    let header = FrameHeader::parse(head, sequence)?;
    Frame::decode(&header, payload, Side::Source)
}

/// CRC-32C bit by bit: reflected polynomial 0x82f63b78, initial value and final xor all ones.
fn castagnoli(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}
