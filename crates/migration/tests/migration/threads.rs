//! The threads of a session: what a VMM has them do first, and a system that has none left.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::toy::*;
use vfio_migration::{
    Destination, DestinationOptions, IncomingError, Machine, MigrateError, Source, SourceOptions, ThreadSetup,
};

fn options() -> SourceOptions {
    let mut options = tls_source();
    options.downtime_limit = Duration::from_secs(2);
    options.peer_timeout = Duration::from_secs(5);
    options
}

fn incoming() -> DestinationOptions {
    let mut options = tls_destination();
    options.peer_timeout = Duration::from_secs(5);
    options
}

/// However many threads the system has left, the guest is where it is said to be, and no thread is left behind.
#[test]
fn threads_that_run_out_are_named_and_the_guest_goes_on() {
    let plan = Plan { pages: 64, hot: 8, ..Plan::default() };
    for left in 0..12 {
        let toy = Toy::booted(&plan);
        vfio_migration::leave_threads(Some(left));
        let both = migrate(&toy, &plan, "tcp:127.0.0.1:0", options(), incoming());
        vfio_migration::leave_threads(None);
        match (both.source, both.destination) {
            (Ok(_), Ok(_)) => {
                assert!(left >= 4, "it moved with {left} threads");
                prove_moved(&toy, &both.machine);
            }
            (Err(MigrateError::NotBegun(failure)), Err(_)) => {
                assert!(failure.text.contains("no thread left"), "{left}: {failure}");
                assert_eq!(failure.errno, Some(11), "{failure}");
                toy.prove_running();
            }
            (source, destination) => panic!("{left}: {source:?}\n{destination:?}"),
        }
    }
    // The destination's own.
    for left in 0..12 {
        let toy = Toy::booted(&plan);
        let machine = Toy::new(&plan);
        let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), incoming()).unwrap();
        let (to, built) = (destination.local().clone(), machine.clone());
        let control = destination.control();
        std::thread::scope(|scope| {
            let arriving = scope.spawn(move || {
                vfio_migration::leave_threads(Some(left));
                let arrived = destination.accept(|_| Ok::<Arc<dyn Machine>, _>(built));
                if arrived.is_ok() {
                    destination.answer_queries(Duration::from_secs(30)).unwrap();
                }
                arrived
            });
            let moved = Source::new(toy.clone(), options()).migrate_to(&to, |_| {});
            control.cancel();
            match (moved, arriving.join().unwrap()) {
                (Ok(_), Ok(_)) => prove_moved(&toy, &machine),
                (Err(error), Err(IncomingError::Aborted(failure))) => {
                    assert!(failure.text.contains("no thread left"), "{left}: {failure}");
                    let said = vfio_migration_types::error_chain(&error);
                    assert!(said.contains("no thread left"), "{left}: the source hears {said}");
                    toy.prove_running();
                }
                (source, destination) => panic!("{left}: {source:?}\n{destination:?}"),
            }
        });
    }
}

/// Each is set up on itself, those too that are made by others of them.
#[test]
fn every_thread_is_set_up_first() {
    let device = FakeDeviceKind::default();
    let plan = Plan { devices: vec![device.clone(), device], ..Plan::default() };
    let toy = Toy::booted(&plan);
    let seen = [(); 2].map(|()| Arc::new(Mutex::new(BTreeSet::new())));
    let [at_source, at_destination] = seen.clone().map(|seen| {
        ThreadSetup::new(move |name| {
            assert_eq!(std::thread::current().name(), Some(name));
            seen.lock().unwrap().insert(name.to_owned());
        })
    });
    let (mut options, mut incoming) = (options(), incoming());
    (options.thread_setup, incoming.thread_setup) = (Some(at_source), Some(at_destination));
    let both = migrate(&toy, &plan, "tcp:127.0.0.1:0", options, incoming);
    both.source.unwrap();
    both.destination.unwrap();
    let [at_source, at_destination] = seen.map(|seen| seen.lock().unwrap().clone());
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    // What a worker makes for two devices is set up as the worker is.
    assert!(at_source.is_superset(&names(&["worker", "reader", "device"])), "{at_source:?}");
    assert!(
        at_destination.is_superset(&names(&["worker", "reader", "loader", "device"])),
        "{at_destination:?}"
    );
    // The caller's own thread is as it was.
    assert_eq!(std::thread::spawn(|| std::thread::current().name().map(str::to_owned)).join().unwrap(), None);
}
