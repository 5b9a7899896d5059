//! What a destination is told to expect: whoever is not expected, or brings what is not, is refused before anything is made for him,
//! and the rightful source comes all the same.

use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_migration::{
    Arrived, Control, Destination, DestinationOptions, Expectation, ExpectationCounts, Expectations,
    ExpectedSource, IncomingControl, IncomingError, IncomingOffer, Machine, MigrateError, NotBuilt, Pin,
    RefusedConnection, Rehearse, Right, Security, Source, SourceOptions, TlsDirectory, TlsRole, Uri,
    own_identity,
};
use vfio_migration_compat::{Reason, SessionCode};
use vfio_migration_types::{AttemptId, Epoch, VmId, error_chain};
use vfio_migration_wire::{Hello, Message, VERSIONS};

use crate::strangers::Peer;
use crate::tls::hosts::{HOST, Waiting, destination_options, plan, secure, source_options};
use crate::toy::pki::{Ca, Host};
use crate::toy::secure::client_config;
use crate::toy::*;

const OTHER_VM: VmId = VmId([0x99; 16]);
const EPOCH: Epoch = Epoch(3);
/// Bytes of RAM of [`plan`].
const MEMORY: u64 = 64 * 4096;

/// What a destination is told to expect, which a test writes anew.
#[derive(Clone)]
struct Told(Arc<Mutex<Result<Expectation, &'static str>>>);

impl Told {
    fn new(expectation: Expectation) -> (Self, Expectations) {
        let told = Self(Arc::new(Mutex::new(Ok(expectation))));
        let own = told.clone();
        (told, Expectations::read_by(move || own.0.lock().unwrap().clone().map_err(Into::into)))
    }

    fn tell(&self, expectation: Result<Expectation, &'static str>) {
        *self.0.lock().unwrap() = expectation;
    }
}

/// A destination that waits until a guest has arrived, and how many machines it built.
fn wait_for_guest(
    destination: &mut Destination,
    plan: &Plan,
    built: &AtomicUsize,
) -> (Result<Arrived, IncomingError>, Arc<Toy>) {
    loop {
        let machine = Toy::new(plan);
        let own = machine.clone();
        let arrived = destination.accept(|_: &IncomingOffer| {
            built.fetch_add(1, Ordering::Relaxed);
            Ok::<Arc<dyn Machine>, NotBuilt>(own)
        });
        match arrived {
            Err(IncomingError::Rehearsed(_) | IncomingError::Refused(_) | IncomingError::Aborted(_)) => {}
            other => return (other, machine),
        }
    }
}

/// Has `play` send sources to a destination that is told this, until a guest has arrived or the play is over.
fn play(
    options: DestinationOptions,
    play: impl FnOnce(&Uri, &IncomingControl, &AtomicUsize),
) -> (Result<Arrived, IncomingError>, Arc<Toy>) {
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let (to, control, built) = (destination.local().clone(), destination.control(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let waiting = Waiting(control.clone());
        let built = &built;
        let arriving = scope.spawn(move || wait_for_guest(&mut destination, &plan(), built));
        play(&to, &control, built);
        drop(waiting);
        arriving.join().unwrap()
    })
}

fn expecting(security: Security, expect: Expectations) -> DestinationOptions {
    let mut options = destination_options(security);
    options.expect = expect;
    options
}

fn options_of(directory: &Path) -> SourceOptions {
    let mut options = source_options(secure(directory));
    options.epoch = EPOCH;
    options
}

fn moves(guest: &Arc<Toy>, to: &Uri, options: SourceOptions) -> Result<(), MigrateError> {
    Source::new(guest.clone(), options).migrate_to(to, |_| {}).map(drop)
}

fn asks(guest: &Arc<Toy>, to: &Uri, options: SourceOptions) -> Result<(), MigrateError> {
    Source::new(guest.clone(), options).rehearse_to(to, Rehearse::Ask, |_| {}).map(drop)
}

/// The one reason for which a source was refused.
fn reason(refused: Result<(), MigrateError>) -> Reason {
    let error = refused.expect_err("it was let in");
    let report = error.report().unwrap_or_else(|| panic!("no refusal: {}", error_chain(&error)));
    assert_eq!(report.reasons.len(), 1, "{report:?}");
    report.reasons[0].clone()
}

/// The refusal that the destination has counted last, of `count`.
fn refused(control: &IncomingControl, count: u64) -> RefusedConnection {
    wait_for("the refusal to be counted", || control.refused().count == count);
    control.refused().last.unwrap()
}

fn named(name: &str) -> ExpectedSource {
    ExpectedSource { name: Some(name.into()), ..ExpectedSource::default() }
}

fn pinned(pin: Pin) -> ExpectedSource {
    ExpectedSource { pin: Some(pin), ..ExpectedSource::default() }
}

fn of(sources: impl IntoIterator<Item = ExpectedSource>) -> Expectation {
    Expectation { sources: Some(sources.into_iter().collect()), ..Expectation::default() }
}

fn may(source: ExpectedSource, right: Right) -> ExpectedSource {
    ExpectedSource { may: Some([right].into()), ..source }
}

#[test]
fn whatever_is_not_expected_is_refused_before_anything_is_made_for_it() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let own = own_identity(here.path(), TlsRole::Client).unwrap();
    let other = Pin::of_key(b"another key");
    let named_and = |more: Expectation| Expectation { sources: Some(vec![named("host-a")]), ..more };
    let any = Expectation::default;
    let both = [Right::Move, Right::Ask];
    // What is expected, what the same source tries, the code, and what it is told; it never hears of a VM that it does not name
    // unless it is expected itself.
    let hidden = OTHER_VM.to_string();
    let cases: Vec<(Expectation, &[Right], SessionCode, &str, bool)> = vec![
        (of([named("host-b")]), &both, SessionCode::OtherSource, "does not expect this source", false),
        (of([named("*")]), &both, SessionCode::OtherSource, "does not expect this source", false),
        (of([pinned(other)]), &both, SessionCode::OtherSource, "does not expect this source", false),
        (
            of([ExpectedSource { pin: Some(other), ..named("host-a") }]),
            &both,
            SessionCode::OtherSource,
            "does not expect this source",
            false,
        ),
        (
            of([ExpectedSource { pin: Some(own.pin), ..named("host-b") }]),
            &both,
            SessionCode::OtherSource,
            "does not expect this source",
            false,
        ),
        (of([]), &both, SessionCode::OtherSource, "does not expect this source", false),
        // A stranger is told that he is one, whatever else is wrong.
        (
            Expectation { vm: Some(OTHER_VM), ..of([named("host-b")]) },
            &both,
            SessionCode::OtherSource,
            "does not expect this source",
            false,
        ),
        (Expectation { vm: Some(OTHER_VM), ..any() }, &both, SessionCode::OtherVm, "another VM than", false),
        (
            named_and(Expectation { vm: Some(OTHER_VM), ..any() }),
            &both,
            SessionCode::OtherVm,
            "is expected, not VM",
            true,
        ),
        (
            Expectation { min_epoch: EPOCH.next(), ..any() },
            &both,
            SessionCode::OldEpoch,
            "a later epoch than 3",
            false,
        ),
        (
            named_and(Expectation { min_epoch: EPOCH.next(), ..any() }),
            &both,
            SessionCode::OldEpoch,
            "from epoch 4 on",
            false,
        ),
        (
            Expectation { max_memory: Some(MEMORY - 1), ..any() },
            &both,
            SessionCode::TooLarge,
            "no guest with 262144 bytes",
            false,
        ),
        (
            named_and(Expectation { max_memory: Some(MEMORY - 1), ..any() }),
            &both,
            SessionCode::TooLarge,
            "262143 are expected at most",
            false,
        ),
        (
            Expectation { max_attempts: Some(0), ..any() },
            &both,
            SessionCode::TooManyAttempts,
            "no further attempt",
            false,
        ),
        (
            Expectation { max_arrivals: Some(0), ..any() },
            &both,
            SessionCode::TooManyArrivals,
            "no further guest",
            false,
        ),
        (
            of([may(named("host-a"), Right::Ask), may(named("host-b"), Right::Move)]),
            &[Right::Move],
            SessionCode::MayNotMove,
            "ask, and not move",
            false,
        ),
        (
            of([may(named("host-a"), Right::Move), may(pinned(other), Right::Ask)]),
            &[Right::Ask],
            SessionCode::MayNotAsk,
            "does not let this source ask",
            false,
        ),
        (
            Expectation { may: [Right::Ask].into(), ..named_and(any()) },
            &[Right::Move],
            SessionCode::MayNotMove,
            "ask, and not move",
            false,
        ),
        (
            Expectation { may: [].into(), ..any() },
            &both,
            SessionCode::OtherSource,
            "does not expect this source",
            false,
        ),
    ];
    let (told, expect) = Told::new(of([]));
    let guest = Toy::booted(&plan());
    let (arrived, machine) = play(expecting(secure(there.path()), expect), |to, control, built| {
        let mut count = 0;
        let mut refuse = |what: Result<Expectation, &'static str>, tries: &[Right]| {
            told.tell(what.clone());
            let attempt = |right: &Right| {
                let tried = match right {
                    Right::Move => moves(&guest, to, options_of(here.path())),
                    Right::Ask => asks(&guest, to, options_of(here.path())),
                };
                let reason = reason(tried);
                guest.prove_running();
                count += 1;
                let refused = refused(control, count);
                // Who it was is known, and what it wanted.
                assert_eq!(refused.security.peer.as_ref(), Some(&own), "{what:?}");
                assert_eq!(refused.wanted, Some((*right, VM)), "{what:?}");
                assert_eq!(refused.why.code().map(SessionCode::name), Some(reason.code.as_str()), "{what:?}");
                (reason, refused.to_string())
            };
            tries.iter().map(attempt).collect::<Vec<_>>()
        };
        for (what, tries, code, says, tells_vm) in &cases {
            for (reason, log) in refuse(Ok(what.clone()), tries) {
                assert_eq!(reason.code, code.name(), "{what:?}: {reason:?}");
                assert!(reason.text.contains(says), "{what:?}: {}", reason.text);
                assert_eq!(reason.text.contains(&hidden), *tells_vm, "{what:?}: {}", reason.text);
                assert!(log.contains("\"host-a\"") && log.contains(&own.pin.to_string()), "{log}");
                if *code == SessionCode::OtherVm {
                    assert!(log.contains(&hidden), "the log of this side has it: {log}");
                }
            }
        }
        for (reason, log) in refuse(Err("/etc/expect: torn"), &both) {
            assert_eq!(reason.code, "no-expectation");
            assert!(
                !reason.text.contains("torn") && log.contains("/etc/expect: torn"),
                "{}: {log}",
                reason.text
            );
        }
        assert_eq!(built.load(Ordering::Relaxed), 0, "a machine was built for somebody who is not expected");
        assert_eq!((control.progress(), control.last_progress()), (None, None), "a refusal was a session");

        // The same source is let in at once when it is what is expected, to the last byte.
        let rightful = Expectation {
            sources: Some(vec![named("host-b"), ExpectedSource { pin: Some(own.pin), ..named("HOST-A.") }]),
            vm: Some(VM),
            min_epoch: EPOCH,
            max_memory: Some(MEMORY),
            max_attempts: Some(1),
            max_arrivals: Some(1),
            ..Expectation::default()
        };
        told.tell(Ok(rightful));
        asks(&guest, to, options_of(here.path())).unwrap();
        moves(&guest, to, options_of(here.path())).unwrap();
        assert_eq!(control.refused().count, count);
    });
    arrived.unwrap();
    prove_moved(&guest, &machine);
}

