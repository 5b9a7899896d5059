//! Nothing is left behind: not by migrations that succeed, not by those that fail. A program of its own, with one test,
//! because it counts what the whole process holds.

#[path = "../migration/toy/mod.rs"]
mod toy;

use std::sync::Arc;
use std::time::Duration;

use toy::proxy::{self, Cut};
use toy::*;
use vfio_migration::{Destination, IncomingError, Machine, Rehearse, Source, SourceOptions};
use vfio_migration_types::Epoch;

#[test]
fn nothing_is_left_behind() {
    let plan = Plan { devices: vec![FakeDeviceKind::default(); 2], ..Plan::default() };
    let mut options = tls_source();
    options.verify = true;
    options.downtime_limit = Duration::from_secs(2);
    let mut here = Toy::booted(&plan);
    let before = resources();
    for round in 1..=10 {
        options.epoch = Epoch(round - 1);
        // An attempt that fails on the way, then one that succeeds.
        let mut wire = None;
        let mut incoming = tls_destination();
        incoming.peer_timeout = Duration::from_secs(1);
        let failed = migrate_by(
            &here,
            &plan,
            "tcp:127.0.0.1:0",
            options.clone(),
            incoming,
            |_, to| {
                let proxy = proxy::start(to, Cut::ToDestination(100_000 + round * 400_000));
                let at = proxy.at.clone();
                wire = Some(proxy);
                at
            },
            |_| {},
        );
        assert!(failed.source.is_err() && failed.destination.is_err());
        drop((failed, wire));
        here.prove_restored();
        for how in [Rehearse::Ask, Rehearse::Precopy, Rehearse::Switchover] {
            rehearse(&here, &plan, how, options.clone());
            here.prove_restored();
        }
        let (_, arrived, there) =
            migrate(&here, &plan, "tcp:127.0.0.1:0", options.clone(), tls_destination()).unwrap();
        prove_moved(&here, &there);
        assert_eq!(arrived.epoch, Epoch(round));
        drop(arrived);
        here = there;
        here.prove_running();
        let mut now = resources();
        // A joined thread may stay in the process's list for a moment.
        wait_for("threads and descriptors to be let go", || {
            now = resources();
            now == before
        });
    }
}

fn rehearse(source: &Arc<Toy>, plan: &Plan, how: Rehearse, options: SourceOptions) {
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let to = destination.local().clone();
    let built: Arc<dyn Machine> = Toy::new(plan);
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || destination.accept(|_| Ok(built)).unwrap_err());
        Source::new(source.clone(), options).rehearse_to(&to, how, |_| {}).unwrap();
        assert!(matches!(arriving.join().unwrap(), IncomingError::Rehearsed(_)));
    });
}
