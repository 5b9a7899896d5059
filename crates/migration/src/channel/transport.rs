//! The bytes of one connection: what a link's frames travel over.

use std::fmt;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};
use vfio_migration_memory::Pieces;

/// A connected stream. Reads and writes block until they have moved something, and move what they can; a
/// [`shutdown`](Self::shutdown) from another thread ends them.
pub(crate) trait Transport: fmt::Debug + Send + Sync {
    /// Takes some of `parts`, in order; returns how many bytes.
    fn write(&self, parts: &[IoSlice<'_>]) -> Result<usize, Errno>;

    /// Takes some of `head`, then of `body`, straight from memory; returns how many bytes. EFAULT: the memory's fault.
    fn write_pieces(&self, head: &[u8], body: &Pieces<'_>) -> Result<usize, Errno>;

    /// Gives some bytes, at most as many as `into` holds; 0 at the end of the stream.
    fn read(&self, into: &mut [u8]) -> Result<usize, Errno>;

    /// The same without waiting: EAGAIN when nothing is there.
    fn read_now(&self, into: &mut [u8]) -> Result<usize, Errno>;

    /// Gives some bytes straight into memory; 0 at the end of the stream. EFAULT: the memory's fault.
    fn read_pieces(&self, into: &Pieces<'_>) -> Result<usize, Errno>;

    /// Sleeps until something can be read (or written), for at most `limit`. Says whether something can.
    fn wait(&self, flags: PollFlags, limit: Duration) -> bool;

    /// Ends one direction, or both; what has arrived can still be read.
    fn shutdown(&self, how: Shutdown);

    /// The descriptor, to be waited for together with others.
    fn fd(&self) -> BorrowedFd<'_>;

    /// The address at the other end, for a person to read.
    fn peer(&self) -> String;
}

/// A stream socket as it is: TCP, unix, or one that was handed over.
#[derive(Debug)]
pub(crate) struct Socket(pub(crate) OwnedFd);

impl Transport for Socket {
    fn write(&self, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
        self.blocking(PollFlags::OUT, || {
            let mut control = SendAncillaryBuffer::default();
            rustix::net::sendmsg(&self.0, parts, &mut control, SendFlags::NOSIGNAL)
        })
    }

    fn write_pieces(&self, head: &[u8], body: &Pieces<'_>) -> Result<usize, Errno> {
        self.blocking(PollFlags::OUT, || body.send(self.fd(), head))
    }

    fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        self.blocking(PollFlags::IN, || {
            rustix::net::recv(&self.0, &mut *into, RecvFlags::empty()).map(|(read, _)| read)
        })
    }

    fn read_now(&self, into: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.0, &mut *into, RecvFlags::DONTWAIT).map(|(read, _)| read)
        })
    }

    fn read_pieces(&self, into: &Pieces<'_>) -> Result<usize, Errno> {
        self.blocking(PollFlags::IN, || into.receive(self.fd()))
    }

    fn wait(&self, flags: PollFlags, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        let mut polled = [PollFd::from_borrowed_fd(self.fd(), flags)];
        rustix::event::poll(&mut polled, Some(&limit)).is_ok_and(|ready| ready > 0)
    }

    fn shutdown(&self, how: Shutdown) {
        let _ = rustix::net::shutdown(&self.0, how);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn peer(&self) -> String {
        match rustix::net::getpeername(&self.0).map(|address| address.map(SocketAddr::try_from)) {
            Ok(Some(Ok(address))) => format!("tcp:{address}"),
            _ => "a unix socket".to_owned(),
        }
    }
}

impl Socket {
    /// Whoever else holds a descriptor that was handed over may have made it non-blocking.
    fn blocking(
        &self,
        ready: PollFlags,
        mut call: impl FnMut() -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        loop {
            match call() {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut polled = [PollFd::from_borrowed_fd(self.fd(), ready)];
                    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None))?;
                }
                done => return done,
            }
        }
    }
}
