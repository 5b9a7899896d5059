//! The ioctls of a page table that tracks, one by one.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vfio_migration_memory::Mapping;
use vfio_migration_types::{Bitmap, Granule, Iova, PAGE_SIZE, Range};
use vfio_migration_uapi::{
    Dma, Ioas, MOCK_HUGE_PAGE, MOCK_KIND, MOCK_START, MockKind, UapiError, attach_mock_device, destroy,
    hw_info, iommu_dirty, make_mock_device, set_dirty_tracking,
};

use super::{DOES_NOT, Rig, TRACKS, iommufd, no_warning, pages, ram, some};
use crate::check::{Outcome, holds, same};

const CLEAR: bool = false;
const KEEP: bool = true;

impl Rig {
    fn track(&self, on: bool) -> Outcome {
        Ok(set_dirty_tracking(self.fd.as_fd(), self.table, on)?)
    }

    /// Which pages of `iova`, counted from its start, are dirty.
    fn dirty(&self, iova: Range<Iova>, granule: Granule, keep: bool) -> Outcome<BTreeSet<u64>> {
        let mut bits = Bitmap::new(iova.len(), granule);
        let mut words = bits.words().to_vec();
        iommu_dirty(self.fd.as_fd(), self.table, iova, granule, &mut words, keep)?;
        bits.or_words(0, &words);
        Ok((0..bits.len()).filter(|page| bits.test(*page)).collect())
    }
}

fn errno(result: Result<(), UapiError>) -> Option<Errno> {
    result.err().and_then(|error| error.errno())
}

/// GET_HW_INFO tells an IOMMU that tracks from one that does not, and what follows from it does follow.
pub(crate) fn capability() -> Outcome {
    let fd = iommufd()?;
    let space = Ioas::new(fd.clone())?;
    let able = make_mock_device(fd.as_fd(), TRACKS, space.id())?;
    let unable = make_mock_device(fd.as_fd(), DOES_NOT, space.id())?;
    for (mock, tracks) in [(able, true), (unable, false)] {
        let info = hw_info(fd.as_fd(), mock.device)?;
        same("kind and capability", (info.kind, info.dirty_tracking), (MOCK_KIND, tracks))?;
    }
    let refused = space.make_tracking_table(unable.device).map(drop);
    same("a table that tracks, for an IOMMU that does not", errno(refused), Some(Errno::OPNOTSUPP))?;
    let table = space.make_tracking_table(able.device)?;
    let refused = attach_mock_device(fd.as_fd(), unable, table);
    same("its device at the other's table", errno(refused), Some(Errno::INVAL))?;

    // The table that attaching to the address space made tracks nothing, and says so.
    let (range, mut bits) = (pages(0, 1)?, [0]);
    let refused = set_dirty_tracking(fd.as_fd(), able.table, true);
    same("tracking in the kernel's own table", errno(refused), Some(Errno::OPNOTSUPP))?;
    let refused = iommu_dirty(fd.as_fd(), able.table, range, Granule::PAGE, &mut bits, CLEAR);
    same("a report of it", errno(refused), Some(Errno::OPNOTSUPP))?;
    for id in [able.object, unable.object, table] {
        destroy(fd.as_fd(), id)?;
    }
    no_warning()
}

