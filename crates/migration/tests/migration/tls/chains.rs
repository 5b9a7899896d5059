//! Certificates that nobody takes, and what comes with them: each is told by the certificate that it is about, on either side.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, KeyUsagePurpose, NameConstraints, SanType, date_time_ymd,
};
use tempfile::TempDir;
use vfio_migration::{TlsDirectory, TlsRole};

use super::hosts::*;
use super::{refused_here, refused_there};
use crate::toy::pki::{Ca, Host};
use crate::toy::*;

type Alter = fn(&mut CertificateParams);

const ROLES: [TlsRole; 2] = [TlsRole::Server, TlsRole::Client];

/// What is said of the certificate of the host in `directory`.
fn judged(directory: &Path, role: TlsRole) -> Result<(), String> {
    TlsDirectory::new(directory).check(role).map(drop).map_err(|error| error.to_string())
}

fn unknown_extension(params: &mut CertificateParams) {
    let mut extension = CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0]);
    extension.set_criticality(true);
    params.custom_extensions.push(extension);
}

fn ended(params: &mut CertificateParams) {
    (params.not_before, params.not_after) = (date_time_ymd(2001, 1, 1), date_time_ymd(2002, 1, 1));
}

/// Certificates of [`HOST`] by way of a CA that is another than it should be.
fn by_way_of(alter: Alter) -> (Ca, TempDir) {
    let root = Ca::new();
    let there = root.host(&Host::named(HOST));
    let sub = root.below("a CA between", alter);
    sub.certify(there.path(), &Host::named(HOST));
    sub.add_to(there.path());
    (root, there)
}

const BETWEEN: [(Alter, &str); 6] = [
    (ended, "which expired at 2002-01-01T00:00:00.000Z"),
    (|params| params.not_before = date_time_ymd(2090, 1, 1), "which is not valid before 2090-01-01"),
    (|params| params.is_ca = IsCa::ExplicitNoCa, "which is no CA's"),
    (|params| params.key_usages = vec![KeyUsagePurpose::CrlSign], "which may sign no certificates"),
    (
        |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::EmailProtection],
        "which is not made for this purpose",
    ),
    (unknown_extension, "which has a critical extension that is not known here (1.2.3.4)"),
];

#[test]
fn a_ca_between_that_does_not_vouch_is_blamed_itself() {
    for (alter, says) in BETWEEN {
        let (root, there) = by_way_of(alter);
        let says = format!("is issued by way of CN=a CA between, {says}");
        for role in ROLES {
            let text = judged(there.path(), role).unwrap_err();
            assert!(text.contains(&role.certificate_file()) && text.contains(&says), "{text}");
        }
        // A peer that does not look at its own hears that it is refused, and the other side says why.
        let here = root.host(&Host::named(HOST));
        for text in [
            refused_here(&secure(here.path()), there.path()),
            refused_there(there.path(), &secure(here.path())),
        ] {
            assert!(text.contains(&format!("the peer's certificate {says}")), "{text}");
        }
    }
}

#[test]
fn a_chain_that_vouches_is_taken_whatever_else_comes_with_it() {
    let (root, there) = by_way_of(|_| {});
    // The same CA as it was before, an old one that nobody asks for, and the root itself.
    for useless in [root.below("a CA between", ended), Ca::altered("old", ended), Ca::new()] {
        useless.add_to(there.path());
    }
    let (toy, both) = attempt(secure(there.path()), secure(there.path()), Clone::clone);
    let (_, _, machine) = both.unwrap();
    prove_moved(&toy, &machine);
}

#[test]
fn a_ca_has_no_more_cas_below_it_than_it_says() {
    let none: Alter = |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let any: Alter = |_| {};
    for (of_root, of_first, blamed) in
        [(none, any, Some("a CA for tests")), (any, none, Some("first")), (any, any, None)]
    {
        let root = Ca::altered("a CA for tests", of_root);
        let there = root.host(&Host::named(HOST));
        let first = root.below("first", of_first);
        let second = first.below("second", any);
        second.certify(there.path(), &Host::named(HOST));
        for ca in [&first, &second] {
            ca.add_to(there.path());
        }
        for role in ROLES {
            match (judged(there.path(), role), blamed) {
                (Ok(()), None) => {}
                (Err(text), Some(name)) => {
                    let says = format!("by way of CN={name}, which allows 0 CAs below it, and there are ");
                    assert!(text.contains(&says), "{text}");
                }
                (judged, _) => panic!("{judged:?} {blamed:?}"),
            }
        }
    }
}

fn only(tree: GeneralSubtree) -> Option<NameConstraints> {
    Some(NameConstraints { permitted_subtrees: vec![tree], excluded_subtrees: Vec::new() })
}

