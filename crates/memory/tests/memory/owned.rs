//! RAM that this library allocates: huge pages, NUMA nodes, population.

use rustix::io::Errno;
use vfio_migration_memory::{GuestRam, MemoryError, OwnedRegion, RamPageSize, RamSpec};
use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset, Range, error_chain};

fn region(gpa: u64, len: u64) -> OwnedRegion {
    RamSpec { gpa: Gpa(gpa), len }.into()
}

#[test]
fn regions_are_files_of_their_own() {
    let regions = [region(0, 4 * PAGE_SIZE), region(4 << 30, 8 * PAGE_SIZE)];
    let ram = GuestRam::owned("test", &regions).unwrap();
    let second = ram.regions()[1];
    assert_eq!(second.offset, RamOffset(4 * PAGE_SIZE));
    let (_, offset) = ram.shared_file(second.offset, second.len).unwrap();
    assert_eq!(offset, 0, "a RAM offset is no file offset");
    assert!(ram.shared_file(RamOffset(0), 5 * PAGE_SIZE).is_none());
    // Accesses go on where one region ends.
    ram.write(RamOffset(4 * PAGE_SIZE - 3), b"across").unwrap();
    let mut back = [0; 6];
    ram.read(RamOffset(4 * PAGE_SIZE - 3), &mut back).unwrap();
    assert_eq!(&back, b"across");
    let extents = ram.data_extents().unwrap();
    assert_eq!(extents, [Range::new(RamOffset(3 * PAGE_SIZE), 2 * PAGE_SIZE).unwrap()], "one extent");
}

#[test]
fn a_populated_region_is_data() {
    let regions = [OwnedRegion { populate: true, ..region(0, 16 * PAGE_SIZE) }, region(4 << 30, PAGE_SIZE)];
    let ram = GuestRam::owned("test", &regions).unwrap();
    assert_eq!(ram.data_extents().unwrap(), [Range::new(RamOffset(0), 16 * PAGE_SIZE).unwrap()]);
}

#[test]
fn a_node_that_there_is_not_is_named() {
    for node in [777, 1024, u32::MAX] {
        let region = OwnedRegion { numa_node: Some(node), ..region(0, PAGE_SIZE) };
        let error = GuestRam::owned("test", &[region]).unwrap_err();
        assert!(error_chain(&error).contains(&format!("NUMA node {node} ")), "{error}");
        assert!(matches!(error.errno(), Some(Errno::INVAL | Errno::NOSYS)), "{error:?}");
    }
    // The control: the first node, of which a kernel without NUMA does not know.
    let region = OwnedRegion { numa_node: Some(0), populate: true, ..region(0, 16 * PAGE_SIZE) };
    match GuestRam::owned("test", &[region]) {
        Ok(ram) => ram.write(RamOffset(0), &[1]).unwrap(),
        Err(error) => assert_eq!(error.errno(), Some(Errno::NOSYS), "{error:?}"),
    }
}

/// Where the host has set huge pages aside they are RAM; everywhere else they are refused in words, before anything is
/// touched.
#[test]
fn huge_pages_are_set_aside_or_refused() {
    const HUGE: u64 = 2 << 20;
    let odd = OwnedRegion { page_size: RamPageSize::Size2M, ..region(0, HUGE + PAGE_SIZE) };
    let error = GuestRam::owned("test", &[odd]).unwrap_err();
    assert!(matches!(error, MemoryError::Layout(_)), "{error:?}");
    // More than any host has.
    let much = OwnedRegion { page_size: RamPageSize::Size2M, ..region(0, 1 << 50) };
    let error = GuestRam::owned("test", &[much]).unwrap_err();
    let text = error_chain(&error);
    assert!(
        text.contains("huge pages")
            || matches!(error.errno(), Some(Errno::NODEV | Errno::NOSYS | Errno::INVAL)),
        "{text}"
    );

    let punch_holes = true;
    let few = OwnedRegion { page_size: RamPageSize::Size2M, punch_holes, ..region(0, 3 * HUGE) };
    let Ok(ram) = GuestRam::owned("test", &[few]) else {
        println!("no huge pages here");
        return;
    };
    let pages = |first: u64, count: u64| Range::new(RamOffset(first * PAGE_SIZE), count * PAGE_SIZE).unwrap();
    for page in 0..1536 {
        ram.write_u64(RamOffset(page * PAGE_SIZE), page + 1).unwrap();
    }
    // Parts of the first and the last huge page, and the whole of the second.
    ram.zero(pages(500, 600)).unwrap();
    for page in 0..1536 {
        assert_eq!(ram.is_zero(page), (500..1100).contains(&page), "{page}");
    }
}
