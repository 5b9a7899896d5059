//! RAM that a VMM keeps in vm-memory.

use std::sync::Arc;

use ::vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use ::vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, mmap::MmapRegionBuilder,
};
use proptest::prelude::*;
use vfio_migration_memory::{AtomicBitmapLog, DirtySource, GuestRam, MemoryError, RamKind, RegionError};
use vfio_migration_types::{Bitmap, Gpa, Granule, PAGE_SIZE, RamOffset};

const ABOVE: u64 = 4 << 30;
const PAGES: u64 = 40;
const READ_WRITE: i32 = 3;
const READ: i32 = 1;
const SHARED: i32 = 1;
const PRIVATE: i32 = 2;
const ANONYMOUS: i32 = 0x20;

fn file(pages: u64) -> FileOffset {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages * PAGE_SIZE).unwrap();
    FileOffset::new(file, PAGE_SIZE)
}

fn region(gpa: u64, file: Option<FileOffset>, prot: i32, flags: i32) -> GuestRegionMmap<AtomicBitmap> {
    let size = usize::try_from(PAGES * PAGE_SIZE).unwrap();
    let builder = MmapRegionBuilder::new_with_bitmap(size, AtomicBitmap::with_len(size))
        .with_mmap_prot(prot)
        .with_mmap_flags(flags);
    let builder = match file {
        Some(file) => builder.with_file_offset(file),
        None => builder,
    };
    GuestRegionMmap::new(builder.build().unwrap(), GuestAddress(gpa)).unwrap()
}

/// A region of each kind: shared file, private anonymous memory, private file, shared anonymous memory.
fn mixed() -> GuestMemoryMmap<AtomicBitmap> {
    let regions = vec![
        region(0, Some(file(PAGES + 1)), READ_WRITE, SHARED),
        region(ABOVE, None, READ_WRITE, PRIVATE | ANONYMOUS),
        region(2 * ABOVE, Some(file(PAGES + 1)), READ_WRITE, PRIVATE),
        region(3 * ABOVE, None, READ_WRITE, SHARED | ANONYMOUS),
    ];
    GuestMemoryMmap::from_regions(regions).unwrap()
}

#[test]
fn it_is_the_same_memory() {
    let memory = mixed();
    let ram = GuestRam::try_from(&memory).unwrap();
    let kinds: Vec<_> = ram.regions().iter().map(|region| region.kind).collect();
    let expected =
        [RamKind::SharedFile, RamKind::PrivateAnonymous, RamKind::PrivateFile, RamKind::SharedFile];
    assert_eq!(kinds, expected);
    for (n, region) in (1u8..).zip(ram.regions()) {
        memory.write_obj(n, GuestAddress(region.gpa.0 + 5)).unwrap();
        ram.write(RamOffset(region.offset.0 + 6), &[n + 100]).unwrap();
        let mut back = [0];
        ram.read(RamOffset(region.offset.0 + 5), &mut back).unwrap();
        assert_eq!(back, [n]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(region.gpa.0 + 6)).unwrap(), n + 100);
    }
    // Only a file that another process would see the guest in, and from its own place on.
    let shared: Vec<_> =
        ram.regions().iter().map(|region| ram.shared_file(region.offset, region.len)).collect();
    assert!(matches!(shared[..], [Some((_, PAGE_SIZE)), None, None, None]), "{shared:?}");
    // It outlives whoever lent it.
    drop(memory);
    ram.digest().unwrap();
    ram.clear().unwrap();
    assert!((0..4 * PAGES).all(|page| ram.is_zero(page)));
}

#[test]
fn what_is_no_ram_is_refused_by_its_address() {
    let refused = |region: GuestRegionMmap<AtomicBitmap>| {
        let memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        match GuestRam::try_from(&memory).unwrap_err() {
            MemoryError::Region { gpa: Gpa(ABOVE), why, .. } => why,
            other => panic!("{other:?}"),
        }
    };
    let why = refused(region(ABOVE, None, READ, PRIVATE | ANONYMOUS));
    assert!(matches!(why, RegionError::Protection), "{why:?}");
    let shrunk = file(PAGES + 1);
    let why = region(ABOVE, Some(shrunk.clone()), READ_WRITE, SHARED);
    shrunk.file().set_len(PAGES * PAGE_SIZE).unwrap();
    let why = refused(why);
    assert!(matches!(why, RegionError::FileTooSmall { .. }), "{why:?}");
    let odd = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x400)]).unwrap();
    let error = GuestRam::try_from(&odd).unwrap_err();
    assert!(matches!(error, MemoryError::Layout(_)), "{error:?}");
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    GuestRam::try_from(&memory).unwrap();
}

