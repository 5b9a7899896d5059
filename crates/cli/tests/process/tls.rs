//! Connections that are secured by TLS, from certificates that the command makes itself to guests that move, and what an
//! independent TLS says of ours.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::support::{Setup, Vm, control, creds, fails, run, software, until};

const HOST: &str = "127.0.0.1";

pub(crate) fn words(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs the command, which succeeds, and returns what it prints.
pub(crate) fn done(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A CA, and folders of two hosts: one that sends, and one that is reached at [`HOST`].
pub(crate) struct Pki {
    pub(crate) ca: PathBuf,
    pub(crate) a: PathBuf,
    pub(crate) b: PathBuf,
}

pub(crate) fn pki(dir: &Path) -> Pki {
    let pki = Pki { ca: dir.join("ca"), a: dir.join("pki-a"), b: dir.join("pki-b") };
    done(&["tls", "init", words(&pki.ca)]);
    let (ca, a, b) = (words(&pki.ca), words(&pki.a), words(&pki.b));
    // Each of them may send and receive.
    done(&["tls", "host", "host-a", "--also", HOST, "--ca", ca, "--output", a]);
    done(&["tls", "host", "host-b", "--also", HOST, "--ca", ca, "--output", b]);
    pki
}

pub(crate) fn receiver(dir: &Path, more: &[&str]) -> Vm {
    software(dir, "b", &[&["--software", "--incoming", "tcp:127.0.0.1:0"], more].concat()).start()
}

pub(crate) fn source(dir: &Path, more: &[&str]) -> Vm {
    software(dir, "a", &[&["--software"], more].concat()).start()
}

fn pin(dir: &Path, part: &str) -> String {
    let printed = done(&["tls", "pin", words(dir)]);
    let line = printed.lines().find(|line| line.contains(part)).unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_guest_moves_there_and_back_between_hosts_that_trust_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    for host in [&pki.a, &pki.b] {
        let shown = done(&["tls", "show", words(host)]);
        assert!(
            shown.contains("the CA that is trusted: vfio-migrate CA ") && shown.contains("365 days"),
            "{shown}"
        );
    }
    let state = dir.path().join("state");
    let a = Setup {
        vm_arguments: &["--tls-creds", words(&pki.a), "--state-dir", words(&state)],
        ..Setup::new(dir.path(), "a")
    }
    .start();
    let b = Setup {
        vm_arguments: &["--tls-creds", words(&pki.b), "--incoming", "tcp:127.0.0.1:0"],
        ..Setup::new(dir.path(), "b")
    }
    .start();
    a.warm();
    let at = b.incoming();
    let vm = format!("vm:{}", control(&a));

    // Questions are asked by the same rules.
    fails(&["check", &vm, &at, "--tls-creds", creds()], 1, "not of a CA that is trusted here");
    done(&["check", &vm, &at, "--tls-creds", words(&pki.a)]);
    done(&["rehearse", "--control", control(&a), "--to", &at]);

    let moved = a.migrate(&at, json!({}));
    assert_eq!(moved["status"], "completed", "{moved}");
    b.assert_whole();
    // Each side says who the other was: in its status, and in the history.
    let arrived = b.migration();
    for (security, host, part) in [
        (&moved["security"], &pki.b, "where a guest arrives"),
        (&arrived["security"], &pki.a, "where one leaves"),
    ] {
        assert_eq!(security["kind"], "tls", "{security}");
        assert_eq!(security["peer"]["pin"], json!(pin(host, part)), "{security}");
        assert!(security["cipher"].as_str().unwrap().starts_with("TLS13_"), "{security}");
    }
    assert_eq!(moved["security"]["peer"]["names"], json!(["host-b", HOST]));
    let history = done(&["history", "--state-dir", words(&state)]);
    let last = history.lines().last().unwrap();
    assert!(last.contains("over TLS with \"host-b\", sha256:"), "{history}");

    // And back, with the other half of both hosts' files.
    a.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    let back = b.migrate(&a.incoming(), json!({}));
    assert_eq!((&back["status"], &back["security"]["kind"]), (&json!("completed"), &json!("tls")), "{back}");
    a.assert_whole();
}

/// What the source says of a migration that must fail, its guest going on; the receiver waits on.
fn refused(a: &Vm, b: &Vm, more: Value) -> String {
    let info = a.migrate(&b.incoming(), more);
    assert_eq!(info["status"], "failed", "{info}");
    a.assert_runs();
    assert_eq!(b.status(), "inmigrate");
    info["error"].as_str().unwrap().to_owned()
}

#[test]
fn whoever_does_not_prove_who_he_is_moves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    let others = tempfile::tempdir().unwrap();
    let stranger = self::pki(others.path());
    let a = source(dir.path(), &["--insecure-plaintext"]);
    let b = receiver(dir.path(), &["--tls-creds", words(&pki.b)]);
    for (asked, says) in [
        (json!({}), "TLS, on a connection that is not set up for it"),
        (json!({"insecure-plaintext": true}), "TLS, on a connection that is not set up for it"),
        (
            json!({"tls-creds": stranger.a}),
            "not of a CA that is trusted here: both hosts need the same ca-cert.pem",
        ),
        (json!({"tls-creds": pki.a, "tls-hostname": "host-c"}), "is not \"host-c\"'s: it names \"host-b\""),
        (
            json!({"tls-creds": pki.a, "tls-pins": [pin(&stranger.b, "arrives")]}),
            "is not among those that are pinned",
        ),
        (json!({"tls-creds": dir.path().join("nothing")}), "client-cert.pem"),
        // The right server, and a client of another CA: the server refuses, and says why.
        (
            json!({"tls-creds": stranger.a, "tls-pins": [pin(&pki.b, "arrives")]}),
            "the peer refused this side: it does not trust the CA of our certificate",
        ),
    ] {
        let text = refused(&a, &b, asked.clone());
        assert!(text.contains(says), "{asked}: {text}");
    }
    for (asked, says) in [
        (json!({"tls-creds": "pki-a"}), "no absolute path"),
        (json!({"tls-hostname": "host-b"}), "needs TLS"),
        (json!({"tls-creds": pki.a, "insecure-plaintext": true}), "exclude each other"),
        (json!({"tls-pins": ["sha256:00"]}), "a pin is sha256: and 64 hexadecimal digits"),
    ] {
        let arguments = [json!({"uri": b.incoming()}), asked.clone()];
        let mut all = serde_json::Map::new();
        arguments.iter().for_each(|part| all.extend(part.as_object().unwrap().clone()));
        let why = a.call("migrate", Value::Object(all)).unwrap_err();
        assert!(why.contains(says), "{asked}: {why}");
    }
    // Pins on both sides, between hosts of two CAs.
    let words_of =
        ["--tls-creds", words(&stranger.b), "--tls-pin", &pin(&pki.a, "leaves")].map(str::to_owned);
    let words_of: Vec<&str> = words_of.iter().map(String::as_str).collect();
    let c = software(
        others.path(),
        "c",
        &[&["--software", "--incoming", "tcp:127.0.0.1:0"], words_of.as_slice()].concat(),
    )
    .start();
    let text = refused(&a, &c, json!({"tls-creds": pki.b, "tls-pins": [pin(&stranger.b, "arrives")]}));
    assert!(text.contains("the peer refused this side"), "{text}");
    let moved =
        a.migrate(&c.incoming(), json!({"tls-creds": pki.a, "tls-pins": [pin(&stranger.b, "arrives")]}));
    assert_eq!(moved["status"], "completed", "{moved}");
    c.assert_runs();
}

/// It says no farewell, as one does whose connection is cut on the way: the guest stays, and nobody is told of security alone.
#[test]
fn a_process_that_is_killed_is_told_as_a_connection_that_broke() {
    for kills_receiver in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let with = ["--tls-creds", creds()];
        let mut a = source(dir.path(), &with);
        let mut b = receiver(dir.path(), &with);
        a.begin(&b.incoming(), json!({"pause-before-switchover": true}));
        until("the switchover to wait", || (a.migration()["status"] == "pre-switchover").then_some(()));
        let told = if kills_receiver {
            b.process.kill();
            let ended = a.ended();
            a.assert_runs();
            ended
        } else {
            a.process.kill();
            until("the end of the session", || {
                let report = b.query("query");
                (report["migration"].is_null() && !report["last"].is_null()).then(|| report["last"].clone())
            })
        };
        let why = told["error"].as_str().unwrap();
        assert_eq!(told["status"], "failed", "{told}");
        assert!(!why.contains("not secure"), "{why}");
        assert!(why.contains("its process may have died") || why.contains("Connection reset"), "{why}");
    }
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    let (a, b) = (words(&pki.a), words(&pki.b));
    let receives = ["vm", "--software", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", b];
    let key = pki.b.join("server-key.pem");
    for file in std::fs::read_dir(&pki.b).unwrap() {
        assert_eq!(file.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let says = "server-key.pem may be read or changed by others than its owner (mode 0644): chmod 600 it";
    fails(&receives, 1, says);
    let shown = run(&["tls", "show", b]);
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.status.code() == Some(1) && text.contains(says), "{text}");
    std::fs::remove_file(&key).unwrap();
    fails(&receives, 1, "server-key.pem");
    std::fs::create_dir(&key).unwrap();
    fails(&receives, 1, "server-key.pem is a directory");
    std::fs::remove_dir(&key).unwrap();
    std::fs::copy(pki.a.join("server-key.pem"), &key).unwrap();
    fails(&receives, 1, "server-key.pem is not the key of");

    // What is there is not replaced unawares.
    let ca = words(&pki.ca);
    fails(&["tls", "init", ca], 1, "exists already");
    fails(&["tls", "host", "host-a", "--ca", ca, "--output", a], 1, "exists already");
    let before = pin(&pki.a, "leaves");
    done(&["tls", "host", "host-a", "--ca", ca, "--output", a, "--days", "20", "--force"]);
    assert_ne!(pin(&pki.a, "leaves"), before);
    let shown = done(&["tls", "show", a]);
    assert!(shown.contains("20 days: make a new one"), "{shown}");
    fails(&["tls", "host", "../evil", "--ca", ca], 2, "is no name of a host");
    fails(&["tls", "host", "host-a", "--ca", a, "--output", b, "--force"], 1, "ca-key.pem");
    fails(&["tls", "pin", words(&dir.path().join("nothing"))], 1, "there is no key to pin");

    // The doctor looks at them too.
    let examined = |dir: &str| {
        let report: Value =
            serde_json::from_slice(&run(&["doctor", "--json", "--tls-creds", dir]).stdout).unwrap();
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|check| check["id"] == "tls-creds").expect("the check").clone()
    };
    let soon = examined(a);
    assert_eq!(soon["status"], "warn", "{soon}");
    assert!(soon["found"].as_str().unwrap().contains("expires at"), "{soon}");
    assert_eq!(soon["fix"], "vfio-migrate tls host NAME --force");
    let wrong = examined(b);
    assert!(wrong["found"].as_str().unwrap().contains("is not the key of"), "{wrong}");
    done(&["tls", "host", "host-b", "--ca", ca, "--output", b, "--force"]);
    assert_eq!(examined(b)["status"], "ok");
}

/// `openssl`, if there is one, with these words and this on its stdin.
fn openssl(arguments: &[&str]) -> Option<Output> {
    let child = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    match child {
        // It ends with its stdin.
        Ok(child) => Some(child.wait_with_output().unwrap()),
        Err(error) => {
            eprintln!(
                "SKIPPED: no openssl ({error}), so nothing but the command itself has looked at its TLS"
            );
            None
        }
    }
}

#[test]
fn openssl_finds_tls_1_3_that_asks_for_a_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    let b = receiver(dir.path(), &["--tls-creds", words(&pki.b)]);
    let at = b.incoming().trim_start_matches("tcp:").to_owned();
    let file = |name: &str| words(&pki.a.join(name)).to_owned();
    let (ca, certificate, key) = (file("ca-cert.pem"), file("client-cert.pem"), file("client-key.pem"));
    let trust = ["s_client", "-connect", &at, "-CAfile", &ca, "-verify_return_error", "-verify_ip", HOST];
    let inside = ["-alpn", "vfio-migrate/1"];
    let proved = ["-cert", &certificate, "-key", &key];
    let Some(good) = openssl(&[&trust[..], &inside, &proved, &["-ign_eof", "-msg"]].concat()) else { return };
    let told = String::from_utf8_lossy(&good.stdout).into_owned();
    for says in
        ["Verify return code: 0 (ok)", "New, TLSv1.3, Cipher is TLS_AES", "ALPN protocol: vfio-migrate/1"]
    {
        assert!(told.contains(says), "{told}\n{}", String::from_utf8_lossy(&good.stderr));
    }
    // It is asked for its certificate, is sent no ticket, and hears the first word of our protocol.
    assert!(told.contains("CertificateRequest") && !told.contains("NewSessionTicket"), "{told}");
    assert!(told.contains("VFIOMIG"), "{told}");
    for refused in [
        // Nothing older, no certificate, another protocol inside.
        [&trust[..], &inside, &proved, &["-tls1_2"]].concat(),
        [&trust[..], &inside, &["-ign_eof"]].concat(),
        [&trust[..], &proved, &["-alpn", "h2"]].concat(),
    ] {
        let output = openssl(&refused).unwrap();
        let told = [output.stdout, output.stderr].concat();
        let told = String::from_utf8_lossy(&told);
        assert!(told.contains("alert"), "{refused:?}: {told}");
        assert!(!told.contains("VFIOMIG"), "{refused:?}: {told}");
    }
    assert_eq!(b.status(), "inmigrate");
}

