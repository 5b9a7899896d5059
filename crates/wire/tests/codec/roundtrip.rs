//! What is encoded is decoded again, whole and alone.

use proptest::prelude::*;
use vfio_migration_types::{Failure, Phase, Side, is_control};
use vfio_migration_wire::{
    Bulk, Crc, Frame, FrameHeader, HEADER_LEN, Message, Offer, Reason, VersionRange, WireError, encode,
    encode_bulk, limits,
};

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_message_comes_back(message in crate::strategies::message(), sequence: u64) {
        let bytes = encode(&message, sequence).unwrap();
        prop_assert_eq!(crate::forge::decode(&bytes, sequence), Ok(Frame::Message(message)));
    }

    #[test]
    fn all_bulk_comes_back(bulk in crate::strategies::bulk(), sequence: u64) {
        let bulk = bulk.borrow();
        let frame = encode_bulk(&bulk, sequence).unwrap();
        let bytes = frame.parts().concat();
        prop_assert_eq!(frame.body_len(), bulk.body_len());
        prop_assert_eq!(frame.wire_len(), bytes.len() as u64 + bulk.body_len());
        prop_assert_eq!(crate::forge::decode(&bytes, sequence), Ok(Frame::Bulk(bulk)));
    }

    /// One stream of anything: read as a session reads it, nothing runs into anything else.
    #[test]
    fn a_stream_comes_back_in_order(parts in proptest::collection::vec(
        prop_oneof![crate::strategies::message().prop_map(Ok), crate::strategies::bulk().prop_map(Err)], 0..12)
    ) {
        let mut stream = Vec::new();
        for (sequence, part) in (0..).zip(&parts) {
            match part {
                Ok(message) => stream.extend(encode(message, sequence).unwrap()),
                Err(bulk) => {
                    let frame = encode_bulk(&bulk.borrow(), sequence).unwrap();
                    stream.extend(frame.parts().concat());
                    stream.extend(vec![0x5a; frame.body_len() as usize]);
                }
            }
        }
        let mut rest = stream.as_slice();
        for (sequence, part) in (0..).zip(&parts) {
            let (head, tail) = rest.split_first_chunk::<HEADER_LEN>().unwrap();
            let header = FrameHeader::parse(head, sequence).unwrap();
            let (payload, tail) = tail.split_at(header.payload_len());
            rest = tail;
            match (Frame::decode(&header, payload, Side::Source).unwrap(), part) {
                (Frame::Message(got), Ok(sent)) => prop_assert_eq!(&got, sent),
                (Frame::Bulk(got), Err(sent)) => {
                    prop_assert_eq!(&got, &sent.borrow());
                    rest = &rest[got.body_len() as usize..];
                }
                (got, sent) => prop_assert!(false, "{got:?} for {sent:?}"),
            }
        }
        prop_assert!(rest.is_empty());
    }

    /// Text of any length and content goes out: cut between characters, and without control characters.
    #[test]
    fn any_text_can_be_sent(text in ".{0,3000}\\PC{0,3000}", device in "\\PC{0,100}") {
        let error = Failure { side: Side::Source, phase: Phase::Iterate, device: Some(device.clone()), arc: None, errno: None,
            text: text.clone(), remedy: text.clone() };
        let bytes = encode(&Message::Abort(error), 0).unwrap();
        let Frame::Message(Message::Abort(got)) = crate::forge::decode(&bytes, 0).unwrap() else { panic!() };
        prop_assert_eq!(&got.text, &cut(&text, limits::ERROR_TEXT));
        prop_assert_eq!(&got.remedy, &cut(&text, limits::ERROR_REMEDY));
        prop_assert_eq!(got.device, Some(cut(&device, limits::ERROR_DEVICE)));
    }
}

