//! Certificates that a CA takes back: by the command, whose lists an independent TLS reads too.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Vm, fails, run};
use crate::tls::{Pki, done, pki, receiver, source, words};

fn crl(dir: &Path) -> std::path::PathBuf {
    dir.join("ca-crl.pem")
}

/// What the source says of a migration that must fail, its guest going on; the receiver waits on.
fn refused(a: &Vm, b: &Vm, creds: &Path) -> String {
    let info = a.migrate(&b.incoming(), json!({"tls-creds": creds}));
    assert_eq!(info["status"], "failed", "{info}");
    a.assert_runs();
    assert_eq!(b.status(), "inmigrate");
    info["error"].as_str().unwrap().to_owned()
}

#[test]
fn a_host_whose_certificates_are_taken_back_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { ca, a: host_a, b: host_b } = pki(dir.path());
    let (a, b) = (source(dir.path(), &[]), receiver(dir.path(), &["--tls-creds", words(&host_b)]));
    done(&[
        "check",
        "--tls-creds",
        words(&host_a),
        &format!("vm:{}", crate::support::control(&a)),
        &b.incoming(),
    ]);

    let said = done(&["tls", "revoke", "host-a", "--ca", words(&ca)]);
    assert!(
        said.contains("has revoked 2 certificates") && said.contains("copy it beside ca-cert.pem"),
        "{said}"
    );
    // It counts for the next connection, while the receiver waits.
    std::fs::copy(crl(&ca), crl(&host_b)).unwrap();
    let text = refused(&a, &b, &host_a);
    assert!(text.contains("the peer refused this side: our certificate is revoked"), "{text}");
    let shown = done(&["tls", "show", words(&host_b)]);
    assert!(
        shown.contains("ca-crl.pem: revoked by CN=vfio-migrate CA ")
            && shown.contains(": 2 certificates, until "),
        "{shown}"
    );
    // Who has the list himself says it before he asks anybody, and so does whoever looks.
    std::fs::copy(crl(&ca), crl(&host_a)).unwrap();
    let says = "client-cert.pem is revoked, by ca-crl.pem";
    assert!(refused(&a, &b, &host_a).contains(says));
    for looks in [&["tls", "show", words(&host_a)][..], &["doctor", "--tls-creds", words(&host_a)]] {
        let text = String::from_utf8(run(looks).stdout).unwrap();
        assert!(text.contains(says), "{text}");
    }
    assert_eq!(run(&["tls", "show", words(&host_a)]).status.code(), Some(1));

    // The list is the same for everybody who reads such lists.
    let (list, trust) = (crl(&ca), ca.join("ca-cert.pem"));
    let asked = |program: &str, arguments: &[&str]| match Command::new(program).args(arguments).output() {
        Ok(output) => Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()),
        Err(error) => {
            eprintln!(
                "SKIPPED: no {program} ({error}), so nothing but the command itself has looked at its revocation list"
            );
            None
        }
    };
    if let Some(told) =
        asked("openssl", &["crl", "-in", words(&list), "-CAfile", words(&trust), "-noout", "-text"])
    {
        assert!(told.contains("verify OK") && told.matches("Serial Number:").count() == 2, "{told}");
    }
    for (host, says) in [(&host_a, "revoked"), (&host_b, "Chain verification output: Verified")] {
        let certificate = host.join("client-cert.pem");
        let arguments = [
            "--verify",
            "--infile",
            words(&certificate),
            "--load-ca-certificate",
            words(&trust),
            "--load-crl",
            words(&list),
        ];
        if let Some(told) = asked("certtool", &arguments) {
            assert!(told.contains(says), "{told}");
        }
    }

    // New certificates are no others', and come with the list; it is renewed as it is.
    done(&["tls", "host", "host-a", "--ca", words(&ca), "--output", words(&host_a), "--force"]);
    let said = done(&["tls", "revoke", "--ca", words(&ca), "--days", "20"]);
    assert!(said.contains("has revoked 2 certificates"), "{said}");
    std::fs::copy(crl(&ca), crl(&host_a)).unwrap();
    let report: Value =
        serde_json::from_slice(&run(&["doctor", "--json", "--tls-creds", words(&host_a)]).stdout).unwrap();
    let check = report["checks"].as_array().unwrap().iter().find(|check| check["id"] == "tls-creds").unwrap();
    assert!(
        check["found"].as_str().unwrap().starts_with("ca-crl.pem: the revocation list expires at "),
        "{check}"
    );
    // The host's certificates are as good as they were.
    let fix = check["fix"].as_str().unwrap();
    assert!(fix.starts_with("vfio-migrate tls revoke --ca ") && !fix.contains("tls host"), "{fix}");
    let moved = a.migrate(&b.incoming(), json!({"tls-creds": host_a}));
    assert_eq!(moved["status"], "completed", "{moved}");
}

