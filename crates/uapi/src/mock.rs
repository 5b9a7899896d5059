//! The mock IOMMU of a kernel built with `CONFIG_IOMMUFD_TEST`, for tests: devices without hardware, whose page tables
//! really track, and pages made dirty by request.
//!
//! Facts are from `drivers/iommu/iommufd/iommufd_test.h` and `selftest.c`, as of Linux 6.12. It is no stable uAPI.

use std::os::fd::BorrowedFd;

use iommufd_bindings as uapi;
use rustix::ioctl::{Opcode, Updater, opcode};
use vfio_migration_types::{Iova, Range};

use crate::error::UapiError;
use crate::feature::argsz;

/// `IOMMU_TEST_CMD`: `_IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 32)`.
const TEST: Opcode = opcode::none(uapi::IOMMUFD_TYPE, 0xa0);

const OP_MOCK_DOMAIN_REPLACE: u32 = 10;
const OP_MOCK_DOMAIN_FLAGS: u32 = 12;
const OP_DIRTY: u32 = 13;
const DEVICE_NO_DIRTY: u32 = 1;
const DEVICE_HUGE_IOVA: u32 = 2;

/// First address that the mock IOMMU translates: `MOCK_APERTURE_START`. The last is 2 GiB less one.
pub const MOCK_START: Iova = Iova(1 << 24);
/// Bytes of its pages: `MOCK_IO_PAGE_SIZE`, half of one of the processor's.
pub const MOCK_PAGE: u64 = 2048;
/// Bytes of its huge pages: `MOCK_HUGE_PAGE_SIZE`.
pub const MOCK_HUGE_PAGE: u64 = 512 * MOCK_PAGE;
/// Kind of the mock in [`HwInfo`](crate::HwInfo): `IOMMU_HW_INFO_TYPE_SELFTEST`.
pub const MOCK_KIND: u32 = 0xfeed_beef;

/// Abilities of the mock IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MockKind {
    /// The mock tracks dirty pages.
    pub tracks: bool,
    /// The mock has huge pages.
    pub huge: bool,
}

/// A mock device, attached. Destroying `object` removes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MockDevice {
    /// The test object that holds it.
    pub object: u32,
    /// The page table that it was attached to at first.
    pub table: u32,
    /// Id of the mock as a device of the iommufd.
    pub device: u32,
}

/// Makes a mock device, bound to `iommufd` and attached to the address space or page table `to`.
///
/// # Errors
/// ENOTTY from a kernel without the mock; EINVAL for a page table that tracks and a device that cannot.
pub fn make_mock_device(iommufd: BorrowedFd<'_>, kind: MockKind, to: u32) -> Result<MockDevice, UapiError> {
    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    let flags = flag(!kind.tracks, DEVICE_NO_DIRTY) | flag(kind.huge, DEVICE_HUGE_IOVA);
    let mut command = Command::new(OP_MOCK_DOMAIN_FLAGS, to);
    command.words[1] = u64::from(flags) << 32;
    call(iommufd, &mut command, "making a mock device")?;
    let [first, second, ..] = command.words;
    Ok(MockDevice { object: low(first), table: high(first), device: low(second) })
}

/// Attaches a mock device to another page table or address space.
pub fn attach_mock_device(iommufd: BorrowedFd<'_>, device: MockDevice, to: u32) -> Result<(), UapiError> {
    let mut command = Command::new(OP_MOCK_DOMAIN_REPLACE, device.object);
    command.words[0] = u64::from(to);
    call(iommufd, &mut command, "attaching a mock device")
}

/// Makes pages of page table `table` dirty, as a device does that writes: bit `n` of `bits` is the mock page `n` from
/// the start of `iova`. Gives how many of them were mapped, and are dirty now.
///
/// # Errors
/// EINVAL while the table does not track.
pub fn dirty_mock_pages(
    iommufd: BorrowedFd<'_>,
    table: u32,
    iova: Range<Iova>,
    bits: &[u64],
) -> Result<u64, UapiError> {
    let needed = iova.len().div_ceil(MOCK_PAGE).div_ceil(64);
    if (bits.len() as u64) < needed {
        return Err(UapiError::BitmapTooSmall { words: bits.len(), needed });
    }
    let mut command = Command::new(OP_DIRTY, table);
    // `flags`, of which there are none, and padding take the first word.
    let bits = bits.as_ptr().expose_provenance() as u64;
    command.words = [0, iova.start().0, iova.len(), MOCK_PAGE, bits, 0];
    call(iommufd, &mut command, "making pages of the mock IOMMU dirty")?;
    Ok(command.words[5])
}

/// `struct iommu_test_cmd`: what stands in the words depends on the operation.
#[repr(C)]
struct Command {
    size: u32,
    op: u32,
    id: u32,
    reserved: u32,
    words: [u64; 6],
    last: u32,
    padding: u32,
}

impl Command {
    fn new(op: u32, id: u32) -> Self {
        let size = const { argsz(size_of::<Self>()) };
        Self { size, op, id, reserved: 0, words: [0; 6], last: 0, padding: 0 }
    }
}

fn call(iommufd: BorrowedFd<'_>, command: &mut Command, doing: &'static str) -> Result<(), UapiError> {
    // SAFETY: this ioctl's structure; the operations above name no memory but the bits of OP_DIRTY, which the kernel
    // only reads, during the call, and which were checked to be as many as it reads.
    unsafe { rustix::ioctl::ioctl(iommufd, Updater::<TEST, Command>::new(command)) }
        .map_err(|source| UapiError::System { doing, source })
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half of a word")]
fn low(word: u64) -> u32 {
    word as u32
}

fn high(word: u64) -> u32 {
    low(word >> 32)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_command_is_laid_out_as_the_kernels() {
        assert_eq!((TEST, size_of::<Command>()), (0x3ba0, 72));
        assert_eq!(std::mem::offset_of!(Command, words), 16);
        assert_eq!(std::mem::offset_of!(Command, last), 64);
    }

    #[test]
    fn a_descriptor_of_something_else_and_too_few_bits_are_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        let kind = MockKind { tracks: true, huge: false };
        let refused = make_mock_device(null.as_fd(), kind, 1).unwrap_err();
        assert_eq!(refused.errno(), Some(rustix::io::Errno::NOTTY));
        let range = Range::new(MOCK_START, 65 * MOCK_PAGE).unwrap();
        let refused = dirty_mock_pages(null.as_fd(), 1, range, &[0]).unwrap_err();
        assert!(matches!(refused, UapiError::BitmapTooSmall { words: 1, needed: 2 }), "{refused}");
        assert!(dirty_mock_pages(null.as_fd(), 1, range, &[0; 2]).unwrap_err().errno().is_some());
    }
}
