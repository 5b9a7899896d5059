//! Two hosts, and what passes between them over TLS.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vfio_migration::{
    Destination, DestinationOptions, IncomingControl, Machine, Security, Source, SourceOptions, Uri,
};
use vfio_migration_types::error_chain;

pub(crate) use crate::toy::HOST;
pub(crate) use crate::toy::secure::{client_config, roots, secure, server_config};
use crate::toy::*;

pub(crate) fn plan() -> Plan {
    Plan { pages: 64, hot: 8, ..Plan::default() }
}

pub(crate) fn source_options(security: Security) -> SourceOptions {
    let mut options = SourceOptions::default();
    options.security = Some(security);
    options.connect_timeout = Duration::from_secs(5);
    options.downtime_limit = Duration::from_secs(10);
    options
}

pub(crate) fn destination_options(security: Security) -> DestinationOptions {
    let mut options = DestinationOptions::default();
    options.security = Some(security);
    options.peer_timeout = Duration::from_secs(5);
    options
}

/// Migrates between two hosts, over `route`.
pub(crate) fn attempt(
    source: Security,
    destination: Security,
    route: impl FnOnce(&Uri) -> Uri,
) -> (Arc<Toy>, Both) {
    let toy = Toy::booted(&plan());
    let both = migrate_by(
        &toy,
        &plan(),
        "tcp:127.0.0.1:0",
        source_options(source),
        destination_options(destination),
        |_, to| route(to),
        |_| {},
    );
    (toy, both)
}

pub(crate) fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (here, listener.accept().unwrap().0)
}

/// What both sides say of an attempt over one connection, which must fail with the guest going on.
pub(crate) fn refused(source: Security, destination: Security) -> (String, String) {
    let (here, there) = tcp_pair();
    let toy = Toy::booted(&plan());
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            let mut place = Destination::over(there.into(), destination_options(destination))?;
            place.accept(|_| Ok::<Arc<dyn Machine>, _>(Toy::new(&plan())))
        });
        let left = Source::new(toy.clone(), source_options(source)).migrate_over(here.into(), |_| {});
        let arrived = arriving.join().unwrap();
        toy.prove_running();
        (error_chain(&left.expect_err("it migrated")), error_chain(&arrived.expect_err("it arrived")))
    })
}

/// What a source with the certificates of `directory` says, and a destination that refuses it. The source does not look at its own
/// files, and begins after `first`.
pub(crate) fn told_of(
    mut destination: Destination,
    directory: &Path,
    first: impl FnOnce(),
) -> (String, String) {
    let to = destination.local().clone();
    let waiting = Waiting(destination.control());
    let (told, refusals) = std::sync::mpsc::channel();
    destination.control().on_refused(move |refused| drop(told.send(refused.why.to_string())));
    let toy = Toy::booted(&plan());
    let options = source_options(Security::Client(Arc::new(client_config(directory))));
    std::thread::scope(|scope| {
        let _waiting = waiting;
        scope.spawn(move || drop(destination.accept(|_| Ok::<Arc<dyn Machine>, _>(Toy::new(&plan())))));
        first();
        let left = Source::new(toy.clone(), options).migrate_to(&to, |_| {}).unwrap_err();
        toy.prove_running();
        (error_chain(&left), refusals.recv_timeout(Duration::from_secs(30)).unwrap())
    })
}

/// Ends a destination's wait, however a test ends.
pub(crate) struct Waiting(pub(crate) IncomingControl);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.cancel();
    }
}
