//! One mapping, and the only code that dereferences it.

use std::any::Any;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::error::MemoryError;

const WORD: usize = size_of::<u64>();

/// A mapping: one of our own, shared and unmapped when dropped, or one that somebody lent, who unmaps it.
///
/// Others — vCPUs, devices, processes — write the memory at any time, so it is only ever accessed through atomics of
/// one byte or one aligned word: no reference to it is made, and a race gives a stale or torn value, never undefined
/// behaviour on this side.
pub(crate) struct Area {
    base: NonNull<u8>,
    len: usize,
    /// Keeps a lent mapping where it is; `None` for one of our own.
    lender: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and stays where it is until it is dropped; a lender may be
// sent by its bound.
unsafe impl Send for Area {}
// SAFETY: every access through `&Area` is atomic (see the type), so threads may race on it.
unsafe impl Sync for Area {}

impl Area {
    /// Maps `len` bytes of `fd` from `offset`, a multiple of the page size, shared. No memory is set aside for it.
    pub(crate) fn map(fd: BorrowedFd<'_>, offset: u64, len: usize, write: bool) -> Result<Self, Errno> {
        Self::map_with(fd, offset, len, write, MapFlags::NORESERVE)
    }

    /// The same, for reading and writing, with the memory set aside: for huge pages, of which a touch that finds none is
    /// a SIGBUS.
    pub(crate) fn map_reserved(fd: BorrowedFd<'_>, len: usize) -> Result<Self, Errno> {
        Self::map_with(fd, 0, len, true, MapFlags::empty())
    }

