//! Mappings of files that others made.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::io::Errno;
use vfio_migration_memory::{GuestRam, Mapping, MemoryError, RamSpec};
use vfio_migration_types::{Gpa, RamOffset};

fn file(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

#[test]
fn two_mappings_of_a_file_are_one_memory() {
    let ram = GuestRam::new("test", &[RamSpec { gpa: Gpa(0), len: 1 << 20 }]).unwrap();
    let (fd, offset) = ram.shared_file(RamOffset(8192), 4096).unwrap();
    let mapping = Mapping::new(fd, offset, 4096, true).unwrap();
    ram.write_u64(RamOffset(8192 + 8), 0x1122_3344_5566_7788).unwrap();
    assert_eq!(mapping.read_u64(8).unwrap(), 0x1122_3344_5566_7788);
    mapping.write_u32(16, 9).unwrap();
    mapping.write_u64(24, 10).unwrap();
    mapping.write(35, b"abc").unwrap();
    assert_eq!(mapping.read_u32(16).unwrap(), 9);
    assert_eq!(ram.read_u64(RamOffset(8192 + 24)).unwrap(), 10);
    let mut text = [0; 3];
    ram.read(RamOffset(8192 + 35), &mut text).unwrap();
    assert_eq!(&text, b"abc");
    assert!(!mapping.can_shrink(), "guest RAM is sealed");
}

#[test]
fn an_offset_inside_a_page_is_minded() {
    let file = file(8192);
    let whole = Mapping::new(file.as_fd(), 0, 8192, true).unwrap();
    whole.write(4000, &[5; 200]).unwrap();
    let part = Mapping::new(file.as_fd(), 4000, 200, false).unwrap();
    assert_eq!(part.len(), 200);
    let mut bytes = [0; 200];
    part.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [5; 200]);
    assert!(matches!(part.read(1, &mut bytes), Err(MemoryError::OutOfBounds { size: 200, .. })));
    assert_eq!(part.host_address().addr().get() % 4096, 4000);
    assert!(part.can_shrink(), "a plain file is not sealed");
}

#[test]
fn a_file_that_ends_too_early_is_refused() {
    let file = file(5000);
    for (offset, len) in [(0, 5001), (4096, 905), (5000, 1), (1 << 40, 1)] {
        let error = Mapping::new(file.as_fd(), offset, len, true).unwrap_err();
        assert!(matches!(error, MemoryError::FileTooSmall { size: 5000, .. }), "{error:?}");
    }
    for (offset, len) in [(0, 0), (1, u64::MAX), (u64::MAX, u64::MAX), (0, 1 << 63)] {
        let error = Mapping::new(file.as_fd(), offset, len, true).unwrap_err();
        assert!(matches!(error, MemoryError::OutOfBounds { .. }), "{error:?}");
    }
    // The last byte that there is can be read: the control for SIGBUS.
    let all = Mapping::new(file.as_fd(), 0, 5000, true).unwrap();
    all.read(4999, &mut [0]).unwrap();
}

#[test]
fn every_access_is_checked() {
    let file = file(4096);
    let mapping = Mapping::new(file.as_fd(), 0, 4096, true).unwrap();
    for offset in [4096, 4093, u64::MAX, u64::MAX - 3] {
        assert!(matches!(mapping.read_u32(offset), Err(MemoryError::OutOfBounds { .. })), "{offset}");
        assert!(matches!(mapping.write_u64(offset, 1), Err(MemoryError::OutOfBounds { .. })), "{offset}");
        assert!(mapping.write(offset, &[0; 4]).is_err() && mapping.read(offset, &mut [0; 4]).is_err());
    }
    assert!(matches!(mapping.read_u32(2), Err(MemoryError::Misaligned { align: 4, .. })));
    assert!(matches!(mapping.write_u64(4, 0), Err(MemoryError::Misaligned { align: 8, .. })));
    let reader = Mapping::new(file.as_fd(), 0, 4096, false).unwrap();
    assert!(!reader.is_writable() && mapping.is_writable());
    assert!(matches!(reader.write_u32(0, 1), Err(MemoryError::ReadOnly)));
    assert!(matches!(reader.write_u64(0, 1), Err(MemoryError::ReadOnly)));
    assert!(matches!(reader.write(0, &[1]), Err(MemoryError::ReadOnly)));
}

#[test]
fn what_cannot_be_mapped_keeps_its_errno() {
    let (pipe, _end) = rustix::pipe::pipe().unwrap();
    let error = Mapping::new(pipe.as_fd(), 0, 4096, false).unwrap_err();
    assert!(matches!(error, MemoryError::System { source: Errno::NODEV, .. }), "{error:?}");
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(4096).unwrap();
    let read_only = File::open(path.path()).unwrap();
    let error = Mapping::new(read_only.as_fd(), 0, 4096, true).unwrap_err();
    assert!(matches!(error, MemoryError::System { source: Errno::ACCESS, .. }), "{error:?}");
    Mapping::new(read_only.as_fd(), 0, 4096, false).unwrap();
}
