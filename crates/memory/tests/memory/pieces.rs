//! Guest memory straight to and from descriptors, a system call at a time.
#![expect(clippy::cast_possible_truncation, reason = "test sizes are small")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use proptest::prelude::*;
use rustix::io::Errno;
use vfio_migration_memory::{GuestRam, MemoryError, RamSpec};
use vfio_migration_types::{Gpa, PAGE_SIZE, RamOffset, Range};

const PAGES: u64 = 1024;

fn ram() -> GuestRam {
    let spec = |gpa| RamSpec { gpa: Gpa(gpa), len: PAGES / 2 * PAGE_SIZE };
    GuestRam::new("test", &[spec(0), spec(4 << 30)]).unwrap()
}

fn filled() -> GuestRam {
    let ram = ram();
    for word in (0..ram.size()).step_by(8) {
        ram.write_u64(RamOffset(word), word.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1).unwrap();
    }
    ram
}

fn pages(first: u64, count: u64) -> Range<RamOffset> {
    Range::new(RamOffset(first * PAGE_SIZE), count * PAGE_SIZE).unwrap()
}

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

/// Shuts its socket down when its thread panics, so that a failing sender fails the test instead of hanging it.
struct HangUp<'a>(BorrowedFd<'a>);

impl Drop for HangUp<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = rustix::net::shutdown(self.0, rustix::net::Shutdown::Both);
        }
    }
}

/// Sends `header` and then all of `runs`, call by call.
fn send(
    ram: &GuestRam,
    to: BorrowedFd<'_>,
    mut header: &[u8],
    runs: &[Range<RamOffset>],
) -> Result<(), Errno> {
    let mut pieces = ram.pieces(runs).unwrap();
    while !header.is_empty() || pieces.left() > 0 {
        let moved = pieces.send(to, header)?;
        let of_header = moved.min(header.len());
        header = &header[of_header..];
        pieces.advance(moved - of_header);
    }
    Ok(())
}

/// Receives all of `runs`, call by call; says how much was missing at an early end.
fn receive(ram: &GuestRam, from: BorrowedFd<'_>, runs: &[Range<RamOffset>]) -> Result<(), u64> {
    let mut pieces = ram.pieces(runs).unwrap();
    while pieces.left() > 0 {
        match pieces.receive(from).unwrap() {
            0 => return Err(pieces.left()),
            moved => pieces.advance(moved),
        }
    }
    Ok(())
}

/// Sends each run behind a header and receives it; the headers arrive intact, and in the end all of it is there.
fn carry(source: &GuestRam, to: BorrowedFd<'_>, from: BorrowedFd<'_>, runs: &[Range<RamOffset>]) -> GuestRam {
    let destination = ram();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _guard = HangUp(to);
            for (number, run) in runs.iter().enumerate() {
                send(source, to, format!("header {number:8}").as_bytes(), &[*run]).unwrap();
            }
        });
        for (number, run) in runs.iter().enumerate() {
            let mut header = [0; 15];
            let mut got = 0;
            while got < header.len() {
                let bytes = rustix::io::read(from, &mut header[got..]).unwrap();
                assert_ne!(bytes, 0);
                got += bytes;
            }
            assert_eq!(header, *format!("header {number:8}").as_bytes());
            receive(&destination, from, &[*run]).unwrap();
        }
    });
    for run in runs {
        let mut pair = [vec![0; run.len() as usize], vec![0; run.len() as usize]];
        source.read(run.start(), &mut pair[0]).unwrap();
        destination.read(run.start(), &mut pair[1]).unwrap();
        assert!(pair[0] == pair[1], "{run:?}");
    }
    destination
}

#[test]
fn everything_arrives_over_unix_and_tcp() {
    let source = filled();
    let all = [pages(0, PAGES)];
    let (a, b) = UnixStream::pair().unwrap();
    assert_eq!(carry(&source, a.as_fd(), b.as_fd(), &all).digest().unwrap(), source.digest().unwrap());
    let (a, b) = tcp();
    assert_eq!(carry(&source, a.as_fd(), b.as_fd(), &all).digest().unwrap(), source.digest().unwrap());
}

#[test]
fn what_a_descriptor_cannot_take_or_give_now_is_the_callers() {
    let source = filled();
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    assert_eq!(ram().pieces(&[pages(0, 1)]).unwrap().receive(b.as_fd()), Err(Errno::AGAIN));
    // More than any default socket buffer holds.
    assert_eq!(send(&source, a.as_fd(), b"", &[pages(0, PAGES)]), Err(Errno::AGAIN));
}

