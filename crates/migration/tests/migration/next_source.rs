//! A source that comes while the place is taken by what keeps no migration out.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vfio_migration::{
    Destination, DestinationOptions, Expectation, IncomingControl, IncomingError, Machine, MigrateError,
    NotBuilt, Source, Uri,
};
use vfio_migration_types::{AttemptId, Epoch};
use vfio_migration_wire::{FEATURE_ASK, FEATURE_REHEARSE, Hello, Message, Offer, PREAMBLE, VERSIONS, encode};

use crate::strangers::Peer;
use crate::tls::hosts::Waiting;
use crate::toy::proxy::Cut;
use crate::toy::secure::{plain_destination, tls_destination, tls_proxy, tls_source, tls_stream};
use crate::toy::{Plan, Toy, VM, prove_moved, wait_for};

const READY: u16 = 0x001c;

fn plan() -> Plan {
    Plan { pages: 64, hot: 8, ..Plan::default() }
}

/// Receives until a guest has arrived; gives how the sessions before that ended.
fn receive(
    mut destination: Destination,
    machines: Vec<Arc<Toy>>,
) -> (Vec<IncomingError>, Result<(), IncomingError>) {
    let mut ended = Vec::new();
    for machine in machines {
        match destination.accept(|_| Ok(machine as Arc<dyn Machine>)) {
            Ok(_) => return (ended, Ok(())),
            Err(error) => ended.push(error),
        }
    }
    let last = ended.pop().unwrap();
    (ended, Err(last))
}

fn listen(options: DestinationOptions) -> (Destination, Uri) {
    let destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let at = destination.local().clone();
    (destination, at)
}

/// Its own destination waits for two minutes whether it asks what became of the attempt: it does not, since it had not sent COMMIT.
#[test]
fn a_source_whose_connection_broke_at_ready_comes_again_at_once() {
    let plan = plan();
    let source = Toy::booted(&plan);
    let (destination, at) = listen(tls_destination());
    let wire = tls_proxy(&at, Cut::BeforeFrameToSource(READY));
    let (lost, arrives) = (Toy::new(&plan), Toy::new(&plan));
    let machines = vec![lost.clone(), arrives.clone()];
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || receive(destination, machines));
        let broken = Source::new(source.clone(), tls_source()).migrate_to(&wire.at, |_| {});
        let Err(MigrateError::Aborted(aborted)) = broken else { panic!("{broken:?}") };
        assert!(aborted.restored, "{aborted:?}");
        source.prove_restored();
        Source::new(source.clone(), tls_source()).migrate_to(&at, |_| {}).unwrap();
        let (before, last) = arriving.join().unwrap();
        last.unwrap();
        assert!(matches!(before.as_slice(), [IncomingError::Aborted(_)]), "{before:?}");
    });
    prove_moved(&source, &arrives);
    lost.prove_standing();
}

/// Whoever may ask alone could keep the place for good.
#[test]
fn a_question_keeps_no_migration_out() {
    let plan = plan();
    for features in [FEATURE_ASK | FEATURE_REHEARSE, FEATURE_REHEARSE] {
        let source = Toy::booted(&plan);
        let (destination, at) = listen(tls_destination());
        let control = destination.control();
        let (asked, arrives) = (Toy::new(&plan), Toy::new(&plan));
        let machines = vec![asked, arrives.clone()];
        std::thread::scope(|scope| {
            let arriving = scope.spawn(move || receive(destination, machines));
            let mut asks = Peer::new(&at);
            let (attempt, epoch) = (AttemptId([3; 16]), Epoch(0));
            asks.say(&Message::Hello(Hello { versions: VERSIONS, features, vm: VM, attempt, epoch }));
            assert!(matches!(asks.hear(), Message::HelloReply(_)));
            wait_for("the question's session", || control.progress().is_some());
            Source::new(source.clone(), tls_source()).migrate_to(&at, |_| {}).unwrap();
            let text = asks.hear_abort();
            assert!(text.contains("another source came"), "{text}");
            let (before, last) = arriving.join().unwrap();
            last.unwrap();
            assert!(matches!(before.as_slice(), [IncomingError::Rehearsed(_)]), "{before:?}");
        });
        prove_moved(&source, &arrives);
    }
}

/// It has begun, and says nothing more than that it is there.
#[test]
fn a_question_keeps_no_other_host_from_asking() {
    let mut options = plain_destination();
    options.peer_timeout = Duration::from_secs(6);
    let (destination, at) = listen(options);
    let control = destination.control();
    let (asked, again) = (Toy::new(&plan()), Toy::new(&plan()));
    let machines = vec![asked.clone(), again];
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || receive(destination, machines));
        let waiting = Waiting(control);
        let mut holder = Peer::in_plain_text_from([127, 0, 0, 2], &at);
        holder.begin(&asked, FEATURE_REHEARSE);
        let mut other = Peer::in_plain_text_from([127, 0, 0, 3], &at);
        let (features, attempt, epoch) = (FEATURE_ASK | FEATURE_REHEARSE, AttemptId([7; 16]), Epoch(0));
        other.say(&Message::Hello(Hello { versions: VERSIONS, features, vm: VM, attempt, epoch }));
        assert!(matches!(other.hear(), Message::HelloReply(_)), "another host's question was refused");
        let text = holder.hear_abort();
        assert!(text.contains("another source came"), "{text}");
        drop(waiting);
        let (before, _) = arriving.join().unwrap();
        assert!(matches!(before.as_slice(), [IncomingError::Rehearsed(_)]), "{before:?}");
    });
}

