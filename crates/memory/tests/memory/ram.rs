//! Layout, accesses, holes, zero pages and digests of guest RAM.
#![expect(clippy::cast_possible_truncation, reason = "test sizes are small")]

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use proptest::prelude::*;
use vfio_migration_memory::{GuestRam, Holes, MemoryError, OwnedRegion, RamSpec};
use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset, Range};

const ABOVE: u64 = 4 << 30;

fn flat(pages: u64) -> GuestRam {
    GuestRam::new("test", &[RamSpec { gpa: Gpa(0), len: pages * PAGE_SIZE }]).unwrap()
}

fn pages(first: u64, count: u64) -> Range<RamOffset> {
    Range::new(RamOffset(first * PAGE_SIZE), count * PAGE_SIZE).unwrap()
}

/// Pages that the memory file has allocated.
fn allocated(ram: &GuestRam) -> u64 {
    rustix::fs::fstat(file(ram)).unwrap().st_blocks.cast_unsigned() * 512 / PAGE_SIZE
}

fn file(ram: &GuestRam) -> BorrowedFd<'_> {
    let (fd, offset) = ram.shared_file(RamOffset(0), 1).unwrap();
    assert_eq!(offset, 0);
    fd
}

#[test]
fn nonsense_layouts_are_refused_with_the_reason() {
    let spec = |gpa, len| RamSpec { gpa: Gpa(gpa), len };
    let page = PAGE_SIZE;
    let cases: [(&[RamSpec], &str); 8] = [
        (&[], "no regions"),
        (&[spec(0, 0)], "no bytes"),
        (&[spec(0, 100)], "whole pages"),
        (&[spec(100, page)], "whole pages"),
        (&[spec(0, 2 * page), spec(page, page)], "overlap"),
        (&[spec(page, page), spec(0, 2 * page)], "overlap"),
        (&[spec(u64::MAX - page + 1, 2 * page)], "leaves the 64-bit address space"),
        (&[spec(0, 1 << 62), spec(1 << 62, 1 << 62)], "larger than a file"),
    ];
    for (specs, why) in cases {
        let error = GuestRam::new("test", specs).unwrap_err();
        assert!(matches!(error, MemoryError::Layout(_)), "{error:?}");
        assert!(error.to_string().contains(why), "{error}");
    }
    let error = GuestRam::new("test", &[spec(0, 1 << 60)]).unwrap_err();
    assert!(matches!(error, MemoryError::TooLarge { wanted, .. } if wanted == 1 << 60), "{error:?}");
    let error = GuestRam::new("a\0b", &[spec(0, page)]).unwrap_err();
    assert!(matches!(error, MemoryError::System { source: rustix::io::Errno::INVAL, .. }), "{error:?}");
    // The control: neighbours that touch are no overlap, in whatever order.
    assert_eq!(GuestRam::new("test", &[spec(page, page), spec(0, page)]).unwrap().size(), 2 * page);
}

#[test]
fn the_file_can_neither_shrink_nor_grow() {
    let ram = flat(4);
    for size in [0, PAGE_SIZE, 5 * PAGE_SIZE] {
        assert_eq!(rustix::fs::ftruncate(file(&ram), size), Err(rustix::io::Errno::PERM), "{size}");
    }
    let write = rustix::fs::SealFlags::WRITE;
    assert_eq!(rustix::fs::fcntl_add_seals(file(&ram), write), Err(rustix::io::Errno::PERM));
}

