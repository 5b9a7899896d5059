//! Files of certificates, keys and expected sources that cannot be trusted: whoever else could change them, or read a key.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use serde_json::json;

use crate::other_users::{Place, STRANGER};
use crate::support::{control, fails, run, until};
use crate::tls::{Pki, done, pki, receiver, source, words};

fn mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// What `tls show` says, and whether all can be used.
fn shown(dir: &Path) -> (bool, String) {
    let output = run(&["tls", "show", words(dir)]);
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_key_of_a_ca_that_others_may_read_issues_and_revokes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { ca, .. } = pki(dir.path());
    let (key, new) = (ca.join("ca-key.pem"), dir.path().join("new"));
    let host = ["tls", "host", "host-c", "--ca", words(&ca), "--output", words(&new)];
    for loose in [0o666, 0o640, 0o604, 0o660] {
        mode(&key, loose);
        for verb in [&host[..], &["tls", "revoke", "--ca", words(&ca)]] {
            let says = format!(
                "ca-key.pem may be read or changed by others than its owner (mode {loose:04o}): chmod 600 it"
            );
            fails(verb, 1, &says);
        }
        assert!(!new.exists(), "{loose:o}");
    }
    mode(&key, 0o600);
    done(&host);
}

#[test]
fn what_anybody_may_change_is_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { ca, b, .. } = pki(dir.path());
    done(&["tls", "revoke", "host-a", "--ca", words(&ca)]);
    std::fs::copy(ca.join("ca-crl.pem"), b.join("ca-crl.pem")).unwrap();
    let receives = ["vm", "--software", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", words(&b)];
    for (file, usual) in
        [("ca-cert.pem", 0o644), ("ca-crl.pem", 0o644), ("server-cert.pem", 0o644), (".", 0o700)]
    {
        let path = b.join(file);
        mode(&path, usual | 0o002);
        let says = format!("may be changed by anybody (mode {:04o}): chmod o-w it", usual | 0o002);
        fails(&receives, 1, &says);
        let (usable, text) = shown(&b);
        assert!(!usable && text.contains(&says), "{file}: {text}");
        mode(&path, usual);
    }
    assert!(shown(&b).0);
    // Whoever may write where a CA lies hands his own on to every host.
    mode(&ca.join("ca-cert.pem"), 0o666);
    let new = dir.path().join("new");
    let host = ["tls", "host", "host-c", "--ca", words(&ca), "--output", words(&new)];
    fails(&host, 1, "ca-cert.pem may be changed by anybody");
}

/// What is wrong with a file of one's own is said of that, and not of another.
#[test]
fn a_file_of_certificates_says_what_is_wrong_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { ca, b, .. } = pki(dir.path());
    let file = b.join("server-cert.pem");
    let (own, authority) =
        (std::fs::read_to_string(&file).unwrap(), std::fs::read_to_string(ca.join("ca-cert.pem")).unwrap());
    let cut = &authority[..authority.len() / 2];
    for (holds, says) in [
        (
            format!("{authority}{own}"),
            "server-cert.pem has the certificate of a CA first: the host's own comes first",
        ),
        (
            format!("{own}{cut}"),
            "server-cert.pem is no whole PEM: what follows on 1 certificates in it is cut off",
        ),
        (cut.to_owned(), "server-cert.pem is no whole PEM: what follows on 0 certificates"),
        (String::new(), "server-cert.pem holds no certificate in PEM"),
    ] {
        std::fs::write(&file, &holds).unwrap();
        let (usable, text) = shown(&b);
        assert!(!usable && text.contains(says), "{text}");
        assert!(!text.contains("is not the key of"), "{text}");
    }
    std::fs::write(&file, format!("{own}{authority}")).unwrap();
    assert!(shown(&b).0, "{}", shown(&b).1);
}

