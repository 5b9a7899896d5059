//! Guest RAM of this VMM: private anonymous memory below the hole, a shared memfd above it, both vm-memory's.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::FromRawFd;

use vfio_migration_guest_image::RamPart;
use vfio_migration_guest_image::map::RAM_HIGH_BASE;
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::error::{Error, system};

/// Guest memory, with a bitmap of this VMM's own writes.
pub(crate) type Memory = GuestMemoryMmap<AtomicBitmap>;

/// The RAM: anonymous memory from 0 on, a memfd from 4 GiB on.
pub(crate) const PARTS: [RamPart; 2] =
    [RamPart { gpa: 0, len: 32 << 20 }, RamPart { gpa: RAM_HIGH_BASE, len: 32 << 20 }];

/// Maps both regions. With `huge` the upper one is made of 2 MiB pages, which the host must have reserved.
pub(crate) fn map(huge: bool) -> Result<Memory, Error> {
    let [low, high] = PARTS;
    let anonymous = region(low, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None)?;
    let file = memfd(c"foreign-ram", high.len, huge)?;
    let shared = region(high, libc::MAP_SHARED, Some(file))?;
    GuestMemoryMmap::from_regions(vec![anonymous, shared]).map_err(Error::other("laying out RAM"))
}

fn region(part: RamPart, flags: i32, file: Option<File>) -> Result<GuestRegionMmap<AtomicBitmap>, Error> {
    let len = usize::try_from(part.len).map_err(Error::other("mapping RAM"))?;
    let mut builder = MmapRegionBuilder::new_with_bitmap(len, AtomicBitmap::with_len(len))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags);
    if let Some(file) = file {
        builder = builder.with_file_offset(FileOffset::new(file, 0));
    }
    let mapped = builder.build().map_err(Error::other("mapping RAM"))?;
    GuestRegionMmap::new(mapped, GuestAddress(part.gpa)).ok_or(Error::Text("RAM past the address space"))
}

fn memfd(name: &CStr, len: u64, huge: bool) -> Result<File, Error> {
    let flags = libc::MFD_CLOEXEC | if huge { libc::MFD_HUGETLB } else { 0 };
    // SAFETY: the name is a C string; the call has no other effect on this process than a new descriptor.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(system("making a memfd"));
    }
    // SAFETY: the descriptor was just made and is nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).map_err(Error::other("sizing a memfd"))?;
    Ok(file)
}
