//! Wires that are cut, and answers that get lost on them: never two owners.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vfio_migration::{Destination, IncomingError, Machine, MigrateError, Source, Uri, read_journal};
use vfio_migration_engine::ownership::{DestinationState, SourceState};

use crate::faults::{both_options, incoming, options, small};
use crate::toy::proxy::{self, Cut};
use crate::toy::*;

/// Bytes of a whole migration on the wire, to the destination and back.
fn whole(plain: bool) -> (u64, u64) {
    let plan = small();
    let source = Toy::booted(&plan);
    let (ours, theirs) = both_options(plain);
    let mut wire = None;
    let route =
        |_: &vfio_migration::IncomingControl, to: &Uri| wire.insert(proxy::start(to, Cut::Never)).at.clone();
    migrate_by(&source, &plan, "tcp:127.0.0.1:0", ours, theirs, route, |_| {}).unwrap();
    let wire: proxy::Proxy = wire.unwrap();
    let moved = wire.moved.load(Ordering::Relaxed);
    assert!(moved > 1 << 18, "{moved}");
    (moved, wire.moved_back.load(Ordering::Relaxed))
}

/// Wherever the wire is cut: never two owners, and the source's guest runs unless it was committed away.
#[test]
fn a_cut_wire_leaves_one_owner() {
    let (there, back) = whole(false);
    let mut cuts: Vec<Cut> = (0..24).map(|n| Cut::ToDestination(there * n / 24 + n * 37)).collect();
    // The handshake of TLS is a great part of what comes back.
    cuts.extend((0..24).map(|n| Cut::ToSource(back * n / 24)));
    cuts.push(Cut::BeforeFrameToSource(0x001c));
    cut_everywhere(false, cuts);
}

#[test]
fn a_cut_wire_leaves_one_owner_in_plain_text_too() {
    let (there, _) = whole(true);
    let mut cuts: Vec<Cut> = (0..6).map(|n| Cut::ToDestination(there * n / 6 + n * 37)).collect();
    cuts.extend((0..12).map(|n| Cut::ToSource(n * 61)));
    cuts.push(Cut::BeforeFrameToSource(0x001c));
    cut_everywhere(true, cuts);
}

fn cut_everywhere(plain: bool, cuts: Vec<Cut>) {
    let plan = small();
    for cut in cuts {
        let source = Toy::booted(&plan);
        let mut wire = None;
        let begun = Instant::now();
        let (ours, mut quick) = both_options(plain);
        quick.peer_timeout = Duration::from_millis(500);
        // A connection that never became a session leaves the destination waiting.
        quick.accept_timeout = Some(Duration::from_millis(500));
        let both = migrate_by(
            &source,
            &plan,
            "tcp:127.0.0.1:0",
            ours,
            quick,
            |_, to| {
                let knows_frames = matches!(cut, Cut::BeforeFrameToSource(_));
                let on_the_way =
                    if knows_frames && !plain { tls_proxy(to, cut) } else { proxy::start(to, cut) };
                wire.insert(on_the_way).at.clone()
            },
            |_| {},
        );
        drop(wire);
        match (&both.source, &both.destination) {
            // In the handshake.
            (
                Err(MigrateError::NotBegun(_)),
                Err(IncomingError::NotBegun(_) | IncomingError::Cancelled(_)),
            ) if !plain => {
                source.prove_running();
                assert!(!both.machine.runs(), "{cut:?}: two owners");
            }
            (Ok(_), Ok(_)) => prove_moved(&source, &both.machine),
            (Err(MigrateError::Aborted(aborted)), Err(_)) => {
                assert!(aborted.restored, "{cut:?}: {aborted:?}");
                source.prove_restored();
                assert!(!both.machine.runs(), "{cut:?}: two owners");
            }
            (source, destination) => panic!("{cut:?}: {source:?} {destination:?}"),
        }
        assert!(begun.elapsed() < Duration::from_secs(15), "{cut:?} took {:?}", begun.elapsed());
    }
}

#[test]
fn a_lost_answer_to_commit_is_asked_for_again() {
    let plan = small();
    let dir = tempfile::tempdir().unwrap();
    let source = Toy::booted(&plan);
    let mut wire = None;
    let (mut ours, mut theirs) = (options(), incoming());
    ours.state_dir = Some(dir.path().join("source"));
    theirs.state_dir = Some(dir.path().join("destination"));
    let both = migrate_by(
        &source,
        &plan,
        "tcp:127.0.0.1:0",
        ours,
        theirs,
        |_, to| {
            // RUNNING never arrives.
            wire.insert(tls_proxy(to, Cut::BeforeFrameToSource(0x0006))).at.clone()
        },
        |_| {},
    );
    drop(wire);
    let (_, arrived, destination) = both.unwrap();
    prove_moved(&source, &destination);
    destination.prove_running();
    assert_eq!(arrived.epoch.0, 1);
    let here = read_journal(&dir.path().join("source"), VM).unwrap().unwrap();
    assert_eq!(here.source.unwrap().state, SourceState::Released);
    let there = read_journal(&dir.path().join("destination"), VM).unwrap().unwrap();
    assert_eq!(there.destination.unwrap().state, DestinationState::Owner);
}

#[test]
fn an_answer_that_never_comes_leaves_the_guest_standing() {
    let plan = small();
    let dir = tempfile::tempdir().unwrap();
    let source = Toy::booted(&plan);
    let mut ours = options();
    // Also how long a loaded host may take to say READY.
    ours.peer_timeout = Duration::from_secs(2);
    ours.connect_timeout = Duration::from_millis(200);
    ours.state_dir = Some(dir.path().to_owned());
    let machine = Toy::new(&plan);
    let built = machine.clone();
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming()).unwrap();
    let wire = tls_proxy(destination.local(), Cut::BeforeFrameToSource(0x0006));
    let at = wire.at.clone();
    let here = std::thread::scope(|scope| {
        scope.spawn(move || {
            // And its socket is gone with it.
            destination.accept(|_| Ok(built as Arc<dyn Machine>)).unwrap();
            drop(destination);
        });
        Source::new(source.clone(), ours.clone()).migrate_to(&at, |_| {})
    });
    drop(wire);
    assert!(matches!(here, Err(MigrateError::Unresolved { .. })), "{here:?}");
    source.prove_standing();
    machine.prove_running();
    // And it cannot be migrated again by mistake, neither by this process nor, once it has let go, by what the journal says.
    let again = Source::new(source.clone(), ours.clone()).migrate_to(&at, |_| {});
    assert!(matches!(again, Err(MigrateError::NotBegun(_))), "{again:?}");
    drop(here);
    let again = Source::new(source.clone(), ours).migrate_to(&at, |_| {});
    assert!(matches!(again, Err(MigrateError::Unresolved { .. })), "{again:?}");
}