/// A source whose own files cannot be used is told to see to those, and not to compare them with the other host's.
#[test]
fn a_source_with_a_bad_file_is_told_which() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { a, b, .. } = pki(dir.path());
    let there = receiver(dir.path(), &["--tls-creds", words(&b)]);
    let vm = source(dir.path(), &["--tls-creds", words(&a)]);
    std::fs::write(a.join("client-key.pem"), "").unwrap();
    let info = vm.migrate(&there.incoming(), serde_json::Value::Null);
    let remedy = info["failure"]["remedy"].as_str().unwrap();
    assert!(remedy.contains("the files of this side") && !remedy.contains("compare"), "{info}");
}

/// A host is trusted by its pin alone.
#[test]
fn a_folder_without_a_ca_is_shown_as_usable_with_a_pin() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { a, b, .. } = pki(dir.path());
    std::fs::remove_file(b.join("ca-cert.pem")).unwrap();
    assert!(!shown(&b).0);
    let pins = done(&["tls", "pin", words(&a)]);
    let pin = pins.split_whitespace().next().unwrap();
    let output = run(&["tls", "show", words(&b), "--tls-pin", pin]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// A CA that may name hosts of one domain makes nothing for another, which no peer would take.
#[test]
fn a_ca_makes_nothing_that_it_may_not_name() {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca");
    std::fs::create_dir(&ca).unwrap();
    mode(&ca, 0o700);
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new([]).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(rcgen::DnType::CommonName, "of one domain");
    params.name_constraints = Some(rcgen::NameConstraints {
        permitted_subtrees: vec![rcgen::GeneralSubtree::DnsName("one.example".into())],
        excluded_subtrees: Vec::new(),
    });
    std::fs::write(ca.join("ca-cert.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    std::fs::write(ca.join("ca-key.pem"), key.serialize_pem()).unwrap();
    mode(&ca.join("ca-key.pem"), 0o600);
    let host = |name: &str, to: &Path| run(&["tls", "host", name, "--ca", words(&ca), "--output", words(to)]);
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    let made = host("a.one.example", &good);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(shown(&good).0);
    let refused = host("a.two.example", &bad);
    let told = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{told}");
    assert!(told.contains("no certificates are made for a.two.example"), "{told}");
    assert!(told.contains("one.example") && told.contains(words(&bad)), "{told}");
    let left: Vec<_> = std::fs::read_dir(&bad)
        .map(|found| found.map(|file| file.unwrap().path()).collect())
        .unwrap_or_default();
    assert!(left.is_empty(), "{left:?}");
    let issued = ca.join("issued").join("a.two.example");
    assert!(!issued.exists());
}

/// Only root can give files away; without it the test says so.
#[test]
fn a_key_that_is_lent_to_a_group_of_others_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { b, .. } = pki(dir.path());
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT TESTED: keys that are lent to other groups. Only root can give files away");
        return;
    }
    let key = b.join("server-key.pem");
    mode(&key, 0o640);
    let loose = "server-key.pem may be read or changed by others than its owner (mode 0640)";
    for (owner, group, says) in
        [(54001, 12345, loose), (54001, 0, "server-key.pem belongs to user 54001"), (0, 0, loose)]
    {
        chown(&key, Some(owner), Some(group)).unwrap();
        let (usable, text) = shown(&b);
        assert!(!usable && text.contains(says), "{owner}:{group}: {text}");
    }
    // As a package lays it out for its service: root lends it to that one's group.
    chown(&key, Some(0), Some(12345)).unwrap();
    assert!(shown(&b).0, "{}", shown(&b).1);
    mode(&key, 0o660);
    assert!(!shown(&b).0);
    // Root's may be lent to a group of ours.
    let Some(place) = Place::of_others() else { return };
    let host = place.path().join("host");
    done(&["tls", "host", "host-c", "--ca", words(&dir.path().join("ca")), "--output", words(&host)]);
    mode(&host, 0o755);
    for (group, usable) in [(54001, true), (12345, false)] {
        for file in std::fs::read_dir(&host).unwrap().map(|file| file.unwrap().path()) {
            chown(&file, Some(0), Some(group)).unwrap();
            mode(&file, 0o640);
        }
        let output = place.run(STRANGER, &["tls", "show", words(&host)]);
        assert_eq!(output.status.success(), usable, "{}", String::from_utf8_lossy(&output.stdout));
    }
}

/// The whole way up: whoever may write to a folder puts another in the place of what is in it.
#[test]
fn a_folder_above_that_anybody_may_change_is_not_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let above = dir.path().join("above");
    let Pki { ca, b, .. } = pki(&above);
    let says = format!("{} may be changed by anybody (mode 0777): chmod o-w it", above.display());
    let new = above.join("new");
    mode(&above, 0o777);
    let (usable, text) = shown(&b);
    assert!(!usable && text.contains(&says), "{text}");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&b, &link).unwrap();
    let receives = ["vm", "--software", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", words(&link)];
    fails(&receives, 1, &says);
    // Nothing is made there either.
    fails(&["tls", "init", words(&new)], 1, &says);
    fails(&["tls", "init", words(&above)], 1, &says);
    let safe = dir.path().join("safe");
    std::fs::rename(&ca, &safe).unwrap();
    let host = ["tls", "host", "host-c", "--ca", words(&safe), "--output"];
    fails(&[&host[..], &[words(&new)]].concat(), 1, &says);
    assert!(!new.exists());
    // In one as /tmp what is ours stays ours.
    mode(&above, 0o1777);
    assert!(shown(&b).0);
    done(&[&host[..], &[words(&new)]].concat());
}