#[test]
fn what_cannot_be_taken_back_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let own = pki(dir.path());
    let others = tempfile::tempdir().unwrap();
    let other = pki(others.path());
    let ca = words(&own.ca);
    fails(&["tls", "revoke", "host-c", "--ca", ca], 1, "has made no certificates for \"host-c\"");
    fails(&["tls", "revoke", "../pki-a/client-cert", "--ca", ca], 1, "has made no certificates for");
    let foreign = other.a.join("client-cert.pem");
    fails(&["tls", "revoke", "--cert", words(&foreign), "--ca", ca], 1, "is not of vfio-migrate CA ");
    fails(&["tls", "revoke", "--cert", ca, "--ca", ca], 1, "is a directory");
    fails(&["tls", "revoke", "--ca", words(&own.a)], 1, "ca-key.pem");
    assert!(!crl(&own.ca).exists());
    // A certificate that the CA has no note of is taken by its file.
    std::fs::remove_dir_all(own.ca.join("issued")).unwrap();
    let said = done(&["tls", "revoke", "--cert", words(&own.a.join("client-cert.pem")), "--ca", ca]);
    assert!(said.contains("has revoked 1 certificates"), "{said}");
    // A list that is there and cannot be read is not written over, and not handed on.
    std::fs::write(crl(&own.ca), "nonsense").unwrap();
    for verb in [
        &["tls", "revoke", "--ca", ca][..],
        &["tls", "host", "host-d", "--ca", ca, "--output", words(&dir.path().join("d"))],
    ] {
        fails(verb, 1, "holds no certificate revocation list in PEM");
    }
}

/// A list by `openssl ca`, without a word on extensions in its configuration, of the CA in `ca`; `None`: there is no openssl.
fn by_openssl(ca: &Path, revoked: &Path) -> Option<String> {
    let (config, index) = (ca.join("openssl.cnf"), ca.join("index.txt"));
    let text = format!(
        "[ca]\ndefault_ca=own\n[own]\ndatabase={}\ndefault_md=sha256\nprivate_key={}\ncertificate={}\n",
        words(&index),
        words(&ca.join("ca-key.pem")),
        words(&ca.join("ca-cert.pem")),
    );
    std::fs::write(&config, text).unwrap();
    std::fs::write(&index, "").unwrap();
    for step in [&["-revoke", words(revoked)][..], &["-gencrl", "-crldays", "90", "-out", words(&crl(ca))]] {
        let made = Command::new("openssl").args(["ca", "-config", words(&config)]).args(step).output();
        let Ok(made) = made else {
            eprintln!("SKIPPED: no openssl, so no list of its making was read");
            return None;
        };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let text = Command::new("openssl").args(["crl", "-in", words(&crl(ca)), "-noout", "-text"]).output();
    Some(String::from_utf8(text.unwrap().stdout).unwrap())
}

#[test]
fn a_list_of_version_1_counts_as_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { ca, a: host_a, b: host_b } = pki(dir.path());
    let Some(text) = by_openssl(&ca, &host_a.join("client-cert.pem")) else { return };
    assert!(text.contains("Version 1 (0x0)"), "{text}");
    std::fs::copy(crl(&ca), crl(&host_b)).unwrap();
    let shown = done(&["tls", "show", words(&host_b)]);
    assert!(
        shown.contains("ca-crl.pem: revoked by CN=vfio-migrate CA ") && shown.contains(": 1 certificate,")
    );
    let (a, b) = (source(dir.path(), &[]), receiver(dir.path(), &["--tls-creds", words(&host_b)]));
    let text = refused(&a, &b, &host_a);
    assert!(text.contains("the peer refused this side: our certificate is revoked"), "{text}");
    // Nobody else is: the host itself comes with its own.
    let moved = a.migrate(&b.incoming(), json!({"tls-creds": host_b}));
    assert_eq!(moved["status"], "completed", "{moved}");
    // What it has is kept in the next one.
    let said = done(&["tls", "revoke", "host-b", "--ca", words(&ca)]);
    assert!(said.contains("has revoked 3 certificates"), "{said}");
}

#[test]
fn a_ca_that_may_sign_no_lists_is_told_before_it_makes_one() {
    let dir = tempfile::tempdir().unwrap();
    let pair = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let (certificate, key) = (dir.path().join("ca-cert.pem"), dir.path().join("ca-key.pem"));
    std::fs::write(certificate, params.self_signed(&pair).unwrap().pem()).unwrap();
    std::fs::write(&key, pair.serialize_pem()).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let says = "may sign no revocation lists: its key usage has no cRLSign";
    fails(&["tls", "revoke", "--ca", words(dir.path())], 1, says);
    assert!(!crl(dir.path()).exists());
}
