//! What somebody on the way can do to a migration over TLS: read, change, cut, replay.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vfio_migration::{Destination, Machine, Security, Uri};
use vfio_migration_types::error_chain;

use super::hosts::*;
use crate::toy::pki::{Ca, Host};
use crate::toy::*;

/// More strangers than may wait, each inside its handshake: the rightful source comes in all the same.
#[test]
fn strangers_in_the_handshake_hold_up_nobody() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let mut strangers = Vec::new();
    let begun = Instant::now();
    let (toy, both) = attempt(secure(here.path()), secure(there.path()), |to| {
        let Uri::Tcp { port, .. } = to else { panic!("{to}") };
        for _ in 0..100 {
            let mut stranger = TcpStream::connect((HOST, *port)).unwrap();
            // The beginning of a ClientHello.
            stranger.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]).unwrap();
            strangers.push(stranger);
        }
        to.clone()
    });
    let (_, _, machine) = both.unwrap();
    prove_moved(&toy, &machine);
    assert!(begun.elapsed() < Duration::from_secs(30));
}

/// What somebody on the way has noted of a session is worth nothing to him.
#[test]
fn a_session_that_is_replayed_is_refused() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let mut noted = Arc::default();
    let (_, both) = attempt(secure(here.path()), secure(there.path()), |to| {
        let (at, seen) = wire(to, None);
        noted = seen;
        at
    });
    both.unwrap();
    let noted: Vec<u8> = noted.lock().unwrap().0.clone();
    let (mut replaying, one) = tcp_pair();
    std::thread::spawn(move || {
        let _ = replaying.write_all(&noted);
        let _ = replaying.read_to_end(&mut Vec::new());
    });
    let mut place = Destination::over(one.into(), destination_options(secure(there.path()))).unwrap();
    let error = place.accept(|_| Ok::<Arc<dyn Machine>, _>(Toy::new(&plan()))).unwrap_err();
    assert!(error_chain(&error).contains("damaged on the way: it does not decrypt"), "{error}");
}

/// An end that the peer did not announce is a failure, wherever in the stream it comes.
#[test]
fn a_stream_that_is_cut_between_records_is_no_end() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    for after in [100_000, 150_000] {
        let (toy, both) = attempt(secure(here.path()), secure(there.path()), |to| wire(to, Some(after)).0);
        toy.prove_running();
        let text = error_chain(&both.destination.unwrap_err());
        assert!(text.contains("the connection broke") && text.contains("no close_notify"), "{text}");
        assert!(!text.contains("not secure"), "{text}");
        both.source.unwrap_err();
    }
}

/// What passes in each direction: to the destination, and back.
type Noted = Arc<Mutex<(Vec<u8>, Vec<u8>)>>;

/// Somebody on the way who notes all that passes, and cuts both ways after so many bytes to the destination.
fn wire(to: &Uri, cut: Option<u64>) -> (Uri, Noted) {
    let Uri::Tcp { host, port } = to.clone() else { panic!("{to}") };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = Uri::Tcp { host: HOST.into(), port: listener.local_addr().unwrap().port() };
    let seen = Noted::default();
    let noted = seen.clone();
    std::thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect((host.as_str(), port)).unwrap();
        // A second connection, which asks what became of COMMIT, finds nobody.
        drop(listener);
        let back = (destination.try_clone().unwrap(), source.try_clone().unwrap(), noted.clone());
        std::thread::spawn(move || {
            pass(back.0, back.1, None, |piece| back.2.lock().unwrap().1.extend_from_slice(piece));
        });
        pass(source, destination, cut, |piece| noted.lock().unwrap().0.extend_from_slice(piece));
    });
    (at, seen)
}

fn pass(mut from: TcpStream, mut to: TcpStream, cut: Option<u64>, note: impl Fn(&[u8])) {
    let mut passed = 0;
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read) = from.read(&mut buffer) {
        let left = cut.map_or(read, |cut| read.min(usize::try_from(cut - passed).unwrap()));
        let piece = &buffer[..left];
        if piece.is_empty() {
            break;
        }
        passed += piece.len() as u64;
        note(piece);
        if to.write_all(piece).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
    if cut.is_some() {
        let _ = from.shutdown(std::net::Shutdown::Both);
    }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn nothing_of_the_guest_can_be_read_on_the_way() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("a")), ca.host(&Host::named(HOST)));
    // A whole number of words, so that it stands in RAM without a gap.
    let canary = b"a canary in guest RAM: 0123456789abcdef!";
    let passed = |source: Security, destination: Security| {
        let toy = Toy::booted(&plan());
        toy.plant(canary);
        let mut seen = Noted::default();
        let both = migrate_by(
            &toy,
            &plan(),
            "tcp:127.0.0.1:0",
            source_options(source),
            destination_options(destination),
            |_, to| {
                let (at, noted) = wire(to, None);
                seen = noted;
                at
            },
            |_| {},
        );
        both.unwrap();
        let of_device = toy.device_state();
        let of_device = of_device[of_device.len() / 2..][..32].to_vec();
        let (there, back) = &*seen.lock().unwrap();
        let found = |needle: &[u8]| contains(there, needle) || contains(back, needle);
        [found(canary), found(&of_device)]
    };
    assert_eq!(passed(secure(here.path()), secure(there.path())), [false, false]);
    assert_eq!(passed(Security::PlainText, Security::PlainText), [true, true]);
}