#[test]
fn asking_and_moving_are_rights_apart() {
    let ca = Ca::new();
    let (a, b) = (ca.host(&Host::named("host-a")), ca.host(&Host::named("host-b")));
    let there = ca.host(&Host::named(HOST));
    let expect = of([may(named("host-a"), Right::Ask), may(named("host-b"), Right::Move)]);
    let guest = Toy::booted(&plan());
    let (arrived, machine) = play(expecting(secure(there.path()), expect.into()), |to, control, _| {
        asks(&guest, to, options_of(a.path())).unwrap();
        assert_eq!(reason(moves(&guest, to, options_of(a.path()))).code, "may-not-move");
        assert_eq!(reason(asks(&guest, to, options_of(b.path()))).code, "may-not-ask");
        refused(control, 2);
        moves(&guest, to, options_of(b.path())).unwrap();
    });
    arrived.unwrap();
    prove_moved(&guest, &machine);
}

#[test]
fn attempts_and_arrivals_are_counted_over_all_waits_of_what_is_expected() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let limited = Expectation { max_attempts: Some(2), max_arrivals: Some(1), ..Expectation::default() };
    let (told, expect) = Told::new(limited.clone());
    let (guest, other) = (Toy::booted(&plan()), Toy::booted(&Plan { pages: 128, ..plan() }));
    let counts = |attempts, arrivals| ExpectationCounts { attempts, arrivals };
    let (arrived, _) = play(expecting(secure(there.path()), expect.clone()), |to, _, built| {
        // Two that do not fit, and count; questions do not.
        for _ in 0..2 {
            asks(&guest, to, options_of(here.path())).unwrap();
            assert_eq!(reason(moves(&other, to, options_of(here.path()))).code, "ram-layout");
        }
        assert_eq!(reason(moves(&guest, to, options_of(here.path()))).code, "too-many-attempts");
        assert_eq!((built.load(Ordering::Relaxed), expect.counts()), (4, counts(2, 0)));
        // Another thing is expected: the counts begin anew. What is refused for its size is no attempt.
        let small = Expectation { max_memory: Some(MEMORY), max_attempts: Some(1), ..limited.clone() };
        told.tell(Ok(small));
        for _ in 0..2 {
            assert_eq!(reason(moves(&other, to, options_of(here.path()))).code, "too-large");
        }
        // Its source hears of it before the session has ended.
        wait_for("what is no attempt not to be counted", || expect.counts() == counts(0, 0));
        moves(&guest, to, options_of(here.path())).unwrap();
    });
    arrived.unwrap();
    assert_eq!(expect.counts(), counts(1, 1));
    // What was counted holds for the next wait, too.
    let guest = Toy::booted(&plan());
    let (arrived, _) = play(expecting(secure(there.path()), expect), |to, _, _| {
        assert_eq!(reason(moves(&guest, to, options_of(here.path()))).code, "too-many-arrivals");
        guest.prove_running();
    });
    assert!(matches!(arrived, Err(IncomingError::Cancelled(_))), "{arrived:?}");
}