#[test]
fn accesses_stop_at_the_end() {
    let ram = flat(2);
    let end = ram.size();
    let mut buffer = [0; 16];
    for (offset, len) in [(end, 1), (end - 15, 16), (u64::MAX, 1), (u64::MAX - 7, 16)] {
        let at = RamOffset(offset);
        let into = &mut buffer[..len];
        assert!(matches!(ram.read(at, into), Err(MemoryError::OutOfBounds { .. })), "{offset:#x}");
        assert!(matches!(ram.write(at, into), Err(MemoryError::OutOfBounds { .. })), "{offset:#x}");
    }
    assert!(matches!(ram.read_u64(RamOffset(end)), Err(MemoryError::OutOfBounds { .. })));
    assert!(matches!(ram.write_u64(RamOffset(4), 1), Err(MemoryError::Misaligned { align: 8, .. })));
    assert!(matches!(ram.zero(pages(1, 2)), Err(MemoryError::OutOfBounds { .. })));
    let odd = Range::new(RamOffset(8), PAGE_SIZE).unwrap();
    assert!(matches!(ram.zero(odd), Err(MemoryError::Misaligned { .. })));
    assert!(matches!(ram.scan(odd, Holes::Possible), Err(MemoryError::Misaligned { .. })));
    assert!(!ram.is_zero(2) && !ram.is_zero(u64::MAX) && !ram.is_zero(u64::MAX / PAGE_SIZE));
    ram.read(RamOffset(end - 16), &mut buffer).unwrap();
    ram.read(RamOffset(end), &mut []).unwrap();
}

#[test]
fn words_are_native_and_in_place() {
    let ram = flat(1);
    ram.write(RamOffset(8), &0x1122_3344_5566_7788u64.to_ne_bytes()).unwrap();
    assert_eq!(ram.read_u64(RamOffset(8)).unwrap(), 0x1122_3344_5566_7788);
    ram.write_u64(RamOffset(16), 7).unwrap();
    let mut bytes = [0; 8];
    ram.read(RamOffset(16), &mut bytes).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), 7);
}

#[test]
fn holes_are_found_and_stay_holes() {
    let ram = flat(1024);
    assert_eq!(ram.data_extents().unwrap(), []);
    for page in [3, 4, 1000] {
        ram.write(RamOffset(page * PAGE_SIZE + 17), &[1]).unwrap();
    }
    ram.write(RamOffset(500 * PAGE_SIZE), &[0]).unwrap();
    let extents = [pages(3, 2), pages(500, 1), pages(1000, 1)];
    assert_eq!(ram.data_extents().unwrap(), extents);

    ram.digest().unwrap();
    assert!((0..1024).all(|page| ram.is_zero(page) != [3, 4, 1000].contains(&page)));
    let runs = ram.scan(pages(0, 1024), Holes::Possible).unwrap();
    let expected = [(0, 3, true), (3, 2, false), (5, 995, true), (1000, 1, false), (1001, 23, true)];
    assert!(
        runs.iter().map(|run| (run.range, run.zero)).eq(expected.map(|(at, n, zero)| (pages(at, n), zero)))
    );
    for extent in extents {
        ram.scan(extent, Holes::Excluded).unwrap();
    }
    ram.zero(pages(100, 100)).unwrap();
    ram.zero(pages(0, 3)).unwrap();
    let (null, _reader) = std::os::unix::net::UnixStream::pair().unwrap();
    ram.pieces(&[pages(3, 2)]).unwrap().send(std::os::fd::AsFd::as_fd(&null), b"header").unwrap();

    assert_eq!(ram.data_extents().unwrap(), extents);
    assert_eq!(allocated(&ram), 4);
    // The control: a plain read through the mapping is what this test could not survive.
    ram.read(RamOffset(200 * PAGE_SIZE), &mut [0]).unwrap();
    assert_eq!(allocated(&ram), 5);
}