#[test]
fn a_source_refuses_an_openssl_that_is_no_destination() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    let a = source(dir.path(), &["--tls-creds", words(&pki.a)]);
    let file = |name: &str| words(&pki.b.join(name)).to_owned();
    let (ca, certificate, key) = (file("ca-cert.pem"), file("server-cert.pem"), file("server-key.pem"));
    // A port that was free a moment ago: s_server does not say which one 0 became before it is asked.
    let asks = &["-Verify", "1", "-verify_return_error"][..];
    for (version, inside, asks, says) in [
        ("-tls1_2", "vfio-migrate/1", asks, "it does not speak TLS 1.3"),
        ("-tls1_3", "h2", asks, "it serves something else than migrations"),
        ("-tls1_3", "vfio-migrate/1", &[], "it asks for no certificate"),
        ("-tls1_3", "vfio-migrate/1", asks, "the peer does not speak this migration protocol"),
    ] {
        let port = TcpListener::bind((HOST, 0)).unwrap().local_addr().unwrap().port().to_string();
        let server = Command::new("openssl")
            .args(["s_server", "-accept", &format!("{HOST}:{port}"), "-cert", &certificate, "-key", &key])
            .args(["-CAfile", &ca, "-naccept", "1", version, "-alpn", inside])
            .args(asks)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut server) = server else {
            eprintln!("SKIPPED: no openssl, so nothing but the command itself has looked at its TLS");
            return;
        };
        let mut out = server.stdout.take().unwrap();
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(b"ACCEPT\n") && out.read(&mut byte).unwrap() > 0 {
            seen.push(byte[0]);
        }
        let mut stdin = server.stdin.take().unwrap();
        // What is no word of our protocol.
        let _ = stdin.write_all(b"hello, this is something else\n");
        let info = a.migrate(&format!("tcp:{HOST}:{port}"), json!({}));
        assert_eq!(info["status"], "failed", "{info}");
        let error = info["error"].as_str().unwrap();
        assert!(error.contains(says), "{error}");
        a.assert_runs();
        drop(stdin);
        server.kill().unwrap();
        let mut rest = Vec::new();
        out.read_to_end(&mut rest).unwrap();
        let rest = String::from_utf8_lossy(&rest);
        server.wait().unwrap();
        if version == "-tls1_3" && inside == "vfio-migrate/1" && !asks.is_empty() {
            // It asks for a certificate of its CA, and has been shown one.
            assert!(rest.contains("1 server accepts that finished"), "{rest}\n{error}");
        } else {
            assert!(!rest.contains("VFIOMIG"), "{rest}");
        }
    }
}