/// Ends the pause before the switchover of a source, however a test ends.
struct Continuing(Control);

impl Drop for Continuing {
    fn drop(&mut self) {
        self.0.continue_switchover();
    }
}

#[test]
fn a_second_source_does_not_disturb_the_rightful_one_that_is_under_way() {
    let ca = Ca::new();
    let (here, stranger) = (ca.host(&Host::named("host-a")), ca.host(&Host::named("host-x")));
    let there = ca.host(&Host::named(HOST));
    let asker = ca.host(&Host::named("host-c"));
    let expect = Expectation { vm: Some(VM), ..of([named("host-a"), may(named("host-c"), Right::Ask)]) };
    let (guest, copy) = (Toy::booted(&plan()), Toy::booted(&plan()));
    let (arrived, machine) = play(expecting(secure(there.path()), expect.into()), |to, control, built| {
        let mut options = options_of(here.path());
        options.pause_before_switchover = true;
        let session = Source::new(guest.clone(), options);
        let source = session.control();
        std::thread::scope(|scope| {
            let going = scope.spawn(move || session.migrate_to(to, |_| {}));
            let continuing = Continuing(source.clone());
            wait_for("the rightful one to be under way", || source.progress().waiting);
            // Whoever is none of those that may come does not even learn that one is under way.
            let refusal = reason(moves(&copy, to, options_of(stranger.path())));
            assert_eq!(refusal.code, "other-source");
            assert_eq!(reason(asks(&copy, to, options_of(stranger.path()))).code, "other-source");
            let last = refused(control, 2).to_string();
            assert!(last.contains("\"host-x\"") && last.contains("none of the sources"), "{last}");
            // A second of the right ones is told.
            let busy = error_chain(&moves(&copy, to, options_of(here.path())).unwrap_err());
            let is_busy = "no migration is taken in here now: another source is being received";
            assert!(busy.contains(is_busy) && busy.contains("(\"host-a\", sha256:"), "{busy}");
            let last = refused(control, 3).to_string();
            assert!(last.contains(is_busy) && last.matches("(\"host-a\", sha256:").count() == 2, "{last}");
            // Who may ask alone is not told who it is; this side is.
            let busy = error_chain(&asks(&copy, to, options_of(asker.path())).unwrap_err());
            assert!(busy.contains(is_busy) && !busy.contains("host-a"), "{busy}");
            let last = refused(control, 4).to_string();
            assert!(last.contains(is_busy) && last.contains("\"host-a\""), "{last}");
            copy.prove_running();
            assert_eq!(built.load(Ordering::Relaxed), 1);
            assert!(source.progress().waiting, "the rightful one was disturbed");
            drop(continuing);
            going.join().unwrap().unwrap();
        });
    });
    arrived.unwrap();
    prove_moved(&guest, &machine);
}

