//! A wire with somebody on it: what is sent passes, and is cut, held up or altered where that is wanted. Whoever alters
//! something knows how frames are made: their checksums are right.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{Shutdown, shutdown};
use vfio_migration::Uri;
use vfio_migration_types::Side;
use vfio_migration_wire::{Bulk, Frame, FrameHeader, HEADER_LEN, Message, PREAMBLE, encode_bulk};

/// Where the first connection is cut. Later ones pass whole.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    Never,
    /// After so many bytes to the destination.
    ToDestination(u64),
    /// After so many bytes to the source.
    ToSource(u64),
    /// Not cut, but nothing more is taken after so many bytes to the destination, while the other way goes on.
    StallToDestination(u64),
    /// Before the frame of this type to the source.
    BeforeFrameToSource(u16),
    /// Not cut, but one bit of a page is flipped on its way to the destination, in the first frame that begins at this page or
    /// behind it. The frame's checksum, if it has one, is left as it was.
    FlipToDestination(u64),
}

pub struct Proxy {
    pub at: Uri,
    /// Bytes forwarded to the destination.
    pub moved: Arc<AtomicU64>,
    /// Bytes forwarded to the source.
    pub moved_back: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Starts a proxy that meddles with bytes as they are on the wire.
pub fn start(to: &Uri, cut: Cut) -> Proxy {
    start_between(to, cut, |socket, _, _| socket.into())
}

/// Starts a proxy between what `end` makes of the connection from the source, and of the one to the destination: of the socket, who
/// is at its other end, and whether the connection is one that is meddled with.
pub fn start_between(
    to: &Uri,
    cut: Cut,
    end: impl Fn(TcpStream, Side, bool) -> OwnedFd + Send + 'static,
) -> Proxy {
    let Uri::Tcp { host, port } = to.clone() else { panic!("only TCP") };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let local = Uri::Tcp { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
    let moved = Arc::new(AtomicU64::new(0));
    let moved_back = Arc::new(AtomicU64::new(0));
    let (count, count_back) = (moved.clone(), moved_back.clone());
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        let mut cut = cut;
        loop {
            let Ok((source, _)) = listener.accept() else { return };
            if stopped.load(Ordering::Relaxed) {
                return;
            }
            let Ok(destination) = TcpStream::connect((host.as_str(), port)) else { continue };
            let (up, down) = match cut {
                Cut::Never => (Meddling::None, Meddling::None),
                Cut::ToDestination(bytes) => (Meddling::CutAfter(bytes), Meddling::None),
                Cut::StallToDestination(bytes) => (Meddling::StallAfter(bytes), Meddling::None),
                Cut::ToSource(bytes) => (Meddling::None, Meddling::CutAfter(bytes)),
                Cut::FlipToDestination(page) => (Meddling::FlipPage(page), Meddling::None),
                Cut::BeforeFrameToSource(number) => (Meddling::None, Meddling::CutBefore(number)),
            };
            let meddled = !matches!(cut, Cut::Never);
            cut = Cut::Never;
            let source = end(source, Side::Source, meddled);
            let destination = end(destination, Side::Destination, meddled);
            let other = (source.try_clone().unwrap(), destination.try_clone().unwrap());
            let (count, count_back) = (count.clone(), count_back.clone());
            let upward = std::thread::spawn(move || forward(other.0, other.1, up, &count).unwrap());
            forward(destination, source, down, &count_back).unwrap();
            upward.join().unwrap();
        }
    });
    Proxy { at: local, moved, moved_back, stop, thread: Some(thread) }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let Uri::Tcp { host, port } = &self.at else { return };
        drop(TcpStream::connect((host.as_str(), *port)));
        self.thread.take().map(JoinHandle::join);
    }
}

/// What is made of a piece of a device's state; with whether the guest was paused when it was sent.
pub type Alter = fn(paused: bool, piece: &mut Vec<u8>);

/// What becomes of one direction.
#[derive(Clone, Copy)]
pub enum Meddling {
    None,
    /// It is cut after so many bytes.
    CutAfter(u64),
    /// Nothing more is taken after so many bytes.
    StallAfter(u64),
    /// It is cut before the frame of this type.
    CutBefore(u16),
    /// Devices' state is altered.
    Alter(Alter),
    /// One bit is flipped of the pages that begin at this one or behind it, and no checksum is made anew.
    FlipPage(u64),
}

