//! Whoever comes with something else than what he needs: told why, with the guest running on, and the receiver there for the next one.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair, date_time_ymd};
use tempfile::TempDir;
use vfio_migration::rustls::ClientConfig;
use vfio_migration::{ALPN, CRL_FILE, Destination, Machine, Security, Source, TlsRole, Uri};
use vfio_migration_types::error_chain;

use super::hosts::*;
use crate::toy::pki::{Ca, Host, write_key};
use crate::toy::*;

/// Gives the host of `directory` a certificate that nobody but itself vouches for.
fn sign_itself(directory: &Path, role: TlsRole, purpose: ExtendedKeyUsagePurpose, name: &str) {
    let mut params = CertificateParams::new([name.to_owned()]).unwrap();
    params.not_after = date_time_ymd(2090, 1, 1);
    params.extended_key_usages = vec![purpose];
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    std::fs::write(directory.join(role.certificate_file()), certificate.pem()).unwrap();
    write_key(&directory.join(role.key_file()), &key.serialize_pem());
}

/// What a side shows that does not look at its own files, as ours does.
fn shown(directory: &Path) -> Security {
    Security::Client(Arc::new(client_config(directory)))
}

/// Sources that a destination at [`HOST`] does not take, each with what it hears of that. The folders live as long as they are needed.
fn bad_sources(
    ca: &Ca,
    here: &Path,
    revoked: &Path,
    folders: &mut Vec<TempDir>,
) -> Vec<(&'static str, Security, &'static str)> {
    let mut host = |host: &Host| {
        folders.push(ca.host(host));
        folders.last().unwrap().path().to_owned()
    };
    let named = || Host::named("host-a");
    let (wrong_ca, wrong_key) = (host(&named()), host(&named()));
    Ca::named("another CA").certify(&wrong_ca, &named());
    Ca::new().certify(&wrong_key, &named());
    let expired = host(&Host { years: (2001, 2002), ..named() });
    let early = host(&Host { years: (2090, 2091), ..named() });
    let server = ExtendedKeyUsagePurpose::ServerAuth;
    let purpose = host(&Host { purposes: (server.clone(), server), ..named() });
    let itself = host(&named());
    sign_itself(&itself, TlsRole::Client, ExtendedKeyUsagePurpose::ClientAuth, "host-a");
    let mismatched = host(&named());
    std::fs::copy(here.join("client-key.pem"), mismatched.join("client-key.pem")).unwrap();
    let empty = TempDir::new().unwrap();
    let nothing = empty.path().to_owned();
    folders.push(empty);
    let mut nameless = ClientConfig::builder().with_root_certificates(roots(here)).with_no_client_auth();
    nameless.alpn_protocols = vec![ALPN.to_vec()];
    let mut other_protocol = client_config(here);
    other_protocol.alpn_protocols = vec![b"h2".to_vec()];
    vec![
        ("wrong CA", shown(&wrong_ca), "it does not trust the CA of our certificate"),
        ("a CA of the same name", shown(&wrong_key), "its CA has the name of ours and another key"),
        ("expired", shown(&expired), "our certificate is not valid by its clock"),
        ("expired, ours", secure(&expired), "client-cert.pem expired at 2002-01-01"),
        ("not yet valid, ours", secure(&early), "client-cert.pem is not valid before 2090-01-01"),
        ("wrong purpose, ours", secure(&purpose), "client-cert.pem is not made for this purpose"),
        ("self-signed, ours", secure(&itself), "client-cert.pem is not of a CA of ca-cert.pem beside it"),
        ("wrong CA, ours", secure(&wrong_ca), "client-cert.pem is not of a CA of ca-cert.pem beside it"),
        ("not yet valid", shown(&early), "our certificate is not valid by its clock"),
        ("wrong purpose", shown(&purpose), "it does not take our certificate"),
        ("self-signed", shown(&itself), "it does not trust the CA of our certificate"),
        ("revoked", secure(revoked), "our certificate is revoked"),
        (
            "no certificate",
            Security::Client(Arc::new(nameless)),
            "it wants a certificate and we have shown none",
        ),
        (
            "another protocol",
            Security::Client(Arc::new(other_protocol)),
            "serves something else than migrations",
        ),
        ("plain text", Security::PlainText, "TLS"),
        ("another's key", secure(&mismatched), "client-key.pem is not the key of"),
        ("no files", secure(&nothing), "client-cert.pem"),
    ]
}

/// What somebody sends who is no source at all, and whether it hangs up afterwards.
const STRANGERS: [(&str, &[u8], bool); 6] = [
    ("nothing", b"", true),
    ("garbage", &[0xa5; 300], false),
    ("a garbled record", &[0x16, 3, 1, 0, 8, 1, 0, 0, 4, 0xff, 0xff, 0xff, 0xff], false),
    ("a record that is too long", &[0x16, 3, 1, 0xff, 0xff, 1, 0, 0xff, 0xff], false),
    ("a handshake that is cut", &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3], true),
    ("HTTP", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", false),
];