#[test]
fn one_that_comes_while_the_last_attempt_is_under_way_is_told_so() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    // Whoever is not named is told less.
    for (expect, says) in [
        (of([named("host-a")]), "no more than 1 attempt is expected, and the last of them is under way"),
        (Expectation::default(), "expects no further attempt: one is under way"),
    ] {
        let expect = Expectation { max_attempts: Some(1), ..expect };
        let (guest, copy) = (Toy::booted(&plan()), Toy::booted(&plan()));
        let (arrived, machine) = play(expecting(secure(there.path()), expect.into()), |to, _, _| {
            let mut options = options_of(here.path());
            options.pause_before_switchover = true;
            let session = Source::new(guest.clone(), options);
            let source = session.control();
            std::thread::scope(|scope| {
                let going = scope.spawn(move || session.migrate_to(to, |_| {}));
                let continuing = Continuing(source.clone());
                wait_for("the attempt to be under way", || source.progress().waiting);
                let refusal = reason(moves(&copy, to, options_of(here.path())));
                assert_eq!(refusal.code, "too-many-attempts");
                assert!(refusal.text.contains(says), "{refusal:?}");
                copy.prove_running();
                drop(continuing);
                going.join().unwrap().unwrap();
            });
        });
        arrived.unwrap();
        prove_moved(&guest, &machine);
    }
}

