//! Guest memory straight to and from descriptors.
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

/// Sends each run behind a header and receives it; the headers arrive intact, and in the end all of it is there.
fn carry(source: &GuestRam, to: BorrowedFd<'_>, from: BorrowedFd<'_>, runs: &[Range<RamOffset>]) -> GuestRam {
    let destination = ram();
    thread::scope(|scope| {
        scope.spawn(|| {
            let _guard = HangUp(to);
            for (number, run) in runs.iter().enumerate() {
                source.send(to, format!("header {number:8}").as_bytes(), *run).unwrap();
            }
        });
        for (number, run) in runs.iter().enumerate() {
            let mut header = [0; 15];
            let mut got = 0;
            while got < header.len() {
                match rustix::io::read(from, &mut header[got..]) {
                    Ok(bytes) => {
                        assert_ne!(bytes, 0);
                        got += bytes;
                    }
                    Err(Errno::AGAIN) => {
                        let mut ready =
                            [rustix::event::PollFd::from_borrowed_fd(from, rustix::event::PollFlags::IN)];
                        rustix::event::poll(&mut ready, None).unwrap();
                    }
                    Err(errno) => panic!("{errno}"),
                }
            }
            assert_eq!(header, *format!("header {number:8}").as_bytes());
            destination.receive(from, *run).unwrap();
        }
    });
    for run in runs {
        let mut pair = [vec![0; run.len() as usize], vec![0; run.len() as usize]];
        source.read_pages_into(*run, &mut pair[0]).unwrap();
        destination.read_pages_into(*run, &mut pair[1]).unwrap();
        assert!(pair[0] == pair[1], "{run:?}");
    }
    destination
}

#[test]
fn everything_arrives_over_unix_tcp_and_a_pipe() {
    let source = filled();
    let all = [pages(0, PAGES)];
    let (a, b) = UnixStream::pair().unwrap();
    assert_eq!(carry(&source, a.as_fd(), b.as_fd(), &all).digest().unwrap(), source.digest().unwrap());
    let (a, b) = tcp();
    assert_eq!(carry(&source, a.as_fd(), b.as_fd(), &all).digest().unwrap(), source.digest().unwrap());
    let (from, to) = rustix::pipe::pipe().unwrap();
    assert_eq!(carry(&source, to.as_fd(), from.as_fd(), &all).digest().unwrap(), source.digest().unwrap());
}

#[test]
fn non_blocking_descriptors_are_waited_for() {
    let source = filled();
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    // More than any default socket buffer holds, so both ends run into EAGAIN.
    let destination = carry(&source, a.as_fd(), b.as_fd(), &[pages(0, PAGES)]);
    assert_eq!(destination.digest().unwrap(), source.digest().unwrap());
    let (from, to) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
    carry(&source, to.as_fd(), from.as_fd(), &[pages(1, 700)]);
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
            source.send_vectored(a.as_fd(), b"head", &runs).unwrap();
            (&a).write_all(b"tail").unwrap();
        });
        let mut word = [0; 4];
        b.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"head");
        destination.receive_vectored(b.as_fd(), &runs).unwrap();
        b.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"tail");
    });
    assert_eq!(source.digest().unwrap(), destination.digest().unwrap());
    assert_eq!(destination.data_extents().unwrap(), runs);
}

#[test]
fn an_end_inside_a_run_is_an_error_that_says_how_much_is_missing() {
    let (mut a, b) = UnixStream::pair().unwrap();
    a.write_all(&[1; 5000]).unwrap();
    drop(a);
    let destination = ram();
    destination.receive(b.as_fd(), pages(0, 1)).unwrap();
    let error = destination.receive(b.as_fd(), pages(1, 3)).unwrap_err();
    assert!(
        matches!(error, MemoryError::UnexpectedEof { missing } if missing == 3 * 4096 - 904),
        "{error:?}"
    );
}

#[test]
fn a_gone_peer_is_epipe_and_no_signal() {
    let (a, b) = UnixStream::pair().unwrap();
    drop(b);
    let error = filled().send(a.as_fd(), b"header", pages(0, 4)).unwrap_err();
    assert!(matches!(error, MemoryError::System { source: Errno::PIPE, .. }), "{error:?}");
}

#[test]
fn wrong_descriptors_and_ranges_are_refused() {
    let ram = filled();
    let (a, b) = UnixStream::pair().unwrap();
    let beyond = pages(PAGES - 1, 2);
    assert!(matches!(ram.send(a.as_fd(), b"header", beyond), Err(MemoryError::OutOfBounds { .. })));
    assert!(matches!(ram.receive(b.as_fd(), beyond), Err(MemoryError::OutOfBounds { .. })));
    let odd = Range::new(RamOffset(0), 100).unwrap();
    assert!(matches!(ram.send(a.as_fd(), b"", odd), Err(MemoryError::Misaligned { .. })));
    // Nothing of the refused frames was sent.
    b.set_nonblocking(true).unwrap();
    assert_eq!(rustix::io::read(&b, &mut [0; 1]), Err(Errno::AGAIN));

    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let error = ram.send(full.as_fd(), b"header", pages(0, 1)).unwrap_err();
    assert!(matches!(error, MemoryError::System { source: Errno::NOSPC, .. }), "{error:?}");
    let null = std::fs::File::open("/dev/null").unwrap();
    let error = ram.receive(null.as_fd(), pages(0, 1)).unwrap_err();
    assert!(matches!(error, MemoryError::UnexpectedEof { missing: PAGE_SIZE }), "{error:?}");
}

#[test]
fn a_blocked_sender_gives_up_when_its_socket_is_shut_down() {
    let source = filled();
    let (a, b) = UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let sender = scope.spawn(|| source.send(a.as_fd(), b"", pages(0, PAGES)));
        // The first byte has come, so the sender is inside; nobody reads the rest.
        let mut byte = [0];
        (&b).read_exact(&mut byte).unwrap();
        a.shutdown(std::net::Shutdown::Both).unwrap();
        let error = sender.join().unwrap().unwrap_err();
        assert!(matches!(error, MemoryError::System { source: Errno::PIPE, .. }), "{error:?}");
    });
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