#[test]
fn a_receiver_outlasts_whoever_does_not_belong_there() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let (revoked, mut folders) = (ca.host(&Host::named("host-a")), Vec::new());
    let sources = bad_sources(&ca, here.path(), revoked.path(), &mut folders);
    let list = ca.list(&[revoked.path()], SystemTime::now() + Duration::from_secs(1 << 25));
    std::fs::write(there.path().join(CRL_FILE), list).unwrap();

    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), destination_options(secure(there.path())))
            .unwrap();
    let to = destination.local().clone();
    let waiting = Waiting(destination.control());
    let (toy, machine) = (Toy::booted(&plan()), Toy::new(&plan()));
    let built = machine.clone();
    std::thread::scope(|scope| {
        let _waiting = waiting;
        let arriving = scope.spawn(move || {
            destination.accept(|_| Ok::<Arc<dyn Machine>, _>(built)).unwrap();
            destination.answer_queries(Duration::from_secs(30)).unwrap();
        });
        for (case, security, says) in sources {
            let begun = Source::new(toy.clone(), source_options(security)).migrate_to(&to, |_| {});
            let text = error_chain(&begun.unwrap_err());
            assert!(text.contains(says), "{case}: {text}");
            toy.prove_running();
        }
        let Uri::Tcp { port, .. } = to else { panic!("{to}") };
        for (case, bytes, hangs_up) in STRANGERS {
            let mut stranger = TcpStream::connect((HOST, port)).unwrap();
            stranger.write_all(bytes).unwrap();
            if hangs_up {
                continue;
            }
            // It is told by an alert, and let go at once.
            let mut answer = Vec::new();
            let _ = stranger.read_to_end(&mut answer);
            assert!(matches!(answer[..], [0x15, 3, _, 0, 2, 2, _]), "{case}: {answer:x?}");
        }
        assert!(!arriving.is_finished());
        Source::new(toy.clone(), source_options(secure(here.path()))).migrate_to(&to, |_| {}).unwrap();
        prove_moved(&toy, &machine);
        machine.prove_running();
    });
}

/// The same at the other end: the source finds it out before it has sent anything of its guest, and the destination hears why.
#[test]
fn a_source_leaves_no_guest_with_whoever_does_not_prove_himself() {
    let ca = Ca::new();
    let here = ca.host(&Host::named("host-a"));
    let named = || Host::named(HOST);
    let client = ExtendedKeyUsagePurpose::ClientAuth;
    let (wrong_ca, itself, revoked) = (ca.host(&named()), ca.host(&named()), ca.host(&named()));
    let wrong_key = ca.host(&named());
    Ca::named("another CA").certify(wrong_ca.path(), &named());
    Ca::new().certify(wrong_key.path(), &named());
    sign_itself(itself.path(), TlsRole::Server, ExtendedKeyUsagePurpose::ServerAuth, HOST);
    let list = ca.list(&[revoked.path()], SystemTime::now() + Duration::from_secs(1 << 25));
    std::fs::write(here.path().join(CRL_FILE), list).unwrap();
    for (case, there, says, told) in [
        ("wrong CA", wrong_ca, "not of a CA that is trusted here", "it does not trust the CA"),
        (
            "a CA of the same name",
            wrong_key,
            "though of one of that name",
            "the name of ours and another key",
        ),
        (
            "expired",
            ca.host(&Host { years: (2001, 2002), ..named() }),
            "the peer's certificate expired at 2002-01-01",
            "not valid by its clock",
        ),
        (
            "not yet valid",
            ca.host(&Host { years: (2090, 2091), ..named() }),
            "not valid before 2090-01-01",
            "not valid by its clock",
        ),
        (
            "wrong name",
            ca.host(&Host::named("host-c")),
            "it names \"host-c\"",
            "it does not take our certificate",
        ),
        (
            "wrong purpose",
            ca.host(&Host { purposes: (client.clone(), client), ..named() }),
            "must have serverAuth at a destination",
            "it does not take our certificate",
        ),
        ("self-signed", itself, "not of a CA that is trusted here", "it does not trust the CA"),
        ("revoked", revoked, "the peer's certificate is revoked", "our certificate is revoked"),
    ] {
        let config = Security::Server(Arc::new(server_config(there.path())));
        let (text, peer) = refused(secure(here.path()), config);
        assert!(text.contains(says), "{case}: {text}");
        assert!(peer.contains("the peer refused this side") && peer.contains(told), "{case}: {peer}");
    }
    // Who is no destination at all.
    for (case, bytes, hangs_up) in STRANGERS {
        let (one, mut stranger) = tcp_pair();
        stranger.write_all(bytes).unwrap();
        // It hears our ClientHello, and does not answer it.
        let mut options = source_options(secure(here.path()));
        options.connect_timeout = Duration::from_millis(500);
        if hangs_up {
            stranger.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let toy = Toy::booted(&plan());
        let moved = Source::new(toy.clone(), options).migrate_over(one.into(), |_| {});
        let text = error_chain(&moved.unwrap_err());
        assert!(text.contains("TLS"), "{case}: {text}");
        toy.prove_running();
    }
}
