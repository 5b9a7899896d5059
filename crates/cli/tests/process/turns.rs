//! Whose turn it is at a receiver: sources that hold the place and bring nothing, and one whose connection broke and that comes again.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use vfio_migration::rustls::pki_types::pem::PemObject;
use vfio_migration::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use vfio_migration::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use vfio_migration::{ALPN, CA_FILE, Uri};
use vfio_migration_types::{AttemptId, Epoch, VmId};
use vfio_migration_wire::{FrameHeader, HEADER_LEN, Hello, Message, Offer, PREAMBLE, VERSIONS, encode};

use crate::expectation::{Hosts, UUID};
use crate::support::{control, run, software, until};

const READY: u16 = 0x001c;

fn connect(at: &str) -> Option<TcpStream> {
    let Uri::Tcp { host, port } = at.parse().unwrap() else { panic!("{at}") };
    TcpStream::connect((host.as_str(), port)).ok()
}

/// What a source has to have to connect with the certificates of `dir`.
fn client(dir: &Path) -> Arc<ClientConfig> {
    let file = |name: &str| dir.join(name);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(file(CA_FILE)).unwrap()).unwrap();
    let chain = CertificateDer::pem_file_iter(file("client-cert.pem")).unwrap();
    let chain = chain.collect::<Result<_, _>>().unwrap();
    let key = PrivateKeyDer::from_pem_file(file("client-key.pem")).unwrap();
    let config = ClientConfig::builder().with_root_certificates(roots);
    let mut config = config.with_client_auth_cert(chain, key).unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(config)
}

fn is_late(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Says HELLO, and OFFER if there is one, and stays; comes again at once, as often as it is thrown out.
fn squat(at: &str, config: &Arc<ClientConfig>, offer: Option<&[u8]>, over: &AtomicBool) {
    let (vm, attempt) = (UUID.parse::<VmId>().unwrap(), AttemptId([7; 16]));
    let hello = Message::Hello(Hello { versions: VERSIONS, features: 0, vm, attempt, epoch: Epoch(0) });
    let mut words = [PREAMBLE.as_slice(), &encode(&hello, 0).unwrap()].concat();
    if let Some(manifest) = offer {
        let offer = Message::Offer(Offer { manifest: manifest.to_vec(), ..Offer::default() });
        words.extend_from_slice(&encode(&offer, 1).unwrap());
    }
    while !over.load(Ordering::Relaxed) {
        let Some(socket) = connect(at) else { continue };
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let connection = ClientConnection::new(config.clone(), ServerName::try_from("127.0.0.1").unwrap());
        let mut stream = StreamOwned::new(connection.unwrap(), socket);
        while stream.conn.is_handshaking() && !over.load(Ordering::Relaxed) {
            if stream.conn.complete_io(&mut stream.sock).is_err_and(|error| !is_late(&error)) {
                break;
            }
        }
        let _ = stream.write_all(&words);
        let mut bytes = [0; 4096];
        while !over.load(Ordering::Relaxed) {
            match stream.read(&mut bytes) {
                Ok(0) => break,
                Err(error) if !is_late(&error) => break,
                _ => {}
            }
        }
    }
}

/// Ends squatters, however a test ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Of another host that may move, or with the certificate of the rightful one.
#[test]
fn squatters_that_come_back_at_once_keep_the_rightful_source_out_no_longer_than_their_turns() {
    for (offers, as_rightful) in [(false, false), (false, true), (true, false), (true, true)] {
        let hosts = Hosts::new();
        hosts.expect(&format!(
            "vm = \"{UUID}\"\nmax_attempts = 1\n[[sources]]\nname = \"host-a\"\n[[sources]]\nname = \"host-x\"\n"
        ));
        let a = hosts.source("a", &hosts.a);
        let b = hosts.receiver(&["--once"]);
        let at = b.incoming();
        let vm = format!("vm:{}", control(&a));
        let manifest = run(&["describe", &vm]);
        assert!(manifest.status.success(), "{manifest:?}");
        let offer = offers.then_some(manifest.stdout.as_slice());
        let config = client(if as_rightful { &hosts.a } else { &hosts.x });
        let case = format!("offers: {offers}, as the rightful one: {as_rightful}");
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let over = Over(&over);
            for _ in 0..3 {
                scope.spawn(|| squat(&at, &config, offer, over.0));
            }
            until("a squatter to have the place", || (!b.migration().is_null()).then_some(()));
            let moved = a.migrate(&at, json!({}));
            assert_eq!(moved["status"], "completed", "{case}: {moved}");
        });
        b.assert_runs();
    }
}

/// Passes a plain-text migration on to `to`, and cuts both of its connections before READY goes to the source.
fn cut_before_ready(to: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = format!("tcp:{}", listener.local_addr().unwrap());
    let to = to.to_owned();
    std::thread::spawn(move || {
        let (source, _) = listener.accept().unwrap();
        let destination = connect(&to).unwrap();
        let (mut from, mut into) = (source.try_clone().unwrap(), destination.try_clone().unwrap());
        let passing = std::thread::spawn(move || drop(std::io::copy(&mut from, &mut into)));
        let (mut from, mut into) = (&destination, &source);
        let mut preamble = [0; PREAMBLE.len()];
        from.read_exact(&mut preamble).unwrap();
        into.write_all(&preamble).unwrap();
        for sequence in 0.. {
            let mut frame = vec![0; HEADER_LEN];
            from.read_exact(&mut frame).unwrap();
            let header = FrameHeader::parse(frame[..].try_into().unwrap(), sequence).unwrap();
            if header.number() == READY {
                break;
            }
            frame.resize(HEADER_LEN + header.payload_len(), 0);
            from.read_exact(&mut frame[HEADER_LEN..]).unwrap();
            into.write_all(&frame).unwrap();
        }
        for end in [&source, &destination] {
            end.shutdown(Shutdown::Both).unwrap();
        }
        passing.join().unwrap();
    });
    at
}

/// A receiver that waits for one migration, whose connection breaks at READY: its source may come again, and another is told in words
/// that nobody is waited for.
#[test]
fn one_migration_whose_connection_broke_comes_again_and_no_other_does() {
    const OTHER: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0009";
    for again in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let plain = ["--software", "--insecure-plaintext"];
        let source = |name: &str, uuid: &str| {
            software(dir.path(), name, &[&plain[..], &["--uuid", uuid]].concat()).start()
        };
        let (a, other) = (source("a", UUID), source("other", OTHER));
        let waits = ["--incoming", "tcp:127.0.0.1:0", "--once"];
        let b = software(dir.path(), "b", &[&plain[..], &waits].concat()).start();
        let at = b.incoming();
        let broken = a.migrate(&cut_before_ready(&at), json!({}));
        assert_eq!(broken["status"], "failed", "{broken}");
        a.assert_runs();
        if again {
            let moved = a.migrate(&at, json!({}));
            assert_eq!(moved["status"], "completed", "{moved}");
            b.assert_runs();
        } else {
            let refused = other.migrate(&at, json!({}));
            let why = refused["error"].as_str().unwrap();
            assert!(why.contains("no guest is waited for any more"), "{refused}");
            other.assert_runs();
            until("the end of the wait", || {
                (b.query("query")["vm"]["incoming"] == Value::Null).then_some(())
            });
        }
    }
}
