//! Runs of guest memory as one system call moves them: no loop, no retry, and no word on what an errno means.

use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use crate::area::{load, store};

/// Most pieces per system call: the kernel's UIO_MAXIOV (`include/uapi/linux/uio.h`).
const MAX_PIECES: usize = 1024;

/// Runs of guest memory in the order in which they travel, made by [`GuestRam::pieces`](crate::GuestRam::pieces).
///
/// [`send`](Self::send) and [`receive`](Self::receive) are one system call each and move what that call moves;
/// [`advance`](Self::advance) says that so much has been moved. The memory may change meanwhile: the guest's dirty log says so.
#[derive(Debug)]
pub struct Pieces<'a> {
    list: Vec<Piece<'a>>,
    /// Those before this one have been moved.
    first: usize,
}

/// Address and length, laid out as `struct iovec`, of memory that stays mapped for `'a`.
///
/// Not an [`IoSlice`], because that is made from a reference, which guest memory must never have.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    base: *mut u8,
    len: usize,
    memory: PhantomData<&'a ()>,
}

// `IoSlice` and `IoSliceMut` are documented to have the layout of `struct iovec`; so has `Piece`.
const _: () = assert!(size_of::<Piece<'_>>() == size_of::<IoSlice<'_>>());
const _: () = assert!(align_of::<Piece<'_>>() == align_of::<IoSlice<'_>>());
const _: () = assert!(size_of::<Piece<'_>>() == size_of::<IoSliceMut<'_>>());

impl<'a> Pieces<'a> {
    pub(crate) fn new(list: Vec<Piece<'a>>) -> Self {
        let mut pieces = Self { list, first: 0 };
        pieces.advance(0);
        pieces
    }

    /// Bytes that are left to move.
    pub fn left(&self) -> u64 {
        self.rest().iter().map(|piece| piece.len as u64).sum()
    }

    /// Writes what is left of a frame's `head`, then the pieces, to a socket: one `sendmsg`, and no SIGPIPE. Returns the
    /// bytes that it took, of the head first. A hole that is sent gets allocated.
    ///
    /// # Errors
    /// The errno of the call. EFAULT: the memory itself cannot be read.
    pub fn send(&self, to: BorrowedFd<'_>, head: &[u8]) -> Result<usize, Errno> {
        let mut batch = Vec::with_capacity(MAX_PIECES.min(self.rest().len() + 1));
        if !head.is_empty() {
            batch.push(Piece { base: head.as_ptr().cast_mut(), len: head.len(), memory: PhantomData });
        }
        batch.extend(self.rest().iter().take(MAX_PIECES - batch.len()));
        // SAFETY: same layout (asserted above), and every piece stays mapped for `'a`; an IoSlice holds the pair and makes no
        // reference of it until asked to, and what follows only hands it to the kernel.
        let slices = unsafe { std::slice::from_raw_parts(batch.as_ptr().cast::<IoSlice<'_>>(), batch.len()) };
        rustix::net::sendmsg(to, slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL)
    }

    /// Reads into the pieces: one `readv`. Returns the bytes that came, 0 at the end of the stream. Not logged as dirty.
    ///
    /// # Errors
    /// The errno of the call. EFAULT: the memory itself cannot be written.
    pub fn receive(&self, from: BorrowedFd<'_>) -> Result<usize, Errno> {
        let mut batch: Vec<Piece<'a>> = self.rest().iter().take(MAX_PIECES).copied().collect();
        let (base, len) = (batch.as_mut_ptr().cast::<IoSliceMut<'_>>(), batch.len());
        // SAFETY: same layout (asserted above), and every piece is writable memory that stays mapped for `'a` and to which no
        // reference exists; an IoSliceMut holds the pair and makes no reference of it until asked to, which nobody does.
        rustix::io::readv(from, unsafe { std::slice::from_raw_parts_mut(base, len) })
    }

    /// Copies the first bytes of what is left, as many as `into` holds, and returns how many: for those who need them in one piece,
    /// to encrypt them say.
    pub fn copy_out(&self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.rest() {
            let rest = into.get_mut(done..).unwrap_or_default();
            let step = piece.len.min(rest.len());
            if let (Some(base), Some(to)) = (NonNull::new(piece.base), rest.get_mut(..step)) {
                // SAFETY: the piece is memory that stays mapped for `'a`, of at least `step` bytes, and is accessed through
                // atomics alone.
                unsafe { load(base, to) };
            }
            done += step;
        }
        done
    }

    /// Copies as much of `bytes` into the pieces as they have room for, and advances by it; returns how much that was. For
    /// what was read ahead of them, or decrypted. Not logged as dirty.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let (Some(piece), Some(rest)) =
            (self.rest().first(), bytes.get(done..).filter(|rest| !rest.is_empty()))
        {
            let step = piece.len.min(rest.len());
            if let (Some(base), Some(from)) = (NonNull::new(piece.base), rest.get(..step)) {
                // SAFETY: the piece is writable memory that stays mapped for `'a`, of at least `step` bytes, and is accessed
                // through atomics alone.
                unsafe { store(base, from) };
            }
            self.advance(step);
            done += step;
        }
        done
    }

    /// Takes `moved` bytes off the front, once they have been moved.
    pub fn advance(&mut self, mut moved: usize) {
        while let Some(piece) = self.list.get_mut(self.first) {
            let step = moved.min(piece.len);
            // Within the piece or one past its end; wrapping because that needs no proof of provenance.
            piece.base = piece.base.wrapping_add(step);
            piece.len -= step;
            moved -= step;
            if piece.len > 0 {
                break;
            }
            self.first += 1;
        }
    }

    fn rest(&self) -> &[Piece<'a>] {
        self.list.get(self.first..).unwrap_or_default()
    }
}

impl Piece<'_> {
    /// # Safety
    /// `len` bytes from `base` stay mapped and writable for the piece's lifetime, and no reference to them exists.
    pub(crate) unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base: base.as_ptr(), len, memory: PhantomData }
    }
}
