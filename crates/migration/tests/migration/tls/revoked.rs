//! Certificates that their CA has taken back.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vfio_migration::{CRL_FILE, Destination, IncomingError, Machine, Source, TlsRole, Uri};
use vfio_migration_types::error_chain;

use super::hosts::*;
use super::{refused_here, refused_there};
use crate::toy::pki::{Ca, Host};
use crate::toy::*;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

fn next_year() -> SystemTime {
    SystemTime::now() + YEAR
}

/// Lays a revocation list down where a host looks for it.
fn lay(directory: &Path, list: &str) {
    std::fs::write(directory.join(CRL_FILE), list).unwrap();
}

#[test]
fn a_revoked_certificate_is_refused_on_either_side() {
    let (ca, other) = (Ca::new(), Ca::named("another CA"));
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let gone = ca.host(&Host::named(HOST));
    // Who is not on the list passes, and so does a CA that has none.
    for issuer in [&ca, &other] {
        for side in [&here, &there] {
            let bundle = side.path().join("ca-cert.pem");
            let (own, others) = (ca.host(&Host::named("x")), other.host(&Host::named("x")));
            let texts =
                [own, others].map(|of| std::fs::read_to_string(of.path().join("ca-cert.pem")).unwrap());
            std::fs::write(bundle, texts.concat()).unwrap();
            lay(side.path(), &issuer.list(&[gone.path()], next_year()));
        }
        let (toy, both) = attempt(secure(here.path()), secure(there.path()), Uri::clone);
        let (_, _, machine) = both.unwrap();
        prove_moved(&toy, &machine);
    }
    // The list of the other CA names the serial numbers of this one's: they are nothing to it.
    let (toy, both) = attempt(secure(gone.path()), secure(there.path()), Uri::clone);
    both.unwrap();
    toy.prove_standing();

    lay(here.path(), &ca.list(&[gone.path()], next_year()));
    let text = refused_here(&secure(here.path()), gone.path());
    assert!(text.contains("the peer's certificate is revoked, by this side's ca-crl.pem"), "{text}");
    lay(there.path(), &ca.list(&[gone.path()], next_year()));
    let text = refused_there(gone.path(), &secure(there.path()));
    assert!(text.contains("the peer's certificate is revoked, by this side's ca-crl.pem"), "{text}");
    let (text, _) = refused(secure(gone.path()), secure(there.path()));
    assert!(text.contains("our certificate is revoked"), "{text}");
}

/// A CA on the way is what is revoked, and all its hosts with it: it is blamed, and not the host.
#[test]
fn a_revoked_ca_between_is_blamed_itself() {
    let root = Ca::new();
    let (here, there) = (root.host(&Host::named(HOST)), root.host(&Host::named(HOST)));
    let between = root.below("a CA between", |_| {});
    between.certify(there.path(), &Host::named(HOST));
    between.add_to(there.path());
    let alone = tempfile::tempdir().unwrap();
    for role in [TlsRole::Server, TlsRole::Client] {
        std::fs::write(alone.path().join(role.certificate_file()), "").unwrap();
    }
    between.add_to(alone.path());
    lay(here.path(), &root.list(&[alone.path()], next_year()));
    let says = "is issued by way of CN=a CA between, which is revoked, by this side's ca-crl.pem";
    for text in
        [refused_here(&secure(here.path()), there.path()), refused_there(there.path(), &secure(here.path()))]
    {
        assert!(text.contains(says), "{text}");
    }
}

/// What a side is started with is looked at before anybody comes, and by name.
#[test]
fn a_list_that_cannot_be_used_is_named_at_once() {
    let (ca, same_name, other) = (Ca::new(), Ca::new(), Ca::named("another CA"));
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    let y2k = SystemTime::UNIX_EPOCH + Duration::from_secs(1_009_843_200);
    for (list, says) in [
        (String::new(), "holds no certificate revocation list in PEM"),
        ("-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".into(), "that cannot be read"),
        (ca.list(&[], y2k), "get a new one from the CA (`vfio-migrate tls revoke`)"),
        (same_name.list(&[], next_year()), "is not signed by CN=a CA for tests of ca-cert.pem"),
        (
            other.list(&[], next_year()),
            "is a revocation list of CN=another CA, which is no CA of ca-cert.pem",
        ),
        (ca.list(&[here.path(), there.path()], next_year()), "is revoked, by ca-crl.pem"),
    ] {
        for directory in [&here, &there] {
            lay(directory.path(), &list);
        }
        let options = destination_options(secure(there.path()));
        let text = match Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options) {
            Err(IncomingError::NotBegun(failure)) => failure.to_string(),
            other => panic!("{other:?}"),
        };
        let file = if says.contains("is revoked") { "server-cert.pem" } else { CRL_FILE };
        assert!(text.contains(file) && text.contains(says), "{text}");
        // The source says so of its own, before it says anything to anybody.
        let (one, _silent) = tcp_pair();
        let toy = Toy::booted(&plan());
        let moved =
            Source::new(toy.clone(), source_options(secure(here.path()))).migrate_over(one.into(), |_| {});
        let text = error_chain(&moved.unwrap_err());
        assert!(text.contains(says), "{text}");
        toy.prove_running();
    }
    // A link to nothing is no absence.
    std::fs::remove_file(there.path().join(CRL_FILE)).unwrap();
    std::os::unix::fs::symlink("nowhere", there.path().join(CRL_FILE)).unwrap();
    let options = destination_options(secure(there.path()));
    Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap_err();
}

/// A list ends while a destination waits, which then takes nobody of that CA, until there is a new one.
#[test]
fn a_list_that_expires_while_a_destination_waits_lets_nobody_in() {
    let ca = Ca::new();
    let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
    // Again, where the host was so busy that it was over before it was read.
    let (mut destination, end) = loop {
        let end = SystemTime::now() + Duration::from_secs(2);
        lay(there.path(), &ca.list(&[], end));
        let options = destination_options(secure(there.path()));
        if let Ok(listening) = Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), options) {
            break (listening, end);
        }
    };
    let to = destination.local().clone();
    let waiting = Waiting(destination.control());
    let (toy, machine) = (Toy::booted(&plan()), Toy::new(&plan()));
    let built = machine.clone();
    std::thread::scope(|scope| {
        let _waiting = waiting;
        scope.spawn(move || {
            destination.accept(|_| Ok::<Arc<dyn Machine>, _>(built)).unwrap();
            destination.answer_queries(Duration::from_secs(30)).unwrap();
        });
        let go = || Source::new(toy.clone(), source_options(secure(here.path()))).migrate_to(&to, |_| {});
        // Its end counts in whole seconds.
        wait_for("the end of the list", || SystemTime::now() > end + Duration::from_secs(1));
        let text = error_chain(&go().unwrap_err());
        assert!(text.contains("the same ca-cert.pem, and a ca-crl.pem that has not expired"), "{text}");
        toy.prove_running();
        lay(there.path(), &ca.list(&[], next_year()));
        go().unwrap();
        prove_moved(&toy, &machine);
    });
}