/// As many wait as may, of hosts that have as many as they may.
#[test]
fn a_host_of_which_none_waits_finds_a_place() {
    let (mut destination, at) = listen(plain_destination());
    let control = destination.control();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            destination.accept(|_| -> Result<Arc<dyn Machine>, NotBuilt> { panic!("nothing was offered") })
        });
        let waiting = Waiting(control);
        let source = |host: u8| {
            let mut peer = Peer::in_plain_text_from([127, 0, 0, host], &at);
            let (attempt, epoch) = (AttemptId([host; 16]), Epoch(0));
            peer.say(&Message::Hello(Hello { versions: VERSIONS, features: 0, vm: VM, attempt, epoch }));
            peer
        };
        let mut holder = source(1);
        assert!(matches!(holder.hear(), Message::HelloReply(_)));
        let mut others: Vec<_> = (2..6).flat_map(|host| [host; 8]).map(source).collect();
        let mut fifth = source(6);
        // The last of those who have most.
        let text = others.pop().unwrap().hear_abort();
        assert!(text.contains("another source is being received"), "{text}");
        others.iter().chain([&holder]).for_each(Peer::hang_up);
        assert!(matches!(fifth.hear(), Message::HelloReply(_)), "the fifth host was refused");
        fifth.hang_up();
        drop(waiting);
        drop(arriving.join().unwrap());
    });
}

/// What a squatter does with the place: it says no more than this, and stays.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Says {
    Nothing,
    Hello,
    Offer,
}

/// Comes again at once, as often as it is thrown out.
fn squat(at: &Uri, says: Says, manifest: &[u8], over: &AtomicBool) {
    let Uri::Tcp { host, port } = at else { panic!("{at}") };
    let hello = Message::Hello(Hello {
        versions: VERSIONS,
        features: 0,
        vm: VM,
        attempt: AttemptId([5; 16]),
        epoch: Epoch(0),
    });
    let offer = Message::Offer(Offer { manifest: manifest.to_vec(), ..Offer::default() });
    while !over.load(Ordering::Relaxed) {
        let Ok(socket) = TcpStream::connect((host.as_str(), *port)) else { continue };
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut stream = tls_stream(socket);
        while stream.conn.is_handshaking() && !over.load(Ordering::Relaxed) {
            if stream.conn.complete_io(&mut stream.sock).is_err_and(|error| !is_late(&error)) {
                break;
            }
        }
        let mut words = vec![PREAMBLE.to_vec()];
        words.extend((says != Says::Nothing).then(|| encode(&hello, 0).unwrap()));
        words.extend((says == Says::Offer).then(|| encode(&offer, 1).unwrap()));
        let _ = stream.write_all(&words.concat());
        let mut bytes = [0; 4096];
        while !over.load(Ordering::Relaxed) {
            match stream.read(&mut bytes) {
                Ok(0) => break,
                Err(error) if !is_late(&error) => break,
                _ => {}
            }
        }
    }
}

fn is_late(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Ends squatters, and the wait for a guest, however a test ends.
struct Over<'a>(&'a AtomicBool, IncomingControl);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        self.1.cancel();
    }
}

/// They have the certificate of the rightful source, so that nobody tells them from it.
#[test]
fn squatters_that_come_back_at_once_keep_no_source_out() {
    for says in [Says::Nothing, Says::Hello, Says::Offer] {
        let source = Toy::booted(&plan());
        let mut options = tls_destination();
        // What is not brought is no attempt.
        options.expect = Expectation { max_attempts: Some(1), ..Expectation::default() }.into();
        let (mut destination, at) = listen(options);
        let (control, over) = (destination.control(), AtomicBool::new(false));
        let manifest = source.manifest().unwrap().to_json().unwrap();
        let arrives = std::thread::scope(|scope| {
            let over = Over(&over, control.clone());
            let arriving = scope.spawn(move || {
                loop {
                    let machine = Toy::new(&plan());
                    match destination.accept(|_| Ok(machine.clone() as Arc<dyn Machine>)) {
                        Ok(_) => return machine,
                        Err(IncomingError::GaveWay(_)) if says == Says::Offer => {}
                        Err(error) => panic!("{says:?}: {error:?}"),
                    }
                }
            });
            for _ in 0..3 {
                scope.spawn(|| squat(&at, says, &manifest, over.0));
            }
            if says != Says::Nothing {
                wait_for("a squatter that has the place", || control.progress().is_some());
            }
            let moved = Source::new(source.clone(), tls_source()).migrate_to(&at, |_| {});
            assert!(moved.is_ok(), "{says:?}: {moved:?}");
            arriving.join().unwrap()
        });
        prove_moved(&source, &arrives);
    }
}

