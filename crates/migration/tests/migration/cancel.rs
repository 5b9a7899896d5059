//! Every wait of a session ends when its operator cancels, and is reported as cancelled. Limits of the waits' own are far longer
//! here: a wait that the cancel does not reach is seen.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use vfio_migration::{
    Control, Destination, DestinationOptions, HeldFile, IncomingError, LockError, Machine, MachineError,
    MigratableDevice, MigrateError, Paused, Rehearse, SaveError, SaveOptions, Section, Source, SourceOptions,
    Uri, probe, save,
};
use vfio_migration_compat::MachineManifest;
use vfio_migration_device::IrqRouter;
use vfio_migration_memory::{DirtySource, GuestRam};
use vfio_migration_types::{Phase, VmId};

use crate::toy::*;

/// The second in which a cancel must end a wait, and what a busy host adds to it.
const WITHIN: Duration = Duration::from_secs(3);
/// Every limit that a wait has of its own.
const FAR: Duration = Duration::from_secs(60);

fn plan() -> Plan {
    Plan { pages: 64, hot: 8, devices: vec![], ..Plan::default() }
}

fn patient() -> SourceOptions {
    let mut options = tls_source();
    options.connect_timeout = FAR;
    options.peer_timeout = FAR;
    options
}

fn incoming() -> DestinationOptions {
    let mut options = tls_destination();
    options.peer_timeout = FAR;
    options
}

/// A machine whose manifest is not answered before it is let go, as that of a device server that was stopped.
struct Asked {
    toy: Arc<Toy>,
    asked: AtomicBool,
    hang: Mutex<Option<Receiver<()>>>,
}

impl Asked {
    /// One that answers at once, and says that it was asked.
    fn answering(toy: &Arc<Toy>) -> Arc<Self> {
        Arc::new(Self { toy: toy.clone(), asked: AtomicBool::new(false), hang: Mutex::new(None) })
    }

    /// One that answers once the sender is dropped.
    fn hanging(toy: &Arc<Toy>) -> (Arc<Self>, Sender<()>) {
        let (let_go, hang) = channel();
        let this = Self { toy: toy.clone(), asked: AtomicBool::new(false), hang: Mutex::new(Some(hang)) };
        (Arc::new(this), let_go)
    }

    fn was_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }
}

impl Machine for Asked {
    fn id(&self) -> VmId {
        self.toy.id()
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        self.asked.store(true, Ordering::Release);
        if let Some(hang) = &*self.hang.lock().unwrap() {
            let _ = hang.recv();
        }
        self.toy.manifest()
    }

    fn ram(&self) -> Arc<GuestRam> {
        self.toy.ram()
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        self.toy.dirty_sources()
    }

    fn devices(&self) -> Vec<MigratableDevice> {
        self.toy.devices()
    }

    fn irq_router(&self) -> Arc<dyn IrqRouter> {
        self.toy.irq_router()
    }

    fn pause(&self) -> Result<bool, MachineError> {
        self.toy.pause()
    }

    fn resume(&self, run: bool) -> Result<(), MachineError> {
        self.toy.resume(run)
    }

    fn save(&self, paused: &Paused) -> Result<Vec<Section>, MachineError> {
        self.toy.save(paused)
    }

    fn load(&self, sections: Vec<Section>) -> Result<(), MachineError> {
        self.toy.load(sections)
    }

    fn release_locks(&self) -> Result<(), LockError> {
        self.toy.release_locks()
    }

    fn take_locks(&self) -> Result<(), LockError> {
        self.toy.take_locks()
    }
}

/// Runs a session, cancels it once it is `waiting`, and gives its failure if it came in time.
fn cancelled<T, E>(
    source: Source,
    waiting: impl FnOnce(&Control) + Send,
    session: impl FnOnce(Source) -> Result<T, E>,
) -> E {
    let control = source.control();
    std::thread::scope(|scope| {
        let cancelling = scope.spawn(move || {
            waiting(&control);
            control.cancel();
            Instant::now()
        });
        let ended = session(source);
        let took = cancelling.join().unwrap().elapsed();
        assert!(took < WITHIN, "the cancel took {took:?}");
        ended.err().expect("it ended otherwise")
    })
}

fn is_cancelled(error: &MigrateError) {
    let MigrateError::Aborted(aborted) = error else { panic!("{error:?}") };
    assert!(aborted.cancelled && aborted.restored, "{aborted:?}");
    assert!(error.to_string().contains("cancelled"), "{error}");
    assert!(error.report().is_none(), "a cancel says nothing of whether the guest could move");
}

