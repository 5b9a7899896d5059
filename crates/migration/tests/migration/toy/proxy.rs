//! A wire that can be cut: forwards TCP connections, and breaks them where it is told to.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use vfio_migration::Uri;
use vfio_migration_wire::{FrameHeader, HEADER_LEN, PREAMBLE};

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
}

pub struct Proxy {
    pub at: Uri,
    /// Bytes forwarded to the destination.
    pub moved: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Starts a proxy.
pub fn start(to: &Uri, cut: Cut) -> Proxy {
    let Uri::Tcp { host, port } = to.clone() else { panic!("only TCP") };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let local = Uri::Tcp { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
    let moved = Arc::new(AtomicU64::new(0));
    let count = moved.clone();
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
                Cut::Never => (Limit::None, Limit::None),
                Cut::ToDestination(bytes) => (Limit::Bytes(bytes), Limit::None),
                Cut::StallToDestination(bytes) => (Limit::Stall(bytes), Limit::None),
                Cut::ToSource(bytes) => (Limit::None, Limit::Bytes(bytes)),
                Cut::BeforeFrameToSource(number) => (Limit::None, Limit::Frame(number)),
            };
            cut = Cut::Never;
            let other = (source.try_clone().unwrap(), destination.try_clone().unwrap());
            let count = count.clone();
            let upward = std::thread::spawn(move || forward(other.0, other.1, up, &count));
            forward(destination, source, down, &AtomicU64::new(0));
            upward.join().unwrap();
        }
    });
    Proxy { at: local, moved, stop, thread: Some(thread) }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let Uri::Tcp { host, port } = &self.at else { return };
        drop(TcpStream::connect((host.as_str(), *port)));
        self.thread.take().map(JoinHandle::join);
    }
}

enum Limit {
    None,
    Bytes(u64),
    Stall(u64),
    Frame(u16),
}

fn forward(mut from: TcpStream, mut to: TcpStream, limit: Limit, count: &AtomicU64) {
    let mut left = match &limit {
        Limit::Bytes(bytes) | Limit::Stall(bytes) => *bytes,
        _ => u64::MAX,
    };
    if let Limit::Frame(number) = &limit {
        let mut preamble = [0; PREAMBLE.len()];
        let mut sequence = 0;
        if from.read_exact(&mut preamble).is_ok() && to.write_all(&preamble).is_ok() {
            let mut head = [0; HEADER_LEN];
            while from.read_exact(&mut head).is_ok() {
                let header = FrameHeader::parse(&head, sequence).unwrap();
                sequence += 1;
                let mut payload = vec![0; header.payload_len()];
                if header.number() == *number || from.read_exact(&mut payload).is_err() {
                    break;
                }
                if to.write_all(&head).is_err() || to.write_all(&payload).is_err() {
                    break;
                }
            }
        }
        left = 0;
    }
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
    if matches!(limit, Limit::Stall(_)) {
        // Until the source hangs up, which shows without reading what it sent.
        let fd = std::os::fd::AsFd::as_fd(&from);
        let mut poll = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::RDHUP)];
        let _ = rustix::event::poll(&mut poll, None);
    }
    if left == 0 {
        // A cut cable, as both ends see it.
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    } else {
        let _ = to.shutdown(Shutdown::Write);
    }
}
