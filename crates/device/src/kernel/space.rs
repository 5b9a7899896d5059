//! Address spaces that devices share: memory is mapped, and pinned, once for all of them.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Iova, RamOffset, Range, error_chain};
use vfio_migration_uapi::{self as uapi, Dma, HostMemory, Ioas, Type1, UapiError};

use super::log_users::LogUsers;
use super::windows::{DmaWindow, DmaWindows};

/// The address space that devices of one guest share, if each is opened with a clone of it
/// ([`KernelOptions::space`](crate::KernelOptions::space)): what one maps all reach, and guest RAM is pinned once, not once for
/// each. Devices of one IOMMU group can be opened only so.
///
/// Those that are opened by their own files share an address space of one iommufd; those that are opened by their groups a
/// container, or several where the kernel does not let them share one. It lasts as long as one of them is open.
#[derive(Clone, Debug, Default)]
pub struct DmaSpace(Arc<Mutex<Spaces>>);

/// The address spaces of the devices that are open.
#[derive(Debug, Default)]
pub(super) struct Spaces {
    ram: Weak<GuestRam>,
    pub(super) iommufd: Weak<IommufdSpace>,
    pub(super) containers: Vec<Weak<Container>>,
}

impl DmaSpace {
    /// The address spaces, for one device at a time, of a guest with `ram`; `None` if it is another guest's.
    pub(super) fn enter(&self, ram: &Arc<GuestRam>) -> Option<MutexGuard<'_, Spaces>> {
        let mut spaces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spaces.containers.retain(|container| container.strong_count() > 0);
        let used = spaces.iommufd.strong_count() > 0 || !spaces.containers.is_empty();
        if used && !std::ptr::eq(spaces.ram.as_ptr(), Arc::as_ptr(ram)) {
            return None;
        }
        spaces.ram = Arc::downgrade(ram);
        Some(spaces)
    }
}

/// An address space of an iommufd, and the page tables made of it that track dirty pages.
#[derive(Debug)]
pub(super) struct IommufdSpace {
    pub(super) ioas: Arc<Ioas>,
    pub(super) tables: Mutex<Vec<Weak<PageTable>>>,
    mappings: Mappings,
}

impl IommufdSpace {
    pub(super) fn new(ioas: Arc<Ioas>) -> Self {
        Self { ioas, tables: Mutex::default(), mappings: Mappings::default() }
    }
}

/// A page table of an address space, which tracks dirty pages. Devices whose IOMMU takes it share it.
#[derive(Debug)]
pub(super) struct PageTable {
    pub(super) iommufd: Arc<OwnedFd>,
    pub(super) id: u32,
    pub(super) users: Arc<LogUsers>,
}

impl PageTable {
    pub(super) fn new(iommufd: Arc<OwnedFd>, id: u32) -> Self {
        Self { iommufd, id, users: Arc::default() }
    }
}

impl Drop for PageTable {
    fn drop(&mut self) {
        // While a device is attached the kernel refuses; it goes with the iommufd.
        if let Err(error) = uapi::destroy(std::os::fd::AsFd::as_fd(&*self.iommufd), self.id) {
            tracing::debug!(error = %error_chain(&error), "a page table was not destroyed");
        }
    }
}

/// A type1 container, and the groups in it.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) type1: Arc<Type1>,
    /// Groups that are open, by their files: a group is opened once.
    pub(super) groups: Mutex<Vec<(PathBuf, Weak<OwnedFd>)>>,
    pub(super) users: Arc<LogUsers>,
    mappings: Mappings,
}

impl Container {
    pub(super) fn new(type1: Type1) -> Self {
        Self {
            type1: Arc::new(type1),
            groups: Mutex::default(),
            users: Arc::default(),
            mappings: Mappings::default(),
        }
    }

    /// The group of this file, if a device has it open.
    pub(super) fn group(&self, file: &std::path::Path) -> Option<Arc<OwnedFd>> {
        let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.iter().find(|(path, _)| path == file).and_then(|(_, group)| group.upgrade())
    }

    pub(super) fn keep(&self, file: PathBuf, group: &Arc<OwnedFd>) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|(_, group)| group.strong_count() > 0);
        groups.push((file, Arc::downgrade(group)));
    }
}

/// The address space that one device is in.
#[derive(Clone, Debug)]
pub(super) enum AddressSpace {
    Type1(Arc<Container>),
    Iommufd {
        space: Arc<IommufdSpace>,
        /// The page table that tracks dirty pages, if the IOMMU can.
        table: Result<Arc<PageTable>, String>,
    },
}

impl AddressSpace {
    fn mappings(&self) -> &Mappings {
        match self {
            Self::Type1(container) => &container.mappings,
            Self::Iommufd { space, .. } => &space.mappings,
        }
    }

    /// What is mapped in it.
    pub(super) fn windows(&self) -> &Arc<DmaWindows> {
        &self.mappings().windows
    }

