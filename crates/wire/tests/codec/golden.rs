//! The bytes of every frame, as files: they change only together with `docs/protocol.md` and the protocol version.
//!
//! After a change that is meant: `GOLDEN=write cargo test -p vfio-migration-wire golden`.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;

use vfio_migration_wire::{
    Frame, FrameType, HEADER_LEN, OPTIONAL, PREAMBLE, check_preamble, encode, encode_bulk, limits,
};

/// The number in the sequence that the golden frames have.
const SEQUENCE: u64 = 0x0706_0504_0302_0100;

#[test]
fn every_frame_has_the_bytes_of_its_file() {
    let mut frames = Vec::new();
    for (name, message) in crate::samples::messages() {
        let bytes = encode(&message, SEQUENCE).unwrap();
        assert_eq!(crate::forge::decode(&bytes, SEQUENCE), Ok(Frame::Message(message.clone())));
        frames.push((name, format!("{message:?}"), bytes));
    }
    for (name, bulk) in crate::samples::bulk() {
        let frame = encode_bulk(&bulk, SEQUENCE).unwrap();
        let bytes = frame.parts().concat();
        assert_eq!(crate::forge::decode(&bytes, SEQUENCE), Ok(Frame::Bulk(bulk.clone())));
        frames.push((name, format!("{bulk:?}"), bytes));
    }

    let mut files = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    for (name, shown, bytes) in &frames {
        let file = format!("{name}.hex");
        let path = folder().join(&file);
        let dump = dump(shown, bytes);
        if std::env::var_os("GOLDEN").is_some_and(|word| word == "write") {
            std::fs::write(&path, &dump).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!(golden, dump, "the bytes of {name} have changed");
        assert!(files.insert(file), "two samples named {name}");
        numbers.insert(u16::from_le_bytes([bytes[4], bytes[5]]));
    }
    let known: BTreeSet<u16> = FrameType::all().map(|frame| frame.number).collect();
    assert_eq!(numbers, known, "every frame type has a golden file");
    let present: BTreeSet<String> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(present, files, "no golden file without a sample");
}

#[test]
fn the_documented_table_of_frames_is_the_codes() {
    let doc = document();
    let rows: Vec<String> = FrameType::all()
        .map(|frame| {
            let lengths = if frame.min == frame.max {
                frame.min.to_string()
            } else {
                format!("{}..{}", frame.min, frame.max)
            };
            format!("| `{:#06x}` | {} | {lengths} |", frame.number, frame.name)
        })
        .collect();
    for row in &rows {
        assert!(doc.contains(row), "docs/protocol.md lacks the row {row}");
    }
    let documented = doc.lines().filter(|line| line.starts_with("| `0x")).count();
    assert_eq!(documented, rows.len(), "docs/protocol.md has a row too many");
}

#[test]
fn the_documented_limits_are_the_codes() {
    let doc = document();
    for (what, value) in [
        ("devices", u64::from(limits::DEVICES)),
        ("manifest, bytes", limits::MANIFEST as u64),
        ("configuration, bytes", limits::CONFIGURATION as u64),
        ("pages in one PAGES", limits::PAGES.into()),
        ("page numbers", limits::PAGE_NUMBERS),
        ("device data in one frame, bytes", limits::DEVICE_DATA as u64),
        ("section, bytes", limits::SECTION as u64),
        ("section name, bytes", limits::SECTION_NAME as u64),
        ("sections", limits::SECTIONS.into()),
        ("all sections, bytes", limits::SECTIONS_BYTES),
        ("reasons in one REFUSE or ACCEPT", limits::REASONS as u64),
        ("reason code, bytes", limits::REASON_CODE as u64),
        ("reason text, bytes", limits::REASON_TEXT as u64),
        ("reason field, bytes", limits::REASON_FIELD as u64),
        ("reason value, bytes", limits::REASON_VALUE as u64),
        ("reason severity or fix, bytes", limits::REASON_WORD as u64),
        ("device name, bytes", limits::DEVICE_NAME as u64),
        ("error device, bytes", limits::ERROR_DEVICE as u64),
        ("error text, bytes", limits::ERROR_TEXT as u64),
        ("error remedy, bytes", limits::ERROR_REMEDY as u64),
        ("digests in one RAM_DIGESTS", limits::RAM_DIGESTS.into()),
        ("logs named in RAM_DIGESTS, bytes", limits::DIRTY_LOGS as u64),
        ("skipped payload, bytes", limits::SKIPPED as u64),
        ("any payload, bytes", limits::PAYLOAD as u64),
    ] {
        let row = format!("| {what} | {value} |");
        assert!(doc.contains(&row), "docs/protocol.md lacks the row {row}");
    }
}

#[test]
fn what_is_frozen_has_not_moved() {
    assert_eq!(&PREAMBLE, b"VFIOMIG\x01");
    assert_eq!(check_preamble(&PREAMBLE), Ok(()));
    assert_eq!(HEADER_LEN, 32);
    let frozen: Vec<_> = FrameType::all().take_while(|frame| frame.number < 0x0010).collect();
    let names: Vec<_> = frozen.iter().map(|frame| (frame.number, frame.name, frame.min, frame.max)).collect();
    assert_eq!(
        names,
        [
            (1, "HELLO", 56, 56),
            (2, "HELLO_REPLY", 16, 16),
            (3, "REFUSE", 4, 610_308),
            (4, "ABORT", 22, 5206),
            (5, "QUERY", 72, 72),
            (6, "RUNNING", 40, 5246),
            (7, "DECLINED", 22, 5206)
        ]
    );
    assert!(FrameType::all().all(|frame| frame.number & OPTIONAL == 0), "version 1 has no optional type");
    assert!(FrameType::all().map(|frame| frame.number).is_sorted_by(|a, b| a < b), "numbers are distinct");
}

/// What it is, then 16 bytes a line, the header apart from the payload.
fn dump(shown: &str, bytes: &[u8]) -> String {
    let (header, payload) = bytes.split_at(HEADER_LEN);
    let mut out = format!("# {shown}\n");
    for part in [header, payload] {
        for line in part.chunks(16) {
            let hex: Vec<String> = line.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(out, "{}", hex.join(" ")).unwrap();
        }
        out.push('\n');
    }
    out.truncate(out.trim_end().len() + 1);
    out
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn document() -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/protocol.md");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
