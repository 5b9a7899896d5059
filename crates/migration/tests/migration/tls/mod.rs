//! Migrations over TLS: who is let in, and with what.

mod authorities;
mod bad_input;
mod binding;
mod chains;
mod flips;
pub(crate) mod hosts;
mod revoked;
mod wire;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::ExtendedKeyUsagePurpose;
use vfio_migration::rustls::ClientConfig;
use vfio_migration::{
    ALPN, CA_FILE, ConnectionSecurity, Destination, IncomingError, Machine, PeerIdentity, Pin, Security,
    SecurityKind, SocketKind, Source, TlsDirectory, TlsRole, Uri, own_identity,
};
use vfio_migration_types::error_chain;

use self::hosts::*;
use crate::toy::pki::{Ca, Host};
use crate::toy::*;

/// What the source says of a destination whose certificate it refuses, and which does not look at it itself.
fn refused_here(source: &Security, destination: &Path) -> String {
    let shown = Security::Server(Arc::new(server_config(destination)));
    let (here, there) = refused(source.clone(), shown);
    assert!(there.contains("the peer refused this side"), "{there}");
    here
}

/// What the destination says of a source whose certificate it refuses; the source, which does not look at it itself, hears of it.
fn refused_there(source: &Path, destination: &Security) -> String {
    let listening =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), destination_options(destination.clone()));
    let (here, there) = told_of(listening.unwrap(), source, || ());
    assert!(here.contains("the peer refused this side"), "{here}");
    there
}

#[test]
fn a_guest_moves_between_hosts_that_trust_each_other() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let toy = Toy::booted(&plan());
    let (mut control, mut incoming) = (None, None);
    // The name that the destination has to prove is that of its address.
    let both = migrate_by(
        &toy,
        &plan(),
        "tcp:127.0.0.1:0",
        source_options(Security::Directory(TlsDirectory::new(here.path()))),
        destination_options(secure(there.path())),
        |there, to| {
            incoming = Some(there.clone());
            to.clone()
        },
        |here| control = Some(here),
    );
    let (_, _, machine) = both.unwrap();
    prove_moved(&toy, &machine);
    // Each side knows who the other was.
    let of_source = control.unwrap().progress().attempt.unwrap().security.unwrap();
    let of_destination = incoming.unwrap().last_progress().unwrap().attempt.unwrap().security.unwrap();
    for (security, directory, role, name) in [
        (of_source, there.path(), TlsRole::Server, HOST),
        (of_destination, here.path(), TlsRole::Client, "host-a"),
    ] {
        let ConnectionSecurity { kind, cipher, peer, socket, unix_peer } = security;
        assert_eq!((socket, unix_peer), (Some(SocketKind::Tcp), None));
        assert_eq!(kind, SecurityKind::Tls);
        assert!(cipher.unwrap().starts_with("TLS13_"));
        let peer = peer.unwrap();
        assert_eq!(peer, own_identity(directory, role).unwrap());
        assert_eq!(peer.names, [name]);
    }
}

#[test]
fn the_name_that_is_connected_to_is_the_one_that_must_be_proved() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named("host-c")));
    let (toy, both) =
        attempt(Security::Directory(TlsDirectory::new(here.path())), secure(there.path()), Uri::clone);
    toy.prove_running();
    let text = error_chain(&both.source.unwrap_err());
    assert!(text.contains("is not \"127.0.0.1\"'s: it names \"host-c\""), "{text}");
    // A connection that was handed over leads to nobody by name.
    let (text, _) = refused(Security::Directory(TlsDirectory::new(here.path())), secure(there.path()));
    assert!(text.contains("--tls-hostname"), "{text}");
}

