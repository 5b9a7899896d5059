//! The tracker that a kernel device gets whose IOMMU tracks dirty pages.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vfio_migration_device::{BareSpace, DirtyLog, TrackerKind};
use vfio_migration_memory::{GuestRam, MemoryError};
use vfio_migration_types::{Bitmap, DeviceId, Granule, Iova, PAGE_SIZE, RamOffset, Range};
use vfio_migration_uapi::{MockDevice, MockKind, attach_mock_device, destroy, make_mock_device};

use super::{DOES_NOT, TRACKS, iommufd, no_warning, pages, ram, some, write};
use crate::check::{Outcome, holds, same};

/// A space with a device in it, as a VMM's, and the RAM that is mapped.
struct Guest {
    fd: Arc<OwnedFd>,
    mock: MockDevice,
    space: BareSpace,
    table: Result<u32, String>,
    ram: Arc<GuestRam>,
}

impl Guest {
    fn new(kind: MockKind, ram_pages: u64) -> Outcome<Self> {
        let fd = iommufd()?;
        let mut space = BareSpace::new(DeviceId::new("t0")?, fd.clone())?;
        let mock = make_mock_device(fd.as_fd(), kind, space.id())?;
        let table = space.make_table(mock.device);
        if let Ok(table) = table {
            attach_mock_device(fd.as_fd(), mock, table)?;
        }
        Ok(Self { fd, mock, space, table, ram: ram(ram_pages * PAGE_SIZE)? })
    }

    fn map(&self, iova: Range<Iova>, ram_page: u64) -> Outcome {
        let offset = RamOffset(ram_page * PAGE_SIZE);
        let memory = self.ram.host_memory(offset, iova.len())?;
        Ok(self.space.map(iova, &memory, offset)?)
    }

    fn write(&self, iova: Range<Iova>, pages: &BTreeSet<u64>) -> Outcome {
        let wrote = write(self.fd.as_fd(), self.table.clone()?, iova, pages)?;
        same("written", wrote, pages.len() as u64)
    }

    fn log(&self) -> Outcome<Box<dyn DirtyLog>> {
        let (choice, log) = self.space.tracker();
        same("tracker", choice.kind, TrackerKind::Iommufd)?;
        holds(choice.why.contains("the IOMMU logs the device's DMA writes"), &choice.why)?;
        Ok(log.ok_or("a tracker without a log")?)
    }

    /// Pages of RAM that the log names.
    fn dirty(&self, log: &dyn DirtyLog) -> Outcome<BTreeSet<u64>> {
        let mut bits = Bitmap::new(self.ram.size(), Granule::PAGE);
        log.report(&mut bits)?;
        Ok((0..bits.len()).filter(|page| bits.test(*page)).collect())
    }

    fn done(self) -> Outcome {
        destroy(self.fd.as_fd(), self.mock.object)?;
        let ram = self.ram;
        drop(self.space);
        same("who holds the RAM", Arc::strong_count(&ram), 1)?;
        no_warning()
    }
}

/// Of RAM on both sides of a hole, mapped in another order than it lies, each write is found where it was, once.
pub(crate) fn exact() -> Outcome {
    let guest = Guest::new(TRACKS, 300)?;
    let (low, high) = (pages(0, 100)?, pages(5000, 200)?);
    guest.map(high, 0)?;
    guest.map(low, 200)?;
    let log = guest.log()?;
    same("granule", log.granule(), Granule::PAGE)?;
    log.start()?;
    holds(guest.dirty(&*log)?.is_empty(), "clean at the start")?;
    for round in 0..20 {
        let (in_low, in_high) = (some(100, round), some(200, round + 100));
        guest.write(low, &in_low)?;
        guest.write(high, &in_high)?;
        let wanted: BTreeSet<u64> = in_high.into_iter().chain(in_low.iter().map(|page| 200 + page)).collect();
        holds(guest.dirty(&*log)? == wanted, &format!("exact in round {round}"))?;
    }
    holds(guest.dirty(&*log)?.is_empty(), "each is said once")?;
    log.stop()?;
    log.stop()?;
    let mut bits = Bitmap::new(guest.ram.size(), Granule::PAGE);
    holds(
        matches!(log.report(&mut bits), Err(MemoryError::NotLogging { .. })),
        "stopped, it reports nothing",
    )?;
    drop(log);
    guest.done()
}