#[test]
fn a_vm_whose_certificates_cannot_be_used_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { a, b, .. } = pki(dir.path());
    let stays = ["vm", "--software", "--exit-with-stdin", "--tls-creds", words(&a)];
    let waits = ["vm", "--software", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", words(&a)];
    let (client, server) = (a.join("client-cert.pem"), a.join("server-cert.pem"));
    // Both certificates have their own keys, and each is for the other way.
    for name in ["cert", "key"] {
        std::fs::copy(b.join(format!("server-{name}.pem")), a.join(format!("client-{name}.pem"))).unwrap();
    }
    fails(&stays, 1, "client-cert.pem is not made for this purpose");
    std::fs::write(&client, "nothing").unwrap();
    fails(&stays, 1, "client-cert.pem holds no certificate in PEM");
    std::fs::remove_file(&client).unwrap();
    fails(&stays, 1, "client-cert.pem");
    std::fs::write(&server, "nothing").unwrap();
    fails(&waits, 1, "server-cert.pem holds no certificate in PEM");
    let none = dir.path().join("none");
    fails(&["vm", "--software", "--exit-with-stdin", "--tls-creds", words(&none)], 1, "client-cert.pem");
}

/// What it does not need first is a warning.
#[test]
fn a_vm_that_starts_says_which_certificates_it_will_miss() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { a, b, .. } = pki(dir.path());
    for (host, file, more, says) in [
        (&a, "server-cert.pem", &[][..], "no guest can arrive over TCP"),
        (&b, "client-cert.pem", &["--incoming", "tcp:127.0.0.1:0"], "no guest can leave over TCP"),
    ] {
        std::fs::write(host.join(file), "nothing").unwrap();
        // It ends as soon as it has started: its stdin is at its end.
        let starts = ["vm", "--software", "--exit-with-stdin", "--tls-creds", words(host)];
        let told = String::from_utf8(run(&[&starts, more].concat()).stderr).unwrap();
        assert!(
            told.contains(says) && told.contains(&format!("{file} holds no certificate in PEM")),
            "{told}"
        );
    }
}

/// A CA in `dir` that has ended, with its key.
fn ended_ca(dir: &Path) {
    let pair = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    params.distinguished_name.push(rcgen::DnType::CommonName, "an old CA");
    std::fs::write(dir.join("ca-cert.pem"), params.self_signed(&pair).unwrap().pem()).unwrap();
    std::fs::write(dir.join("ca-key.pem"), pair.serialize_pem()).unwrap();
}