    fn map_with(
        fd: BorrowedFd<'_>,
        offset: u64,
        len: usize,
        write: bool,
        flags: MapFlags,
    ) -> Result<Self, Errno> {
        let protection = if write { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        let flags = MapFlags::SHARED | flags;
        // SAFETY: the address is the kernel's choice, so the mapping replaces nothing; no reference to it is ever made.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, protection, flags, fd, offset) }?;
        Ok(Self { base: NonNull::new(base.cast()).ok_or(Errno::NOMEM)?, len, lender: None })
    }

    /// Takes up `len` bytes that somebody else has mapped.
    ///
    /// # Safety
    /// As long as `lender` lives they are mapped at `base`, readable and writable, and nobody holds a reference to them.
    pub(crate) unsafe fn lent(base: NonNull<u8>, len: usize, lender: Arc<dyn Any + Send + Sync>) -> Self {
        Self { base, len, lender: Some(lender) }
    }

    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    /// Address of the first byte, as a number.
    pub(crate) fn address(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// Address of `len` bytes at `offset`, all of them inside the mapping.
    pub(crate) fn pointer(&self, offset: u64, len: u64) -> Result<NonNull<u8>, MemoryError> {
        let size = self.len();
        if offset > size || len > size - offset {
            return Err(MemoryError::OutOfBounds { offset, len, size });
        }
        // SAFETY: offset <= len of the mapping, so the result stays inside it or one past its end.
        Ok(unsafe { self.base.add(as_usize(offset)) })
    }

    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.pointer(offset, into.len() as u64)?;
        // SAFETY: `pointer` has checked that all of `into.len()` bytes from `from` are mapped.
        unsafe { load(from, into) };
        Ok(())
    }

    /// The caller has made sure that the mapping is writable.
    pub(crate) fn write(&self, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        let to = self.pointer(offset, from.len() as u64)?;
        // SAFETY: `pointer` has checked that all of `from.len()` bytes from `to` are mapped; the caller has made sure that
        // the mapping is writable.
        unsafe { store(to, from) };
        Ok(())
    }

    /// One aligned access, ordered before what follows it.
    pub(crate) fn load_u32(&self, offset: u64) -> Result<u32, MemoryError> {
        let at = self.aligned(offset, size_of::<u32>())?.cast::<u32>();
        // SAFETY: four mapped, aligned bytes (checked by `aligned`), accessed by nobody here but through atomics.
        Ok(unsafe { AtomicU32::from_ptr(at.as_ptr()) }.load(Ordering::Acquire))
    }

    /// One aligned access, ordered after what precedes it. The caller has made sure that the mapping is writable.
    pub(crate) fn store_u32(&self, offset: u64, value: u32) -> Result<(), MemoryError> {
        let at = self.aligned(offset, size_of::<u32>())?.cast::<u32>();
        // SAFETY: as in `load_u32`, and writable by this function's contract.
        unsafe { AtomicU32::from_ptr(at.as_ptr()) }.store(value, Ordering::Release);
        Ok(())
    }

    /// One aligned access, ordered before what follows it.
    pub(crate) fn load_u64(&self, offset: u64) -> Result<u64, MemoryError> {
        let at = self.aligned(offset, WORD)?.cast::<u64>();
        // SAFETY: eight mapped, aligned bytes (checked by `aligned`), accessed by nobody here but through atomics.
        Ok(unsafe { AtomicU64::from_ptr(at.as_ptr()) }.load(Ordering::Acquire))
    }

    /// One aligned access, ordered after what precedes it. The caller has made sure that the mapping is writable.
    pub(crate) fn store_u64(&self, offset: u64, value: u64) -> Result<(), MemoryError> {
        let at = self.aligned(offset, WORD)?.cast::<u64>();
        // SAFETY: as in `load_u64`, and writable by this function's contract.
        unsafe { AtomicU64::from_ptr(at.as_ptr()) }.store(value, Ordering::Release);
        Ok(())
    }

    /// Whether all of `len` bytes at `offset`, both multiples of 64, are zero. Stops at the first that is not.
    pub(crate) fn is_zero(&self, offset: u64, len: u64) -> Result<bool, MemoryError> {
        const STRIDE: usize = 64;
        let at = self.pointer(offset, len)?;
        if !at.addr().get().is_multiple_of(WORD) || !len.is_multiple_of(STRIDE as u64) {
            return Err(MemoryError::Misaligned { offset, len, align: STRIDE as u64 });
        }
        let zero = |line: usize| {
            // SAFETY: `pointer` has checked the whole length, `line` counts 64-byte strides inside it, and the words
            // are aligned (checked above).
            let line = unsafe { at.add(line * STRIDE) }.cast::<u64>();
            let any = (0..STRIDE / WORD).fold(0, |any, word| {
                // SAFETY: as above: one of the eight words of a stride that lies inside the mapping.
                any | unsafe { AtomicU64::from_ptr(line.add(word).as_ptr()) }.load(Ordering::Relaxed)
            });
            any == 0
        };
        Ok((0..as_usize(len) / STRIDE).all(zero))
    }

    /// Allocates every page of the area now, not when it is first written.
    pub(crate) fn populate(&self) -> Result<(), Errno> {
        // SAFETY: the range is this mapping's own, and populating it for writing changes no byte.
        unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.len, Advice::LinuxPopulateWrite) }
    }