/// From half a byte of bits to more than a page of them.
pub(crate) fn sizes() -> Outcome {
    for bytes in [8 << 10, 16 << 10, 64 << 10, 128 << 10, 320 << 10, 64 << 20, 256 << 20] {
        let count = bytes / PAGE_SIZE;
        let guest = Guest::new(TRACKS, count)?;
        // Not at a multiple of its size.
        let range = pages(3, count)?;
        guest.map(range, 0)?;
        let log = guest.log()?;
        log.start()?;
        let written = some(count, bytes);
        guest.write(range, &written)?;
        holds(guest.dirty(&*log)? == written, &format!("exact in {bytes} bytes"))?;
        log.stop()?;
        drop(log);
        guest.done()?;
    }
    Ok(())
}

/// A second start is refused, and loses nothing; a trial and a start after a stop begin clean.
pub(crate) fn starts() -> Outcome {
    let guest = Guest::new(TRACKS, 64)?;
    let range = pages(0, 64)?;
    guest.map(range, 0)?;
    let log = guest.log()?;
    log.start()?;
    let written = some(64, 5);
    guest.write(range, &written)?;
    holds(matches!(log.start(), Err(MemoryError::AlreadyLogging { .. })), "a second start is refused")?;
    holds(guest.dirty(&*log)? == written, "and loses nothing")?;
    guest.write(range, &written)?;
    log.stop()?;
    log.start()?;
    holds(guest.dirty(&*log)?.is_empty(), "a new start is clean")?;
    guest.write(range, &[7].into())?;
    same("and logs", guest.dirty(&*log)?, [7].into())?;
    log.stop()?;
    drop(log);
    guest.done()
}

/// What is mapped or unmapped while the log runs counts as dirty as a whole: the IOMMU forgets what it unmaps.
pub(crate) fn memory_that_moves() -> Outcome {
    let guest = Guest::new(TRACKS, 60)?;
    let (stays, goes, comes) = (pages(0, 20)?, pages(100, 20)?, pages(200, 20)?);
    guest.map(stays, 0)?;
    guest.map(goes, 20)?;
    let log = guest.log()?;
    log.start()?;
    guest.write(stays, &[3].into())?;
    guest.write(goes, &[4].into())?;
    guest.space.unmap(goes)?;
    guest.map(comes, 40)?;
    guest.write(comes, &[5].into())?;
    let moved: BTreeSet<u64> = (20..60).collect();
    same("dirty", guest.dirty(&*log)?, &moved | &[3].into())?;
    same("dirty, again", guest.dirty(&*log)?, moved)?;
    // Mapped where it was, it is asked for again, and still counts as dirty.
    guest.map(goes, 20)?;
    guest.write(stays, &[19].into())?;
    same("dirty, after it came back", guest.dirty(&*log)?, (19..60).collect())?;
    log.stop()?;
    log.start()?;
    guest.write(comes, &[6].into())?;
    same("a new start knows all that is mapped", guest.dirty(&*log)?, [46].into())?;
    log.stop()?;
    drop(log);
    guest.done()
}

/// Without the capability there is no log, and the choice says why and what follows.
pub(crate) fn without_capability() -> Outcome {
    let guest = Guest::new(DOES_NOT, 16)?;
    guest.map(pages(0, 16)?, 0)?;
    let (choice, log) = guest.space.tracker();
    same("tracker", choice.kind, TrackerKind::Everything)?;
    for said in ["the IOMMU does not track dirty pages", "--allow-all-dirty"] {
        holds(choice.why.contains(said), &choice.why)?;
    }
    holds(log.is_none(), "no log")?;
    guest.done()
}
