//! Lent regions that are no RAM, each refused by name; and what is held of those that are.

use std::any::Any;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_memory::{GuestRam, LentRegion, MemoryError, RamKind, RamPageSize, RegionError};
use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset, Range};

use crate::lender::{Backing, MARGIN, Mapped, lend};

const ABOVE: u64 = 4 << 30;

/// Lends two regions of 8 pages, the second as `change` makes it.
fn second(backing: Backing, change: impl FnOnce(&mut LentRegion, &Mapped)) -> Result<GuestRam, MemoryError> {
    let mapped = Arc::new((Mapped::new(8, Backing::MemoryFile), Mapped::new(8, backing)));
    let first = mapped.0.region(0, Backing::MemoryFile, true);
    let mut second = mapped.1.region(ABOVE, backing, true);
    change(&mut second, &mapped.0);
    let lender: Arc<dyn Any + Send + Sync> = mapped.clone();
    let made = lend(vec![first, second], lender);
    if made.is_err() {
        assert_eq!(Arc::strong_count(&mapped), 1, "a refusal holds nothing");
    }
    made
}

/// The reason for which the second region is refused.
fn refused(backing: Backing, change: impl FnOnce(&mut LentRegion, &Mapped)) -> RegionError {
    match second(backing, change).unwrap_err() {
        MemoryError::Region { gpa: Gpa(ABOVE), why, .. } => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_cannot_be_laid_out_is_refused_with_the_regions() {
    let layout = |change: fn(&mut LentRegion)| {
        let error = second(Backing::Anonymous, |region, _| change(region)).unwrap_err();
        assert!(matches!(error, MemoryError::Layout(_)), "{error:?}");
        error.to_string()
    };
    assert!(
        layout(|region| region.gpa = Gpa(7 * PAGE_SIZE)).contains("0x7000+0x8000 and 0x0+0x8000 overlap")
    );
    assert!(
        layout(|region| region.gpa = Gpa(ABOVE + 8))
            .contains("0x100000008+0x8000 is not made of whole pages")
    );
    assert!(layout(|region| region.len -= 1).contains("whole pages of 4096"));
    assert!(layout(|region| region.len = 0).contains("no bytes at 0x100000000"));
    assert!(layout(|region| region.gpa = Gpa(u64::MAX - 4095)).contains("leaves the 64-bit address space"));
    assert!(layout(|region| region.page_size = RamPageSize::Size2M).contains("whole pages of 2097152"));
    assert!(layout(|region| region.page_size = RamPageSize::Size1G).contains("whole pages of 1073741824"));
    let none = lend(vec![], Arc::new(())).unwrap_err();
    assert!(none.to_string().contains("no regions"), "{none}");
    // The control.
    second(Backing::Anonymous, |_, _| ()).unwrap();
}

#[test]
fn a_place_that_is_not_of_pages_is_refused() {
    let why = refused(Backing::Anonymous, |region, _| {
        region.host = region.host.map_addr(|address| address.saturating_add(8));
    });
    assert!(matches!(why, RegionError::HostAddress { page: 4096, .. }), "{why:?}");
    let why = refused(Backing::MemoryFile, |region, _| region.file.as_mut().unwrap().1 += 512);
    assert!(matches!(why, RegionError::FileOffset { offset: 0x3200, page: 4096 }), "{why:?}");
    let why = refused(Backing::MemoryFile, |region, _| region.file.as_mut().unwrap().1 = u64::MAX - 4095);
    assert!(matches!(why, RegionError::AddressSpace), "{why:?}");
    let why = refused(Backing::Anonymous, |region, _| region.len = (1 << 63) - (1 << 20));
    assert!(matches!(why, RegionError::AddressSpace), "{why:?}");
    // 2 MiB at a host address that is none of 2 MiB.
    let why = refused(Backing::Anonymous, |region, _| {
        (region.page_size, region.len) = (RamPageSize::Size2M, 2 << 20);
        region.host = region.host.map_addr(|address| (address | 0x1000).saturating_add(0));
    });
    assert!(matches!(why, RegionError::HostAddress { page: 0x20_0000, .. }), "{why:?}");
}

#[test]
fn a_file_that_is_not_the_regions_is_refused() {
    // Shorter than said: as made, it has MARGIN pages more than the region and as many before it.
    for (offset, fits) in [(2 * MARGIN, true), (2 * MARGIN + 1, false), (1000, false)] {
        let made = second(Backing::MemoryFile, |region, _| {
            region.file.as_mut().unwrap().1 = offset * PAGE_SIZE;
        });
        match made {
            Ok(_) => assert!(fits, "{offset}"),
            Err(MemoryError::Region {
                gpa: Gpa(ABOVE),
                why: RegionError::FileTooSmall { size, needed },
                ..
            }) => {
                assert!(!fits && size < needed, "{offset}");
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    let with = |fd: OwnedFd| refused(Backing::MemoryFile, |region, _| region.file = Some((fd, 0)));
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    assert!(matches!(with(pipe), RegionError::NoMemoryFile));
    assert!(matches!(with(std::fs::File::open("/").unwrap().into()), RegionError::NoMemoryFile));
    assert!(matches!(with(std::fs::File::open("/dev/zero").unwrap().into()), RegionError::NoMemoryFile));
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    assert!(matches!(with(std::fs::File::open(file.path()).unwrap().into()), RegionError::FileReadOnly));
    let path = rustix::fs::open(file.path(), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    let why = with(path);
    assert!(
        matches!(why, RegionError::System { source: Errno::BADF, .. } | RegionError::FileReadOnly),
        "{why:?}"
    );

    let why = refused(Backing::Anonymous, |region, other| {
        region.file = Some((other.file.as_ref().unwrap().try_clone().unwrap().into(), 0));
    });
    assert!(matches!(why, RegionError::AnonymousFile), "{why:?}");
    let why = refused(Backing::Private, |region, _| region.fresh = true);
    assert!(matches!(why, RegionError::FreshFile), "{why:?}");
    let why = refused(Backing::MemoryFile, |region, _| {
        (region.page_size, region.len) = (RamPageSize::Size2M, 2 << 20);
        region.host = region.host.map_addr(|address| (address | 0x1f_ffff).saturating_add(1));
        region.file.as_mut().unwrap().1 = 0;
    });
    assert!(matches!(why, RegionError::PageSize { said: 0x20_0000, found: 4096 }), "{why:?}");
}

#[test]
fn one_memory_is_not_two_regions() {
    let why = refused(Backing::Anonymous, |region, other| region.host = other.host);
    assert!(matches!(why, RegionError::SameMemory { other: Gpa(0) }), "{why:?}");
    // Two mappings of a file; the regions touch in it, or overlap by a page.
    for (pages, fits) in [(8, true), (7, false)] {
        let made = second(Backing::MemoryFile, |region, other| {
            let file = other.file.as_ref().unwrap();
            file.set_len(64 * PAGE_SIZE).unwrap();
            region.file = Some((file.try_clone().unwrap().into(), (MARGIN + pages) * PAGE_SIZE));
        });
        match made {
            Ok(_) => assert!(fits, "{pages}"),
            Err(MemoryError::Region { why: RegionError::SameMemory { .. }, .. }) => assert!(!fits, "{pages}"),
            Err(other) => panic!("{other:?}"),
        }
    }
}

/// What is behind the end of a file is SIGBUS, and to lseek a hole, which would be zeros.
#[test]
fn a_file_that_shrinks_is_an_error_that_names_the_region() {
    let mapped = Arc::new((Mapped::new(8, Backing::Anonymous), Mapped::new(8, Backing::MemoryFile)));
    let regions =
        vec![mapped.0.region(0, Backing::Anonymous, true), mapped.1.region(ABOVE, Backing::MemoryFile, true)];
    let ram = lend(regions, mapped.clone()).unwrap();
    ram.write(RamOffset(0), &[5; 16 * 4096]).unwrap();
    let file = mapped.1.file.as_ref().unwrap();
    file.set_len((MARGIN + 5) * PAGE_SIZE).unwrap();
    let all = Range::new(RamOffset(0), ram.size()).unwrap();
    let results = [
        ram.data_extents().map(drop),
        ram.scan(all, vfio_migration_memory::Holes::Possible).map(drop),
        ram.scan(all, vfio_migration_memory::Holes::Excluded).map(drop),
        ram.digest().map(drop),
        ram.zero(all),
        ram.clear(),
        ram.populate(),
    ];
    for (n, result) in results.into_iter().enumerate() {
        let error = result.unwrap_err();
        assert!(
            matches!(
                error,
                MemoryError::Region {
                    gpa: Gpa(ABOVE),
                    why: RegionError::FileTooSmall { size: 0x8000, needed: 0xb000 },
                    ..
                }
            ),
            "{n}: {error:?}"
        );
    }
    // Pieces are the kernel's to touch: EFAULT, and no signal.
    let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
    let last = Range::new(RamOffset(15 * PAGE_SIZE), PAGE_SIZE).unwrap();
    assert_eq!(ram.pieces(&[last]).unwrap().send(a.as_fd(), b""), Err(Errno::FAULT));
    // Grown again it is RAM again.
    file.set_len((8 + 2 * MARGIN) * PAGE_SIZE).unwrap();
    ram.digest().unwrap();
}

#[test]
fn a_region_that_was_lent_as_fresh_is_cleared_the_second_time() {
    for fresh in [true, false] {
        let mapped = Arc::new(Mapped::new(4, Backing::Anonymous));
        let region = LentRegion { fresh, ..mapped.region(0, Backing::Anonymous, false) };
        let ram = lend(vec![region], mapped.clone()).unwrap();
        // It was not, which shows whether it is taken at its word.
        ram.write(RamOffset(0), &[1]).unwrap();
        ram.clear().unwrap();
        assert_eq!(ram.is_zero(0), !fresh);
        ram.clear().unwrap();
        assert!(ram.is_zero(0));
    }
}

#[test]
fn the_lender_is_held_as_long_as_anybody_may_reach_its_memory() {
    let mapped = Arc::new(Mapped::new(4, Backing::Anonymous));
    let ram = Arc::new(lend(vec![mapped.region(0, Backing::Anonymous, false)], mapped.clone()).unwrap());
    let memory = ram.host_memory(RamOffset(0), PAGE_SIZE).unwrap();
    assert_eq!(memory.address(), mapped.host.addr().get() as u64);
    drop(ram);
    assert_eq!(Arc::strong_count(&mapped), 2);
    drop(memory);
    assert_eq!(Arc::strong_count(&mapped), 1);
}

#[test]
fn a_server_is_handed_what_the_guest_sees_and_nothing_else() {
    let kinds = [Backing::MemoryFile, Backing::Anonymous, Backing::Private, Backing::Undescribed];
    let mapped: Arc<Vec<_>> = Arc::new(kinds.iter().map(|backing| Mapped::new(4, *backing)).collect());
    let regions = (0..).zip(kinds).zip(mapped.iter());
    let regions = regions.map(|((n, backing), mapped)| mapped.region(n << 32, backing, false)).collect();
    let ram = lend(regions, mapped.clone()).unwrap();
    let region = |n: u64| RamOffset(n * 4 * PAGE_SIZE);
    assert_eq!(ram.regions()[2].kind, RamKind::PrivateFile);
    let (fd, offset) = ram.shared_file(RamOffset(PAGE_SIZE), 3 * PAGE_SIZE).unwrap();
    // The file's place is the lender's, and not the RAM offset.
    assert_eq!(offset, (MARGIN + 1) * PAGE_SIZE);
    assert!(ram.shared_file(RamOffset(PAGE_SIZE), 4 * PAGE_SIZE).is_none(), "two regions");
    assert_eq!(ram.offset_in_file(fd, offset, PAGE_SIZE).unwrap(), Some(RamOffset(PAGE_SIZE)));
    assert_eq!(ram.offset_in_file(fd, 0, MARGIN * PAGE_SIZE).unwrap(), None, "the margin is no RAM");
    for (offset, len) in [(0, MARGIN * PAGE_SIZE + 1), (offset, 4 * PAGE_SIZE), (0, u64::MAX)] {
        let error = ram.offset_in_file(fd, offset, len).unwrap_err();
        assert!(matches!(error, MemoryError::OutOfBounds { .. }), "{error:?}");
    }
    for (n, kind) in (0..).zip(kinds).skip(1) {
        assert!(ram.shared_file(region(n), PAGE_SIZE).is_none(), "{kind:?}");
    }
    let private = mapped[2].file.as_ref().unwrap();
    let error = ram.offset_in_file(private.as_fd(), MARGIN * PAGE_SIZE, PAGE_SIZE).unwrap_err();
    assert!(
        matches!(error, MemoryError::Region { gpa: Gpa(0x2_0000_0000), why: RegionError::PrivateFile, .. }),
        "{error:?}"
    );
    let other = tempfile::tempfile().unwrap();
    assert_eq!(ram.offset_in_file(other.as_fd(), 0, PAGE_SIZE).unwrap(), None);
}
