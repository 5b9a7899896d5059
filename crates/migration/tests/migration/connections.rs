//! Connections that a VMM makes and accepts itself, and streams that are no sockets.

use std::io::{Error, PipeReader, PipeWriter, Read, Write, pipe};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vfio_migration::{
    ByteStream, ConnectionFactory, Destination, DestinationOptions, IncomingError, Machine, MigrateError,
    NotHandedOver, Rehearse, Source, SourceOptions, Uri, bridge,
};

use crate::faults::small;
use crate::toy::proxy::{Meddling, forward};
use crate::toy::*;

fn options() -> SourceOptions {
    let mut options = SourceOptions::default();
    options.downtime_limit = Duration::from_secs(2);
    options
}

/// A VMM's own listener, whose connections it hands over.
#[test]
fn a_vmm_accepts_connections_itself_and_hands_them_over() {
    let plan = small();
    let (source, machine) = (Toy::booted(&plan), Toy::new(&plan));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("own");
    let listener = UnixListener::bind(&path).unwrap();
    let at: Uri = format!("unix:{}", path.display()).parse().unwrap();
    let (mut destination, connections) = Destination::of_connections(DestinationOptions::default()).unwrap();
    assert!(!destination.is_connected());
    let datagram = OwnedFd::from(UnixDatagram::pair().unwrap().0);
    assert!(matches!(connections.hand_over(datagram), Err(NotHandedOver::NotAStream)));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while let Ok((connection, _)) = listener.accept() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                connections.hand_over(connection.into()).unwrap();
            }
        });
        let built = machine.clone();
        let arriving = scope.spawn(move || {
            let built = || Ok::<Arc<dyn Machine>, vfio_migration::NotBuilt>(built.clone());
            let rehearsed = destination.accept(|_| built());
            assert!(matches!(rehearsed, Err(IncomingError::Rehearsed(_))), "{rehearsed:?}");
            destination.accept(|_| built())
        });
        // Whoever says nothing, or nonsense, keeps nobody out.
        let _silent = UnixStream::connect(&path).unwrap();
        UnixStream::connect(&path).unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        Source::new(source.clone(), options()).rehearse_to(&at, Rehearse::Precopy, |_| {}).unwrap();
        Source::new(source.clone(), options()).migrate_to(&at, |_| {}).unwrap();
        arriving.join().unwrap().unwrap();
        stop.store(true, Ordering::Relaxed);
        drop(UnixStream::connect(&path));
    });
    prove_moved(&source, &machine);
    machine.prove_running();
    let late = OwnedFd::from(UnixStream::pair().unwrap().0);
    assert!(matches!(connections.hand_over(late), Err(NotHandedOver::Gone)));
}

#[test]
fn a_wait_ends_when_nobody_can_hand_a_connection_over() {
    let (mut destination, connections) = Destination::of_connections(DestinationOptions::default()).unwrap();
    let (_kept, waits) = UnixStream::pair().unwrap();
    connections.hand_over(waits.into()).unwrap();
    let mut others = Vec::new();
    loop {
        let (one, other) = UnixStream::pair().unwrap();
        others.push(one);
        match connections.hand_over(other.into()) {
            Ok(()) => assert!(others.len() < 1000, "there is no bound"),
            Err(NotHandedOver::Full) => break,
            Err(error) => panic!("{error}"),
        }
    }
    drop((connections, others, _kept));
    let ended = destination.accept(|_| -> Result<Arc<dyn Machine>, _> { panic!("nobody came") });
    let Err(IncomingError::NotBegun(failure)) = ended else { panic!("{ended:?}") };
    assert!(failure.text.contains("nobody is left who could hand a connection over"), "{failure}");
}

/// What leaves the host is not taken as it is because a VMM brings it.
#[test]
fn a_tcp_connection_that_is_handed_over_needs_security() {
    let (mut destination, connections) = Destination::of_connections(DestinationOptions::default()).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut came = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    connections.hand_over(listener.accept().unwrap().0.into()).unwrap();
    drop(connections);
    destination.accept(|_| -> Result<Arc<dyn Machine>, _> { panic!("nobody may come") }).unwrap_err();
    assert_eq!(came.read(&mut [0; 16]).unwrap_or(0), 0, "nothing is said to it");
}