/// Migrates and rehearses, each cancelled while it is `waiting`.
fn both_cancelled(to: &Uri, options: &SourceOptions, waiting: impl Fn(&Control, &Asked) + Send + Sync) {
    let toy = Toy::booted(&plan());
    for rehearse in [None, Some(Rehearse::Ask), Some(Rehearse::Switchover)] {
        let machine = Asked::answering(&toy);
        let source = Source::new(machine.clone(), options.clone());
        let error = cancelled(
            source,
            |control| waiting(control, &machine),
            |source| match rehearse {
                None => source.migrate_to(to, |_| {}).map(drop),
                Some(how) => source.rehearse_to(to, how, |_| {}).map(drop),
            },
        );
        is_cancelled(&error);
        toy.prove_restored();
    }
}

/// A listener that takes no connection any more, and what keeps it so.
fn full_listener() -> (OwnedFd, Uri, Vec<TcpStream>) {
    let listener =
        rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::bind(&listener, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let listener = TcpListener::from(listener);
    let at = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&at, Duration::from_millis(200)) {
        queued.push(stream);
    }
    (listener.into(), Uri::Tcp { host: at.ip().to_string(), port: at.port() }, queued)
}

/// Whether somebody waits for an answer to his SYN to this port (proc_net(5): state 02).
fn connects_to(port: u16) -> bool {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().any(|line| line.contains(&format!(":{port:04X} 02 ")))
}

#[test]
fn connecting_to_a_host_that_does_not_answer() {
    let (_listener, to, _queued) = full_listener();
    let Uri::Tcp { port, .. } = to else { unreachable!() };
    // The last of those that filled the queue may still be trying.
    both_cancelled(&to, &patient(), |_, machine| {
        wait_for("the manifest to be read", || machine.was_asked());
        wait_for("the connect", || connects_to(port));
    });
}

#[test]
fn connecting_to_a_socket_whose_queue_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    let mut queued = Vec::new();
    loop {
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        if rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).is_err() {
            break;
        }
        queued.push(socket);
    }
    both_cancelled(&Uri::Unix(path), &patient(), |_, machine| {
        wait_for("the manifest to be read", || machine.was_asked());
    });
}

#[test]
fn a_destination_that_says_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = Uri::Tcp { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
    let mut plain = patient();
    plain.security = plain_source().security;
    // It is waited for in the handshake, and for the answer to HELLO.
    for options in [patient(), plain] {
        both_cancelled(&to, &options, |control, _| {
            wait_for("the hello", || control.progress().phase == Phase::Hello);
        });
    }
}

#[test]
fn a_question_whether_a_machine_fits() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = Uri::Tcp { host: "127.0.0.1".into(), port: listener.local_addr().unwrap().port() };
    let (_listener, hanging, _queued) = full_listener();
    let manifest = Toy::new(&plan()).manifest().unwrap();
    for to in [silent, hanging] {
        let (steer, control) = channel();
        std::thread::scope(|scope| {
            let (manifest, to) = (manifest.clone(), &to);
            let asking = scope.spawn(move || {
                probe(manifest, Some(VM), to, patient(), |control| steer.send(control).unwrap())
            });
            let control = control.recv().unwrap();
            control.cancel();
            let begun = Instant::now();
            is_cancelled(&asking.join().unwrap().unwrap_err());
            assert!(begun.elapsed() < WITHIN);
        });
    }
}

/// Whoever handed the connection over had sent as much as it takes.
#[test]
fn a_connection_that_takes_nothing() {
    let toy = Toy::booted(&plan());
    let machine = Asked::answering(&toy);
    let (here, _there) = UnixStream::pair().unwrap();
    here.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut (&here), &[0; 4096]).is_ok() {}
    let error = cancelled(
        Source::new(machine.clone(), patient()),
        |_| wait_for("the manifest to be read", || machine.was_asked()),
        |source| source.migrate_over(here.into(), |_| {}),
    );
    is_cancelled(&error);
    toy.prove_restored();
}

