//! Plain text: only for who asks for it, on both sides; and then everything passes there, too.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use vfio_migration::{
    Destination, DestinationOptions, IncomingError, Machine, MigrateError, Rehearse, SecurityKind, Source,
    SourceOptions, Uri, needs_security, probe,
};
use vfio_migration_types::{Epoch, Phase};

use crate::toy::proxy::{self, Cut};
use crate::toy::*;

fn plan() -> Plan {
    Plan { pages: 64, hot: 8, ..Plan::default() }
}

fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (here, listener.accept().unwrap().0)
}

/// An embedder that says nothing of security has unix sockets, and nothing else.
#[test]
fn nothing_leaves_the_host_for_who_does_not_say_how_it_is_secured() {
    let says = "is no unix socket, and nothing says how it is to be secured";
    // Somebody who would take anything.
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let tcp = Uri::Tcp { host: HOST.into(), port: listener.local_addr().unwrap().port() };
    let (here, there) = tcp_pair();
    let fd = Uri::Fd(here.as_raw_fd());
    assert!(needs_security(&tcp) && needs_security(&fd) && !needs_security(&"unix:/run/b".parse().unwrap()));

    let toy = Toy::booted(&plan());
    let new = || Source::new(toy.clone(), SourceOptions::default());
    let manifest = toy.manifest().unwrap();
    for uri in [&tcp, &fd] {
        for error in [
            new().migrate_to(uri, |_| {}).unwrap_err(),
            new().rehearse_to(uri, Rehearse::Precopy, |_| {}).unwrap_err(),
            probe(manifest.clone(), Some(VM), uri, SourceOptions::default(), |_| {}).unwrap_err(),
        ] {
            let MigrateError::NotBegun(failure) = error else { panic!("{error:?}") };
            assert!(failure.phase == Phase::Plan && failure.text.contains(says), "{failure}");
            assert!(failure.remedy.contains("--insecure-plaintext"), "{failure}");
        }
    }
    let over = new().migrate_over(here.try_clone().unwrap().into(), |_| {}).unwrap_err();
    assert!(over.to_string().contains(says), "{over}");
    let over = new().rehearse_over(here.try_clone().unwrap().into(), Rehearse::Ask, |_| {}).unwrap_err();
    assert!(over.to_string().contains(says), "{over}");
    assert!(listener.accept().is_err(), "somebody connected");
    toy.prove_running();

    let any = Uri::Tcp { host: HOST.into(), port: 0 };
    for listened in [
        Destination::listen(&any, DestinationOptions::default()),
        Destination::listen(&Uri::Fd(there.as_raw_fd()), DestinationOptions::default()),
        Destination::over(there.try_clone().unwrap().into(), DestinationOptions::default()),
    ] {
        let error = listened.unwrap_err();
        let IncomingError::NotBegun(failure) = &error else { panic!("{error:?}") };
        assert!(failure.text.contains(says) && failure.remedy.contains("--insecure-plaintext"), "{failure}");
    }
}

#[test]
fn a_guest_moves_there_and_back() {
    let mut here = Toy::booted(&plan());
    for round in 0..2 {
        let (mut options, mut control) = (plain_source(), None);
        options.verify = true;
        options.downtime_limit = Duration::from_secs(10);
        options.epoch = Epoch(round);
        let both = migrate_by(
            &here,
            &plan(),
            "tcp:127.0.0.1:0",
            options,
            plain_destination(),
            |_, to| to.clone(),
            |steered| control = Some(steered),
        );
        let (completed, _, there) = both.unwrap();
        prove_moved(&here, &there);
        there.prove_running();
        assert_eq!(completed.ram_digest_match, Some(true));
        let security = control.unwrap().progress().attempt.unwrap().security.unwrap();
        assert_eq!((security.kind, security.peer), (SecurityKind::PlainText, None));
        here = there;
    }
}

#[test]
fn a_cancel_and_a_cut_wire_leave_the_guest_where_it_was() {
    for cut in [Cut::Never, Cut::ToDestination(100_000)] {
        let toy = Toy::booted(&plan());
        let mut options = plain_source();
        // The cancel comes where nothing else ends it.
        options.pause_before_switchover = true;
        let mut incoming = plain_destination();
        incoming.peer_timeout = Duration::from_secs(2);
        let mut wire = None;
        let both = migrate_by(
            &toy,
            &plan(),
            "tcp:127.0.0.1:0",
            options,
            incoming,
            |_, to| wire.insert(proxy::start(to, cut)).at.clone(),
            |control| {
                if matches!(cut, Cut::Never) {
                    std::thread::spawn(move || {
                        wait_for("the wait before the switchover", || control.progress().waiting);
                        control.cancel();
                    });
                }
            },
        );
        drop(wire);
        let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
        assert_eq!((aborted.cancelled, aborted.restored), (matches!(cut, Cut::Never), true), "{aborted}");
        toy.prove_restored();
        assert!(matches!(both.destination, Err(IncomingError::Aborted(_))), "{:?}", both.destination);
    }
}