#[test]
fn names_that_a_ca_may_not_give_are_told_with_what_it_may() {
    for (alter, name, says) in [
        (
            (|params| params.name_constraints = only(GeneralSubtree::DnsName("example.org".into()))) as Alter,
            "host-a",
            Some("DNS \"example.org\""),
        ),
        (
            |params| params.name_constraints = only(GeneralSubtree::DnsName("example.org".into())),
            "a.example.org",
            None,
        ),
        (
            |params| {
                let mut names = DistinguishedName::new();
                names.push(DnType::OrganizationName, "an organization");
                params.name_constraints = only(GeneralSubtree::DirectoryName(names));
            },
            "a.example.org",
            Some("directory names, which are not judged here: nobody is taken"),
        ),
    ] {
        for between in [false, true] {
            let root = if between { Ca::new() } else { Ca::altered("constrained", alter) };
            let there = root.host(&Host::named(name));
            if between {
                let sub = root.below("constrained", alter);
                sub.certify(there.path(), &Host::named(name));
                sub.add_to(there.path());
            }
            for role in ROLES {
                match (judged(there.path(), role), says) {
                    (Ok(()), None) => {}
                    (Err(text), Some(says)) => {
                        let says = format!("name constraints of CN=constrained: only {says}");
                        assert!(text.contains(&says), "{text}");
                    }
                    (judged, _) => panic!("{name} {between}: {judged:?}"),
                }
            }
        }
    }
}

#[test]
fn a_certificate_is_blamed_for_what_it_is_and_not_its_key() {
    let ca = Ca::new();
    for (alter, says) in [
        (unknown_extension as Alter, "has a critical extension that is not known here (1.2.3.4)"),
        (
            |params| params.key_usages = vec![KeyUsagePurpose::KeyEncipherment],
            "its key usage has no digitalSignature",
        ),
        (|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), "is a CA's own"),
    ] {
        let there = ca.host(&Host { alter, ..Host::named(HOST) });
        for role in ROLES {
            let text = judged(there.path(), role).unwrap_err();
            assert!(text.contains(&role.certificate_file()) && text.contains(says), "{text}");
        }
        let here = ca.host(&Host::named(HOST));
        let text = refused_there(there.path(), &secure(here.path()));
        assert!(text.contains("the peer's certificate ") && text.contains(says), "{text}");
    }
    let there = ca.host(&Host::named(HOST));
    let pem = "-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n";
    std::fs::write(there.path().join("server-cert.pem"), pem).unwrap();
    let text = judged(there.path(), TlsRole::Server).unwrap_err();
    assert!(text.contains("server-cert.pem is no certificate of X.509, or a broken one"), "{text}");
    std::fs::write(there.path().join("ca-cert.pem"), pem).unwrap();
    let text = judged(there.path(), TlsRole::Client).unwrap_err();
    assert!(
        text.contains("ca-cert.pem holds a certificate, number 1 in it, that is no certificate"),
        "{text}"
    );
}

/// A subjectAltName of its own making: one name of this kind (its tag) and content.
fn names(params: &mut CertificateParams, tag: u8, content: &[u8]) {
    let name = [&[tag, u8::try_from(content.len()).unwrap()], content].concat();
    let all = [&[0x30, u8::try_from(name.len()).unwrap()], name.as_slice()].concat();
    params.subject_alt_names.clear();
    params.custom_extensions.push(CustomExtension::from_oid_content(&[2, 5, 29, 17], all));
}

#[test]
fn a_server_names_a_host_that_a_source_could_ask_for() {
    let ca = Ca::new();
    for (alter, refused) in [
        ((|params| names(params, 0x86, b"spiffe://a/b")) as Alter, Some("its own has URI \"spiffe://a/b\"")),
        (|params| names(params, 0x81, b"a@b.example"), Some("its own has email \"a@b.example\"")),
        (|params| names(params, 0x82, b""), Some("its own has DNS \"\"")),
        (|params| names(params, 0x82, b"*"), Some("its own has DNS \"*\"")),
        (|params| names(params, 0x82, b"*."), Some("its own has DNS \"*.\"")),
        (|params| names(params, 0x82, b"a b"), Some("its own has DNS \"a b\"")),
        (|params| names(params, 0x82, b"192.0.2.1"), Some("its own has DNS \"192.0.2.1\"")),
        (|params| names(params, 0x87, &[192, 0, 2]), Some("its own has an IP address of 3 bytes")),
        (|params| params.subject_alt_names.clear(), Some("it has none")),
        (|params| names(params, 0x82, b"*.example.org"), None),
        (|params| names(params, 0x82, b"host-b"), None),
        (|params| names(params, 0x87, &[192, 0, 2, 1]), None),
        (
            |params| {
                params.subject_alt_names.push(SanType::URI("spiffe://a/b".try_into().unwrap()));
            },
            None,
        ),
    ] {
        let there = ca.host(&Host { alter, ..Host::named("host-b") });
        match (judged(there.path(), TlsRole::Server), refused) {
            (Ok(()), None) => {}
            (Err(text), Some(says)) => {
                let named = "server-cert.pem names no host that a source could ask for";
                assert!(text.contains(named) && text.contains(says), "{text}");
            }
            (judged, _) => panic!("{judged:?}, and {refused:?} was to come"),
        }
        // Nobody asks for a source by name.
        judged(there.path(), TlsRole::Client).unwrap();
    }
}