#[test]
fn a_device_that_does_not_say_what_it_is() {
    let toy = Toy::booted(&plan());
    let dir = tempfile::tempdir().unwrap();
    let to: Uri = "tcp:127.0.0.1:1".parse().unwrap();
    type Session<'a> = Box<dyn Fn(Source) -> Result<(), MigrateError> + 'a>;
    let file = dir.path().join("file");
    let sessions: [Session<'_>; 3] = [
        Box::new(|source| source.migrate_to(&to, |_| {}).map(drop)),
        Box::new(|source| source.rehearse_to(&to, Rehearse::Precopy, |_| {}).map(drop)),
        Box::new(|source| match save(source, &file, SaveOptions::default(), |_| {}) {
            Err(SaveError::Session(error)) => Err(error),
            other => panic!("{other:?}"),
        }),
    ];
    let mut options = patient().for_saving();
    options.state_dir = Some(dir.path().join("state"));
    for session in sessions {
        let (machine, let_go) = Asked::hanging(&toy);
        let error = cancelled(
            Source::new(machine.clone(), options.clone()),
            |_| wait_for("the question", || machine.was_asked()),
            session,
        );
        is_cancelled(&error);
        toy.prove_restored();
        // The question is still there, and does not keep the VM from another attempt.
        let again = Source::new(toy.clone(), options.clone()).migrate_to(&to, |_| {}).unwrap_err();
        assert!(
            matches!(&again, MigrateError::NotBegun(failure) if failure.phase == Phase::Hello),
            "{again}"
        );
        drop(let_go);
    }
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["state"], "a file was left behind");
}

/// A journal that cannot be read, as one on a server of files that is gone.
#[test]
fn a_journal_that_does_not_answer() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let journal = state.join(format!("{VM}.json"));
    let held = HeldFile::at(&journal);
    let toy = Toy::booted(&plan());
    let mut options = patient();
    options.state_dir = Some(state);
    let to: Uri = "tcp:127.0.0.1:1".parse().unwrap();
    let error = cancelled(
        Source::new(toy.clone(), options),
        |_| wait_for("the journal to be opened", || held.is_waited_for()),
        |source| source.migrate_to(&to, |_| {}),
    );
    is_cancelled(&error);
}

/// Runs a session against a destination that takes it in; the destination's end, too.
fn against_a_destination(
    options: SourceOptions,
    waiting: impl FnOnce(&Control) + Send,
) -> (MigrateError, IncomingError, Arc<Toy>) {
    let toy = Toy::booted(&plan());
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming()).unwrap();
    let to = destination.local().clone();
    std::thread::scope(|scope| {
        let built = Toy::new(&plan());
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built as Arc<dyn Machine>)));
        let source = Source::new(toy.clone(), options);
        let error = cancelled(source, waiting, |source| source.migrate_to(&to, |_| {}));
        (error, arriving.join().unwrap().unwrap_err(), toy)
    })
}

fn hold(path: &Path) -> File {
    let lock = File::options().create(true).truncate(false).write(true).open(path).unwrap();
    flock(lock.as_fd(), FlockOperation::LockExclusive).unwrap();
    lock
}

/// The lock of the journal's file is held by somebody who does not let go.
#[test]
fn a_journal_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let held = hold(&dir.path().join(format!("{VM}.lock")));
    let mut options = patient();
    options.state_dir = Some(dir.path().to_owned());
    let (error, _, toy) = against_a_destination(options, |control| {
        wait_for("the setup", || control.progress().phase == Phase::Setup);
    });
    is_cancelled(&error);
    toy.prove_restored();
    drop(held);
    // What is written late says the same: the guest is this side's.
    wait_for("the write", || dir.path().join(format!("{VM}.json")).exists());
    let owned = vfio_migration::ownership_at(dir.path(), VM).unwrap();
    assert!(
        matches!(owned, vfio_migration::VmOwnership::Ours(_) | vfio_migration::VmOwnership::Unknown),
        "{owned:?}"
    );
}

#[test]
fn the_operators_own_word() {
    let mut options = patient();
    options.pause_before_switchover = true;
    let (error, there, toy) = against_a_destination(options, |control| {
        wait_for("the wait", || control.progress().waiting);
    });
    is_cancelled(&error);
    assert!(matches!(there, IncomingError::Aborted(_)), "{there:?}");
    toy.prove_restored();
}

/// Cancels a destination once `waiting` says so, and gives what it made of it.
fn destination_cancelled(before: impl FnOnce(&Uri), waiting: impl FnOnce(&vfio_migration::IncomingControl)) {
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming()).unwrap();
    let control = destination.control();
    let to = destination.local().clone();
    std::thread::scope(|scope| {
        let built = Toy::new(&plan());
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built as Arc<dyn Machine>)));
        before(&to);
        waiting(&control);
        control.cancel();
        let begun = Instant::now();
        let error = arriving.join().unwrap().unwrap_err();
        assert!(begun.elapsed() < WITHIN, "{:?}", begun.elapsed());
        assert!(matches!(error, IncomingError::Cancelled(_)), "{error:?}");
        assert!(error.to_string().contains("cancelled"), "{error}");
    });
}