/// The longest prefix of whole characters that fits.
fn cut(text: &str, max: usize) -> String {
    let clean: String = text.chars().map(|char| if is_control(char) { ' ' } else { char }).collect();
    let end = (0..=max.min(clean.len())).rev().find(|end| clean.is_char_boundary(*end)).unwrap();
    clean[..end].to_owned()
}

#[test]
fn a_terminal_is_safe_from_the_peers_text() {
    let reason =
        Reason { code: "x\n".into(), text: "\x1b[2J\u{9b}31mred\r\n\u{202e}".into(), ..Reason::default() };
    let bytes = encode(&Message::Refuse(vec![reason]), 0).unwrap();
    let Ok(Frame::Message(Message::Refuse(got))) = crate::forge::decode(&bytes, 0) else { panic!() };
    assert_eq!(got, [Reason { code: "x ".into(), text: " [2J 31mred   ".into(), ..Reason::default() }]);
}

#[test]
fn reasons_beyond_the_limit_are_left_out() {
    let reasons =
        vec![Reason { code: "c".repeat(1000), text: "é".repeat(1000), ..Reason::default() }; 70_000];
    let bytes = encode(&Message::Refuse(reasons), 0).unwrap();
    let Ok(Frame::Message(Message::Refuse(got))) = crate::forge::decode(&bytes, 0) else { panic!() };
    assert_eq!(got.len(), limits::REASONS);
    assert_eq!((got[0].code.len(), got[0].text.len()), (limits::REASON_CODE, limits::REASON_TEXT));
}

#[test]
fn the_largest_of_everything_fits_and_one_more_does_not() {
    let length = |result: Result<Vec<u8>, WireError>| match result {
        Err(WireError::Length { .. } | WireError::Value { .. }) => None,
        other => Some(other.unwrap().len() - HEADER_LEN),
    };
    let offer =
        |len| length(encode(&Message::Offer(Offer { manifest: vec![b'x'; len], ..Offer::default() }), 0));
    assert_eq!(offer(limits::MANIFEST), Some(limits::MANIFEST + 4));
    assert_eq!(offer(limits::MANIFEST + 1), None);
    assert_eq!(offer(1), None);
    let configured = |len, digest| {
        let (configuration, manifest) = (vec![7; len], b"{}".to_vec());
        let offer = Offer { configuration, configuration_digest: [digest; 32], manifest, ..Offer::default() };
        length(encode(&Message::Offer(offer), 0))
    };
    assert_eq!(configured(limits::CONFIGURATION, 1), Some(4 + 32 + limits::CONFIGURATION + 2));
    assert_eq!(configured(limits::CONFIGURATION + 1, 1), None);
    assert_eq!(configured(0, 0), Some(6));
    assert_eq!(configured(0, 1), None, "a digest of nothing is told");
    let name = |len| {
        let names = vec![("n".repeat(len), "m".into())];
        length(encode(&Message::Offer(Offer { names, manifest: b"{}".to_vec(), ..Offer::default() }), 0))
    };
    assert_eq!(name(limits::DEVICE_NAME), Some(4 + 2 + limits::DEVICE_NAME + 2 + 1 + 2));
    assert_eq!(name(limits::DEVICE_NAME + 1), None, "half a name is another device's");

    let bulk = |bulk: Bulk<'_>| {
        let bytes = length(encode_bulk(&bulk, 0).map(|frame| frame.parts().concat()))?;
        let again = encode_bulk(&bulk, 0).unwrap().parts().concat();
        assert_eq!(crate::forge::decode(&again, 0), Ok(Frame::Bulk(bulk)));
        Some(bytes)
    };
    let data = vec![7; limits::SECTION + 1];
    let piece =
        |len: usize| bulk(Bulk::DeviceData { device: 0, sequence: 0, offset: 0, bytes: &data[..len] });
    assert_eq!(piece(limits::DEVICE_DATA), Some(limits::DEVICE_DATA + 24));
    assert_eq!(piece(limits::DEVICE_DATA + 1), None);
    assert_eq!(piece(0), None);

    let name = "n".repeat(limits::SECTION_NAME + 1);
    let section = |chars: usize, len: usize| {
        bulk(Bulk::Section { name: &name[..chars], version: 1, bytes: &data[..len] })
    };
    assert_eq!(section(limits::SECTION_NAME, limits::SECTION), Some(limits::PAYLOAD));
    assert_eq!(section(1, limits::SECTION), Some(9 + limits::SECTION));
    assert_eq!(section(1, limits::SECTION + 1), None);
    assert_eq!(section(limits::SECTION_NAME + 1, 0), None);
    assert_eq!(section(0, 0), None);

    let pages = |first, count| bulk(Bulk::Pages { first, count, crc: None });
    assert_eq!(pages(limits::PAGE_NUMBERS - 256, limits::PAGES), Some(16));
    assert_eq!(pages(0, limits::PAGES + 1), None);
    assert_eq!(pages(0, 0), None);
    assert_eq!(pages(limits::PAGE_NUMBERS - 1, 2), None);
    assert_eq!(pages(u64::MAX, 1), None);
    let zero = |first, count| bulk(Bulk::ZeroPages { first, count });
    assert_eq!(zero(0, limits::PAGE_NUMBERS), Some(16));
    assert_eq!(zero(1, limits::PAGE_NUMBERS), None);
    assert_eq!(zero(u64::MAX, u64::MAX), None);
    assert_eq!(zero(5, 0), None);
}