/// Before anybody comes, and each with what to do.
#[test]
fn what_no_connection_can_prove_is_not_expected() {
    let ca = Ca::new();
    let there = ca.host(&Host::named(HOST));
    let pin = Pin::of_key(b"a key");
    let pins = Security::Directory(TlsDirectory { pins: [pin].into(), ..TlsDirectory::new(there.path()) });
    let tls = secure(there.path());
    let dir = tempfile::tempdir().unwrap();
    let unix = format!("unix:{}", dir.path().join("socket").display());
    let tcp = "tcp:127.0.0.1:0".to_owned();
    for (at, security, source, says) in [
        (&tcp, Security::PlainText, named("host-a"), "in plain text prove neither"),
        (&tcp, Security::PlainText, pinned(pin), "in plain text prove neither"),
        (&unix, tls.clone(), named("host-a"), "over a unix socket prove neither"),
        (&tcp, pins.clone(), named("host-a"), "\"host-a\" is expected by name"),
        (&tcp, tls.clone(), ExpectedSource::default(), "neither a name nor a pin"),
    ] {
        let expectation = of([pinned(pin), source.clone()]);
        let expectation = if matches!(security, Security::PlainText) { of([source]) } else { expectation };
        let uri: Uri = at.parse().unwrap();
        let checked = expectation.check(&uri, Some(&security)).unwrap_err().to_string();
        let listened = Destination::listen(&uri, expecting(security, expectation.into()));
        let text = error_chain(&listened.expect_err("it waits for nobody"));
        assert!(text.contains(says) && text.contains(&checked), "{at}: {text}, and {checked}");
    }
    // What can be proved is.
    let good = [(tls.clone(), named("host-a")), (tls, pinned(pin)), (pins, pinned(pin))];
    for (security, source) in good {
        let uri = tcp.parse().unwrap();
        Destination::listen(&uri, expecting(security, of([source]).into())).unwrap();
    }
    // Written while it waits, it lets nobody in: neither who proves a key alone, nor as an entry that is anybody's.
    let here = ca.host(&Host::named("host-a"));
    let own = own_identity(here.path(), TlsRole::Client).unwrap();
    let pins = TlsDirectory { pins: [own.pin].into(), ..TlsDirectory::new(there.path()) };
    let (told, expect) = Told::new(Expectation::default());
    let guest = Toy::booted(&plan());
    drop(play(expecting(Security::Directory(pins), expect), |to, _, _| {
        for source in [
            named("host-a"),
            ExpectedSource { pin: Some(own.pin), ..named("host-a") },
            ExpectedSource::default(),
        ] {
            told.tell(Ok(of([source])));
            assert_eq!(reason(moves(&guest, to, options_of(here.path()))).code, "other-source");
        }
        told.tell(Ok(of([pinned(own.pin)])));
        asks(&guest, to, options_of(here.path())).unwrap();
        guest.prove_running();
    }));
    let (told, expect) = Told::new(Expectation::default());
    let guest = Toy::booted(&plan());
    drop(play(expecting(Security::PlainText, expect), |to, _, _| {
        told.tell(Ok(of([named("host-a")])));
        assert_eq!(reason(moves(&guest, to, source_options(Security::PlainText))).code, "other-source");
        guest.prove_running();
    }));
}

