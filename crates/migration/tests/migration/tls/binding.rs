//! A further connection belongs to one session: who asks what became of a COMMIT has to prove that he was in it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_migration::rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384;
use vfio_migration::rustls::crypto::tls13::OkmBlock;
use vfio_migration::rustls::{ClientConnection, KeyLog, StreamOwned};
use vfio_migration::{Destination, Expectation, Machine, Security, Source, Uri, read_journal};
use vfio_migration_types::Side;
use vfio_migration_wire::{Frame, FrameHeader, HEADER_LEN, Message, PREAMBLE, encode};

use super::hosts::*;
use crate::toy::pki::{Ca, Host};
use crate::toy::*;

/// Connects with the certificates of `directory`, sends what `question` makes of the connection, and reads one answer.
fn ask(to: &Uri, directory: &Path, question: impl FnOnce(&ClientConnection) -> Message) -> Message {
    let Uri::Tcp { host, port } = to else { panic!("{to}") };
    let name = HOST.try_into().unwrap();
    let connection = ClientConnection::new(Arc::new(client_config(directory)), name).unwrap();
    let mut stream = StreamOwned::new(connection, TcpStream::connect((host.as_str(), *port)).unwrap());
    let mut preamble = [0; PREAMBLE.len()];
    stream.read_exact(&mut preamble).unwrap();
    stream.write_all(&PREAMBLE).unwrap();
    let question = question(&stream.conn);
    stream.write_all(&encode(&question, 0).unwrap()).unwrap();
    let mut head = [0; HEADER_LEN];
    stream.read_exact(&mut head).unwrap();
    let header = FrameHeader::parse(&head, 0).unwrap();
    let mut payload = vec![0; header.payload_len()];
    stream.read_exact(&mut payload).unwrap();
    match Frame::decode(&header, &payload, Side::Destination).unwrap() {
        Frame::Message(message) => message,
        other => panic!("{other:?}"),
    }
}

fn refused(answer: Message) {
    match answer {
        Message::Abort(cause) => assert!(cause.text.contains("only the source of a migration"), "{cause}"),
        other => panic!("{other:?}"),
    }
}

/// What a connection's exporters are derived from, as its client notes it.
#[derive(Debug, Default)]
struct ExporterSecret(Mutex<Vec<u8>>);

impl KeyLog for ExporterSecret {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        if label == "EXPORTER_SECRET" {
            *self.0.lock().unwrap() = secret.to_vec();
        }
    }
}

/// RFC 8446, section 7.5, of a connection with SHA-384.
fn exporter(secret: &[u8], label: &[u8], context: &[u8]) -> [u8; 32] {
    let suite = TLS13_AES_256_GCM_SHA384.tls13().unwrap();
    let hash = |bytes: &[u8]| suite.common.hash_provider.hash(bytes);
    let expand = |secret: &[u8], label: &[u8], context: &[u8], out: &mut [u8]| {
        let label = [b"tls13 ", label].concat();
        let lengths = [
            u16::try_from(out.len()).unwrap().to_be_bytes().as_slice(),
            &[u8::try_from(label.len()).unwrap()],
        ]
        .concat();
        let info = [lengths.as_slice(), &label, &[u8::try_from(context.len()).unwrap()], context];
        suite.hkdf_provider.expander_for_okm(&OkmBlock::new(secret)).expand_slice(&info, out).unwrap();
    };
    let (mut derived, mut out) = ([0; 48], [0; 32]);
    expand(secret, label, hash(b"").as_ref(), &mut derived);
    expand(&derived, b"exporter", hash(context).as_ref(), &mut out);
    out
}

/// What docs/protocol.md has a source say on `connection`, by the key of its session.
fn proof(session_key: &[u8; 32], connection: &ClientConnection) -> [u8; 32] {
    let label = b"EXPERIMENTAL-vfio-migrate-connection";
    let value = connection.export_keying_material([0; 32], label, Some(&[])).unwrap();
    *blake3::keyed_hash(session_key, &value).as_bytes()
}