#[test]
fn many_scattered_runs_go_in_one_frame() {
    // More pieces than one system call takes.
    let source = GuestRam::new("test", &[RamSpec { gpa: Gpa(0), len: 3000 * PAGE_SIZE }]).unwrap();
    let destination = GuestRam::new("test", &[RamSpec { gpa: Gpa(0), len: 3000 * PAGE_SIZE }]).unwrap();
    let runs: Vec<_> = (0..1500).map(|n| pages(n * 2, 1)).collect();
    for run in &runs {
        source.write_u64(run.start(), run.start().0 + 1).unwrap();
    }
    let (a, mut b) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _guard = HangUp(a.as_fd());
            send(&source, a.as_fd(), b"head", &runs).unwrap();
            (&a).write_all(b"tail").unwrap();
        });
        let mut word = [0; 4];
        b.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"head");
        receive(&destination, b.as_fd(), &runs).unwrap();
        b.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"tail");
    });
    assert_eq!(source.digest().unwrap(), destination.digest().unwrap());
    assert_eq!(destination.data_extents().unwrap(), runs);
}

#[test]
fn an_end_inside_a_run_leaves_what_is_missing() {
    let (mut a, b) = UnixStream::pair().unwrap();
    a.write_all(&[1; 5000]).unwrap();
    drop(a);
    let destination = ram();
    receive(&destination, b.as_fd(), &[pages(0, 1)]).unwrap();
    assert_eq!(receive(&destination, b.as_fd(), &[pages(1, 3)]), Err(3 * 4096 - 904));
}

#[test]
fn a_gone_peer_is_epipe_and_no_signal() {
    let (a, b) = UnixStream::pair().unwrap();
    drop(b);
    assert_eq!(send(&filled(), a.as_fd(), b"header", &[pages(0, 4)]), Err(Errno::PIPE));
}

#[test]
fn ranges_that_are_no_pages_of_it_are_refused() {
    let ram = filled();
    let beyond = ram.pieces(&[pages(0, 1), pages(PAGES - 1, 2)]);
    assert!(matches!(beyond, Err(MemoryError::OutOfBounds { .. })));
    let odd = Range::new(RamOffset(0), 100).unwrap();
    assert!(matches!(ram.pieces(&[odd]), Err(MemoryError::Misaligned { .. })));
}

#[test]
fn memory_that_cannot_be_touched_is_efault_and_no_signal() {
    let ram = filled();
    let (a, mut b) = UnixStream::pair().unwrap();
    let at = ram.host_address(RamOffset(PAGE_SIZE), PAGE_SIZE).unwrap().as_ptr();
    // SAFETY: a page of this test's own RAM, to which no reference exists, and which nobody else touches.
    unsafe { rustix::mm::mprotect(at.cast(), 4096, rustix::mm::MprotectFlags::empty()) }.unwrap();
    assert_eq!(ram.pieces(&[pages(1, 1)]).unwrap().send(a.as_fd(), b""), Err(Errno::FAULT));
    b.write_all(&[7; 4096]).unwrap();
    assert_eq!(ram.pieces(&[pages(1, 1)]).unwrap().receive(a.as_fd()), Err(Errno::FAULT));
    // What was not moved is not lost.
    let mut back = [0; 4096];
    receive(&ram, a.as_fd(), &[pages(2, 1)]).unwrap();
    ram.read(RamOffset(2 * PAGE_SIZE), &mut back).unwrap();
    assert_eq!(back, [7; 4096]);
}

#[test]
fn bytes_that_were_read_ahead_go_first() {
    let (ram, source) = (ram(), filled());
    let mut whole = vec![0; 3 * 4096];
    source.read(RamOffset(0), &mut whole).unwrap();
    for ahead in [0, 1, 4095, 4096, 5000, whole.len()] {
        ram.zero(pages(0, 4)).unwrap();
        let mut pieces = ram.pieces(&[pages(0, 1), pages(1, 2)]).unwrap();
        assert_eq!(pieces.fill(&whole[..ahead]), ahead);
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&whole[ahead..]).unwrap();
        while pieces.left() > 0 {
            let moved = pieces.receive(b.as_fd()).unwrap();
            pieces.advance(moved);
        }
        assert_eq!(pieces.fill(&whole), 0, "no more than there is room for");
        let mut back = vec![0; whole.len()];
        ram.read(RamOffset(0), &mut back).unwrap();
        assert!(back == whole && ram.is_zero(3), "{ahead}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn random_runs_arrive(
        runs in proptest::collection::vec((0u64..PAGES, 1u64..200), 1..20), over_tcp: bool,
    ) {
        let source = filled();
        let runs: Vec<_> = runs.into_iter().map(|(first, count)| pages(first, count.min(PAGES - first))).collect();
        if over_tcp {
            let (a, b) = tcp();
            carry(&source, a.as_fd(), b.as_fd(), &runs);
        } else {
            let (a, b) = UnixStream::pair().unwrap();
            carry(&source, a.as_fd(), b.as_fd(), &runs);
        }
    }
}
