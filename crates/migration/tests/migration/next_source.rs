//! A source that comes while the place is taken by what keeps no migration out.

use std::sync::Arc;

use vfio_migration::{Destination, DestinationOptions, IncomingError, Machine, MigrateError, Source, Uri};
use vfio_migration_types::{AttemptId, Epoch};
use vfio_migration_wire::{FEATURE_ASK, FEATURE_REHEARSE, Hello, Message, VERSIONS};

use crate::strangers::Peer;
use crate::toy::proxy::Cut;
use crate::toy::secure::{tls_destination, tls_proxy, tls_source};
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
            assert!(text.contains("a migration came"), "{text}");
            let (before, last) = arriving.join().unwrap();
            last.unwrap();
            assert!(matches!(before.as_slice(), [IncomingError::Rehearsed(_)]), "{before:?}");
        });
        prove_moved(&source, &arrives);
    }
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
            assert!(text.contains("no migration is taken in here now"), "{text}");
        }
        control.continue_switchover();
        moving.join().unwrap().unwrap();
        arriving.join().unwrap().1.unwrap();
    });
    prove_moved(&source, &arrives);
}