/// A source by hand, in plain text, where nobody is expected.
#[test]
fn who_is_not_expected_is_told_so_and_nothing_more_whatever_he_asks() {
    let (told, expect) = Told::new(of([]));
    let attempt = AttemptId([3; 16]);
    drop(play(expecting(Security::PlainText, expect), |to, control, _| {
        let mut asking = Peer::in_plain_text(to);
        asking.say(&Message::Query { vm: VM, attempt, epoch: Epoch(0), proof: [0; 32] });
        let text = asking.hear_abort();
        assert!(text.contains("does not expect this source"), "{text}");
        refused(control, 1);
        let mut coming = Peer::in_plain_text(to);
        let hello = Hello { versions: VERSIONS, features: 0, vm: VM, attempt, epoch: Epoch(0) };
        coming.say(&Message::Hello(hello));
        let Message::Refuse(reasons) = coming.hear() else { panic!("it was let in") };
        assert_eq!(reasons[0].code, "other-source");
        refused(control, 2);
        // What is no migration counts, and who leaves without a word does not.
        let Uri::Tcp { host, port } = to else { panic!("{to}") };
        drop(TcpStream::connect((host.as_str(), *port)).unwrap());
        std::io::Write::write_all(
            &mut TcpStream::connect((host.as_str(), *port)).unwrap(),
            b"GET / HTTP/1.1\r\n\r\n",
        )
        .unwrap();
        let last = refused(control, 3);
        assert_eq!((last.wanted, last.why.code()), (None, None));
        // Whoever may come may ask.
        told.tell(Ok(Expectation::default()));
        let mut asking = Peer::in_plain_text(to);
        asking.say(&Message::Query { vm: VM, attempt, epoch: Epoch(0), proof: [0; 32] });
        let text = asking.hear_abort();
        assert!(!text.contains("does not expect"), "{text}");
        assert_eq!(control.refused().count, 3);
    }));
}

#[test]
fn certificates_that_are_not_trusted_are_counted_too() {
    let (ca, others) = (Ca::new(), Ca::new());
    let there = ca.host(&Host::named(HOST));
    let stranger = others.host(&Host::named("host-a"));
    // It takes the destination, which does not take it; what it shows, it does not judge.
    std::fs::copy(there.path().join("ca-cert.pem"), stranger.path().join("ca-cert.pem")).unwrap();
    let shown = Security::Client(Arc::new(client_config(stranger.path())));
    let guest = Toy::booted(&plan());
    drop(play(destination_options(secure(there.path())), |to, control, _| {
        moves(&guest, to, source_options(shown)).unwrap_err();
        guest.prove_running();
        let last = refused(control, 1);
        assert!(last.to_string().contains("not of a CA that is trusted here"), "{last}");
    }));
}

/// There is no next one to wait for.
#[test]
fn one_connection_that_was_handed_over_ends_with_its_refusal() {
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    let expect = Expectation { vm: Some(OTHER_VM), ..Expectation::default() };
    let mut destination =
        Destination::over(there.into(), expecting(Security::PlainText, expect.into())).unwrap();
    let guest = Toy::booted(&plan());
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            destination.accept(|_| -> Result<Arc<dyn Machine>, NotBuilt> { panic!("nobody is expected") })
        });
        let left = Source::new(guest.clone(), SourceOptions::default()).migrate_over(here.into(), |_| {});
        assert_eq!(reason(left.map(drop)).code, "other-vm");
        let Err(IncomingError::Refused(reasons)) = arriving.join().unwrap() else { panic!("no refusal") };
        assert!(reasons[0].text.contains(&OTHER_VM.to_string()), "{reasons:?}");
    });
    guest.prove_running();
}

/// A listener hears of each refusal as it happens.
#[test]
fn each_refusal_is_told_to_whoever_listens() {
    let (heard, refusals) = std::sync::mpsc::channel();
    let guest = Toy::booted(&plan());
    drop(play(expecting(Security::PlainText, of([]).into()), |to, control, _| {
        control.on_refused(move |refused| heard.send(refused.clone()).unwrap());
        for _ in 0..2 {
            moves(&guest, to, source_options(Security::PlainText)).unwrap_err();
            let refused = refusals.recv_timeout(Duration::from_secs(20)).unwrap();
            assert_eq!(refused.why.code(), Some(SessionCode::OtherSource));
        }
    }));
}