/// Every way in which certificates do not fit, each with what its judge says; the other side hears that it was refused.
#[test]
fn whoever_does_not_prove_who_he_is_is_refused() {
    let (ca, stranger) = (Ca::new(), Ca::new());
    let here = ca.host(&Host::named("host-a"));
    let there = ca.host(&Host::named(HOST));
    let (a, b) = (secure(here.path()), secure(there.path()));
    let only = |purpose: ExtendedKeyUsagePurpose| (purpose.clone(), purpose);
    let wrong_ca = |host: &Host| {
        let directory = ca.host(host);
        stranger.certify(directory.path(), host);
        directory
    };

    // The destination's certificate, seen by the source before it sends anything.
    for (directory, says) in [
        (ca.host(&Host::named("host-c")), "it names \"host-c\""),
        (ca.host(&Host { years: (2090, 2091), ..Host::named(HOST) }), "not valid before 2090-01-01"),
        (
            ca.host(&Host { purposes: only(ExtendedKeyUsagePurpose::ClientAuth), ..Host::named(HOST) }),
            "its extended key usage must have serverAuth at a destination",
        ),
        (wrong_ca(&Host::named(HOST)), "not of a CA that is trusted here"),
    ] {
        let text = refused_here(&a, directory.path());
        assert!(text.contains(says), "{text}");
    }

    // The source's certificate, seen by the destination before it allocates anything.
    for (directory, says) in [
        (ca.host(&Host { years: (2090, 2091), ..Host::named("host-a") }), "not valid before 2090-01-01"),
        (
            ca.host(&Host { purposes: only(ExtendedKeyUsagePurpose::ServerAuth), ..Host::named("host-a") }),
            "clientAuth at a source",
        ),
        (wrong_ca(&Host::named("host-a")), "not of a CA that is trusted here"),
    ] {
        let text = refused_there(directory.path(), &b);
        assert!(text.contains(says), "{text}");
    }

    // No certificate at all.
    let mut nameless =
        ClientConfig::builder().with_root_certificates(roots(here.path())).with_no_client_auth();
    nameless.alpn_protocols = vec![ALPN.to_vec()];
    let (toy, both) = attempt(Security::Client(Arc::new(nameless)), b, Uri::clone);
    toy.prove_running();
    let text = error_chain(&both.source.unwrap_err());
    assert!(text.contains("it wants a certificate and we have shown none"), "{text}");
}

#[test]
fn plain_text_and_tls_do_not_meet() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let (text, peer) = refused(secure(here.path()), Security::PlainText);
    assert!(text.contains("instead of a TLS handshake: is it plain text there?"), "{text}");
    assert!(text.contains("start the destination with --tls-creds"), "{text}");
    assert!(peer.contains("TLS, on a connection that is not set up for it: --tls-creds"), "{peer}");
    let (text, peer) = refused(Security::PlainText, secure(there.path()));
    assert!(text.contains("TLS, on a connection that is not set up for it: --tls-creds"), "{text}");
    assert!(peer.contains("the peer speaks in plain text") && peer.contains("needs --tls-creds"), "{peer}");
}

/// Something else that is served over TLS with the same certificates is not taken for a migration.
#[test]
fn another_protocol_inside_is_refused() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let mut config = client_config(here.path());
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (toy, both) = attempt(Security::Client(Arc::new(config)), secure(there.path()), Uri::clone);
    let text = error_chain(&both.source.unwrap_err());
    assert!(text.contains("it serves something else than migrations"), "{text}");
    toy.prove_running();

    // A side that names none at all, be it source or destination.
    let says = "another protocol inside than vfio-migrate/1";
    let mut config = client_config(here.path());
    config.alpn_protocols = Vec::new();
    let (toy, both) = attempt(Security::Client(Arc::new(config)), secure(there.path()), Uri::clone);
    toy.prove_running();
    both.source.unwrap_err();
    let mut config = server_config(there.path());
    config.alpn_protocols = Vec::new();
    let (text, _) = refused(secure(here.path()), Security::Server(Arc::new(config)));
    assert!(text.contains(says), "{text}");
}

/// A VMM that has its certificates from elsewhere brings its own configuration.
#[test]
fn a_vmm_brings_its_own_configuration() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let server = server_config(there.path());
    let client = Security::Client(Arc::new(client_config(here.path())));
    let server = Security::Server(Arc::new(server));
    let (toy, both) = attempt(client.clone(), server.clone(), Uri::clone);
    let (_, _, machine) = both.unwrap();
    prove_moved(&toy, &machine);
    // Each for its own side.
    let (text, _) = refused(server, Security::PlainText);
    assert!(text.contains("a destination's configuration was given to a source"), "{text}");
    let listened = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), destination_options(client));
    let text = error_chain(&listened.unwrap_err());
    assert!(text.contains("a source's configuration was given to a destination"), "{text}");
}