    fn map(&self, iova: Range<Iova>, memory: &HostMemory, dma: Dma) -> Result<(), UapiError> {
        match self {
            Self::Type1(container) => container.type1.map(iova, memory, dma),
            Self::Iommufd { space, .. } => space.ioas.map(iova, memory, dma),
        }
    }

    fn unmap(&self, iova: Range<Iova>) -> Result<(), UapiError> {
        match self {
            Self::Type1(container) => container.type1.unmap(iova),
            Self::Iommufd { space, .. } => space.ioas.unmap(iova),
        }
    }
}

/// The memory behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    Ram(RamOffset),
    /// Another device's BAR: a file of this process by its number, and the place in it.
    File(i32, u64),
}

impl Backing {
    pub(super) fn file(fd: BorrowedFd<'_>, offset: u64) -> Self {
        Self::File(fd.as_raw_fd(), offset)
    }

    /// Its begin in guest RAM.
    fn ram(self) -> Option<RamOffset> {
        match self {
            Self::Ram(ram) => Some(ram),
            Self::File(..) => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    iova: Range<Iova>,
    backing: Backing,
    access: (bool, bool),
    /// Devices that mapped it.
    users: usize,
}

#[derive(Debug, Default)]
struct Mappings {
    windows: Arc<DmaWindows>,
    all: Mutex<Vec<Mapping>>,
}

/// A device's part in an address space: what it has mapped itself. It takes that back when it goes.
#[derive(Debug)]
pub(super) struct SpaceMember {
    pub(super) space: AddressSpace,
    mine: Mutex<Vec<Range<Iova>>>,
}

/// The range overlaps one that is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Overlaps;

impl SpaceMember {
    pub(super) fn new(space: AddressSpace) -> Self {
        Self { space, mine: Mutex::default() }
    }

    /// Maps memory, which `make` gives, unless another device has mapped just that.
    pub(super) fn map<E>(
        &self,
        iova: Range<Iova>,
        backing: Backing,
        dma: Dma,
        make: impl FnOnce() -> Result<HostMemory, E>,
        refused: impl FnOnce(UapiError) -> E,
    ) -> Result<Result<(), E>, Overlaps> {
        let mappings = self.space.mappings();
        let mut all = mappings.all();
        let mut mine = self.mine();
        if mine.iter().any(|mapped| mapped.overlaps(&iova)) {
            return Err(Overlaps);
        }
        let access = (dma.read, dma.write);
        if let Some(there) = all.iter_mut().find(|there| there.iova.overlaps(&iova)) {
            if (there.iova, there.backing, there.access) != (iova, backing, access) {
                return Err(Overlaps);
            }
            there.users += 1;
            mine.push(iova);
            return Ok(Ok(()));
        }
        // Noted before: a log that starts in between must not miss it.
        mappings.windows.add(DmaWindow { iova, write: dma.write, ram: backing.ram() });
        let mapped = make().and_then(|memory| self.space.map(iova, &memory, dma).map_err(refused));
        match &mapped {
            Ok(()) => {
                all.push(Mapping { iova, backing, access, users: 1 });
                mine.push(iova);
            }
            Err(_) => {
                mappings.windows.remove(iova);
            }
        }
        Ok(mapped)
    }

    /// Takes back a range that this device mapped; `None` if it did not. No other device may have mapped it too, or it stays.
    pub(super) fn unmap(&self, iova: Range<Iova>) -> Option<Result<(), UapiError>> {
        let mappings = self.space.mappings();
        let mut all = mappings.all();
        let mut mine = self.mine();
        let at = mine.iter().position(|mapped| *mapped == iova)?;
        let there = all.iter().position(|there| there.iova == iova)?;
        if let Some(shared) = all.get_mut(there).filter(|shared| shared.users > 1) {
            shared.users -= 1;
            mine.swap_remove(at);
            return Some(Ok(()));
        }
        // Taken off the list first: a log must not ask for what is gone. What it was counts as dirty.
        let window = mappings.windows.remove(iova);
        let unmapped = self.space.unmap(iova);
        match (&unmapped, window) {
            (Ok(()), _) => {
                all.swap_remove(there);
                mine.swap_remove(at);
            }
            (Err(_), Some(window)) => mappings.windows.add(window),
            (Err(_), None) => {}
        }
        Some(unmapped)
    }

    /// Takes the device out, and back what it mapped, before it is closed: the address space may live on.
    pub(super) fn leave(&self, device: BorrowedFd<'_>) {
        if matches!(self.space, AddressSpace::Iommufd { .. })
            && let Err(error) = uapi::detach(device)
        {
            tracing::debug!(error = %error_chain(&error), "a device was not taken out of its iommufd");
        }
        let mine = self.mine().clone();
        for iova in mine {
            if let Some(Err(error)) = self.unmap(iova) {
                tracing::debug!(error = %error_chain(&error), ?iova, "memory stays mapped for DMA");
            }
        }
    }

    fn mine(&self) -> MutexGuard<'_, Vec<Range<Iova>>> {
        self.mine.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mappings {
    fn all(&self) -> MutexGuard<'_, Vec<Mapping>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