/// RUNNING is lost on the way: the source asks over a connection that its VMM makes.
#[test]
fn a_source_asks_over_a_connection_that_its_vmm_makes() {
    const RUNNING: u16 = 0x0006;
    let plan = small();
    let (source, machine) = (Toy::booted(&plan), Toy::new(&plan));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("at");
    let at: Uri = format!("unix:{}", path.display()).parse().unwrap();
    let mut destination = Destination::listen(&at, DestinationOptions::default()).unwrap();
    let control = destination.control();
    let (end, of_source) = UnixStream::pair().unwrap();
    let of_destination = UnixStream::connect(&path).unwrap();
    let made = Arc::new(AtomicUsize::new(0));
    let mut options = options();
    let count = made.clone();
    options.further_connections = Some(ConnectionFactory::new(move |within| {
        assert!(!within.is_zero());
        // The first cannot be made.
        if count.fetch_add(1, Ordering::Relaxed) == 0 {
            return Err(Error::other("the host is busy"));
        }
        Ok(UnixStream::connect(&path)?.into())
    }));
    std::thread::scope(|scope| {
        let (from, to) = (of_source.try_clone().unwrap(), of_destination.try_clone().unwrap());
        scope.spawn(move || forward(from.into(), to.into(), Meddling::None, &AtomicU64::new(0)).unwrap());
        scope.spawn(move || {
            let cut = Meddling::CutBefore(RUNNING);
            forward(of_destination.into(), of_source.into(), cut, &AtomicU64::new(0)).unwrap();
        });
        let built = machine.clone();
        scope.spawn(move || {
            destination.accept(|_| Ok(built as Arc<dyn Machine>)).unwrap();
            destination.answer_queries(Duration::from_secs(30)).unwrap();
        });
        Source::new(source.clone(), options).migrate_over(end.into(), |_| {}).unwrap();
        control.cancel();
    });
    assert_eq!(made.load(Ordering::Relaxed), 2);
    prove_moved(&source, &machine);
    machine.prove_running();
}

/// Two pipes, each of which takes a little at a time.
struct Pipes {
    from: Mutex<PipeReader>,
    to: Mutex<Option<PipeWriter>>,
    /// Bytes that still come before it breaks.
    left: AtomicU64,
}

impl Pipes {
    fn pair(breaks_after: u64) -> [Arc<dyn ByteStream>; 2] {
        let ((there, here_writes), (here, there_writes)) = (pipe().unwrap(), pipe().unwrap());
        let end = |from: PipeReader, to: PipeWriter, left: u64| {
            let (from, to, left) = (Mutex::new(from), Mutex::new(Some(to)), AtomicU64::new(left));
            Arc::new(Pipes { from, to, left }) as Arc<dyn ByteStream>
        };
        [end(here, here_writes, u64::MAX), end(there, there_writes, breaks_after)]
    }
}

impl ByteStream for Pipes {
    fn read(&self, into: &mut [u8]) -> Result<usize, Error> {
        let most = into.len().min(1 + 7 * 1000);
        let read = self.from.lock().unwrap_or_else(PoisonError::into_inner).read(&mut into[..most])?;
        let left = self.left.load(Ordering::Relaxed);
        if read as u64 > left {
            return Err(Error::other("the cable was cut"));
        }
        self.left.store(left - read as u64, Ordering::Relaxed);
        Ok(read)
    }

    fn write(&self, from: &[u8]) -> Result<usize, Error> {
        let most = from.len().min(1 + 11 * 1000);
        match &mut *self.to.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(to) => to.write(&from[..most]),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn shutdown(&self, how: Shutdown) {
        if how != Shutdown::Read {
            // Its reader comes to the end of the stream.
            drop(self.to.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }
}

/// A migration over pipes of which the destination's breaks after so many bytes.
fn over_pipes(breaks_after: u64) -> (Arc<Toy>, Arc<Toy>, Result<(), MigrateError>) {
    let plan = small();
    let (source, machine) = (Toy::booted(&plan), Toy::new(&plan));
    let [here, there] = Pipes::pair(breaks_after);
    let built = machine.clone();
    let moved = std::thread::scope(|scope| {
        scope.spawn(move || {
            let options = DestinationOptions::default();
            let mut destination = Destination::over(bridge(there).unwrap(), options).unwrap();
            drop(destination.accept(|_| Ok(built as Arc<dyn Machine>)));
        });
        Source::new(source.clone(), options()).migrate_over(bridge(here).unwrap(), |_| {})
    });
    (source, machine, moved.map(drop))
}

#[test]
fn a_guest_moves_over_a_pair_of_pipes() {
    let (source, machine, moved) = over_pipes(u64::MAX);
    moved.unwrap();
    prove_moved(&source, &machine);
    machine.prove_running();
}

#[test]
fn a_stream_that_breaks_leaves_the_guest_where_it_is() {
    let (source, machine, moved) = over_pipes(100_000);
    let Err(MigrateError::Aborted(aborted)) = moved else { panic!("{moved:?}") };
    assert!(aborted.restored, "{aborted:?}");
    source.prove_restored();
    machine.prove_standing();
}