/// A right certificate and the attempt's name are not enough, of the source's own host neither: what counts is to have been in the session.
#[test]
fn a_question_from_outside_the_session_is_refused() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let (other, renewed) = (ca.host(&Host::named("host-c")), ca.host(&Host::named("host-a")));
    let state = tempfile::tempdir().unwrap();
    let mut options = destination_options(secure(there.path()));
    options.state_dir = Some(state.path().to_owned());
    let listen = |expect: Expectation| {
        let mut options = options.clone();
        options.expect = expect.into();
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap()
    };
    let mut destination = listen(Expectation::default());
    let to = destination.local().clone();
    let waiting = Waiting(destination.control());
    let machine = Toy::new(&plan());
    let built = machine.clone();
    let toy = Toy::booted(&plan());
    let secret = Arc::new(ExporterSecret::default());
    let mut config = client_config(here.path());
    config.key_log = secret.clone();
    let mut options = source_options(Security::Client(Arc::new(config)));
    options.pause_before_switchover = true;
    let source = Source::new(toy.clone(), options);
    let control = source.control();
    let mut ours = None;
    std::thread::scope(|scope| {
        let _waiting = waiting;
        scope.spawn(move || {
            destination.accept(|_| Ok::<Arc<dyn Machine>, _>(built)).unwrap();
            destination.answer_queries(Duration::from_secs(30)).unwrap();
        });
        let sending = scope.spawn(|| source.migrate_to(&to, |_| {}));
        wait_for("the switchover to be held", || control.progress().waiting);
        let attempt = control.progress().attempt.unwrap();
        let query = |proof| Message::Query {
            vm: attempt.vm,
            attempt: attempt.attempt,
            epoch: attempt.epoch.next(),
            proof,
        };
        let key = |attempt: &[u8; 16]| {
            exporter(&secret.0.lock().unwrap(), b"EXPERIMENTAL-vfio-migrate-session", attempt)
        };
        let session = key(&attempt.attempt.0);
        // While the guest is on its way, when an answer would give the attempt up; and afterwards.
        for arrived in [false, true] {
            if arrived {
                control.continue_switchover();
            }
            // Who knows the attempt alone.
            refused(ask(&to, here.path(), |_| query([0; 32])));
            // Another host, with the session's key and without the name or public key that it goes with.
            refused(ask(&to, other.path(), |own| query(proof(&session, own))));
            // The source's own host, from another session.
            let label = b"EXPERIMENTAL-vfio-migrate-session";
            refused(ask(&to, here.path(), |own| {
                let key = own.export_keying_material([0; 32], label, Some(&attempt.attempt.0)).unwrap();
                query(proof(&key, own))
            }));
            // The same session, and another attempt.
            refused(ask(&to, here.path(), |own| query(proof(&key(&[7; 16]), own))));
            // What was said on a connection is said again on the next.
            let mut said = [0; 32];
            refused(ask(&to, other.path(), |own| {
                said = proof(&session, own);
                query(said)
            }));
            refused(ask(&to, here.path(), |_| query(said)));
        }
        sending.join().unwrap().unwrap();
        prove_moved(&toy, &machine);
        // The source itself is answered, also with a new key of its name.
        for own in [here.path(), renewed.path()] {
            let answer = ask(&to, own, |connection| query(proof(&session, connection)));
            assert!(matches!(answer, Message::Running(_)), "{answer:?}");
        }
        ours = Some((query(session), session));
    });
    // A process that was started since has the journal alone, and tells nobody else either; him it does, whoever is expected now.
    let (Message::Query { vm, attempt, epoch, .. }, session) = ours.unwrap() else { panic!() };
    let journal = state.path().join(format!("{vm}.json"));
    assert_eq!(std::fs::metadata(&journal).unwrap().permissions().mode() & 0o777, 0o600);
    let kept = std::fs::read_to_string(&journal).unwrap();
    let hex = blake3::Hash::from_bytes(session).to_hex();
    assert!(kept.contains(hex.as_str()));
    assert!(!format!("{:?}", read_journal(state.path(), vm)).contains(&hex[..16]));
    let mut destination = listen(Expectation { sources: Some(vec![]), ..Expectation::default() });
    let to = destination.local().clone();
    let waiting = Waiting(destination.control());
    std::thread::scope(|scope| {
        let _waiting = waiting;
        scope.spawn(move || destination.answer_queries(Duration::from_secs(30)).unwrap());
        refused(ask(&to, here.path(), |_| Message::Query { vm, attempt, epoch, proof: [0; 32] }));
        let answer = ask(&to, here.path(), |connection| Message::Query {
            vm,
            attempt,
            epoch,
            proof: proof(&session, connection),
        });
        assert!(matches!(answer, Message::Running(_)), "{answer:?}");
    });
}

/// A source whose connection was cut before the answer to its COMMIT hears it on the next one.
#[test]
fn the_source_of_the_session_is_answered() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let (toy, machine) = (Toy::booted(&plan()), Toy::new(&plan()));
    let journal = machine.journal.clone();
    let both = migrate_into(
        &toy,
        machine,
        "tcp:127.0.0.1:0",
        source_options(secure(here.path())),
        destination_options(secure(there.path())),
        |_, to| cut_once(to, move || journal.lock().unwrap().iter().any(|said| said == "resume")),
        |_| {},
    );
    let (_, _, machine) = both.unwrap();
    prove_moved(&toy, &machine);
    machine.prove_running();
}

/// Somebody on the way who cuts the first connection at what is sent to the source once `due`, and lets the others pass.
fn cut_once(to: &Uri, due: impl Fn() -> bool + Send + 'static) -> Uri {
    let Uri::Tcp { host, port } = to.clone() else { panic!("{to}") };
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let at = Uri::Tcp { host: HOST.into(), port: listener.local_addr().unwrap().port() };
    std::thread::spawn(move || {
        for first in [true, false] {
            let (source, _) = listener.accept().unwrap();
            let destination = TcpStream::connect((host.as_str(), port)).unwrap();
            let (mut up, mut to_destination) =
                (source.try_clone().unwrap(), destination.try_clone().unwrap());
            let upward = std::thread::spawn(move || std::io::copy(&mut up, &mut to_destination));
            let (mut down, mut to_source) = (&destination, &source);
            let mut buffer = vec![0; 64 << 10];
            while let Ok(read @ 1..) = down.read(&mut buffer) {
                if (first && due()) || to_source.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
            for end in [&source, &destination] {
                let _ = end.shutdown(Shutdown::Both);
            }
            let _ = upward.join().unwrap();
        }
    });
    at
}