pub(crate) fn exact() -> Outcome {
    const PAGES: u64 = 4096;
    let rig = Rig::new(TRACKS)?;
    let (ram, range, written) = (ram(PAGES * PAGE_SIZE)?, pages(0, PAGES)?, some(PAGES, 1));
    rig.map(&ram, 0, range)?;
    same("written before the start", errno_of(rig.write(range, &written)), Some(Errno::INVAL))?;
    rig.track(true)?;
    holds(rig.dirty(range, Granule::PAGE, CLEAR)?.is_empty(), "clean at the start")?;
    same("written", rig.write(range, &written)?, written.len() as u64)?;
    // Kept, they are there the next time; cleared, they are not.
    for keep in [KEEP, KEEP, CLEAR] {
        same("dirty pages", rig.dirty(range, Granule::PAGE, keep)? == written, true)?;
    }
    holds(rig.dirty(range, Granule::PAGE, CLEAR)?.is_empty(), "cleared")?;

    // A report sets bits and clears none.
    let mut words = vec![1 << 5; usize::try_from(PAGES / 64)?];
    rig.write(range, &[64].into())?;
    iommu_dirty(rig.fd.as_fd(), rig.table, range, Granule::PAGE, &mut words, CLEAR)?;
    same("set before, and dirty", (words[0], words[1]), (1 << 5, 1 << 5 | 1))?;

    // A table that does not track answers with success, and nothing: the kernel does not pass on what the driver says.
    rig.write(range, &written)?;
    rig.track(false)?;
    holds(rig.dirty(range, Granule::PAGE, CLEAR)?.is_empty(), "a report without tracking is of nothing")?;
    rig.done()
}

/// Bits count from the start of the range asked for, wherever it is, and pages may be of any size.
pub(crate) fn ranges_and_sizes() -> Outcome {
    const PAGES: u64 = 1024;
    let rig = Rig::new(TRACKS)?;
    let (ram, all, written) = (ram(PAGES * PAGE_SIZE)?, pages(0, PAGES)?, some(PAGES, 2));
    rig.map(&ram, 0, all)?;
    rig.track(true)?;
    rig.write(all, &written)?;
    for (first, count) in [(0, 1), (3, 70), (63, 2), (65, 127), (PAGES - 3, 3), (1, PAGES - 2)] {
        let wanted: BTreeSet<u64> = written.range(first..first + count).map(|page| page - first).collect();
        let found = rig.dirty(pages(first, count)?, Granule::PAGE, KEEP)?;
        holds(found == wanted, &format!("exact in {count} pages from page {first}"))?;
    }
    for size in [8 << 10, 64 << 10, 2 << 20] {
        let wanted: BTreeSet<u64> = written.iter().map(|page| page * PAGE_SIZE / size).collect();
        holds(rig.dirty(all, Granule::new(size)?, KEEP)? == wanted, &format!("exact in pages of {size}"))?;
    }
    let half = Range::new(Iova(MOCK_START.0 + PAGE_SIZE), PAGE_SIZE)?;
    let refused = iommu_dirty(rig.fd.as_fd(), rig.table, half, Granule::new(2 * PAGE_SIZE)?, &mut [0], CLEAR);
    holds(matches!(refused, Err(UapiError::Misaligned { .. })), "half a page is refused")?;

    // A part that is read is cleared by itself.
    let part = pages(100, 200)?;
    rig.dirty(part, Granule::PAGE, CLEAR)?;
    let wanted: BTreeSet<u64> = written.into_iter().filter(|page| !(100..300).contains(page)).collect();
    holds(rig.dirty(all, Granule::PAGE, CLEAR)? == wanted, "the rest is dirty still")?;
    rig.done()
}

/// Over a hole the kernel stops, and calls it a success: why each mapping is asked for by itself.
pub(crate) fn holes() -> Outcome {
    let rig = Rig::new(TRACKS)?;
    let ram = ram(30 * PAGE_SIZE)?;
    let (first, second, third) = (pages(0, 10)?, pages(10, 10)?, pages(40, 10)?);
    for (number, range) in [first, second, third].into_iter().enumerate() {
        rig.map(&ram, number as u64 * 10 * PAGE_SIZE, range)?;
    }
    rig.track(true)?;
    let all = pages(0, 50)?;
    let written = BTreeSet::from([2, 9, 10, 15, 40, 49]);
    same("written, of which two where nothing is", rig.write(all, &(&written | &[20, 30].into()))?, 6)?;
    let up_to_the_hole = BTreeSet::from([2, 9, 10, 15]);
    same("what lies together", rig.dirty(pages(0, 20)?, Granule::PAGE, KEEP)?, up_to_the_hole.clone())?;
    same("across the hole, without an error", rig.dirty(all, Granule::PAGE, KEEP)?, up_to_the_hole)?;
    same("the first", rig.dirty(first, Granule::PAGE, CLEAR)?, [2, 9].into())?;
    same("the second", rig.dirty(second, Granule::PAGE, CLEAR)?, [0, 5].into())?;
    same("the third", rig.dirty(third, Granule::PAGE, CLEAR)?, [0, 9].into())?;
    rig.done()
}

