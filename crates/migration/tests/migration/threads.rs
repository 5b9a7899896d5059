//! A system that has no threads left.

use std::sync::Arc;
use std::time::Duration;

use crate::toy::*;
use vfio_migration::{
    Destination, DestinationOptions, IncomingError, Machine, MigrateError, Source, SourceOptions,
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
    for left in 0..8 {
        let toy = Toy::booted(&plan);
        vfio_migration::leave_threads(Some(left));
        let both = migrate(&toy, &plan, "tcp:127.0.0.1:0", options(), incoming());
        vfio_migration::leave_threads(None);
        match (both.source, both.destination) {
            (Ok(_), Ok(_)) => {
                assert!(left >= 2, "it moved with {left} threads");
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
    for left in 0..8 {
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