/// It may have begun, too, and then send nothing of a guest.
#[test]
fn a_source_that_begins_and_brings_nothing_makes_way() {
    let plan = plan();
    let source = Toy::booted(&plan);
    let (destination, at) = listen(tls_destination());
    let (control, machine, arrives) = (destination.control(), Toy::new(&plan), Toy::new(&plan));
    let machines = vec![machine.clone(), arrives.clone()];
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || receive(destination, machines));
        let mut idle = Peer::new(&at);
        idle.begin(&machine, 0);
        wait_for("the session", || control.progress().is_some());
        Source::new(source.clone(), tls_source()).migrate_to(&at, |_| {}).unwrap();
        let text = idle.hear_abort();
        assert!(text.contains("another source waits"), "{text}");
        let (before, last) = arriving.join().unwrap();
        last.unwrap();
        assert!(matches!(before.as_slice(), [IncomingError::GaveWay(_)]), "{before:?}");
    });
    prove_moved(&source, &arrives);
}

/// Nobody else waits, and it is thrown out all the same.
#[test]
fn a_source_that_makes_no_offer_has_no_session() {
    let (destination, at) = listen(tls_destination());
    let control = destination.control();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || receive(destination, vec![Toy::new(&plan())]));
        let mut idle = Peer::new(&at);
        let (attempt, epoch) = (AttemptId([3; 16]), Epoch(0));
        idle.say(&Message::Hello(Hello { versions: VERSIONS, features: 0, vm: VM, attempt, epoch }));
        let text = idle.hear_abort();
        assert!(text.contains("OFFER"), "{text}");
        wait_for("it to be counted", || control.refused().count == 1);
        let told = control.refused().last.unwrap().to_string();
        assert!(told.contains("it said HELLO and offered no guest: "), "{told}");
        assert!(control.progress().is_none() && control.last_progress().is_none());
        // The destination waits on, until now.
        control.cancel();
        let (_, last) = arriving.join().unwrap();
        assert!(matches!(last, Err(IncomingError::Cancelled(_))), "{last:?}");
    });
}

/// It was the one attempt that was expected.
#[test]
fn a_source_that_comes_again_is_told_that_its_attempt_has_failed() {
    let plan = plan();
    let source = Toy::booted(&plan);
    let mut options = tls_destination();
    options.expect = Expectation { max_attempts: Some(1), ..Expectation::default() }.into();
    let (destination, at) = listen(options);
    let wire = tls_proxy(&at, Cut::BeforeFrameToSource(READY));
    let control = destination.control();
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || receive(destination, vec![Toy::new(&plan)]));
        Source::new(source.clone(), tls_source()).migrate_to(&wire.at, |_| {}).unwrap_err();
        source.prove_restored();
        wait_for("the attempt to be undone", || {
            let awaited = control.progress().map(|progress| progress.awaited).unwrap_or_default();
            !awaited.is_empty()
        });
        let again = Source::new(source.clone(), tls_source()).migrate_to(&at, |_| {});
        let Err(MigrateError::Refused(reasons)) = again else { panic!("{again:?}") };
        let text = &reasons[0].text;
        assert!(text.contains("expects no further attempt") && !text.contains("under way"), "{text}");
        control.cancel();
        arriving.join().unwrap().1.unwrap_err();
    });
}

/// A migration has the place: neither a question nor another migration takes it.
#[test]
fn a_migration_gives_way_to_nobody() {
    let plan = plan();
    let source = Toy::booted(&plan);
    let (destination, at) = listen(tls_destination());
    let mut options = tls_source();
    options.pause_before_switchover = true;
    let arrives = Toy::new(&plan);
    let machines = vec![arrives.clone()];
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || receive(destination, machines));
        let session = Source::new(source.clone(), options);
        let control = session.control();
        let at_once = at.clone();
        let moving = scope.spawn(move || session.migrate_to(&at_once, |_| {}));
        wait_for("the switchover", || control.progress().waiting);
        for features in [0, FEATURE_REHEARSE, FEATURE_ASK | FEATURE_REHEARSE] {
            let mut other = Peer::new(&at);
            let (attempt, epoch) = (AttemptId([4; 16]), Epoch(0));
            other.say(&Message::Hello(Hello { versions: VERSIONS, features, vm: VM, attempt, epoch }));
            let text = other.hear_abort();
            let says = "no migration is taken in here now: another source is being received, tcp:127.0.0.1:";
            assert!(text.starts_with(says) && text.contains("sha256:"), "{text}");
        }
        control.continue_switchover();
        moving.join().unwrap().unwrap();
        arriving.join().unwrap().1.unwrap();
    });
    prove_moved(&source, &arrives);
}