#[test]
fn zeroing_gives_pages_back_or_keeps_them_in_place() {
    for punch_holes in [false, true] {
        let spec = RamSpec { gpa: Gpa(0), len: 16 * PAGE_SIZE };
        let ram = GuestRam::owned("test", &[OwnedRegion { punch_holes, ..spec.into() }]).unwrap();
        let fill = [7; 4 * PAGE_SIZE as usize];
        ram.write(RamOffset(4 * PAGE_SIZE), &fill).unwrap();
        ram.zero(pages(5, 2)).unwrap();
        ram.zero(pages(0, 4)).unwrap();
        let expected = if punch_holes { vec![pages(4, 1), pages(7, 1)] } else { vec![pages(4, 4)] };
        assert_eq!(ram.data_extents().unwrap(), expected);
        assert!((0..16).all(|page| ram.is_zero(page) != [4, 7].contains(&page)));
        let mut back = [1; PAGE_SIZE as usize];
        ram.read(pages(5, 1).start(), &mut back).unwrap();
        assert_eq!(back, [0; PAGE_SIZE as usize]);
    }
}

/// An IOMMU goes on with the pages that it has pinned, whatever becomes of the file.
#[test]
fn pages_stay_once_a_device_may_reach_them() {
    let spec = |gpa| RamSpec { gpa: Gpa(gpa), len: 4 * PAGE_SIZE };
    let region = |gpa| OwnedRegion { punch_holes: true, ..spec(gpa).into() };
    let ram = Arc::new(GuestRam::owned("test", &[region(0), region(ABOVE)]).unwrap());
    ram.write(RamOffset(0), &[1; 8 * PAGE_SIZE as usize]).unwrap();
    let pinned = ram.host_memory(RamOffset(PAGE_SIZE), PAGE_SIZE).unwrap();
    ram.zero(pages(0, 8)).unwrap();
    assert_eq!(ram.data_extents().unwrap(), [pages(0, 4)], "one region is reached, the other is not");
    drop(pinned);
    ram.clear().unwrap();
    assert_eq!(ram.data_extents().unwrap(), [pages(0, 4)], "nobody knows whether it is pinned still");
    assert!((0..8).all(|page| ram.is_zero(page)));
}

#[test]
fn populating_allocates_everything_and_changes_nothing() {
    let ram = flat(64);
    ram.write(RamOffset(PAGE_SIZE), &[9]).unwrap();
    let before = ram.digest().unwrap();
    ram.populate().unwrap();
    assert_eq!(allocated(&ram), 64);
    assert_eq!(ram.data_extents().unwrap(), [pages(0, 64)]);
    assert_eq!(ram.digest().unwrap(), before);
}

#[test]
fn digests_see_contents_and_not_allocation() {
    let (a, b) = (flat(300), flat(300));
    assert_eq!(a.digest().unwrap(), *blake3::hash(b"").as_bytes());
    for page in (0..300).step_by(7) {
        let fill: Vec<u8> = (0..PAGE_SIZE).map(|at| (at * 31 + page) as u8 | 1).collect();
        a.write(RamOffset(page * PAGE_SIZE), &fill).unwrap();
        b.write(pages(page, 1).start(), &fill).unwrap();
    }
    b.write(RamOffset(5 * PAGE_SIZE), &[0; 8192]).unwrap();
    assert_ne!(a.data_extents().unwrap(), b.data_extents().unwrap());
    assert_eq!(a.digest().unwrap(), b.digest().unwrap());

    let at = RamOffset(294 * PAGE_SIZE + 4095);
    let mut byte = [0];
    b.read(at, &mut byte).unwrap();
    for bit in 0..8 {
        b.write(at, &[byte[0] ^ 1 << bit]).unwrap();
        assert_ne!(a.digest().unwrap(), b.digest().unwrap(), "bit {bit}");
        // Its own page sees it, and no other part does.
        for (part, same) in [(pages(294, 1), false), (pages(0, 294), true), (pages(295, 5), true)] {
            assert_eq!(a.digest_of(part).unwrap() == b.digest_of(part).unwrap(), same, "{part:?}");
        }
    }
    assert_eq!(a.digest_of(pages(0, 300)).unwrap(), a.digest().unwrap());
    assert!(a.digest_of(pages(0, 301)).is_err());
    b.write(at, &byte).unwrap();
    assert_eq!(a.digest().unwrap(), b.digest().unwrap());

    // The same page somewhere else is another memory.
    let (c, d) = (flat(2), flat(2));
    c.write(RamOffset(0), &[1]).unwrap();
    d.write(RamOffset(PAGE_SIZE), &[1]).unwrap();
    assert_ne!(c.digest().unwrap(), d.digest().unwrap());
}

