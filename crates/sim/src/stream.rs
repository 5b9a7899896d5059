//! The device's own migration stream: a header by which it refuses state of another device, records, a trailer.
//!
//! ```text
//! header   48 bytes  {u64 magic, u32 major, u32 minor, u64 state size, u64 model hash, u64 0, u32 0, u32 crc}
//! record   24 bytes  {u32 kind, u32 length, u64 at, u32 crc of the payload, u32 crc of these 20 bytes}, then payload
//! ```
//! Little-endian; CRC-32C. The header comes first and once; pages and pieces of the mailbox in any number, a later
//! one replacing an earlier; then the registers; then the trailer, `{u64 bytes before it, u64 sum of generations}`,
//! after which nothing may come.

use crate::error::{SimError, invalid};
use crate::regs;

/// The model's name: what a manifest declares and the header's hash stands for.
pub const MODEL: &str = "vfio-migrate.org/sample";

/// Bytes of the header.
pub(crate) const HEADER: usize = 48;
/// Bytes before a record's payload.
pub(crate) const RECORD: usize = 24;
/// Bytes of the trailer's payload.
pub(crate) const TRAILER: usize = 16;
/// Most bytes of a record's payload.
pub(crate) const MAX_PAYLOAD: usize = 64 << 10;

const MAGIC: u64 = u64::from_le_bytes(*b"SMPLSTA1");

/// Header of a stream: the device that wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamHeader {
    pub(crate) version: (u16, u16),
    pub(crate) state_size: u64,
    /// [`model_hash`] of the model.
    pub(crate) model: u64,
}

/// Kind of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum RecordKind {
    /// Pages of the bulk state, from page number `at`.
    Pages = 1,
    /// A piece of the mailbox, from byte `at`.
    Mailbox = 2,
    /// Registers of the device.
    Registers = 3,
    /// End of the stream.
    Trailer = 4,
}

