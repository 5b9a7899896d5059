//! Whole messages out, and what is owed of one that was begun.

use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{MutexGuard, TryLockError};
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::error::ConnError;
use super::inbox::Rx;
use super::socket::{send_some, wait};
use super::{Conn, TRY_AGAIN, deadline, lock};
use crate::codec::{Command, HEADER_SIZE, Header, Kind};

/// The most bytes that are owed to a peer that reads nothing. It asked for all of them.
const MAX_UNSENT: usize = 16 << 20;

impl Conn {
    /// Sends what is left of a message that was begun.
    pub(super) fn send_rest(&self, rx: &mut Rx, deadline: Instant) -> Result<(), ConnError> {
        let mut tx = self.lock_tx(rx)?;
        if tx.is_empty() {
            return Ok(());
        }
        self.send_bytes(Some(rx), &mut tx, &mut [], &[], deadline, &mut false)
    }

    /// The right to send. Whoever holds it may need somebody to read.
    pub(super) fn lock_tx(&self, rx: &mut Rx) -> Result<MutexGuard<'_, Vec<u8>>, ConnError> {
        loop {
            match self.tx.try_lock() {
                Ok(tx) => return Ok(tx),
                Err(TryLockError::Poisoned(tx)) => return Ok(tx.into_inner()),
                Err(TryLockError::WouldBlock) if rx.has_room() => match self.read(rx, deadline(TRY_AGAIN)) {
                    Ok(message) => rx.place(message)?,
                    Err(ConnError::Timeout) => {}
                    Err(error) => return Err(error),
                },
                Err(TryLockError::WouldBlock) => return Ok(lock(&self.tx)),
            }
        }
    }

    /// Sends one message. The caller holds `tx`, and lends `rx` if it holds that too. `begun` is set once a byte is out.
    #[expect(clippy::too_many_arguments, reason = "a message's fields, used in two places")]
    pub(super) fn send(
        &self,
        rx: Option<&mut Rx>,
        unsent: &mut Vec<u8>,
        id: u16,
        command: Command,
        kind: Kind,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
        begun: &mut bool,
    ) -> Result<(), ConnError> {
        let len = parts.iter().fold(HEADER_SIZE, |len, part| len.saturating_add(part.len()));
        let size = u32::try_from(len).map_err(|_| ConnError::Violation(format!("{len} bytes to be sent")))?;
        let header = Header { id, command, size, kind }.encode();
        let mut slices: Vec<IoSlice<'_>> = std::iter::once(&header[..])
            .chain(parts.iter().copied())
            .filter(|part| !part.is_empty())
            .map(IoSlice::new)
            .collect();
        self.send_bytes(rx, unsent, &mut slices, fds, deadline, begun)
    }

    /// Sends `unsent`, then `slices`. If time runs out, what is left goes back into `unsent`; that of `slices` only if it is
    /// `owed`, as it is once a byte of them is out.
    pub(super) fn send_bytes(
        &self,
        mut rx: Option<&mut Rx>,
        unsent: &mut Vec<u8>,
        slices: &mut [IoSlice<'_>],
        fds: &[BorrowedFd<'_>],
        deadline: Instant,
        owed: &mut bool,
    ) -> Result<(), ConnError> {
        if !unsent.is_empty() {
            let rest = std::mem::take(unsent);
            let mut front: &mut [IoSlice<'_>] = &mut [IoSlice::new(&rest)];
            let sent = self.send_slices(rx.as_deref_mut(), &mut front, &[], deadline, &mut true);
            if sent.is_err() {
                keep(unsent, front)?;
                if *owed {
                    keep(unsent, slices)?;
                }
            }
            sent?;
        }
        let mut slices = slices;
        let sent = self.send_slices(rx, &mut slices, fds, deadline, owed);
        if sent.is_err() && *owed {
            keep(unsent, slices)?;
        }
        sent
    }

    fn send_slices(
        &self,
        mut rx: Option<&mut Rx>,
        slices: &mut &mut [IoSlice<'_>],
        mut fds: &[BorrowedFd<'_>],
        deadline: Instant,
        begun: &mut bool,
    ) -> Result<(), ConnError> {
        while !slices.is_empty() {
            match send_some(&self.socket, slices, fds) {
                Ok(sent) => {
                    // Descriptors go with the first byte.
                    fds = &[];
                    *begun = true;
                    IoSlice::advance_slices(slices, sent);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match rx.as_deref_mut() {
                    Some(rx) => self.wait_to_send(Some(rx), deadline, deadline)?,
                    None => {
                        let mut own = self.rx.try_lock().ok();
                        // Another thread reads, but may be done before this one.
                        let until =
                            if own.is_some() { deadline } else { deadline.min(Instant::now() + TRY_AGAIN) };
                        self.wait_to_send(own.as_deref_mut(), until, deadline)?;
                    }
                },
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ConnError::closed("the peer closed it")),
                Err(errno) => return Err(ConnError::system("sending", errno)),
            }
        }
        Ok(())
    }

    /// Waits until the socket takes more or `until` has passed, and reads a message if one comes first.
    fn wait_to_send(&self, rx: Option<&mut Rx>, until: Instant, deadline: Instant) -> Result<(), ConnError> {
        let interrupt = self.interrupt.as_ref().map(|fd| fd.as_fd());
        let rx = rx.filter(|rx| rx.has_room());
        let wanted = if rx.is_some() { PollFlags::OUT | PollFlags::IN } else { PollFlags::OUT };
        let ready = match wait(&self.socket, interrupt, wanted, until) {
            Err(ConnError::Timeout) if until < deadline => return Ok(()),
            ready => ready?,
        };
        if let (Some(rx), true, false) = (rx, ready.readable, ready.writable) {
            // No longer than what has come: the peer may go on only when it is sent something.
            match self.read(rx, Instant::now()) {
                Ok(message) => rx.place(message)?,
                Err(ConnError::Timeout) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Keeps what is left to be sent.
fn keep(unsent: &mut Vec<u8>, slices: &[IoSlice<'_>]) -> Result<(), ConnError> {
    let len = slices.iter().fold(unsent.len(), |len, slice| len.saturating_add(slice.len()));
    if len > MAX_UNSENT {
        return Err(ConnError::Violation("it asks for more and more, and takes nothing".into()));
    }
    for slice in slices {
        unsent.extend_from_slice(slice);
    }
    Ok(())
}
