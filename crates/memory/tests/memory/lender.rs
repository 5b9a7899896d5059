//! Memory that a test has mapped itself, as a VMM has, to be lent.
#![expect(clippy::cast_possible_truncation, reason = "a page is 4096 bytes")]

use std::any::Any;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags};
use vfio_migration_memory::{GuestRam, LentRegion, MemoryError, RamKind, RamPageSize};
use vfio_migration_types::{Gpa, PAGE_SIZE};

/// Pages of a file before and behind the region: nobody may touch them.
pub(crate) const MARGIN: u64 = 3;

/// What a region is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backing {
    /// A memory file, mapped shared from [`MARGIN`] pages on.
    MemoryFile,
    /// The same of a file on a disk, as far as the folder for temporary files is on one.
    DiskFile,
    /// The same as the first, lent without a descriptor.
    Undescribed,
    Anonymous,
    /// A file that is full of numbers, and of holes, mapped private from [`MARGIN`] pages on, and lent with or without a
    /// descriptor. On a disk the first, whose holes stay holes when they are read.
    Private,
    PrivateUndescribed,
}

pub(crate) const BACKINGS: [Backing; 6] = [
    Backing::MemoryFile,
    Backing::DiskFile,
    Backing::Undescribed,
    Backing::Anonymous,
    Backing::Private,
    Backing::PrivateUndescribed,
];

/// Mapped memory, unmapped when dropped.
pub(crate) struct Mapped {
    pub(crate) host: NonNull<u8>,
    len: usize,
    pub(crate) file: Option<File>,
}

// SAFETY: the mapping belongs to the process, and only `GuestRam` accesses it.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub(crate) fn new(pages: u64, backing: Backing) -> Self {
        let len = usize::try_from(pages * PAGE_SIZE).unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        if backing == Backing::Anonymous {
            // SAFETY: at an address of the kernel's choice, so that it replaces nothing.
            let host =
                unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, access, MapFlags::PRIVATE) };
            return Self { host: NonNull::new(host.unwrap().cast()).unwrap(), len, file: None };
        }
        let file = if matches!(backing, Backing::DiskFile | Backing::Private) {
            tempfile::tempfile().unwrap()
        } else {
            let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
            File::from(rustix::fs::memfd_create("lent", flags).unwrap())
        };
        file.set_len((pages + 2 * MARGIN) * PAGE_SIZE).unwrap();
        let private = matches!(backing, Backing::Private | Backing::PrivateUndescribed);
        let numbered = if private { 0..pages + 2 * MARGIN } else { 0..MARGIN };
        for page in numbered.chain(pages + MARGIN..pages + 2 * MARGIN) {
            // A page of zeros stays a hole.
            if number(page) != number(0) {
                file.write_all_at(&number(page), page * PAGE_SIZE).unwrap();
            }
        }
        let flags = if private { MapFlags::PRIVATE } else { MapFlags::SHARED };
        // SAFETY: as above.
        let host = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, access, flags, file.as_fd(), MARGIN * PAGE_SIZE)
        };
        Self { host: NonNull::new(host.unwrap().cast()).unwrap(), len, file: Some(file) }
    }

    /// What it says of itself to be lent.
    pub(crate) fn region(&self, gpa: u64, backing: Backing, punch_holes: bool) -> LentRegion {
        let kind = match backing {
            Backing::MemoryFile | Backing::DiskFile | Backing::Undescribed => RamKind::SharedFile,
            Backing::Anonymous => RamKind::PrivateAnonymous,
            Backing::Private | Backing::PrivateUndescribed => RamKind::PrivateFile,
        };
        let described = !matches!(backing, Backing::Undescribed | Backing::PrivateUndescribed);
        let file = self.file.as_ref().filter(|_| described);
        LentRegion {
            gpa: Gpa(gpa),
            len: self.len as u64,
            host: self.host,
            kind,
            page_size: RamPageSize::Size4K,
            file: file.map(|file| (OwnedFd::from(file.try_clone().unwrap()), MARGIN * PAGE_SIZE)),
            fresh: false,
            punch_holes,
        }
    }

    /// Whether nobody has touched its file outside of the region; and the whole of a file that is mapped private.
    pub(crate) fn file_is_as_made(&self, backing: Backing) -> bool {
        let Some(file) = &self.file else { return true };
        let pages = self.len as u64 / PAGE_SIZE;
        let private = matches!(backing, Backing::Private | Backing::PrivateUndescribed);
        let numbered = if private { 0..pages + 2 * MARGIN } else { 0..MARGIN };
        numbered.chain(pages + MARGIN..pages + 2 * MARGIN).all(|page| {
            let mut found = [0; PAGE_SIZE as usize];
            file.read_exact_at(&mut found, page * PAGE_SIZE).unwrap();
            found == number(page)
        })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and `GuestRam`, which held this, is gone.
        unsafe { rustix::mm::munmap(self.host.as_ptr().cast(), self.len) }.unwrap();
    }
}

/// The contents of page `page` of a file: of every fifth, zeros.
pub(crate) fn number(page: u64) -> [u8; PAGE_SIZE as usize] {
    [if page.is_multiple_of(5) { 0 } else { u8::try_from(page % 250).unwrap() }; PAGE_SIZE as usize]
}

/// Lends `regions`, which are mapped as long as `lender` lives.
pub(crate) fn lend(
    regions: Vec<LentRegion>,
    lender: Arc<dyn Any + Send + Sync>,
) -> Result<GuestRam, MemoryError> {
    // SAFETY: each region is a whole `Mapped` that `lender` owns, as it was mapped; nobody refers to it, and nobody pins it.
    unsafe { GuestRam::lent(regions, lender) }
}
