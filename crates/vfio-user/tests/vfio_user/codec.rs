//! The codec alone: what is encoded is decoded, and no bytes make it panic.

use proptest::prelude::*;
use vfio_user_peer::codec::*;
use vfio_user_peer::{IovaRange, MmapArea, RegionWrite};

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        any::<bool>().prop_map(|no_reply| Kind::Command { no_reply }),
        Just(Kind::Reply),
        any::<u32>().prop_map(Kind::Error),
    ]
}

fn extension() -> impl Strategy<Value = Extension> {
    any::<[bool; 4]>().prop_map(|[p2p, precopy_info, data_size, manifest]| Extension {
        p2p,
        precopy_info,
        data_size,
        manifest,
    })
}

proptest! {
    #[test]
    fn headers_survive(id: u16, command: u16, size in 16u32.., kind in kind()) {
        let header = Header { id, command: Command(command), size, kind };
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn versions_survive(
        numbers: (u16, u16, u32, u32, u32, u64),
        twin in any::<Option<u32>>(),
        write_multiple: bool,
        extension in extension(),
    ) {
        let (major, minor, max_msg_fds, max_data_xfer_size, max_dma_maps, pgsizes) = numbers;
        let twin_socket = TwinSocket { supported: twin.is_some(), fd_index: twin };
        let capabilities = VersionCapabilities {
            max_msg_fds, max_data_xfer_size, max_dma_maps, pgsizes, twin_socket, write_multiple, extension,
        };
        let version = VersionPayload { major, minor, capabilities };
        let mut bytes = Vec::new();
        version.encode(&mut bytes);
        prop_assert_eq!(VersionPayload::decode(&bytes), Ok(version));
    }

    #[test]
    fn areas_survive(raw in prop::collection::vec((0u64..1 << 40, 0u64..1 << 40), 0..20)) {
        let areas: Vec<_> = raw.into_iter().map(|(offset, size)| MmapArea { offset, size }).collect();
        let info = RegionInfoPayload { flags: REGION_FLAG_CAPS, cap_offset: 32, size: 1 << 41, ..Default::default() };
        let mut body = info.to_vec();
        body.extend(encode_sparse_areas(&areas));
        prop_assert_eq!(decode_sparse_areas(&info, &body), Ok(areas));
    }

    #[test]
    fn writes_survive(raw in prop::collection::vec((any::<u64>(), any::<u32>(), 1u32..=8, any::<[u8; 8]>()), 0..=200)) {
        let writes: Vec<_> = raw
            .into_iter()
            .map(|(offset, region, count, data)| RegionWrite { offset, region, count, data })
            .collect();
        prop_assert_eq!(decode_multi(&encode_multi(&writes)), Ok(writes));
    }

    #[test]
    fn ranges_survive(raw in prop::collection::vec((any::<u32>(), 1u64..1 << 40), 0..50)) {
        let ranges: Vec<_> = raw.into_iter().map(|(iova, len)| IovaRange { iova: iova.into(), len }).collect();
        let mut bytes = Vec::new();
        encode_ranges(&ranges, &mut bytes);
        let count = u32::try_from(ranges.len()).unwrap();
        prop_assert_eq!(decode_ranges(count, &bytes), Ok(ranges));
        bytes.push(0);
        prop_assert!(decode_ranges(count, &bytes).is_err());
    }

    #[test]
    fn payloads_survive(iova: u64, len: u64, offset: u64, flags: u32, argsz: u32) {
        let map = DmaMapPayload { argsz, flags, offset, iova, len };
        prop_assert_eq!(DmaMapPayload::decode_exact(&map.to_vec()), Ok(map));
        prop_assert_eq!(map.to_vec().len(), 32);
        let report = LoggingReport { iova, length: len, page_size: offset };
        prop_assert_eq!(LoggingReport::decode_exact(&report.to_vec()), Ok(report));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), count: u32, flags: u32, at in 0u32..300) {
        let _ = Header::decode(&bytes);
        let _ = VersionPayload::decode(&bytes);
        let _ = decode_io_fds(&bytes);
        let _ = decode_multi(&bytes);
        let _ = decode_multi_reply(&bytes);
        let _ = decode_ranges(count % 40, &bytes);
        let _ = decode_ranges(count, &bytes);
        let _ = after_feature_head(&bytes);
        let _ = irq_flags::action(flags);
        let _ = prot_of_flags(flags);
        let info = RegionInfoPayload { flags, cap_offset: at, size: 1 << 20, ..Default::default() };
        let _ = decode_sparse_areas(&info, &bytes);
        if let Ok(info) = RegionInfoPayload::decode_prefix(&bytes) {
            let _ = decode_sparse_areas(&RegionInfoPayload { flags: REGION_FLAG_CAPS, ..info }, &bytes);
        }
        let _ = IrqSetPayload::decode_with_rest(&bytes);
        let _ = MigDataHead::decode_exact(&bytes);
    }

    #[test]
    fn mangled_versions_never_panic(mangle in prop::collection::vec((0usize..400, any::<u8>()), 0..6), cut in 0usize..400) {
        let mut bytes = Vec::new();
        let capabilities = VersionCapabilities {
            extension: Extension::ALL,
            twin_socket: TwinSocket { supported: true, fd_index: Some(0) },
            ..VersionCapabilities::default()
        };
        VersionPayload { major: 0, minor: 2, capabilities }.encode(&mut bytes);
        for (at, byte) in mangle {
            if let Some(slot) = bytes.get_mut(at) {
                *slot = byte;
            }
        }
        bytes.truncate(cut);
        let _ = VersionPayload::decode(&bytes);
    }

    #[test]
    fn reports_stay_inside_their_pages(bits in prop::collection::vec(any::<u8>(), 0..64), pages in 0u64..300) {
        let mut bitmap = [0u64; 8];
        or_bitmap(&bits, pages, &mut bitmap);
        for page in pages..512 {
            prop_assert_eq!(bitmap[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1, 0);
        }
    }
}

/// Bytes as other implementations send and expect them.
#[test]
fn golden_bytes() {
    let header = Header { id: 0x1234, command: Command::MIG_DATA_READ, size: 24, kind: Kind::Error(22) };
    if cfg!(target_endian = "little") {
        assert_eq!(header.encode(), [0x34, 0x12, 17, 0, 24, 0, 0, 0, 0x21, 0, 0, 0, 22, 0, 0, 0]);
    }
    assert_eq!(
        [IrqSetPayload::SIZE, RegionAccess::SIZE, DmaAccess::SIZE, IoFdEntry::SIZE, RegionInfoPayload::SIZE],
        [20, 16, 16, 40, 32]
    );
    assert_eq!(
        [PrecopyPayload::SIZE, LoggingControl::SIZE, LoggingReport::SIZE, MigStatePayload::SIZE],
        [24, 16, 24, 8]
    );
    // libvfio-user's, with capabilities that are not ours.
    let json = br#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576,"migration":{"pgsize":4096},"x":[]}}"#;
    let bytes = [&[0, 0, 2, 0][..], json, &[0]].concat();
    let version = VersionPayload::decode(&bytes).unwrap();
    assert_eq!(
        version.capabilities,
        VersionCapabilities { max_msg_fds: 8, ..VersionCapabilities::default() }
    );
    // The extension of another version counts as absent.
    let other = br#"{"capabilities":{"x-vfio-migrate":{"version":2,"p2p":true}}}"#;
    let version = VersionPayload::decode(&[&[0, 0, 2, 0][..], other, &[0]].concat()).unwrap();
    assert_eq!(version.capabilities.extension, Extension::NONE);
}
