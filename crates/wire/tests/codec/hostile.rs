//! Bytes from a peer that is broken or hostile: refused with an error, never a panic, never something else than was sent.
//!
//! A stand-in for a fuzzer on stable Rust. For hours of it:
//! `PROPTEST_CASES=100000000 cargo test --release -p vfio-migration-wire hostile`.

use crate::forge::Forged;
use proptest::collection::vec;
use proptest::prelude::*;
use vfio_migration_types::Side;
use vfio_migration_wire::{
    Frame, FrameHeader, FrameType, HEADER_LEN, Message, OPTIONAL, WireError, encode, encode_bulk, limits,
};

fn config(cases: u32) -> ProptestConfig {
    let asked = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig { cases: asked.unwrap_or(cases), failure_persistence: None, ..ProptestConfig::default() }
}

/// Every sample as one frame.
fn frames() -> Vec<Vec<u8>> {
    let messages = crate::samples::messages().into_iter().map(|(_, message)| encode(&message, 5).unwrap());
    let bulk =
        crate::samples::bulk().into_iter().map(|(_, bulk)| encode_bulk(&bulk, 5).unwrap().parts().concat());
    messages.chain(bulk).collect()
}

/// One message has one encoding: whatever is accepted is encoded to the very bytes that were received.
fn assert_canonical(frame: &Frame<'_>, payload: &[u8]) {
    let again = match frame {
        Frame::Message(message) => encode(message, 0).unwrap(),
        Frame::Bulk(bulk) => encode_bulk(bulk, 0).unwrap().parts().concat(),
        _ => return,
    };
    assert_eq!(&again[HEADER_LEN..], payload, "{frame:?}");
}

proptest! {
    #![proptest_config(config(20_000))]

    #[test]
    fn noise_is_no_header(bytes: [u8; HEADER_LEN], sequence: u64) {
        prop_assert!(FrameHeader::parse(&bytes, sequence).is_err());
    }

    /// Behind right checksums, any header: it is refused or its payload is within the limit.
    #[test]
    fn any_header_is_refused_or_within_limits(
        number in prop_oneof![any::<u16>(), 0u16..0x30, 0x100u16..0x110], flags in prop_oneof![any::<u16>(), 0u16..8],
        channel in 0u16..2, reserved in 0u16..2, announced in prop_oneof![any::<u32>(), 0u32..100]
    ) {
        let forged = Forged { number, flags, channel, reserved, sequence: 0, payload: &[] };
        if let Ok(header) = FrameHeader::parse(&forged.header_announcing(announced), 0) {
            let known = FrameType::all().find(|known| known.number == number);
            let max = known.map_or(limits::SKIPPED, |known| known.max as usize);
            prop_assert!(header.payload_len() <= max && max <= limits::PAYLOAD);
            prop_assert_eq!((channel, reserved), (0, 0));
            prop_assert!(known.is_some() || number & OPTIONAL != 0);
        }
    }

    /// Behind right checksums, any payload: refused, or understood without a bit left over.
    #[test]
    fn noise_in_a_payload_is_refused_or_canonical(
        frame in proptest::sample::select(FrameType::all().collect::<Vec<_>>()),
        crc: bool, noise in vec(prop_oneof![Just(0u8), Just(1u8), any::<u8>()], 0..400)
    ) {
        let len = noise.len().clamp(frame.min as usize, (frame.max as usize).min(400));
        let mut payload = noise;
        payload.resize(len, 0);
        let mut forged = Forged::new(frame.number, &payload);
        forged.flags |= if crc && frame.name == "PAGES" { 4 } else { 0 };
        if let Ok(frame) = forged.decode() {
            assert_canonical(&frame, &payload);
        }
    }

    /// The same from something valid: a few bytes changed, cut or appended, checksums made right again.
    #[test]
    fn a_forged_payload_is_refused_or_canonical(
        sample in proptest::sample::select(frames()), changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in 0usize..3, more in vec(any::<u8>(), 0..3)
    ) {
        let number = u16::from_le_bytes([sample[4], sample[5]]);
        let flags = u16::from_le_bytes([sample[6], sample[7]]);
        let mut payload = sample[HEADER_LEN..].to_vec();
        for (place, byte) in changes {
            if !payload.is_empty() {
                let place = place.index(payload.len());
                payload[place] = byte;
            }
        }
        payload.truncate(payload.len().saturating_sub(cut));
        payload.extend(more);
        if let Ok(frame) = (Forged { flags, ..Forged::new(number, &payload) }).decode() {
            assert_canonical(&frame, &payload);
        }
    }

    /// Up to four bytes in a row damaged, anywhere: CRC-32C finds every such burst.
    #[test]
    fn damage_is_found(message in crate::strategies::message(), place: prop::sample::Index, damage in 1u32..) {
        let mut bytes = encode(&message, 3).unwrap();
        let place = place.index(bytes.len() - 3);
        bytes.iter_mut().skip(place).zip(damage.to_le_bytes()).for_each(|(byte, damage)| *byte ^= damage);
        prop_assert!(crate::forge::decode(&bytes, 3).is_err());
    }
}

