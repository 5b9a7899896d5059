//! DMA that the server asks for by message, instead of doing it itself: served from guest RAM, and logged here,
//! because the server's own log does not hold it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vfio_migration_memory::{GuestRam, Mapping, MemoryError, WriteLog};
use vfio_migration_types::{DeviceId, Gpa, Iova, RamOffset, Range};
use vfio_user_peer::DmaHandler;

use crate::hardware::DmaAccess;

/// The guest RAM that the device may reach.
#[derive(Debug)]
pub(super) struct GuestDma {
    ram: Arc<GuestRam>,
    windows: Mutex<Vec<ServedWindow>>,
    /// Guest pages written on the server's behalf.
    pub(super) writes: WriteLog,
}

/// One DMA mapping: a range of addresses, and the memory behind it.
#[derive(Debug)]
struct ServedWindow {
    iova: Range<Iova>,
    access: DmaAccess,
    /// The server maps it by itself, and logs what it writes.
    shared: bool,
    target: Target,
}

#[derive(Debug)]
enum Target {
    /// Guest RAM at the same address.
    Ram,
    /// Something else with a file: another device's BAR. Mapped here only when the server does not map it.
    Elsewhere(Option<Mapping>),
}

impl GuestDma {
    pub(super) fn new(id: &DeviceId, ram: Arc<GuestRam>) -> Self {
        let writes = WriteLog::new(format!("DMA served for {id}"), ram.size());
        Self { ram, windows: Mutex::new(Vec::new()), writes }
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Notes a mapping. `file` backs it where it is not guest RAM and the server cannot map it.
    pub(super) fn map(&self, iova: Range<Iova>, access: DmaAccess, shared: bool, file: Option<Mapping>) {
        let ram = self.ram.offset_of(Gpa(iova.start().0), iova.len()).is_some();
        let target = if ram { Target::Ram } else { Target::Elsewhere(file) };
        self.windows().push(ServedWindow { iova, access, shared, target });
    }

    pub(super) fn unmap(&self, iova: Range<Iova>) {
        self.windows().retain(|window| window.iova != iova);
    }

    /// Mapped guest RAM that the server reaches by itself, so that its own log holds what it writes.
    pub(super) fn shared_ram(&self) -> Vec<Range<Iova>> {
        let logged = |window: &&ServedWindow| {
            window.shared && window.access.write && matches!(window.target, Target::Ram)
        };
        self.windows().iter().filter(logged).map(|window| window.iova).collect()
    }

    /// Whether a mapping that may be written holds this page of guest RAM.
    pub(super) fn reaches(&self, page: RamOffset) -> bool {
        self.windows().iter().any(|window| {
            let start = self.ram.offset_of(Gpa(window.iova.start().0), window.iova.len());
            matches!(window.target, Target::Ram)
                && window.access.write
                && start.is_some_and(|start| (start.0..start.0 + window.iova.len()).contains(&page.0))
        })
    }

    /// Whether every mapping of guest RAM that may be written is served here, so that this side's log is exact alone.
    pub(super) fn serves_all(&self) -> bool {
        let ram = |window: &&ServedWindow| matches!(window.target, Target::Ram) && window.access.write;
        let windows = self.windows();
        windows.iter().any(|window| ram(&window)) && !windows.iter().filter(ram).any(|window| window.shared)
    }

    fn access(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        act: impl FnOnce(Place<'_>) -> Result<(), MemoryError>,
    ) -> Result<(), Errno> {
        let wanted = Range::new(Iova(iova), len as u64).map_err(|_| Errno::INVAL)?;
        let windows = self.windows();
        let window = windows
            .iter()
            .find(|window| wanted.start() >= window.iova.start() && wanted.end() <= window.iova.end())
            .ok_or(Errno::FAULT)?;
        if !(if write { window.access.write } else { window.access.read }) {
            return Err(Errno::ACCESS);
        }
        let place = match &window.target {
            Target::Ram => Place::Ram(Gpa(iova)),
            Target::Elsewhere(Some(mapping)) => Place::Mapping(mapping, iova - window.iova.start().0),
            Target::Elsewhere(None) => return Err(Errno::FAULT),
        };
        act(place).map_err(|_| Errno::FAULT)
    }

    fn windows(&self) -> MutexGuard<'_, Vec<ServedWindow>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Place<'a> {
    Ram(Gpa),
    Mapping(&'a Mapping, u64),
}

impl DmaHandler for GuestDma {
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.access(iova, into.len(), false, |place| match place {
            Place::Ram(gpa) => match self.ram.offset_of(gpa, into.len() as u64) {
                Some(offset) => self.ram.read(offset, into),
                None => Err(MemoryError::OutOfBounds {
                    offset: gpa.0,
                    len: into.len() as u64,
                    size: self.ram.size(),
                }),
            },
            Place::Mapping(mapping, offset) => mapping.read(offset, into),
        })
    }

    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        self.access(iova, from.len(), true, |place| match place {
            Place::Ram(gpa) => match self.ram.offset_of(gpa, from.len() as u64) {
                Some(offset) => {
                    self.ram.write(offset, from)?;
                    self.writes.mark(offset, from.len() as u64);
                    Ok(())
                }
                None => Err(MemoryError::OutOfBounds {
                    offset: gpa.0,
                    len: from.len() as u64,
                    size: self.ram.size(),
                }),
            },
            Place::Mapping(mapping, offset) => mapping.write(offset, from),
        })
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration_memory::RamSpec;
    use vfio_migration_types::PAGE_SIZE;

    use super::*;

    #[test]
    fn the_log_covers_what_may_be_written_and_is_mapped() {
        let specs =
            [RamSpec { gpa: Gpa(0), len: 8 * PAGE_SIZE }, RamSpec { gpa: Gpa(1 << 32), len: 8 * PAGE_SIZE }];
        let ram = Arc::new(GuestRam::new("dma", &specs).unwrap());
        let dma = GuestDma::new(&"net0".parse().unwrap(), ram);
        let iova = |gpa: u64, pages: u64| Range::new(Iova(gpa), pages * PAGE_SIZE).unwrap();
        let covered =
            || (0..16).filter(|page| dma.reaches(RamOffset(page * PAGE_SIZE))).collect::<Vec<u64>>();
        assert!(covered().is_empty());
        dma.map(iova(2 * PAGE_SIZE, 2), DmaAccess { read: true, write: false }, true, None);
        dma.map(iova(4 * PAGE_SIZE, 2), DmaAccess::BOTH, true, None);
        dma.map(iova(1 << 32, 1), DmaAccess::BOTH, false, None);
        assert_eq!(covered(), [4, 5, 8]);
        dma.unmap(iova(4 * PAGE_SIZE, 2));
        assert_eq!(covered(), [8]);
    }
}
