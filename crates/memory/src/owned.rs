//! Guest RAM that this library allocates: a sealed memory file for each region.

use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, SealFlags};
use vfio_migration_types::Gpa;

use crate::area::{Area, as_usize};
use crate::error::MemoryError;
use crate::numa;
use crate::ram::GuestRam;
use crate::region::{RamKind, RamPageSize, RamRegionInfo, Region, RegionFile, Wanted, lay_out};

/// A region of guest RAM that is wanted, of pages of 4 KiB, on any node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamSpec {
    /// Guest physical address of its first byte: a multiple of 4096.
    pub gpa: Gpa,
    /// Bytes: a multiple of 4096, at least one page.
    pub len: u64,
}

/// A region of guest RAM that is wanted, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnedRegion {
    /// Guest physical address of its first byte: a multiple of the page size.
    pub gpa: Gpa,
    /// Bytes: a multiple of the page size, at least one page.
    pub len: u64,
    /// The host's pages that it is made of. Huge ones are set aside when RAM is made, or that fails.
    pub page_size: RamPageSize,
    /// The host's NUMA node that its pages are allocated from, and no other.
    pub numa_node: Option<u32>,
    /// All of it is allocated at once, not page by page as it is written.
    pub populate: bool,
    /// Pages that become zero may be given back to the host. Not for RAM that a kernel device (VFIO, iommufd) reaches,
    /// which has its pages pinned and would go on with one that was given back; `false` always works.
    pub punch_holes: bool,
}

impl From<RamSpec> for OwnedRegion {
    fn from(RamSpec { gpa, len }: RamSpec) -> Self {
        Self {
            gpa,
            len,
            page_size: RamPageSize::default(),
            numa_node: None,
            populate: false,
            punch_holes: false,
        }
    }
}

impl GuestRam {
    /// RAM made of `specs`, zeroed, in this order, whose pages stay where they are once they are written. `name` shows in
    /// `/proc/*/maps`; at most 249 bytes.
    ///
    /// # Errors
    /// As [`owned`](Self::owned).
    pub fn new(name: &str, specs: &[RamSpec]) -> Result<Self, MemoryError> {
        Self::owned(name, &specs.iter().copied().map(OwnedRegion::from).collect::<Vec<_>>())
    }

    /// RAM made of `regions`, zeroed, in this order. `name` shows in `/proc/*/maps`; at most 249 bytes.
    ///
    /// Each region is a memory file, sealed against growing and shrinking, so that no process it is handed to can take a
    /// page from under another. Its pages are allocated when first written, unless the region says otherwise.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] for regions that overlap, are empty, misaligned or leave the address space;
    /// [`MemoryError::TooLarge`] for more than the host's memory and swap; [`MemoryError::System`] with ENOMEM for more huge
    /// pages than the host has set aside.
    pub fn owned(name: &str, regions: &[OwnedRegion]) -> Result<Self, MemoryError> {
        let infos = lay_out(regions.iter().map(|region| Wanted {
            gpa: region.gpa,
            len: region.len,
            page_size: region.page_size,
            kind: RamKind::SharedFile,
        }))?;
        let small = infos.iter().filter(|info| info.page_size == RamPageSize::Size4K);
        let wanted: u64 = small.map(|info| info.len).sum();
        if let Some(available) = host_memory()
            && wanted > available
        {
            return Err(MemoryError::TooLarge { wanted, available });
        }
        let made = infos.into_iter().zip(regions).map(|(info, region)| allocate(name, info, region));
        Ok(Self::of(made.collect::<Result<_, _>>()?))
    }
}

fn allocate(name: &str, info: RamRegionInfo, wanted: &OwnedRegion) -> Result<Region, MemoryError> {
    let huge = match info.page_size {
        RamPageSize::Size4K => MemfdFlags::empty(),
        RamPageSize::Size2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        RamPageSize::Size1G => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | huge)
        .map_err(MemoryError::system("creating a memory file"))?;
    rustix::fs::ftruncate(&fd, info.len).map_err(MemoryError::system("sizing a memory file"))?;
    // SEAL too: nobody may add F_SEAL_WRITE later and make the guest's RAM read-only.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(MemoryError::system("sealing a memory file"))?;
    let area = if huge.is_empty() {
        Area::map(fd.as_fd(), 0, as_usize(info.len), true).map_err(MemoryError::system("mapping guest RAM"))
    } else {
        // The errno alone (ENOMEM) does not say what there is too little of.
        Area::map_reserved(fd.as_fd(), as_usize(info.len)).map_err(MemoryError::system(
            "setting huge pages aside for guest RAM (/proc/sys/vm/nr_hugepages says how many there are)",
        ))
    }?;
    if let Some(node) = wanted.numa_node {
        numa::bind(&area, node)?;
    }
    let file = RegionFile::new(fd, 0).map_err(MemoryError::system("examining a memory file"))?;
    let region = Region::new(info, area, Some(file), false, wanted.punch_holes);
    if wanted.populate {
        region.populate()?;
    }
    Ok(region)
}

/// The host's memory and swap in bytes, used or not; `None` where procfs does not say.
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    field("MemTotal:")?.checked_add(field("SwapTotal:").unwrap_or(0))
}