#[test]
fn a_zero_test_sees_every_byte() {
    let ram = flat(1);
    for at in (0..PAGE_SIZE).step_by(61).chain([PAGE_SIZE - 1]) {
        ram.write(RamOffset(at), &[0x80]).unwrap();
        assert!(!ram.is_zero(0), "{at}");
        ram.write(RamOffset(at), &[0]).unwrap();
        assert!(ram.is_zero(0), "{at}");
    }
}

#[test]
fn host_addresses_stay_in_one_region() {
    let len = 4 * PAGE_SIZE;
    let ram =
        GuestRam::new("test", &[RamSpec { gpa: Gpa(0), len }, RamSpec { gpa: Gpa(ABOVE), len }]).unwrap();
    assert_eq!(ram.regions()[1].offset, RamOffset(len));
    let base = ram.host_address(RamOffset(0), len).unwrap();
    assert!(ram.host_address(RamOffset(0), len + 1).is_none());
    assert!(ram.host_address(RamOffset(1), u64::MAX).is_none());
    assert!(ram.host_address(RamOffset(2 * len), 0).is_none());
    let high = ram.host_address(RamOffset(len), len).unwrap();
    assert!(high.addr().get().is_multiple_of(4096) && base != high);
}

proptest! {
    #[test]
    fn gpas_and_offsets_agree_across_the_hole(
        low in 1u64..64, high in 1u64..64, swapped: bool, gpa in prop_oneof![0u64..80, (ABOVE / 4096 - 8)..(ABOVE / 4096 + 80)],
        into in 0u64..PAGE_SIZE, len in 0u64..40 * PAGE_SIZE,
    ) {
        let mut specs = [
            RamSpec { gpa: Gpa(0), len: low * PAGE_SIZE }, RamSpec { gpa: Gpa(ABOVE), len: high * PAGE_SIZE },
        ];
        if swapped {
            specs.swap(0, 1);
        }
        let ram = GuestRam::new("test", &specs).unwrap();
        let gpa = gpa * PAGE_SIZE + into;
        let inside = |spec: &&RamSpec| gpa >= spec.gpa.0 && gpa < spec.gpa.0 + spec.len && gpa + len <= spec.gpa.0 + spec.len;
        let found = ram.offset_of(Gpa(gpa), len);
        prop_assert_eq!(found.is_some(), specs.iter().any(|spec| inside(&spec)));
        if let Some(offset) = found {
            prop_assert_eq!(ram.gpa_of(offset), Some(Gpa(gpa)));
            prop_assert!(offset.0 + len <= ram.size());
            prop_assert!(ram.host_address(offset, len).is_some());
        }
        prop_assert_eq!(ram.gpa_of(RamOffset(ram.size())), None);
        prop_assert_eq!(ram.offset_of(Gpa(u64::MAX), len), None);
        prop_assert_eq!(ram.offset_of(Gpa(0), u64::MAX), None);
    }

    #[test]
    fn copies_are_exact_at_any_alignment(offset in 0u64..200, bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let ram = flat(1);
        ram.write(RamOffset(0), &[0xee; 400]).unwrap();
        ram.write(RamOffset(offset), &bytes).unwrap();
        let mut all = [0; 400];
        ram.read(RamOffset(0), &mut all).unwrap();
        let mut expected = [0xee; 400];
        expected[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        prop_assert_eq!(all, expected);
        let mut back = vec![0; bytes.len()];
        ram.read(RamOffset(offset), &mut back).unwrap();
        prop_assert_eq!(back, bytes);
    }
}