/// Beginning again and unmapping both lose what was tracked.
pub(crate) fn what_loses_bits() -> Outcome {
    let rig = Rig::new(TRACKS)?;
    let (ram, range, written) = (ram(64 * PAGE_SIZE)?, pages(0, 64)?, some(64, 3));
    rig.map(&ram, 0, range)?;
    rig.track(true)?;
    rig.write(range, &written)?;
    rig.track(true)?;
    holds(rig.dirty(range, Granule::PAGE, KEEP)?.is_empty(), "begun twice, it has forgotten")?;

    rig.write(range, &written)?;
    rig.track(false)?;
    rig.track(true)?;
    holds(rig.dirty(range, Granule::PAGE, KEEP)?.is_empty(), "begun anew, it is clean")?;

    rig.write(range, &written)?;
    holds(rig.dirty(range, Granule::PAGE, KEEP)? == written, "read before it is unmapped")?;
    rig.space.unmap(range)?;
    holds(rig.dirty(range, Granule::PAGE, CLEAR)?.is_empty(), "unmapped, it is nothing and no error")?;
    rig.map(&ram, 0, range)?;
    holds(rig.dirty(range, Granule::PAGE, CLEAR)?.is_empty(), "mapped again, it is clean")?;
    rig.write(range, &written)?;
    holds(rig.dirty(range, Granule::PAGE, CLEAR)? == written, "and tracked")?;
    rig.done()
}

/// One write dirties all of a huge page of the IOMMU's, and it is reported page by page.
pub(crate) fn huge_pages() -> Outcome {
    const LEN: u64 = 4 << 20;
    const EACH: u64 = MOCK_HUGE_PAGE / PAGE_SIZE;
    fs::write("/proc/sys/vm/nr_hugepages", "2")?;
    let file = memfd_create("ktest", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
    ftruncate(&file, LEN)?;
    let memory = Arc::new(Mapping::new(file.as_fd(), 0, LEN, true)?).host_memory();
    let rig = Rig::new(MockKind { huge: true, ..TRACKS })?;
    let range = Range::new(MOCK_START, LEN)?;
    rig.space.map(range, &memory, Dma::BOTH)?;
    rig.track(true)?;
    same("written", rig.write(range, &[EACH + 7].into())?, 1)?;
    let wanted: BTreeSet<u64> = (EACH..2 * EACH).collect();
    holds(rig.dirty(range, Granule::PAGE, KEEP)? == wanted, "all of the huge page")?;
    same("in its own size", rig.dirty(range, Granule::new(MOCK_HUGE_PAGE)?, KEEP)?, [1].into())?;
    // The kernel reports a huge page to its end, which is behind the end of this range and of its bits.
    let (part, mut words) = (pages(EACH + 100, 10)?, [0; 4]);
    iommu_dirty(rig.fd.as_fd(), rig.table, part, Granule::PAGE, &mut words, CLEAR)?;
    same("a part of it, and not what lies behind", words, [0x3ff, 0, 0, 0])?;
    // Why all of a mapping is asked for: the kernel has forgotten all of the huge page.
    holds(rig.dirty(range, Granule::PAGE, KEEP)?.is_empty(), "a part that is cleared takes the rest along")?;
    rig.done()
}

fn errno_of<T>(result: Outcome<T>) -> Option<Errno> {
    result.err()?.downcast_ref::<UapiError>()?.errno()
}