/// Behind right checksums, every byte of every sample set to every value: refused, or understood to the bit.
#[test]
fn every_value_of_every_byte_is_refused_or_canonical() {
    for frame in frames() {
        let [.., low, high, flags, _] = *frame.first_chunk::<8>().unwrap();
        let mut payload = frame[HEADER_LEN..].to_vec();
        for place in 0..payload.len() {
            let kept = payload[place];
            for value in 0..=u8::MAX {
                payload[place] = value;
                let forged = Forged::new(u16::from_le_bytes([low, high]), &payload);
                if let Ok(frame) = (Forged { flags: flags.into(), ..forged }).decode() {
                    assert_canonical(&frame, &payload);
                }
            }
            payload[place] = kept;
        }
    }
}

#[test]
fn every_byte_of_every_frame_is_protected() {
    for frame in frames() {
        for place in 0..frame.len() {
            for damage in 1..=u8::MAX {
                let mut bytes = frame.clone();
                bytes[place] ^= damage;
                assert!(crate::forge::decode(&bytes, 5).is_err(), "byte {place} ^ {damage:#x} of {frame:x?}");
            }
        }
    }
}

#[test]
fn every_length_is_checked_before_a_payload_is_read() {
    for frame in FrameType::all() {
        let forged = Forged::new(frame.number, &[]);
        for len in [frame.max + 1, 1 << 25, u32::MAX - 1, u32::MAX] {
            let want =
                WireError::Length { frame: frame.name, len: len.into(), min: frame.min, max: frame.max };
            assert_eq!(FrameHeader::parse(&forged.header_announcing(len), 0), Err(want));
        }
        for len in [frame.min, frame.max] {
            let header = FrameHeader::parse(&forged.header_announcing(len), 0).unwrap();
            assert_eq!((header.payload_len(), header.name()), (len as usize, frame.name));
            // Another payload than announced is no payload, and is not mistaken for one.
            let short = vec![0; len.saturating_sub(1) as usize];
            let long = vec![0; len as usize + 1];
            assert!(matches!(Frame::decode(&header, &long, Side::Source), Err(WireError::Length { .. })));
            assert!(
                len == 0
                    || matches!(Frame::decode(&header, &short, Side::Source), Err(WireError::Length { .. }))
            );
        }
        if let Some(len) = frame.min.checked_sub(1) {
            assert!(matches!(
                FrameHeader::parse(&forged.header_announcing(len), 0),
                Err(WireError::Length { .. })
            ));
        }
    }
}

#[test]
fn inner_lengths_and_counts_are_bounded_by_limit_and_payload() {
    // REFUSE: 257 reasons, and 256 of which none is there.
    let many = [1, 1, 0, 0];
    assert_eq!(
        Forged::new(0x0003, &many).decode(),
        Err(WireError::Value { frame: "REFUSE", field: "count", value: 257 })
    );
    let none = [0, 1, 0, 0];
    assert_eq!(
        Forged::new(0x0003, &none).decode(),
        Err(WireError::Truncated { frame: "REFUSE", field: "code", offset: 4 })
    );
    // A text longer than its limit, and one longer than the payload.
    for (len, want) in [
        (65u16, WireError::Value { frame: "REFUSE", field: "code", value: 65 }),
        (64, WireError::Truncated { frame: "REFUSE", field: "code", offset: 6 }),
    ] {
        let mut payload = vec![1, 0, 0, 0];
        payload.extend(len.to_le_bytes());
        payload.extend(b"short");
        assert_eq!(Forged::new(0x0003, &payload).decode(), Err(want));
    }
    // FINAL_END: 65 devices; two announced, one there.
    for (count, want) in [
        (65u8, WireError::Value { frame: "FINAL_END", field: "devices", value: 65 }),
        (2, WireError::Truncated { frame: "FINAL_END", field: "total.bytes", offset: 88 }),
    ] {
        let mut payload = vec![0; 88];
        payload[14] = count;
        assert_eq!(Forged::new(0x001b, &payload).decode(), Err(want));
    }
    // SECTION: a name longer than the payload.
    let mut payload = vec![0; 9];
    payload[4] = 128;
    assert_eq!(
        Forged::new(0x0104, &payload).decode(),
        Err(WireError::Truncated { frame: "SECTION", field: "name", offset: 8 })
    );
}

