//! CAs that vouch for nobody: TLS libraries take whatever lies in the file as one.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{CertificateParams, IsCa, KeyUsagePurpose, date_time_ymd};
use vfio_migration::{CA_FILE, Destination, IncomingError, Security, Source};
use vfio_migration_types::error_chain;

use super::hosts::*;
use crate::toy::pki::{Ca, Host};
use crate::toy::*;

type Alter = fn(&mut CertificateParams);

fn ended(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2001, 1, 1);
    params.not_after = date_time_ymd(2002, 1, 1);
}

const NO_CAS: [(&str, Alter, &str); 5] = [
    ("ended", ended, "the CA CN=ended ended at 2002-01-01T00:00:00.000Z: make a new one"),
    (
        "to come",
        |params| params.not_before = date_time_ymd(2090, 1, 1),
        "the CA CN=to come is not valid before 2090-01-01T00:00:00.000Z",
    ),
    ("a host", |params| params.is_ca = IsCa::ExplicitNoCa, "CN=a host is no CA"),
    ("silent", |params| params.is_ca = IsCa::NoCa, "CN=silent is no CA"),
    (
        "for lists",
        |params| params.key_usages = vec![KeyUsagePurpose::CrlSign],
        "CN=for lists may sign no certificates",
    ),
];

fn listening(directory: &Path) -> Result<Destination, IncomingError> {
    Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), destination_options(secure(directory)))
}

#[test]
fn a_ca_that_does_not_vouch_is_refused_by_name_on_either_side() {
    for (name, alter, says) in NO_CAS {
        let ca = Ca::altered(name, alter);
        let (here, there) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
        let text = match listening(there.path()) {
            Err(IncomingError::NotBegun(failure)) => failure.to_string(),
            other => panic!("{name}: {other:?}"),
        };
        assert!(text.contains(CA_FILE) && text.contains(says), "{text}");
        let (one, _silent) = tcp_pair();
        let toy = Toy::booted(&plan());
        let moved =
            Source::new(toy.clone(), source_options(secure(here.path()))).migrate_over(one.into(), |_| {});
        let text = error_chain(&moved.unwrap_err());
        assert!(text.contains(CA_FILE) && text.contains(says), "{text}");
        toy.prove_running();
    }
}

/// Files hold several CAs while one follows another.
#[test]
fn of_several_cas_those_that_vouch_are_taken() {
    let ca = Ca::new();
    let there = ca.host(&Host::named(HOST));
    for (name, alter, says) in NO_CAS {
        let other = Ca::altered(name, alter);
        let stranger = other.host(&Host::named(HOST));
        let texts = [&stranger, &there].map(|of| std::fs::read_to_string(of.path().join(CA_FILE)).unwrap());
        let (a, b) = (ca.host(&Host::named("host-a")), ca.host(&Host::named(HOST)));
        for side in [&a, &b] {
            std::fs::write(side.path().join(CA_FILE), texts.concat()).unwrap();
        }
        // It takes the other side, and is judged itself.
        std::fs::copy(there.path().join(CA_FILE), stranger.path().join(CA_FILE)).unwrap();
        let (_, text) = told_of(listening(b.path()).unwrap(), stranger.path(), || ());
        assert!(text.contains(CA_FILE) && text.contains(says), "{text}");
        let (text, _) = refused(secure(a.path()), Security::Server(Arc::new(server_config(stranger.path()))));
        assert!(text.contains(CA_FILE) && text.contains(says), "{text}");
        if name == "ended" {
            let (toy, both) = attempt(secure(a.path()), secure(b.path()), Clone::clone);
            let (_, _, machine) = both.unwrap();
            prove_moved(&toy, &machine);
        }
    }
}

#[test]
fn a_ca_that_ends_while_a_destination_waits_lets_nobody_in() {
    // Again, where the host was so busy that it was over before it was read.
    let (ca, there, destination, end) = loop {
        let end = SystemTime::now() + Duration::from_secs(2);
        let since_1970 = end.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let ca =
            Ca::altered("short-lived", |params| params.not_after = date_time_ymd(1970, 1, 1) + since_1970);
        let there = ca.host(&Host::named(HOST));
        if let Ok(destination) = listening(there.path()) {
            break (ca, there, destination, end);
        }
    };
    let here = ca.host(&Host::named("host-a"));
    // Its end counts in whole seconds.
    let over = || wait_for("the end of the CA", || SystemTime::now() > end + Duration::from_secs(1));
    let (_, why) = told_of(destination, here.path(), over);
    assert!(why.contains("the CA CN=short-lived ended at "), "{why}");
    drop(there);
}