    /// Writes to every page of `page` bytes without changing a byte of it, so that it is allocated.
    pub(crate) fn touch(&self, page: u64) -> Result<(), MemoryError> {
        for offset in (0..self.len()).step_by(as_usize(page)) {
            let at = self.pointer(offset, 1)?;
            // SAFETY: a mapped byte (checked by `pointer`) of an area that is writable, accessed through atomics alone.
            unsafe { AtomicU8::from_ptr(at.as_ptr()) }.fetch_or(0, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives whole pages back to the host (MADV_DONTNEED): of a private anonymous mapping, they read as zero afterwards.
    pub(crate) fn give_back(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        let at = self.pointer(offset, len)?;
        // SAFETY: the range is inside the mapping (checked by `pointer`), and nobody refers to it: to whoever reads it, it
        // is as if zeros had been written.
        unsafe { rustix::mm::madvise(at.as_ptr().cast(), as_usize(len), Advice::LinuxDontNeed) }
            .map_err(MemoryError::system("giving pages of guest RAM back to the host"))
    }

    fn aligned(&self, offset: u64, size: usize) -> Result<NonNull<u8>, MemoryError> {
        let at = self.pointer(offset, size as u64)?;
        if !at.addr().get().is_multiple_of(size) {
            return Err(MemoryError::Misaligned { offset, len: size as u64, align: size as u64 });
        }
        Ok(at)
    }
}

impl fmt::Debug for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.lender.is_some() { "lent" } else { "mapped" };
        write!(f, "Area({kind} {:p}+{:#x})", self.base, self.len)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.lender.is_some() {
            return;
        }
        // SAFETY: exactly what `map` mapped; nothing borrowed from it outlives `self`, except addresses whose users
        // took on by contract not to outlive it.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping: {unmapped:?}");
    }
}

/// Copies `into.len()` bytes from `from` through atomics: aligned words are read whole.
///
/// # Safety
/// The `into.len()` bytes from `from` are mapped, and nobody holds a reference to them.
pub(crate) unsafe fn load(from: NonNull<u8>, into: &mut [u8]) {
    let (head, words) = split(from, into.len());
    let (first, rest) = into.split_at_mut(head);
    let (middle, last) = rest.split_at_mut(words * WORD);
    // SAFETY: by this function's contract; `split` aligns the middle part to a word, and the three parts add up to the length.
    unsafe {
        load_bytes(from, first);
        let mut at = from.add(head).cast::<u64>();
        for word in middle.as_chunks_mut::<WORD>().0 {
            *word = AtomicU64::from_ptr(at.as_ptr()).load(Ordering::Relaxed).to_ne_bytes();
            at = at.add(1);
        }
        load_bytes(at.cast(), last);
    }
}

/// Copies `from` to `to` through atomics: aligned words are written whole.
///
/// # Safety
/// `to` and the `from.len()` bytes from there are mapped and writable, and no reference to them exists.
pub(crate) unsafe fn store(to: NonNull<u8>, from: &[u8]) {
    let (head, words) = split(to, from.len());
    let (first, rest) = from.split_at(head);
    let (middle, last) = rest.split_at(words * WORD);
    // SAFETY: by this function's contract; `split` aligns the middle part to a word, and the three parts add up to the length.
    unsafe {
        store_bytes(to, first);
        let mut at = to.add(head).cast::<u64>();
        for word in middle.as_chunks::<WORD>().0 {
            AtomicU64::from_ptr(at.as_ptr()).store(u64::from_ne_bytes(*word), Ordering::Relaxed);
            at = at.add(1);
        }
        store_bytes(at.cast(), last);
    }
}

/// The number of single bytes before the first aligned word, and of whole words after them.
fn split(start: NonNull<u8>, len: usize) -> (usize, usize) {
    let head = (start.addr().get().wrapping_neg() % WORD).min(len);
    (head, (len - head) / WORD)
}

/// # Safety
/// `from` and the `into.len()` bytes from there are mapped.
unsafe fn load_bytes(from: NonNull<u8>, into: &mut [u8]) {
    for (index, byte) in into.iter_mut().enumerate() {
        // SAFETY: by this function's contract.
        *byte = unsafe { AtomicU8::from_ptr(from.add(index).as_ptr()) }.load(Ordering::Relaxed);
    }
}

/// # Safety
/// `to` and the `from.len()` bytes from there are mapped and writable.
unsafe fn store_bytes(to: NonNull<u8>, from: &[u8]) {
    for (index, byte) in from.iter().enumerate() {
        // SAFETY: by this function's contract.
        unsafe { AtomicU8::from_ptr(to.add(index).as_ptr()) }.store(*byte, Ordering::Relaxed);
    }
}

/// Sizes of memory that exists, or that a system call then refuses.
#[expect(clippy::cast_possible_truncation, reason = "64-bit hosts only, asserted in lib.rs")]
pub(crate) const fn as_usize(n: u64) -> usize {
    n as usize
}