#[test]
fn values_that_no_peer_may_send_are_not_sent() {
    for message in [
        Message::InitialSent { device: limits::DEVICES, generation: 0 },
        Message::InitialLoaded { device: u16::MAX, generation: 0 },
        Message::Credit { device: limits::DEVICES, bytes: 1 },
        Message::HelloReply(vfio_migration_wire::HelloReply { version: 0, features: 0 }),
        Message::FinalEnd(vfio_migration_wire::FinalEnd {
            ram_pages: 0,
            ram_digest: None,
            sections: 0,
            devices: vec![vfio_migration_wire::DeviceTotal { bytes: 0, digest: [0; 32] }; 65],
        }),
    ] {
        assert!(matches!(encode(&message, 0), Err(WireError::Value { .. })), "{message:?}");
    }
    for (min, max) in [(0, 1), (2, 1)] {
        let hello = vfio_migration_wire::Hello {
            versions: VersionRange { min, max },
            features: 0,
            vm: vfio_migration_types::VmId([0; 16]),
            attempt: vfio_migration_types::AttemptId([0; 16]),
            epoch: vfio_migration_types::Epoch(0),
        };
        assert!(matches!(encode(&Message::Hello(hello), 0), Err(WireError::Value { .. })));
    }
    let name = Bulk::Section { name: "with space", version: 0, bytes: b"" };
    assert!(matches!(encode_bulk(&name, 0), Err(WireError::Text { .. })));
    let end = Bulk::DeviceData { device: 0, sequence: 0, offset: u64::MAX, bytes: b"x" };
    assert!(matches!(encode_bulk(&end, 0), Err(WireError::Value { field: "offset", .. })));
}

#[test]
fn a_damaged_body_shows() {
    let body = vec![0xa5; 8192];
    let crc = Crc::of(&body);
    let frame = encode_bulk(&Bulk::Pages { first: 1, count: 2, crc: Some(crc.value()) }, 0).unwrap();
    let bytes = frame.parts().concat();
    let Ok(Frame::Bulk(Bulk::Pages { crc: Some(announced), .. })) = crate::forge::decode(&bytes, 0) else {
        panic!()
    };
    assert_eq!(Crc::of(&body).check_body(announced), Ok(()));
    let mut damaged = body;
    damaged[4097] ^= 4;
    assert!(matches!(Crc::of(&damaged).check_body(announced), Err(WireError::BodyCrc { .. })));
}
