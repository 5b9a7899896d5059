//! DMA that the server asks for by message, instead of doing it itself: served from guest RAM, and logged here,
//! because the server's own log does not hold it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use vfio_migration_memory::{GuestRam, Mapping, MemoryError, WriteLog};
use vfio_migration_types::{DeviceId, Iova, RamOffset, Range};
use vfio_user_peer::DmaHandler;

use crate::hardware::DmaAccess;

/// The guest RAM that the device may reach.
#[derive(Debug)]
pub(super) struct GuestDma {
    ram: Arc<GuestRam>,
    state: Mutex<State>,
    /// Guest pages written on the server's behalf.
    pub(super) writes: WriteLog,
}

#[derive(Debug, Default)]
struct State {
    windows: Vec<ServedWindow>,
    /// Guest RAM that was mapped or unmapped since the log last started, with its length: the server's log is not sure to hold
    /// its writes.
    moved: Vec<(RamOffset, u64)>,
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
    /// Guest RAM, from there on.
    Ram(RamOffset),
    /// Something else with a file: another device's BAR. Mapped here only when the server does not map it.
    Elsewhere(Option<Mapping>),
}

impl GuestDma {
    pub(super) fn new(id: &DeviceId, ram: Arc<GuestRam>) -> Self {
        let writes = WriteLog::new(format!("DMA served for {id}"), ram.size());
        Self { ram, state: Mutex::default(), writes }
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Notes a mapping of guest RAM, which the server maps itself where it is `shared`.
    pub(super) fn map_ram(&self, iova: Range<Iova>, access: DmaAccess, shared: bool, ram: RamOffset) {
        self.lock().add(ServedWindow { iova, access, shared, target: Target::Ram(ram) });
    }

    /// Notes a mapping of something else. `file` backs it where the server cannot map it.
    pub(super) fn map_other(
        &self,
        iova: Range<Iova>,
        access: DmaAccess,
        shared: bool,
        file: Option<Mapping>,
    ) {
        self.lock().add(ServedWindow { iova, access, shared, target: Target::Elsewhere(file) });
    }

    /// Forgets a mapping; whether it was known.
    pub(super) fn unmap(&self, iova: Range<Iova>) -> bool {
        self.lock().remove(iova)
    }

    /// A mapping of guest RAM that shares addresses with `iova`.
    pub(super) fn overlapping(&self, iova: Range<Iova>) -> Option<(Range<Iova>, RamOffset)> {
        let state = self.lock();
        let mut shared = state.windows.iter().filter(|window| window.iova.overlaps(&iova));
        shared.find_map(|window| Some((window.iova, window.ram()?)))
    }

    /// Whether exactly this range is mapped.
    pub(super) fn contains(&self, iova: Range<Iova>) -> bool {
        self.lock().windows.iter().any(|window| window.iova == iova)
    }

    /// [`shared_ram`](Self::shared_ram), for a log that is about to start.
    pub(super) fn begin(&self) -> Vec<(Range<Iova>, RamOffset)> {
        let mut state = self.lock();
        state.moved.clear();
        state.shared_ram()
    }

    /// Mapped guest RAM that the server reaches by itself, so that its own log holds what it writes.
    pub(super) fn shared_ram(&self) -> Vec<(Range<Iova>, RamOffset)> {
        self.lock().shared_ram()
    }

    /// Guest RAM that changed hands since [`begin`](Self::begin), with its length in bytes.
    pub(super) fn moved(&self) -> Vec<(RamOffset, u64)> {
        self.lock().moved.clone()
    }

    /// Whether any guest RAM is mapped, for reading alone too.
    pub(super) fn knows_ram(&self) -> bool {
        self.lock().windows.iter().any(|window| window.ram().is_some())
    }

    /// Whether a mapping that may be written holds this page of guest RAM, or held it since the log started.
    pub(super) fn reaches(&self, page: RamOffset) -> bool {
        let state = self.lock();
        let written = state.windows.iter().filter_map(ServedWindow::written);
        let mut written = written.chain(state.moved.iter().copied());
        written.any(|(start, len)| (start.0..start.0 + len).contains(&page.0))
    }

    /// Whether every mapping of guest RAM that may be written is served here, so that this side's log is exact alone.
    pub(super) fn serves_all(&self) -> bool {
        let state = self.lock();
        let mut written = state.windows.iter().filter(|window| window.written().is_some()).peekable();
        written.peek().is_some() && written.all(|window| !window.shared)
    }

    fn access(
        &self,
        iova: u64,
        len: usize,
        write: bool,
        act: impl FnOnce(Place<'_>) -> Result<(), MemoryError>,
    ) -> Result<(), Errno> {
        let wanted = Range::new(Iova(iova), len as u64).map_err(|_| Errno::INVAL)?;
        let state = self.lock();
        let window = state
            .windows
            .iter()
            .find(|window| wanted.start() >= window.iova.start() && wanted.end() <= window.iova.end())
            .ok_or(Errno::FAULT)?;
        if !(if write { window.access.write } else { window.access.read }) {
            return Err(Errno::ACCESS);
        }
        let place = match &window.target {
            Target::Ram(ram) => Place::Ram(RamOffset(ram.0 + (iova - window.iova.start().0))),
            Target::Elsewhere(Some(mapping)) => Place::Mapping(mapping, iova - window.iova.start().0),
            Target::Elsewhere(None) => return Err(Errno::FAULT),
        };
        act(place).map_err(|_| Errno::FAULT)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ServedWindow {
    /// Its begin in guest RAM.
    fn ram(&self) -> Option<RamOffset> {
        match self.target {
            Target::Ram(ram) => Some(ram),
            Target::Elsewhere(_) => None,
        }
    }

    /// Guest RAM that the device may write by it.
    fn written(&self) -> Option<(RamOffset, u64)> {
        self.ram().filter(|_| self.access.write).map(|ram| (ram, self.iova.len()))
    }
}

impl State {
    fn add(&mut self, window: ServedWindow) {
        self.note(&window);
        self.windows.push(window);
    }

    fn remove(&mut self, iova: Range<Iova>) -> bool {
        let Some(at) = self.windows.iter().position(|window| window.iova == iova) else { return false };
        let window = self.windows.swap_remove(at);
        self.note(&window);
        true
    }

    fn note(&mut self, window: &ServedWindow) {
        if let Some(written) = window.written()
            && !self.moved.contains(&written)
        {
            self.moved.push(written);
        }
    }

    fn shared_ram(&self) -> Vec<(Range<Iova>, RamOffset)> {
        let shared = self.windows.iter().filter(|window| window.shared);
        shared.filter_map(|window| window.written().map(|(ram, _)| (window.iova, ram))).collect()
    }
}

enum Place<'a> {
    Ram(RamOffset),
    Mapping(&'a Mapping, u64),
}

impl DmaHandler for GuestDma {
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.access(iova, into.len(), false, |place| match place {
            Place::Ram(offset) => self.ram.read(offset, into),
            Place::Mapping(mapping, offset) => mapping.read(offset, into),
        })
    }

    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        self.access(iova, from.len(), true, |place| match place {
            Place::Ram(offset) => {
                self.ram.write(offset, from)?;
                self.writes.mark(offset, from.len() as u64);
                Ok(())
            }
            Place::Mapping(mapping, offset) => mapping.write(offset, from),
        })
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration_memory::RamSpec;
    use vfio_migration_types::{Gpa, PAGE_SIZE};

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
        let read_only = DmaAccess { read: true, write: false };
        dma.map_ram(iova(2 * PAGE_SIZE, 2), read_only, true, RamOffset(2 * PAGE_SIZE));
        assert!(dma.knows_ram() && covered().is_empty());
        dma.map_ram(iova(4 * PAGE_SIZE, 2), DmaAccess::BOTH, true, RamOffset(4 * PAGE_SIZE));
        // The address at which it is mapped need not be the guest's.
        dma.map_ram(iova(1 << 40, 1), DmaAccess::BOTH, false, RamOffset(8 * PAGE_SIZE));
        assert_eq!(covered(), [4, 5, 8]);
        assert_eq!(dma.begin(), [(iova(4 * PAGE_SIZE, 2), RamOffset(4 * PAGE_SIZE))]);
        assert!(dma.moved().is_empty() && !dma.serves_all());
        // What it held once is the log's to report, until it starts anew.
        assert!(dma.unmap(iova(4 * PAGE_SIZE, 2)) && !dma.unmap(iova(4 * PAGE_SIZE, 2)));
        assert_eq!(
            (dma.moved(), covered()),
            (vec![(RamOffset(4 * PAGE_SIZE), 2 * PAGE_SIZE)], vec![4, 5, 8])
        );
        assert!(dma.begin().is_empty() && dma.serves_all());
        assert_eq!(covered(), [8]);
    }
}
