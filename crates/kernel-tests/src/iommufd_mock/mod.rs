//! The IOMMU's own dirty tracking, against iommufd's mock IOMMU: a kernel built with `CONFIG_IOMMUFD_TEST`. The kernel's
//! page tables and ioctls are the real ones; only the writes are made up.

pub(crate) mod table;
pub(crate) mod tracker;

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, open};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{Gpa, Iova, PAGE_SIZE, RamOffset, Range};
use vfio_migration_uapi::{
    Dma, Ioas, MOCK_PAGE, MOCK_START, MockDevice, MockKind, attach_mock_device, destroy, dirty_mock_pages,
    make_mock_device,
};

use crate::check::{Outcome, same};

const TRACKS: MockKind = MockKind { tracks: true, huge: false };
const DOES_NOT: MockKind = MockKind { tracks: false, huge: false };

fn iommufd() -> Outcome<Arc<OwnedFd>> {
    Ok(Arc::new(open(Path::new("/dev/iommu"), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?))
}

fn ram(len: u64) -> Outcome<Arc<GuestRam>> {
    Ok(Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len }])?))
}

/// Pages `first .. first + count` from the first address that the mock IOMMU translates.
fn pages(first: u64, count: u64) -> Outcome<Range<Iova>> {
    Ok(Range::new(Iova(MOCK_START.0 + first * PAGE_SIZE), count * PAGE_SIZE)?)
}

/// A device that writes to some `pages` of `iova`, to one half of each: the mock IOMMU has pages of half the size.
fn write(iommufd: BorrowedFd<'_>, table: u32, iova: Range<Iova>, pages: &BTreeSet<u64>) -> Outcome<u64> {
    let halves = PAGE_SIZE / MOCK_PAGE;
    let mut bits = vec![0; usize::try_from((iova.len() / MOCK_PAGE).div_ceil(64))?];
    for page in pages {
        let half = page * halves + page % halves;
        bits[usize::try_from(half / 64)?] |= 1u64 << (half % 64);
    }
    Ok(dirty_mock_pages(iommufd, table, iova, &bits)?)
}

/// About one in seven of `count` pages, others each time, the first and the last among them.
fn some(count: u64, seed: u64) -> BTreeSet<u64> {
    let mut state = seed;
    let mut step = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    (0..count).filter(|page| *page == 0 || *page + 1 == count || step().is_multiple_of(7)).collect()
}

/// A mock device attached to a table that tracks.
struct Rig {
    fd: Arc<OwnedFd>,
    space: Ioas,
    mock: MockDevice,
    table: u32,
}

impl Rig {
    fn new(kind: MockKind) -> Outcome<Self> {
        let fd = iommufd()?;
        let space = Ioas::new(fd.clone())?;
        let mock = make_mock_device(fd.as_fd(), kind, space.id())?;
        let table = space.make_tracking_table(mock.device)?;
        attach_mock_device(fd.as_fd(), mock, table)?;
        Ok(Self { fd, space, mock, table })
    }

    fn map(&self, ram: &Arc<GuestRam>, offset: u64, iova: Range<Iova>) -> Outcome {
        let memory = ram.host_memory(RamOffset(offset), iova.len())?;
        Ok(self.space.map(iova, &memory, Dma::BOTH)?)
    }

    fn write(&self, iova: Range<Iova>, pages: &BTreeSet<u64>) -> Outcome<u64> {
        write(self.fd.as_fd(), self.table, iova, pages)
    }

    /// Takes it apart, and looks whether the kernel complained about anything.
    fn done(self) -> Outcome {
        let Self { fd, space, mock, table } = self;
        destroy(fd.as_fd(), mock.object)?;
        destroy(fd.as_fd(), table)?;
        drop(space);
        no_warning()
    }
}

/// A warning of the kernel's taints it (`TAINT_WARN`).
fn no_warning() -> Outcome {
    let taints: u64 = fs::read_to_string("/proc/sys/kernel/tainted")?.trim().parse()?;
    same("warnings of the kernel", taints & (1 << 9), 0)
}