/// A piece of the stream, whole and with its checksum checked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Item<'a> {
    Header(StreamHeader),
    Pages { first: u64, bytes: &'a [u8] },
    Mailbox { at: u64, bytes: &'a [u8] },
    Registers(&'a [u8]),
    Trailer { generations: u64 },
}

pub(crate) fn put_header(out: &mut Vec<u8>, header: StreamHeader) {
    let at = out.len();
    out.extend(MAGIC.to_le_bytes());
    out.extend(u32::from(header.version.0).to_le_bytes());
    out.extend(u32::from(header.version.1).to_le_bytes());
    out.extend(header.state_size.to_le_bytes());
    out.extend(header.model.to_le_bytes());
    out.extend([0; 12]);
    let crc = crc32c::crc32c(&out[at..]);
    out.extend(crc.to_le_bytes());
}

/// Appends a record. The payload must not be longer than [`MAX_PAYLOAD`].
pub(crate) fn put_record(out: &mut Vec<u8>, kind: RecordKind, at: u64, payload: &[u8]) {
    debug_assert!(payload.len() <= MAX_PAYLOAD);
    let start = out.len();
    out.extend((kind as u32).to_le_bytes());
    out.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend(crc32c::crc32c(payload).to_le_bytes());
    let crc = crc32c::crc32c(&out[start..]);
    out.extend(crc.to_le_bytes());
    out.extend(payload);
}

/// Appends the trailer to a stream of which `before` bytes were already sent.
pub(crate) fn put_trailer(out: &mut Vec<u8>, before: u64, generations: u64) {
    let mut payload = [0; TRAILER];
    payload[..8].copy_from_slice(&before.to_le_bytes());
    payload[8..].copy_from_slice(&generations.to_le_bytes());
    put_record(out, RecordKind::Trailer, 0, &payload);
}

/// Reads a stream as it comes, cut anywhere, holding back at most one record.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    held: Vec<u8>,
    /// Bytes of whole pieces so far.
    consumed: u64,
    header_seen: bool,
    record: Option<RecordHead>,
    registers_seen: bool,
    ended: bool,
    broken: bool,
}

#[derive(Clone, Copy, Debug)]
struct RecordHead {
    kind: RecordKind,
    len: usize,
    at: u64,
    crc: u32,
}

impl Parser {
    /// Takes the next bytes and hands each piece that they complete to `sink`. After an error the stream is lost.
    pub(crate) fn push(
        &mut self,
        bytes: &[u8],
        mut sink: impl FnMut(Item<'_>) -> Result<(), SimError>,
    ) -> Result<(), SimError> {
        if self.broken {
            return Err(invalid("the stream was refused before"));
        }
        let result = self.take(bytes, &mut sink);
        self.broken = result.is_err();
        result
    }

    /// Whether the stream is complete.
    pub(crate) fn ended(&self) -> bool {
        self.ended && !self.broken
    }

    fn take(
        &mut self,
        mut bytes: &[u8],
        sink: &mut impl FnMut(Item<'_>) -> Result<(), SimError>,
    ) -> Result<(), SimError> {
        while !bytes.is_empty() {
            if self.ended {
                return Err(invalid("bytes after the stream's end"));
            }
            let want = match (self.header_seen, self.record) {
                (false, _) => HEADER,
                (true, None) => RECORD,
                (true, Some(record)) => record.len,
            };
            let missing = want - self.held.len();
            if bytes.len() < missing {
                self.held.extend_from_slice(bytes);
                return Ok(());
            }
            let (here, rest) = bytes.split_at(missing);
            bytes = rest;
            if self.held.is_empty() {
                self.piece(here, sink)?;
            } else {
                let mut held = std::mem::take(&mut self.held);
                held.extend_from_slice(here);
                self.piece(&held, sink)?;
                held.clear();
                self.held = held;
            }
        }
        Ok(())
    }

    fn piece(
        &mut self,
        piece: &[u8],
        sink: &mut impl FnMut(Item<'_>) -> Result<(), SimError>,
    ) -> Result<(), SimError> {
        if !self.header_seen {
            let header = parse_header(piece)?;
            self.header_seen = true;
            self.consumed += HEADER as u64;
            return sink(Item::Header(header));
        }
        let Some(record) = self.record.take() else {
            let record = parse_record(piece)?;
            if self.registers_seen && record.kind != RecordKind::Trailer {
                return Err(invalid("records after the registers"));
            }
            self.record = Some(record);
            return Ok(());
        };
        if crc32c::crc32c(piece) != record.crc {
            return Err(invalid("a record's checksum does not match"));
        }
        match record.kind {
            RecordKind::Pages => sink(Item::Pages { first: record.at, bytes: piece })?,
            RecordKind::Mailbox => sink(Item::Mailbox { at: record.at, bytes: piece })?,
            RecordKind::Registers => {
                self.registers_seen = true;
                sink(Item::Registers(piece))?;
            }
            RecordKind::Trailer => {
                if !self.registers_seen {
                    return Err(invalid("the stream ends without registers"));
                }
                if word(piece, 0) != self.consumed {
                    return Err(invalid("the stream's length is not what its end says"));
                }
                sink(Item::Trailer { generations: word(piece, 8) })?;
                self.ended = true;
            }
        }
        self.consumed += (RECORD + piece.len()) as u64;
        Ok(())
    }
}

fn parse_header(bytes: &[u8]) -> Result<StreamHeader, SimError> {
    if word(bytes, 0) != MAGIC {
        return Err(invalid("this is no state of a sample device"));
    }
    if crc32c::crc32c(&bytes[..HEADER - 4]) != half(bytes, HEADER - 4) {
        return Err(invalid("the header's checksum does not match"));
    }
    let part =
        |at| u16::try_from(half(bytes, at)).map_err(|_| invalid("the header's version is out of range"));
    Ok(StreamHeader { version: (part(8)?, part(12)?), state_size: word(bytes, 16), model: word(bytes, 24) })
}

fn parse_record(bytes: &[u8]) -> Result<RecordHead, SimError> {
    if crc32c::crc32c(&bytes[..RECORD - 4]) != half(bytes, RECORD - 4) {
        return Err(invalid("a record's head does not match its checksum"));
    }
    let len = half(bytes, 4) as usize;
    let (kind, fits) = match half(bytes, 0) {
        1 => (RecordKind::Pages, (1..=MAX_PAYLOAD).contains(&len)),
        2 => (RecordKind::Mailbox, (1..=MAX_PAYLOAD).contains(&len)),
        3 => (RecordKind::Registers, len == regs::ENCODED),
        4 => (RecordKind::Trailer, len == TRAILER),
        _ => return Err(invalid("a record of an unknown kind")),
    };
    match fits {
        true => Ok(RecordHead { kind, len, at: word(bytes, 8), crc: half(bytes, 16) }),
        false => Err(invalid("a record of a length that cannot be")),
    }
}

/// Hash that stands for a model in a header.
pub(crate) fn model_hash(model: &str) -> u64 {
    word(blake3::hash(model.as_bytes()).as_bytes(), 0)
}

fn word(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn half(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SAMPLE: StreamHeader = StreamHeader { version: (1, 0), state_size: 8192, model: 7 };

    fn sample() -> Vec<u8> {
        let mut out = Vec::new();
        put_header(&mut out, SAMPLE);
        put_record(&mut out, RecordKind::Pages, 1, &[7; 4096]);
        put_record(&mut out, RecordKind::Mailbox, 4096, &[8; 100]);
        put_record(&mut out, RecordKind::Registers, 0, &[9; regs::ENCODED]);
        let before = out.len() as u64;
        put_trailer(&mut out, before, 0x1234);
        out
    }

    fn parse(stream: &[u8], cut: usize) -> Result<(Vec<String>, bool), SimError> {
        let mut parser = Parser::default();
        let mut items = Vec::new();
        for piece in stream.chunks(cut) {
            parser.push(piece, |item| {
                items.push(match item {
                    Item::Pages { first, bytes } => format!("pages {first} {}", bytes.len()),
                    Item::Mailbox { at, bytes } => format!("mailbox {at} {}", bytes.len()),
                    Item::Registers(bytes) => format!("registers {}", bytes[0]),
                    other => format!("{other:?}"),
                });
                Ok(())
            })?;
        }
        Ok((items, parser.ended()))
    }

    #[test]
    fn a_stream_reads_the_same_however_it_is_cut() {
        let stream = sample();
        let (whole, ended) = parse(&stream, stream.len()).unwrap();
        assert!(ended);
        assert_eq!(whole.len(), 5);
        assert_eq!(whole[1..4], ["pages 1 4096", "mailbox 4096 100", "registers 9"]);
        for cut in [1, 7, 24, 48, 1000, 4096] {
            assert_eq!(parse(&stream, cut).unwrap(), (whole.clone(), true));
        }
    }

    #[test]
    fn a_stream_cut_short_has_not_ended_and_one_too_long_is_refused() {
        let mut stream = sample();
        for end in 0..stream.len() {
            assert!(!parse(&stream[..end], 4096).unwrap().1, "{end}");
        }
        stream.push(0);
        assert!(parse(&stream, 4096).is_err());
        assert!(parse(&stream, 1).is_err());
    }

    #[test]
    fn every_single_altered_byte_is_noticed() {
        let stream = sample();
        for at in 0..stream.len() {
            let mut altered = stream.clone();
            altered[at] ^= 0x10;
            assert!(parse(&altered, 4096).is_err(), "{at}");
        }
    }

    #[test]
    fn a_dropped_or_repeated_record_is_noticed() {
        let stream = sample();
        let pages = HEADER..HEADER + RECORD + 4096;
        let without: Vec<u8> = [&stream[..pages.start], &stream[pages.end..]].concat();
        assert!(parse(&without, 4096).is_err());
        let twice: Vec<u8> = [&stream[..pages.end], &stream[pages.start..]].concat();
        assert!(parse(&twice, 4096).is_err());
    }

    proptest! {
        #[test]
        fn nonsense_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400), cut in 1usize..90) {
            let _ = parse(&bytes, cut);
            let mut stream = sample()[..HEADER].to_vec();
            stream.extend(bytes);
            let _ = parse(&stream, cut);
        }
    }
}