#[test]
fn a_log_runs_from_its_start_to_its_end() {
    let memory = mixed();
    let log = AtomicBitmapLog::new("vmm", &memory).unwrap();
    let mut bits = Bitmap::new(4 * PAGES * PAGE_SIZE, Granule::PAGE);
    memory.write_obj(1u8, GuestAddress(0)).unwrap();
    assert!(matches!(log.report(&mut bits), Err(MemoryError::NotLogging { .. })));
    log.start().unwrap();
    assert!(matches!(log.start(), Err(MemoryError::AlreadyLogging { .. })));
    log.report(&mut bits).unwrap();
    assert!(!bits.any(), "written before the start");
    memory.write_obj(1u8, GuestAddress(3 * ABOVE + 2 * PAGE_SIZE)).unwrap();
    log.report(&mut bits).unwrap();
    assert!(bits.test(3 * PAGES + 2) && bits.count() == 1, "RAM offsets, not guest addresses");
    log.stop().unwrap();
    log.stop().unwrap();
}

#[test]
fn bits_of_larger_pages_are_reported_whole() {
    let size = usize::try_from(PAGES * PAGE_SIZE).unwrap();
    let with = |page: usize| {
        let bitmap = AtomicBitmap::new(size, page.try_into().unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap)
            .with_mmap_prot(READ_WRITE)
            .with_mmap_flags(PRIVATE | ANONYMOUS)
            .build();
        let region = GuestRegionMmap::new(mapping.unwrap(), GuestAddress(0)).unwrap();
        GuestMemoryMmap::from_regions(vec![region]).unwrap()
    };
    for (page, first, count) in [(4096, 17, 1), (1 << 14, 16, 4), (1 << 16, 16, 16), (1 << 30, 0, 40)] {
        let memory = with(page);
        let log = AtomicBitmapLog::new("vmm", &memory).unwrap();
        log.start().unwrap();
        memory.write_obj(1u8, GuestAddress(17 * PAGE_SIZE)).unwrap();
        let mut bits = Bitmap::new(PAGES * PAGE_SIZE, Granule::PAGE);
        log.report(&mut bits).unwrap();
        assert_eq!(bits.count(), count, "{page}");
        assert!((first..first + count).all(|page| bits.test(page)), "{page}");
    }
    for page in [5000, 3 * 4096, 512] {
        let error = AtomicBitmapLog::new("vmm", &with(page)).unwrap_err();
        assert!(matches!(error, MemoryError::Region { why: RegionError::BitmapPages, .. }), "{error:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// What is written by vm-memory is in the log, and copying what the log names makes the two memories the same.
    #[test]
    fn copying_what_the_log_names_copies_all(
        writes in proptest::collection::vec((0u64..4, 0u64..PAGES * PAGE_SIZE - 9000, 1usize..9000, any::<u8>()), 0..20),
    ) {
        let memory = mixed();
        let ram = GuestRam::try_from(&memory).unwrap();
        let log = AtomicBitmapLog::new("vmm", &memory).unwrap();
        let copy = Arc::new(GuestRam::try_from(&mixed()).unwrap());
        log.start().unwrap();
        for (region, at, len, byte) in writes {
            memory.write_slice(&vec![byte; len], GuestAddress(region * ABOVE + at)).unwrap();
        }
        let mut bits = Bitmap::new(ram.size(), Granule::PAGE);
        log.report(&mut bits).unwrap();
        let mut page = vec![0; usize::try_from(PAGE_SIZE).unwrap()];
        for at in bits.runs().flat_map(|run| run.first..run.first + run.count) {
            ram.read(RamOffset(at * PAGE_SIZE), &mut page).unwrap();
            copy.write(RamOffset(at * PAGE_SIZE), &page).unwrap();
        }
        prop_assert_eq!(ram.digest().unwrap(), copy.digest().unwrap());
    }
}
