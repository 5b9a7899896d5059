//! Moving guest memory to and from descriptors without a copy on this side.

use std::io::{IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags};

use crate::error::MemoryError;

/// Most pieces per system call: the kernel's UIO_MAXIOV (`include/uapi/linux/uio.h`).
const MAX_PIECES: usize = 1024;

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

impl<'a> Piece<'a> {
    /// Bytes that are only read, whatever the call.
    pub(crate) fn bytes(bytes: &'a [u8]) -> Self {
        Self { base: bytes.as_ptr().cast_mut(), len: bytes.len(), memory: PhantomData }
    }

    /// # Safety
    /// `len` bytes from `base` stay mapped for `'a`; for [`receive`], writable.
    pub(crate) unsafe fn raw(base: NonNull<u8>, len: usize) -> Self {
        Self { base: base.as_ptr(), len, memory: PhantomData }
    }
}

/// Writes all of `pieces`, in order.
///
/// EINTR and short writes are gone over; a non-blocking descriptor is waited for. A socket whose peer is gone gives
/// EPIPE and no signal.
pub(crate) fn send(to: BorrowedFd<'_>, pieces: &mut [Piece<'_>]) -> Result<(), MemoryError> {
    let mut socket = true;
    transfer(to, pieces, PollFlags::OUT, |batch| {
        // SAFETY: same layout (asserted above), same lifetime; an IoSlice holds the pair and makes no reference of it
        // until asked to, and what follows only hands it to the kernel.
        let slices = unsafe { std::slice::from_raw_parts(batch.as_ptr().cast::<IoSlice<'_>>(), batch.len()) };
        if socket {
            let sent =
                rustix::net::sendmsg(to, slices, &mut SendAncillaryBuffer::default(), SendFlags::NOSIGNAL);
            if sent != Err(Errno::NOTSOCK) {
                return sent;
            }
            socket = false;
        }
        rustix::io::writev(to, slices)
    })
    .map_err(|stopped| match stopped {
        Stopped::Failed(source) => MemoryError::System { doing: "sending guest memory".into(), source },
        // Only files can take nothing without an error: a full one, in effect.
        Stopped::Ended(_) => {
            MemoryError::System { doing: "sending guest memory".into(), source: Errno::NOSPC }
        }
    })
}

/// Fills all of `pieces`, in order.
///
/// # Safety
/// Every piece is writable memory to which no reference exists.
pub(crate) unsafe fn receive(from: BorrowedFd<'_>, pieces: &mut [Piece<'_>]) -> Result<(), MemoryError> {
    transfer(from, pieces, PollFlags::IN, |batch| {
        let (base, len) = (batch.as_mut_ptr().cast::<IoSliceMut<'_>>(), batch.len());
        // SAFETY: same layout (asserted above), same lifetime, and by this function's contract writable memory; an
        // IoSliceMut holds the pair and makes no reference of it until asked to, which nobody does.
        rustix::io::readv(from, unsafe { std::slice::from_raw_parts_mut(base, len) })
    })
    .map_err(|stopped| match stopped {
        Stopped::Failed(source) => MemoryError::System { doing: "receiving guest memory".into(), source },
        Stopped::Ended(missing) => MemoryError::UnexpectedEof { missing },
    })
}

enum Stopped {
    Failed(Errno),
    /// A call moved nothing; this many bytes were still to move.
    Ended(u64),
}

fn transfer(
    fd: BorrowedFd<'_>,
    mut pieces: &mut [Piece<'_>],
    ready: PollFlags,
    mut call: impl FnMut(&mut [Piece<'_>]) -> Result<usize, Errno>,
) -> Result<(), Stopped> {
    loop {
        pieces = skip_empty(pieces);
        if pieces.is_empty() {
            return Ok(());
        }
        let batch = pieces.len().min(MAX_PIECES);
        match call(&mut pieces[..batch]) {
            Ok(0) => return Err(Stopped::Ended(pieces.iter().map(|piece| piece.len as u64).sum())),
            Ok(moved) => pieces = advance(pieces, moved),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, ready)], None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(Stopped::Failed(errno)),
                }
            }
            Err(errno) => return Err(Stopped::Failed(errno)),
        }
    }
}

/// What is left of `pieces` after `moved` bytes.
fn advance<'p, 'a>(mut pieces: &'p mut [Piece<'a>], mut moved: usize) -> &'p mut [Piece<'a>] {
    while let Some(first) = pieces.first_mut() {
        let step = moved.min(first.len);
        // Within the piece or one past its end; wrapping because that needs no proof of provenance.
        first.base = first.base.wrapping_add(step);
        first.len -= step;
        moved -= step;
        if moved == 0 {
            break;
        }
        pieces = &mut pieces[1..];
    }
    pieces
}

fn skip_empty<'p, 'a>(pieces: &'p mut [Piece<'a>]) -> &'p mut [Piece<'a>] {
    let empty = pieces.iter().take_while(|piece| piece.len == 0).count();
    &mut pieces[empty..]
}