/// A VMM that has secured the stream itself says with whom it talks.
#[test]
fn a_stream_that_somebody_vouches_for_has_an_identity() {
    let peer = |name: &str| PeerIdentity {
        names: vec![name.to_owned()],
        pin: Pin::of_key(name.as_bytes()),
        not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000),
    };
    let (here, there) = tcp_pair();
    let toy = Toy::booted(&plan());
    let source = Source::new(toy, source_options(Security::Vouched(peer("host-b"))));
    let (control, mut seen) = (source.control(), None);
    std::thread::scope(|scope| {
        let arriving = scope.spawn(|| {
            let options = destination_options(Security::Vouched(peer("host-a")));
            let mut place = Destination::over(there.into(), options).unwrap();
            place.accept(|_| Ok::<Arc<dyn Machine>, _>(Toy::new(&plan()))).unwrap();
            place.control().last_progress().unwrap().attempt.unwrap().security.unwrap()
        });
        source.migrate_over(here.into(), |progress| seen = Some(progress.clone())).unwrap();
        assert_eq!(arriving.join().unwrap().peer, Some(peer("host-a")));
    });
    let security = control.progress().attempt.unwrap().security.unwrap();
    assert_eq!((security.kind, security.peer), (SecurityKind::Vouched, Some(peer("host-b"))));
    // The progress that carries it reads back as it was written.
    let seen = seen.unwrap();
    let read: vfio_migration::Progress =
        serde_json::from_str(&serde_json::to_string(&seen).unwrap()).unwrap();
    assert_eq!(read.attempt, seen.attempt);
}

/// A peer that is silent in the handshake is given up in time, on both sides.
#[test]
fn a_handshake_that_does_not_end_is_given_up() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let (one, _silent) = tcp_pair();
    let mut options = source_options(secure(here.path()));
    options.connect_timeout = Duration::from_millis(200);
    let toy = Toy::booted(&plan());
    let error = Source::new(toy.clone(), options).migrate_over(one.into(), |_| {}).unwrap_err();
    assert!(error_chain(&error).contains("the peer did not end the TLS handshake within 0.2 s"), "{error}");
    toy.prove_running();

    let (_silent, one) = tcp_pair();
    let mut options = destination_options(secure(there.path()));
    options.peer_timeout = Duration::from_millis(200);
    let mut place = Destination::over(one.into(), options).unwrap();
    let error = place.accept(|_| Ok::<Arc<dyn Machine>, _>(Toy::new(&plan()))).unwrap_err();
    assert!(error_chain(&error).contains("it said nothing within 200ms"), "{error}");
}