/// Passes on what comes `from` one end, until either is gone, and counts the bytes.
///
/// # Errors
/// What came is no frame.
pub fn forward(
    from: OwnedFd,
    to: OwnedFd,
    meddling: Meddling,
    count: &AtomicU64,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let (from, to) = (File::from(from), File::from(to));
    let cut = match meddling {
        Meddling::CutBefore(_) | Meddling::Alter(_) | Meddling::FlipPage(_) => frames(&from, &to, meddling),
        Meddling::None => Ok(bytes(&from, &to, u64::MAX, count)),
        Meddling::CutAfter(most) | Meddling::StallAfter(most) => Ok(bytes(&from, &to, most, count)),
    };
    if matches!(meddling, Meddling::StallAfter(_)) {
        // Until the source hangs up, which shows without reading what it sent.
        let _ = poll(&mut [PollFd::from_borrowed_fd(from.as_fd(), PollFlags::RDHUP)], None);
    }
    if matches!(cut, Ok(true)) {
        // A cut cable, as both ends see it.
        let _ = shutdown(&from, Shutdown::Both);
        let _ = shutdown(&to, Shutdown::Both);
    } else {
        // Whoever reads may still read what was sent.
        let _ = shutdown(&to, Shutdown::Write);
        let _ = shutdown(&from, Shutdown::Read);
    }
    cut.map(drop)
}

/// Passes at most so many bytes on. Gives whether it was all of them.
fn bytes(mut from: &File, mut to: &File, most: u64, count: &AtomicU64) -> bool {
    let mut left = most;
    let mut buffer = vec![0; 64 << 10];
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let Ok(read) = from.read(&mut buffer[..most]) else { break };
        if read == 0 || to.write_all(&buffer[..read]).is_err() {
            break;
        }
        left = left.saturating_sub(read as u64);
        count.fetch_add(read as u64, Ordering::Relaxed);
    }
    left == 0
}

/// Passes frames on. Gives whether it ended at the one that it is to be cut before.
fn frames(mut from: &File, mut to: &File, meddling: Meddling) -> Result<bool, Box<dyn Error + Send + Sync>> {
    let mut preamble = [0; PREAMBLE.len()];
    if from.read_exact(&mut preamble).is_err() || to.write_all(&preamble).is_err() {
        return Ok(false);
    }
    let mut paused = false;
    let (mut flip, mut flipped) = (false, false);
    for sequence in 0.. {
        let mut head = [0; HEADER_LEN];
        if from.read_exact(&mut head).is_err() {
            break;
        }
        let header = FrameHeader::parse(&head, sequence)?;
        if matches!(meddling, Meddling::CutBefore(number) if number == header.number()) {
            return Ok(true);
        }
        let mut payload = vec![0; header.payload_len()];
        // The source may leave in the middle of a frame when it has given up.
        if from.read_exact(&mut payload).is_err() {
            break;
        }
        let mut body = Vec::new();
        let mut altered = None;
        match (Frame::decode(&header, &payload, Side::Source)?, meddling) {
            (Frame::Message(Message::Final(_)), _) => paused = true,
            (
                Frame::Bulk(Bulk::DeviceData { device, sequence: piece, offset, bytes }),
                Meddling::Alter(alter),
            ) => {
                let mut bytes = bytes.to_vec();
                alter(paused, &mut bytes);
                let bulk = Bulk::DeviceData { device, sequence: piece, offset, bytes: &bytes };
                altered = Some(encode_bulk(&bulk, sequence)?.parts().concat());
            }
            (Frame::Bulk(bulk @ Bulk::Pages { first, .. }), Meddling::FlipPage(page)) => {
                flip = first >= page;
                body.resize(usize::try_from(bulk.body_len())?, 0);
            }
            (Frame::Bulk(bulk), _) => body.resize(usize::try_from(bulk.body_len())?, 0),
            _ => {}
        }
        if from.read_exact(&mut body).is_err() {
            break;
        }
        if let (true, false, Some(byte)) = (std::mem::take(&mut flip), flipped, body.last_mut()) {
            *byte ^= 0x10;
            flipped = true;
        }
        let frame = altered.unwrap_or_else(|| [head.as_slice(), &payload, &body].concat());
        if to.write_all(&frame).is_err() {
            break;
        }
    }
    Ok(false)
}
