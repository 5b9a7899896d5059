//! Vital product data: what the maker wrote into a PCI function (PCI Local Bus Specification 3.0, Appendix I).

use vfio_migration_types::is_control;

/// Tags of large resources.
const READ_ONLY: u8 = 0x90;
/// Small resource tag, without its length.
const END: u8 = 0x78;
/// Longest text that is taken, in bytes.
const TEXT_MAX: usize = 128;

/// Part number and engineering change level, which distinguish one make of a board from another. A serial number is of
/// one board, and is not taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Vpd {
    pub(super) part: Option<String>,
    pub(super) change: Option<String>,
}

/// Reads what can be read of it; it may be cut short, or nonsense.
pub(super) fn parse(mut bytes: &[u8]) -> Vpd {
    let mut found = Vpd::default();
    while let Some((&tag, rest)) = bytes.split_first() {
        if tag & 0x80 == 0 {
            // A small resource: its length is in the tag.
            if tag & 0x78 == END {
                break;
            }
            bytes = rest.get(usize::from(tag & 7)..).unwrap_or_default();
            continue;
        }
        let Some((len, rest)) = rest.split_first_chunk::<2>() else { break };
        let len = usize::from(u16::from_le_bytes(*len));
        let Some((body, after)) = rest.split_at_checked(len) else { break };
        if tag == READ_ONLY {
            keywords(body, &mut found);
        }
        bytes = after;
    }
    found
}

fn keywords(mut bytes: &[u8], found: &mut Vpd) {
    while let Some(([first, second, len], rest)) = bytes.split_first_chunk::<3>() {
        let Some((value, after)) = rest.split_at_checked(usize::from(*len)) else { return };
        let text = std::str::from_utf8(value)
            .ok()
            .map(str::trim)
            .filter(|text| !text.is_empty() && text.len() <= TEXT_MAX && !text.contains(is_control));
        match (first, second) {
            (b'P', b'N') => found.part = text.map(str::to_owned),
            (b'E', b'C') => found.change = text.map(str::to_owned),
            _ => {}
        }
        bytes = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let keywords = b"PN\x09MCX653-X1EC\x02A5SN\x041234";
        let mut bytes = vec![0x82, 4, 0];
        bytes.extend(b"name");
        bytes.extend([READ_ONLY, u8::try_from(keywords.len()).unwrap(), 0]);
        bytes.extend(keywords);
        bytes.push(END);
        bytes
    }

    #[test]
    fn part_and_change_are_found_and_the_serial_number_is_left() {
        let found = parse(&sample());
        assert_eq!((found.part.as_deref(), found.change.as_deref()), (Some("MCX653-X1"), Some("A5")));
    }

    #[test]
    fn nonsense_is_no_panic_and_what_is_cut_is_unknown() {
        let whole = sample();
        for len in 0..whole.len() {
            let _ = parse(&whole[..len]);
        }
        assert_eq!(parse(&whole[..9]), Vpd::default());
        assert_eq!(parse(&[0xff; 64]), Vpd::default());
        assert_eq!(parse(&[0x79; 4096]), Vpd::default());
    }
}