/// What the destination is started with is looked at before anybody comes.
#[test]
fn files_that_cannot_be_used_are_named_at_once() {
    let listen = |directory: &Path| {
        let options = destination_options(secure(directory));
        match Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options) {
            Err(IncomingError::NotBegun(failure)) => failure.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let ca = Ca::new();
    let key = TlsRole::Server.key_file();
    let certificate = TlsRole::Server.certificate_file();
    let empty = tempfile::tempdir().unwrap();
    let text = listen(empty.path());
    assert!(text.contains(&certificate) && text.contains("No such file"), "{text}");

    let host = ca.host(&Host::named(HOST));
    std::fs::set_permissions(host.path().join(&key), std::fs::Permissions::from_mode(0o640)).unwrap();
    let text = listen(host.path());
    assert!(text.contains(&key) && text.contains("0640") && text.contains("chmod 600"), "{text}");

    let host = ca.host(&Host::named(HOST));
    std::fs::write(host.path().join(&key), "no key").unwrap();
    let text = listen(host.path());
    assert!(text.contains(&key) && text.contains("holds no private key"), "{text}");

    let host = ca.host(&Host::named(HOST));
    let other = ca.host(&Host::named(HOST));
    std::fs::copy(other.path().join(&key), host.path().join(&key)).unwrap();
    let text = listen(host.path());
    assert!(text.contains("is not the key of") && text.contains(&certificate), "{text}");

    let host = ca.host(&Host { years: (2001, 2002), ..Host::named(HOST) });
    let text = listen(host.path());
    assert!(text.contains(&certificate) && text.contains("expired at 2002-01-01"), "{text}");

    let host = ca.host(&Host::named(HOST));
    std::fs::write(host.path().join(CA_FILE), "").unwrap();
    let text = listen(host.path());
    assert!(text.contains(CA_FILE) && text.contains("holds no certificate"), "{text}");
}

/// What is wrong with a source's own files is told before it connects: its destination has nothing to do with it.
#[test]
fn a_source_whose_files_cannot_be_used_connects_to_nobody() {
    let ca = Ca::new();
    let listener = std::net::TcpListener::bind((HOST, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let to: Uri = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    let server = ExtendedKeyUsagePurpose::ServerAuth;
    for host in [
        Host { years: (2001, 2002), ..Host::named("host-a") },
        Host { years: (2090, 2091), ..Host::named("host-a") },
        Host { purposes: (client, server), ..Host::named("host-a") },
    ] {
        let toy = Toy::booted(&plan());
        let directory = ca.host(&host);
        let options = source_options(secure(directory.path()));
        let text = error_chain(&Source::new(toy.clone(), options).migrate_to(&to, |_| {}).unwrap_err());
        assert!(text.contains("client-cert.pem"), "{text}");
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "{text}");
        toy.prove_running();
    }
}

#[test]
fn pinned_keys_need_no_ca_and_no_name() {
    let (ca, other) = (Ca::new(), Ca::new());
    let (here, there) = (ca.host(&Host::named("a")), other.host(&Host::named("b")));
    std::fs::remove_file(here.path().join(CA_FILE)).unwrap();
    let pin = |directory: &Path, role| own_identity(directory, role).unwrap().pin;
    let pinned = |directory: &Path, pins: &[Pin]| {
        let pins: BTreeSet<Pin> = pins.iter().copied().collect();
        Security::Directory(TlsDirectory { pins, ..TlsDirectory::new(directory) })
    };
    let of_source = pin(here.path(), TlsRole::Client);
    let of_destination = pin(there.path(), TlsRole::Server);
    let right = || pinned(here.path(), &[of_destination]);
    let (toy, both) = attempt(right(), pinned(there.path(), &[of_source]), Uri::clone);
    let (_, _, machine) = both.unwrap();
    prove_moved(&toy, &machine);
    let (text, _) = refused(pinned(here.path(), &[of_source]), pinned(there.path(), &[of_source]));
    assert!(text.contains(&of_destination.to_string()) && text.contains("pinned"), "{text}");
    let (text, peer) = refused(right(), pinned(there.path(), &[of_destination]));
    assert!(peer.contains(&of_source.to_string()) && peer.contains("pinned"), "{peer}");
    assert!(text.contains("the peer refused this side"), "{text}");
}

/// Certificates are replaced while a destination waits; while they do not fit each other, the old ones serve.
#[test]
fn certificates_rotate_while_a_destination_waits() {
    let (ca, next) = (Ca::new(), Ca::new());
    let (here, there) = (ca.host(&Host::named("a")), ca.host(&Host::named(HOST)));
    let options = destination_options(secure(there.path()));
    let mut destination = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let to = destination.local().clone();
    let waiting = Waiting(destination.control());
    let machine = Toy::new(&plan());
    let built = machine.clone();
    std::thread::scope(|scope| {
        let _waiting = waiting;
        scope.spawn(move || {
            let arrived = destination.accept(|_| Ok::<Arc<dyn Machine>, _>(built));
            if arrived.is_ok() {
                destination.answer_queries(Duration::from_secs(30)).unwrap();
            }
        });
        let toy = Toy::booted(&plan());
        let go = |directory: &Path| {
            Source::new(toy.clone(), source_options(secure(directory))).migrate_to(&to, |_| {})
        };
        // Half replaced: the key is gone, and the old certificate still proves who it is.
        let key = there.path().join(TlsRole::Server.key_file());
        std::fs::remove_file(&key).unwrap();
        let stranger = next.host(&Host::named("a"));
        let text = error_chain(&go(stranger.path()).unwrap_err());
        assert!(text.contains("not of a CA that is trusted here"), "{text}");
        // Whole: certificate and CA are others, and so are those whom they trust.
        let new = next.host(&Host::named(HOST));
        for entry in std::fs::read_dir(new.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), there.path().join(entry.file_name())).unwrap();
        }
        let text = error_chain(&go(here.path()).unwrap_err());
        assert!(text.contains("not of a CA that is trusted here"), "{text}");
        go(stranger.path()).unwrap();
        prove_moved(&toy, &machine);
    });
}