#[test]
fn a_destination_to_which_nobody_comes() {
    destination_cancelled(|_| {}, |_| {});
}

#[test]
fn a_destination_whose_visitor_says_nothing() {
    let mut visitor = None;
    destination_cancelled(
        |to| {
            let Uri::Tcp { host, port } = to else { unreachable!() };
            visitor = Some(TcpStream::connect((host.as_str(), *port)).unwrap());
        },
        |_| {},
    );
}

/// The source holds its switchover, and says no more.
#[test]
fn a_destination_that_loads() {
    let toy = Toy::booted(&plan());
    let mut options = patient();
    options.pause_before_switchover = true;
    let source = Source::new(toy.clone(), options);
    let control = source.control();
    std::thread::scope(|scope| {
        let mut sending = None;
        destination_cancelled(
            |to| {
                let to = to.clone();
                sending = Some(scope.spawn(move || source.migrate_to(&to, |_| {}).unwrap_err()));
            },
            |_| wait_for("the wait", || control.progress().waiting),
        );
        let error = sending.unwrap().join().unwrap();
        assert!(matches!(&error, MigrateError::Aborted(aborted) if !aborted.cancelled), "{error:?}");
    });
    toy.prove_restored();
}

/// The disk takes nothing: neither when the file is created, nor later.
#[test]
fn a_file_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let toy = Toy::booted(&plan());
    let saved = |source: Source| match save(source, &path, SaveOptions::default(), |_| {}) {
        Err(SaveError::Session(error)) => Err::<(), _>(error),
        other => panic!("{other:?}"),
    };
    let held = HeldFile::at(&path);
    let source = Source::new(toy.clone(), patient().for_saving());
    is_cancelled(&cancelled(source, |_| wait_for("the disk", || held.is_waited_for()), saved));
    drop(held);
    let mut options = patient().for_saving();
    options.bandwidth = Some(64 << 10);
    let mut held = None;
    let source = Source::new(toy.clone(), options);
    let waiting = |control: &Control| {
        wait_for("the pre-copy", || control.progress().phase == Phase::Iterate);
        let disk = held.insert(HeldFile::at(&path));
        wait_for("the disk", || disk.is_waited_for());
    };
    is_cancelled(&cancelled(source, waiting, saved));
    toy.prove_restored();
    // What is written late is gone again.
    drop(held);
    wait_for("the file to be gone", || std::fs::read_dir(dir.path()).unwrap().next().is_none());
}

/// Before anything is created the devices are asked how much there is to be saved.
#[test]
fn a_device_that_does_not_say_how_much_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let small = FakeDeviceKind { pieces: 30, ..FakeDeviceKind::default() };
    let toy = Toy::booted(&Plan { devices: vec![small], ..plan() });
    toy.device(0).hang_at(FakeFault::Progress);
    let source = Source::new(toy.clone(), patient().for_saving());
    let error = cancelled(
        source,
        |_| wait_for("the question", || toy.device(0).hangs()),
        |source| match save(source, &path, SaveOptions::default(), |_| {}) {
            Err(SaveError::Session(error)) => Err::<(), _>(error),
            other => panic!("{other:?}"),
        },
    );
    is_cancelled(&error);
    toy.device(0).let_go();
    toy.prove_restored();
    wait_for("the file to be gone", || std::fs::read_dir(dir.path()).unwrap().next().is_none());
}

/// The source does not wait for the disk of its destination, which says that it does.
#[test]
fn a_journal_of_the_destination_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let held = hold(&dir.path().join(format!("{VM}.lock")));
    let toy = Toy::booted(&plan());
    let mut options = incoming();
    options.state_dir = Some(dir.path().to_owned());
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let (to, receiving) = (destination.local().clone(), destination.control());
    std::thread::scope(|scope| {
        let built = Toy::new(&plan());
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built as Arc<dyn Machine>)));
        let named = |cancelling: bool| {
            let progress = receiving.progress()?;
            let answer = progress.awaited.first()?.to_string();
            (progress.cancelling == cancelling && answer.contains("the state directory has not answered"))
                .then_some(())
        };
        let source = Source::new(toy.clone(), patient());
        let error = cancelled(
            source,
            |_| wait_for("the disk to be named", || named(false).is_some()),
            |source| source.migrate_to(&to, |_| {}),
        );
        is_cancelled(&error);
        wait_for("the disk to be named", || named(true).is_some());
        drop(held);
        let error = arriving.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("cancelled"), "{error}");
    });
    toy.prove_restored();
}