#[test]
fn a_frame_lost_doubled_or_swapped_shows() {
    let frame = encode(&Message::Begun, 7).unwrap();
    let (head, _) = frame.split_first_chunk().unwrap();
    for due in [0, 6, 8, u64::MAX] {
        assert_eq!(FrameHeader::parse(head, due), Err(WireError::Sequence { expected: due, found: 7 }));
    }
    assert_eq!(FrameHeader::parse(head, 7).map(|header| header.sequence()), Ok(7));
}

#[test]
fn unknown_frames_are_skipped_only_if_optional() {
    let payload = vec![9; limits::SKIPPED];
    for number in [0x8000, 0x8001, 0xffff] {
        assert_eq!(Forged::new(number, &payload).decode(), Ok(Frame::Skipped(number)));
        assert_eq!(Forged::new(number, &[]).decode(), Ok(Frame::Skipped(number)));
        // Skipped, but neither endless nor unchecked.
        let forged = Forged::new(number, &payload);
        assert!(matches!(
            FrameHeader::parse(&forged.header_announcing(limits::SKIPPED as u32 + 1), 0),
            Err(WireError::Length { .. })
        ));
        let header = FrameHeader::parse(&forged.header(), 0).unwrap();
        assert!(matches!(
            Frame::decode(&header, &vec![8; limits::SKIPPED], Side::Source),
            Err(WireError::PayloadCrc { .. })
        ));
        // A body of unknown length cannot be skipped.
        let body = Forged { flags: 3, ..forged };
        assert!(matches!(body.decode(), Err(WireError::Flags { flags: 3, .. })));
    }
    for number in [0, 0x0008, 0x0025, 0x00ff, 0x0105, 0x7fff] {
        assert_eq!(Forged::new(number, &payload).decode(), Err(WireError::UnknownFrame(number)));
    }
}

#[test]
fn what_is_reserved_must_be_zero() {
    let begun = Forged::new(0x0013, &[]);
    assert_eq!(begun.decode(), Ok(Frame::Message(Message::Begun)));
    assert_eq!(
        Forged { channel: 1, ..begun }.decode(),
        Err(WireError::Channel { frame: "BEGUN", channel: 1 })
    );
    assert!(matches!(Forged { reserved: 1, ..begun }.decode(), Err(WireError::Value { .. })));
    for flags in [0, 2, 3, 5, 9, 0x8001, u16::MAX] {
        assert_eq!(Forged { flags, ..begun }.decode(), Err(WireError::Flags { frame: "BEGUN", flags }));
    }
    let pages = [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0];
    for flags in [0, 1, 2, 5, 6, 11] {
        assert!(matches!(
            Forged { flags, ..Forged::new(0x0100, &pages) }.decode(),
            Err(WireError::Flags { .. })
        ));
    }
    // A body CRC without its flag.
    assert_eq!(Forged::new(0x0100, &pages).decode(), Err(WireError::Reserved { frame: "PAGES", offset: 16 }));
    assert!(Forged { flags: 7, ..Forged::new(0x0100, &pages) }.decode().is_ok());
}

#[test]
fn another_stream_is_told_from_a_damaged_one() {
    let mut frame = encode(&Message::Begun, 0).unwrap();
    frame[0] = b'X';
    assert_eq!(
        crate::forge::decode(&frame, 0),
        Err(WireError::Magic { found: u32::from_le_bytes(*b"XMIG") })
    );
    frame[0] = b'V';
    frame[16] = 1;
    assert!(
        matches!(crate::forge::decode(&frame, 1), Err(WireError::HeaderCrc { .. })),
        "damage is no lost frame"
    );
}
