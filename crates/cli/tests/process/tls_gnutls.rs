//! What GnuTLS, under which QEMU migrates, says of our TLS from either end.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::tls::{pki, receiver, source, words};

const HOST: &str = "127.0.0.1";
const TLS13: &str = "NORMAL:-VERS-ALL:+VERS-TLS1.3";
const TLS12: &str = "NORMAL:-VERS-ALL:+VERS-TLS1.2";

/// What a program of GnuTLS says, if there is one; it ends with its stdin.
fn told(program: &str, arguments: &[&str]) -> Option<String> {
    match Command::new(program).args(arguments).stdin(Stdio::null()).output() {
        Ok(output) => Some(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()),
        Err(error) => {
            eprintln!("SKIPPED: no {program} ({error}), so GnuTLS has not looked at this TLS");
            None
        }
    }
}

fn file(dir: &Path, name: &str) -> String {
    words(&dir.join(name)).to_owned()
}

#[test]
fn gnutls_finds_tls_1_3_that_asks_for_a_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    let b = receiver(dir.path(), &["--tls-creds", words(&pki.b)]);
    let at = b.incoming();
    let port = at.rsplit(':').next().unwrap();
    let (ca, certificate, key) =
        (file(&pki.a, "ca-cert.pem"), file(&pki.a, "client-cert.pem"), file(&pki.a, "client-key.pem"));
    let trust = ["--x509cafile", &ca, "--port", port, HOST];
    let proved = ["--x509certfile", &certificate, "--x509keyfile", &key];
    let (inside, other) = (["--alpn=vfio-migrate/1"], ["--alpn=h2"]);
    let Some(good) = told("gnutls-cli", &[&trust[..], &proved, &inside, &["--priority", TLS13]].concat())
    else {
        return;
    };
    for says in [
        "Status: The certificate is trusted.",
        "Description: (TLS1.3",
        "Server has requested a certificate",
        "Application protocol: vfio-migrate/1",
        "Handshake was completed",
    ] {
        assert!(good.contains(says), "{says}: {good}");
    }
    for (refused, says) in [
        // Nothing older, another protocol inside; and, behind a handshake that was over for it by then, no certificate.
        ([&trust[..], &proved, &inside, &["--priority", TLS12]].concat(), "alert"),
        ([&trust[..], &proved, &other, &["--priority", TLS13]].concat(), "alert"),
        ([&trust[..], &inside, &["--priority", TLS13]].concat(), "alert"),
    ] {
        let told = told("gnutls-cli", &refused).unwrap();
        assert!(told.contains(says), "{refused:?}: {told}");
    }
    assert_eq!(b.status(), "inmigrate");
}

#[test]
fn gnutls_serves_a_source_that_proves_itself_and_nothing_older() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    let a = source(dir.path(), &["--tls-creds", words(&pki.a)]);
    let (ca, certificate, key) =
        (file(&pki.b, "ca-cert.pem"), file(&pki.b, "server-cert.pem"), file(&pki.b, "server-key.pem"));
    for (priority, inside, says) in
        [(TLS12, "vfio-migrate/1", "it may not speak TLS 1.3"), (TLS13, "vfio-migrate/1", "")]
    {
        // A port that was free a moment ago: the server does not say which one 0 became.
        let port = TcpListener::bind((HOST, 0)).unwrap().local_addr().unwrap().port().to_string();
        // Line by line, though nobody looks at a terminal.
        let server = Command::new("stdbuf")
            .args(["-oL", "gnutls-serv", "--echo", "--port", &port, "--priority", priority, "--alpn", inside])
            .args(["--x509cafile", &ca, "--x509certfile", &certificate, "--x509keyfile", &key])
            .args(["--require-client-cert", "--verify-client-cert"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let there = Command::new("gnutls-serv").arg("--version").output().is_ok();
        let (true, Ok(mut server)) = (there, server) else {
            eprintln!("SKIPPED: no gnutls-serv, so GnuTLS has not looked at this TLS");
            return;
        };
        let mut errors = BufReader::new(server.stderr.take().unwrap()).lines();
        while !errors.next().expect("it ends").unwrap().contains("listening on IPv4") {}
        let mut lines = BufReader::new(server.stdout.take().unwrap()).lines().map(Result::unwrap);
        a.call("migrate", json!({"uri": format!("tcp:{HOST}:{port}")})).unwrap();
        if says.is_empty() {
            // It says nothing of our protocol, and is given up; by then it has looked at our certificate.
            let seen: Vec<String> =
                lines.by_ref().take_while(|line| !line.contains("Application protocol:")).collect();
            let seen = seen.join("\n");
            for says in ["Status: The certificate is trusted.", "Version: TLS1.3", "CN=host-a"] {
                assert!(seen.contains(says), "{says}: {seen}");
            }
            a.call("migrate-cancel", serde_json::Value::Null).unwrap();
        }
        let info = a.ended();
        let error = info["error"].as_str().unwrap_or_default();
        assert!(info["status"] != "completed" && error.contains(says), "{info}");
        a.assert_runs();
        server.kill().unwrap();
        server.wait().unwrap();
    }
}
