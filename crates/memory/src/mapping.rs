//! A shared mapping of somebody else's memory.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::fs::{FileType, SealFlags};

use crate::area::{Area, as_usize};
use crate::error::MemoryError;

/// A part of a file that another process gave us, mapped shared: a BAR whose memory a vfio-user server offers, or a
/// piece of guest RAM that a client mapped for DMA.
///
/// Safe to share between threads, and safe while the other side writes: see the crate documentation. What it cannot
/// guard against is the other side shrinking the file afterwards, which turns the next access into SIGBUS; a file for
/// which [`can_shrink`](Self::can_shrink) is true is to be taken only from a peer that is trusted that far.
#[derive(Debug)]
pub struct Mapping {
    area: Area,
    /// Bytes between the start of the mapping, which is a page's, and the byte asked for.
    skip: u64,
    len: u64,
    writable: bool,
    can_shrink: bool,
}

impl Mapping {
    /// Maps `len` bytes (at least one) of `fd` from byte `offset`, for reading, and with `write` for writing as well.
    /// The descriptor may be closed afterwards.
    ///
    /// # Errors
    /// [`MemoryError::FileTooSmall`] for a regular file (a memory file is one) that ends before the range does.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, len: u64, write: bool) -> Result<Self, MemoryError> {
        let stat = rustix::fs::fstat(fd).map_err(MemoryError::system("examining a file to be mapped"))?;
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let end = offset.checked_add(len).filter(|end| i64::try_from(*end).is_ok());
        let Some(end) = end.filter(|_| len > 0) else {
            return Err(MemoryError::OutOfBounds { offset, len, size });
        };
        if regular && end > size {
            return Err(MemoryError::FileTooSmall { offset, len, size });
        }
        let skip = offset % rustix::param::page_size() as u64;
        let area = Area::map(fd, offset - skip, as_usize(len + skip), write)
            .map_err(MemoryError::system("mapping shared memory"))?;
        let can_shrink =
            regular && !rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        Ok(Self { area, skip, len, writable: write, can_shrink })
    }

    /// Bytes, at least one.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it was mapped for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether the file could still be made shorter than the mapping by whoever else holds it: it is a regular file
    /// without F_SEAL_SHRINK.
    pub fn can_shrink(&self) -> bool {
        self.can_shrink
    }

    /// Address of the first byte, for KVM_SET_USER_MEMORY_REGION. The memory stays mapped as long as this value lives;
    /// whoever uses the address answers for that.
    pub fn host_address(&self) -> NonNull<u8> {
        self.area.pointer(self.skip, self.len).expect("the mapping was made of skip + len bytes")
    }

    /// Copies `into.len()` bytes out. Aligned words are read whole; longer pieces may be torn by others' writes.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.area.read(self.at(offset, into.len() as u64)?, into)
    }

    /// Copies `from` in; aligned words are written whole.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.area.write(self.at_mut(offset, from.len() as u64)?, from)
    }

    /// Reads the aligned 32-bit word at `offset` in one access (acquire). In the host's byte order, as all of these.
    pub fn read_u32(&self, offset: u64) -> Result<u32, MemoryError> {
        self.area.load_u32(self.at(offset, 4)?)
    }

    /// Writes the aligned 32-bit word at `offset` in one access, after all that was written before it (release).
    pub fn write_u32(&self, offset: u64, value: u32) -> Result<(), MemoryError> {
        self.area.store_u32(self.at_mut(offset, 4)?, value)
    }

    /// Reads the aligned 64-bit word at `offset` in one access (acquire).
    pub fn read_u64(&self, offset: u64) -> Result<u64, MemoryError> {
        self.area.load_u64(self.at(offset, 8)?)
    }

    /// Writes the aligned 64-bit word at `offset` in one access, after all that was written before it (release).
    pub fn write_u64(&self, offset: u64, value: u64) -> Result<(), MemoryError> {
        self.area.store_u64(self.at_mut(offset, 8)?, value)
    }

    fn at(&self, offset: u64, len: u64) -> Result<u64, MemoryError> {
        if offset > self.len || len > self.len - offset {
            return Err(MemoryError::OutOfBounds { offset, len, size: self.len });
        }
        Ok(self.skip + offset)
    }

    fn at_mut(&self, offset: u64, len: u64) -> Result<u64, MemoryError> {
        if !self.writable {
            return Err(MemoryError::ReadOnly);
        }
        self.at(offset, len)
    }
}
