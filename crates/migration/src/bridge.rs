//! A way in for streams that are no sockets: a VMM's own TLS, frames over vsock, a pair of pipes.

use std::fmt;
use std::io::{Error, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::Builder;

use rustix::event::{PollFd, PollFlags, poll};
use vfio_migration_types::error_chain;

/// Bytes that are carried over at a time.
const PIECE: usize = 256 << 10;

/// A connected stream of bytes, in order and without loss, both ways. Its calls block, and each direction has a thread of its own.
pub trait ByteStream: Send + Sync {
    /// Gives some bytes, at most as many as `into` holds; 0 at the end of the stream.
    ///
    /// # Errors
    /// It is broken, or did not end as it should (a TLS stream without close_notify).
    fn read(&self, into: &mut [u8]) -> Result<usize, Error>;

    /// Takes some of `from`, at least one byte; returns how many.
    ///
    /// # Errors
    /// It is broken.
    fn write(&self, from: &[u8]) -> Result<usize, Error>;

    /// Ends one direction, or both. Calls of that direction that block return before long, with an error or at the end of the stream.
    fn shutdown(&self, how: Shutdown);
}

/// A socket that carries what goes over `stream`, for [`Source::migrate_over`](crate::Source::migrate_over),
/// [`Destination::over`](crate::Destination::over), [`IncomingConnections::hand_over`](crate::IncomingConnections::hand_over) and a
/// [`ConnectionFactory`](crate::ConnectionFactory). It costs a copy and two threads, which end with the socket and the stream. To the
/// library it is a unix socket of this process: who is at the other end is what [`Security::Vouched`](crate::Security) says.
///
/// # Errors
/// The host has no descriptor or no thread left; `stream` is then shut down.
pub fn bridge(stream: Arc<dyn ByteStream>) -> Result<OwnedFd, Error> {
    let made = (|| {
        let (own, other) = UnixStream::pair()?;
        let (of_in, of_out) = (own.try_clone()?, own);
        let (from, to) = (Arc::clone(&stream), Arc::clone(&stream));
        Builder::new().name("bridge-in".into()).spawn(move || carry_in(&*from, of_in))?;
        Builder::new().name("bridge-out".into()).spawn(move || carry_out(&*to, of_out))?;
        Ok(other.into())
    })();
    if made.is_err() {
        // A thread that was made ends with it.
        stream.shutdown(Shutdown::Both);
    }
    made
}

/// What comes over the stream goes into the socket.
fn carry_in(stream: &dyn ByteStream, mut socket: UnixStream) {
    let mut buffer = vec![0; PIECE];
    let end = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(read) => {
                let Some(piece) = buffer.get(..read) else {
                    break Err(Error::other("more than was asked for"));
                };
                if socket.write_all(piece).is_err() {
                    // The session is over.
                    break Ok(());
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
    };
    match end {
        Ok(()) => drop(socket.shutdown(Shutdown::Write)),
        // Not an end of the stream: both directions are broken.
        Err(error) => {
            tracing::warn!(error = %error_chain(&error), "a stream that was handed over broke");
            drop(socket.shutdown(Shutdown::Both));
        }
    }
}

/// What the session sends goes over the stream.
fn carry_out(stream: &dyn ByteStream, mut socket: UnixStream) {
    let mut buffer = vec![0; PIECE];
    loop {
        let read = match socket.read(&mut buffer) {
            Ok(0) => break stream.shutdown(Shutdown::Write),
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break stream.shutdown(Shutdown::Write),
        };
        if let Err(error) = write_all(stream, buffer.get(..read).unwrap_or_default()) {
            tracing::warn!(error = %error_chain(&error), "a stream that was handed over broke");
            drop(socket.shutdown(Shutdown::Both));
            break;
        }
    }
    // Until the session has let go of its end: what is still read then is for nobody.
    let mut polled = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::empty())];
    let _ = rustix::io::retry_on_intr(|| poll(&mut polled, None));
    stream.shutdown(Shutdown::Both);
}

fn write_all(stream: &dyn ByteStream, mut from: &[u8]) -> Result<(), Error> {
    while !from.is_empty() {
        match stream.write(from) {
            Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
            Ok(written) => from = from.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl fmt::Debug for dyn ByteStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ByteStream")
    }
}
