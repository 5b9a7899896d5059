//! Guest RAM that the VMM has already, and lends.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use vfio_migration_types::{Gpa, PAGE_SIZE};

use crate::area::{Area, as_usize};
use crate::error::{MemoryError, RegionError};
use crate::ram::GuestRam;
use crate::region::{RamKind, RamPageSize, RamRegionInfo, Region, RegionFile, Wanted, lay_out};

/// The magic number of hugetlbfs in statfs (linux/magic.h), whose block size is its page size.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A region of guest RAM that the VMM has mapped.
#[derive(Debug)]
pub struct LentRegion {
    /// Guest physical address of its first byte: a multiple of the page size.
    pub gpa: Gpa,
    /// Bytes: a multiple of the page size, at least one page.
    pub len: u64,
    /// Where this process has it mapped, at a multiple of the page size.
    pub host: NonNull<u8>,
    /// What is mapped there.
    pub kind: RamKind,
    /// The size of the pages behind it.
    pub page_size: RamPageSize,
    /// A descriptor of the file that is mapped there, and the file offset of the region's first byte. Where the region is a
    /// shared file it is handed to vfio-user servers, which map it for their DMA, and holes are looked for in it (lseek(2),
    /// which moves the file position of every duplicate of the descriptor). Without, a server asks for each access by message,
    /// and all of the region counts as data.
    pub file: Option<(OwnedFd, u64)>,
    /// Nobody has written to it since it was made, and it reads as zero: a guest that arrives in it need not have it cleared.
    pub fresh: bool,
    /// Pages that become zero may be given back to the host, because none is pinned, by a VFIO device or by anything else.
    pub punch_holes: bool,
}

impl GuestRam {
    /// RAM made of `regions` that the VMM has mapped, in this order, which need not be that of their guest addresses. It holds
    /// a clone of `lender`, as does whoever is given memory of it, a device for one.
    ///
    /// The regions are RAM as long as it lives: none may come, go or move. A region that is filled in by userfaultfd has to be
    /// whole before a guest is moved out of it: a page that is not there yet counts as zero.
    ///
    /// # Errors
    /// [`MemoryError::Layout`] for regions that overlap, are empty, misaligned or leave the address space;
    /// [`MemoryError::Region`] for one whose memory or file cannot be what it is said to be, with the reason.
    ///
    /// # Safety
    /// For each region, until `lender` and every clone of it are dropped:
    /// - its `len` bytes from `host` stay mapped there, readable and writable;
    /// - no Rust reference to any of them exists: this process, too, accesses them by raw pointer or by system call alone;
    /// - `kind` and `page_size` are what is mapped, and `file`, where there is one, is the file that is mapped, from that offset
    ///   on;
    /// - with `punch_holes`, nobody has a page of it pinned, nor gets one pinned, but by [`host_memory`](Self::host_memory).
    pub unsafe fn lent(
        regions: Vec<LentRegion>,
        lender: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, MemoryError> {
        let infos = lay_out(regions.iter().map(|region| Wanted {
            gpa: region.gpa,
            len: region.len,
            page_size: region.page_size,
            kind: region.kind,
        }))?;
        let mut taken = Vec::with_capacity(regions.len());
        for (info, lent) in infos.into_iter().zip(regions) {
            check_place(&info, &lent).map_err(|why| refused(&info, why))?;
            // SAFETY: by this function's contract.
            let area = unsafe { Area::lent(lent.host, as_usize(info.len), Arc::clone(&lender)) };
            let file = lent.file.map(|(fd, offset)| {
                check_file(&info, fd.as_fd())?;
                RegionFile::new(fd, offset).map_err(examining)
            });
            let file = file.transpose().map_err(|why| refused(&info, why))?;
            let region = Region::new(info, area, file, lent.fresh, lent.punch_holes);
            region.check_file()?;
            if let Some(other) = taken.iter().find(|other: &&Region| other.is_same_memory(&region)) {
                return Err(region.refused(RegionError::SameMemory { other: other.info.gpa }));
            }
            taken.push(region);
        }
        Ok(Self::of(taken))
    }
}

fn check_place(info: &RamRegionInfo, lent: &LentRegion) -> Result<(), RegionError> {
    let address = lent.host.addr().get() as u64;
    let page = info.page_size.bytes().max(rustix::param::page_size() as u64);
    if !address.is_multiple_of(page) {
        return Err(RegionError::HostAddress { address, page });
    }
    // As `isize::MAX`, the most that a pointer may be moved.
    if address.checked_add(info.len).is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(RegionError::AddressSpace);
    }
    match (info.kind, &lent.file) {
        (RamKind::PrivateAnonymous, Some(_)) => Err(RegionError::AnonymousFile),
        (RamKind::PrivateFile, _) if lent.fresh => Err(RegionError::FreshFile),
        (_, Some((_, offset))) if !offset.is_multiple_of(page) => {
            Err(RegionError::FileOffset { offset: *offset, page })
        }
        (_, Some((_, offset)))
            if offset.checked_add(info.len).is_none_or(|end| i64::try_from(end).is_err()) =>
        {
            Err(RegionError::AddressSpace)
        }
        _ => Ok(()),
    }
}

fn check_file(info: &RamRegionInfo, fd: BorrowedFd<'_>) -> Result<(), RegionError> {
    let stat = rustix::fs::fstat(fd).map_err(examining)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(RegionError::NoMemoryFile);
    }
    let mode = rustix::fs::fcntl_getfl(fd).map_err(examining)? & OFlags::RWMODE;
    if info.kind == RamKind::SharedFile && mode != OFlags::RDWR {
        return Err(RegionError::FileReadOnly);
    }
    let (said, found) = (info.page_size.bytes(), file_page_size(fd)?);
    if found == said { Ok(()) } else { Err(RegionError::PageSize { said, found }) }
}

/// Bytes of the pages that a file is made of in memory.
pub(crate) fn file_page_size(fd: BorrowedFd<'_>) -> Result<u64, RegionError> {
    let system = rustix::fs::fstatfs(fd).map_err(examining)?;
    let huge = u64::try_from(system.f_type).is_ok_and(|magic| magic == HUGETLBFS_MAGIC);
    Ok(if huge { u64::try_from(system.f_bsize).unwrap_or(0) } else { PAGE_SIZE })
}

fn examining(source: rustix::io::Errno) -> RegionError {
    RegionError::System { doing: "examining its file", source }
}

fn refused(info: &RamRegionInfo, why: RegionError) -> MemoryError {
    MemoryError::Region { gpa: info.gpa, len: info.len, why }
}