#[test]
fn a_ca_that_vouches_for_nobody_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, other, new) = (dir.path().join("ca"), dir.path().join("other"), dir.path().join("new"));
    for ca in [&ca, &other] {
        done(&["tls", "init", words(ca)]);
    }
    let host = ["tls", "host", "host-c", "--ca", words(&ca), "--output", words(&new)];
    std::fs::copy(other.join("ca-key.pem"), ca.join("ca-key.pem")).unwrap();
    for verb in [&host[..], &["tls", "revoke", "--ca", words(&ca)]] {
        fails(verb, 1, "ca-key.pem is not the key of");
    }
    ended_ca(&ca);
    fails(&host, 1, "an old CA ended at 2021-01-01T00:00:00");
    // Behind one that counts it is still the one that would issue.
    let good = std::fs::read_to_string(other.join("ca-cert.pem")).unwrap();
    let old = std::fs::read_to_string(ca.join("ca-cert.pem")).unwrap();
    std::fs::write(ca.join("ca-cert.pem"), old + &good).unwrap();
    fails(&host, 1, "an old CA ended at 2021-01-01T00:00:00");
    assert!(!new.exists());
}

#[test]
fn certificates_of_hosts_end_with_their_ca() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, new) = (dir.path().join("ca"), dir.path().join("new"));
    done(&["tls", "init", words(&ca), "--days", "5"]);
    for (days, capped) in [("365", true), ("4", false)] {
        let host =
            ["tls", "host", "host-c", "--ca", words(&ca), "--output", words(&new), "--force", "--days", days];
        let made = run(&host);
        let told = String::from_utf8(made.stderr).unwrap();
        assert!(made.status.success(), "{told}");
        let shown = run(&["tls", "show", words(&new), "--json"]).stdout;
        let shown: serde_json::Value = serde_json::from_slice(&shown).unwrap();
        let end = |n: usize| shown["files"][n]["certificates"][0]["not-after"].as_str().unwrap().to_owned();
        assert!(end(1) == end(2) && (end(1) == end(0)) == capped && end(1) <= end(0), "{shown}");
        let says = format!("the certificates end at {}, with their CA", end(0));
        assert_eq!(told.contains(&says), capped, "{told}");
    }
}

#[test]
fn what_mends_it_is_something_that_can_be_done() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { ca, b, .. } = pki(dir.path());
    let again = run(&["tls", "init", words(&ca)]);
    let told = String::from_utf8(again.stderr).unwrap();
    assert_eq!(again.status.code(), Some(1), "{told}");
    assert!(told.contains("choose another folder") && !told.contains("--force"), "{told}");
    let key = b.join("server-key.pem");
    mode(&key, 0o644);
    let doctor = run(&["doctor", "--json", "--tls-creds", words(&b)]).stdout;
    let doctor: serde_json::Value = serde_json::from_slice(&doctor).unwrap();
    let check = doctor["checks"].as_array().unwrap().iter().find(|check| check["id"] == "tls-creds").unwrap();
    assert_eq!(check["fix"], format!("chmod 600 {}", key.display()), "{check}");
}

/// A certificate in `a` that the certificate of a host in `b` has issued, which is no CA's.
fn by_a_host(a: &Path, b: &Path) {
    let text = |name: &str| std::fs::read_to_string(b.join(name)).unwrap();
    let (issuer, key) = (text("client-cert.pem"), rcgen::KeyPair::from_pem(&text("client-key.pem")).unwrap());
    let issuing = rcgen::Issuer::from_ca_cert_pem(&issuer, key).unwrap();
    let pair = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["host-a".to_owned()]).unwrap();
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let made = params.signed_by(&pair, &issuing).unwrap().pem();
    std::fs::write(a.join("client-cert.pem"), made + &issuer).unwrap();
    std::fs::write(a.join("client-key.pem"), pair.serialize_pem()).unwrap();
}

#[test]
fn who_does_not_speak_tls_is_told_in_words_and_not_as_a_peer_over_tls() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { a, b, .. } = pki(dir.path());
    let receives = receiver(dir.path(), &["--tls-creds", words(&b)]);
    let to = receives.incoming();
    let plain = source(dir.path(), &["--insecure-plaintext"]);
    let address = to.strip_prefix("tcp:").unwrap();
    for (n, (says, bytes, kind)) in [
        ("speaks in plain text", None, "plain-text"),
        ("what it sent is no TLS", Some(&b"GET / HTTP/1.1\r\n\r\n"[..]), "tls"),
        ("longer than any that is taken", Some(&[0x16, 3, 1, 0, 4, 1, 0xff, 0xff, 0xff]), "tls"),
    ]
    .into_iter()
    .enumerate()
    {
        match bytes {
            None => assert_eq!(plain.migrate(&to, json!({}))["status"], "failed"),
            Some(bytes) => {
                let mut stranger = TcpStream::connect(address).unwrap();
                stranger.write_all(bytes).unwrap();
                // An alert, and the end.
                let _ = stranger.read_to_end(&mut Vec::new());
            }
        }
        until("the refusal to be counted", || (receives.info()["refused"]["count"] == n + 1).then_some(()));
        let last = receives.info()["refused"]["last"].take();
        assert_eq!(last["security"]["kind"], kind, "{last}");
        assert!(last["why"].as_str().unwrap().contains(says), "{last}");
        let status = done(&["status", "--control", control(&receives)]);
        assert!(status.contains(says) && !status.contains("over TLS"), "{status}");
    }
    by_a_host(&a, &b);
    let says = "client-cert.pem is issued by way of CN=host-b, which is no CA's";
    fails(&["vm", "--software", "--exit-with-stdin", "--tls-creds", words(&a)], 1, says);
}

/// A certificate of `dir`'s server key by the CA in `ca`, as openssl makes it without extensions: of X.509 version 1.
fn by_openssl(ca: &Path, dir: &Path) -> Option<()> {
    let (key, request) = (dir.join("server-key.pem"), dir.join("request.pem"));
    let (trust, trusted_key) = (ca.join("ca-cert.pem"), ca.join("ca-key.pem"));
    let certificate = dir.join("server-cert.pem");
    let steps: [&[&str]; 2] = [
        &["req", "-new", "-key", words(&key), "-subj", "/CN=host-b", "-out", words(&request)],
        &[
            "x509",
            "-req",
            "-in",
            words(&request),
            "-CA",
            words(&trust),
            "-CAkey",
            words(&trusted_key),
            "-set_serial",
            "7",
            "-days",
            "90",
            "-out",
            words(&certificate),
        ],
    ];
    for step in steps {
        let Ok(made) = std::process::Command::new("openssl").args(step).output() else {
            eprintln!("SKIPPED: no openssl, so no certificate of version 1 was judged");
            return None;
        };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let shown = std::process::Command::new("openssl")
        .args(["x509", "-noout", "-text", "-in", words(&certificate)])
        .output()
        .unwrap();
    if !String::from_utf8_lossy(&shown.stdout).contains("Version: 1 ") {
        eprintln!("SKIPPED: this openssl makes version 3 unasked");
        return None;
    }
    Some(())
}

#[test]
fn a_certificate_of_version_1_is_told_as_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { ca, b, .. } = pki(dir.path());
    if by_openssl(&ca, &b).is_none() {
        return;
    }
    let says = "server-cert.pem is of X.509 version 1, and has to be of version 3";
    fails(&["vm", "--software", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", words(&b)], 1, says);
    let (usable, text) = shown(&b);
    assert!(!usable && text.contains(says) && !text.contains("is not the key of"), "{text}");
    // A CA of that version is none.
    std::fs::copy(b.join("server-cert.pem"), b.join("ca-cert.pem")).unwrap();
    let (usable, text) = shown(&b);
    assert!(!usable && text.contains("CN=host-b is of X.509 version 1"), "{text}");
}

#[test]
fn a_ca_with_a_key_that_is_too_short_is_told_as_that() {
    let dir = tempfile::tempdir().unwrap();
    let Pki { b, .. } = pki(dir.path());
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:1024", "-nodes", "-days", "90", "-subj", "/CN=short"])
        .args(["-keyout", words(&dir.path().join("key")), "-out", words(&b.join("ca-cert.pem"))])
        .output();
    let Ok(made) = made else {
        eprintln!("SKIPPED: no openssl, so no CA with a short key was judged");
        return;
    };
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let (usable, text) = shown(&b);
    assert!(
        !usable && text.contains("CN=short has an RSA key of 1024 bits, and one of 2048 or more"),
        "{text}"
    );
}
