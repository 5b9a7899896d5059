//! What strangers cost a receiver that has certificates, and what of its secrets it ever shows.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::{Process, Setup, Vm, command, control, run, until};
use crate::tls::{done, pki, receiver, source, words};

/// A handshake message of 60000 bytes, in records, whose last byte is yet to come.
fn endless_hello() -> Vec<u8> {
    let message = [&[1, 0, 0xea, 0x60, 3, 3][..], &[7; 60_000 - 3]].concat();
    let records = message.chunks(1 << 14).map(|part| {
        let [high, low] = u16::try_from(part.len()).unwrap().to_be_bytes();
        [&[0x16, 3, 1, high, low][..], part].concat()
    });
    records.collect::<Vec<_>>().concat()
}

/// Three times as many as may wait, each with as much of a handshake as it is let: they cost a bounded part of memory and no descriptor for long,
/// are let go in time, and the rightful source comes in.
#[test]
fn a_handshake_is_bounded_in_time_memory_and_number() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    let a = source(dir.path(), &["--tls-creds", words(&pki.a)]);
    let b = receiver(dir.path(), &["--tls-creds", words(&pki.b)]);
    let at = b.incoming();
    let address = at.trim_start_matches("tcp:");
    let (descriptors, threads) = b.process.holdings();
    let before = b.process.own_memory_kib();
    let hello = endless_hello();
    let mut strangers: Vec<TcpStream> = (0..192).map(|_| TcpStream::connect(address).unwrap()).collect();
    let begun = Instant::now();
    for stranger in &mut strangers {
        stranger.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        // Whoever is one too many may be gone by then.
        let _ = stranger.write_all(&hello);
    }
    let most = until("the strangers to be let in, and no more than may wait", || {
        let (now, _) = b.process.holdings();
        (now >= descriptors + 32).then_some(now)
    });
    assert!(most <= descriptors + 64 + 8, "{most} descriptors, of {descriptors} before");
    let grown = b.process.own_memory_kib().saturating_sub(before);
    assert!(grown < 64 * 256 + 4096, "{grown} KiB for 64 strangers");
    // No thread is anybody's who has proved nothing.
    assert!(b.process.holdings().1 <= threads);
    for mut stranger in strangers {
        stranger.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let ended = stranger.read_to_end(&mut Vec::new());
        let kind = ended.as_ref().map_err(std::io::Error::kind);
        assert!(kind != Err(std::io::ErrorKind::WouldBlock), "it was not let go");
    }
    // Three lots of five seconds each, if they come one after another; and a machine that is busy.
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    let moved = a.migrate(&at, json!({}));
    assert_eq!(moved["status"], "completed", "{moved}");
}

/// A `vm` that logs all that it can into a file.
fn chatty(dir: &Path, name: &str, more: &[&str]) -> Vm {
    let setup = Setup { devices: 1, vm_arguments: more, ..Setup::new(dir, name) };
    let (devices, arguments) = setup.prepare();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let child = command(&words)
        .arg("--exit-with-stdin")
        .env("RUST_LOG", "trace")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(File::create(dir.join(format!("{name}.log"))).unwrap())
        .spawn()
        .unwrap();
    let vm = Vm { process: Process::of(child), devices, control: dir.join(format!("{name}.control")) };
    until("the control socket", || vm.try_call("query", serde_json::Value::Null)).unwrap();
    vm
}

#[test]
fn no_secret_is_ever_shown() {
    let dir = tempfile::tempdir().unwrap();
    let pki = pki(dir.path());
    let (here, there) = (dir.path().join("state-a"), dir.path().join("state-b"));
    let a =
        chatty(dir.path(), "a", &["--software", "--tls-creds", words(&pki.a), "--state-dir", words(&here)]);
    let incoming = [
        "--software",
        "--incoming",
        "tcp:127.0.0.1:0",
        "--tls-creds",
        words(&pki.b),
        "--state-dir",
        words(&there),
    ];
    let b = chatty(dir.path(), "b", &incoming);
    let vm = format!("vm:{}", control(&a));
    let mut told = done(&["check", &vm, &b.incoming(), "--tls-creds", words(&pki.a), "--json"]);
    let events = a.events();
    told += &done(&["migrate", "--control", control(&a), &b.incoming(), "--json", "--downtime-limit", "30s"]);
    told += &events.try_iter().map(|event| event.to_string()).collect::<String>();
    for state in [&here, &there] {
        told += &done(&["status", "--state-dir", words(state), "--json"]);
        told += &done(&["history", "--state-dir", words(state), "--json"]);
    }
    for vm in [&a, &b] {
        told += &done(&["status", "--control", control(vm), "--json"]);
    }
    for host in [&pki.a, &pki.b] {
        told += &done(&["tls", "show", words(host), "--json"]);
        told += &done(&["tls", "pin", words(host), "--json"]);
        told += &String::from_utf8_lossy(&run(&["doctor", "--tls-creds", words(host), "--json"]).stdout);
    }
    drop((a, b));
    for name in ["a", "b"] {
        let log = std::fs::read_to_string(dir.path().join(format!("{name}.log"))).unwrap();
        assert!(log.contains("DEBUG") || log.contains("TRACE"), "{log}");
        told += &log;
    }
    // Something of each key: its base64 as the file has it, line by line.
    let mut secrets = Vec::new();
    for host in [&pki.a, &pki.b, &pki.ca] {
        for file in std::fs::read_dir(host).unwrap().map(|file| file.unwrap().path()) {
            if file.to_string_lossy().ends_with("-key.pem") {
                let text = std::fs::read_to_string(&file).unwrap();
                secrets.extend(
                    text.lines()
                        .filter(|line| !line.starts_with('-'))
                        .map(|line| line[..32.min(line.len())].to_owned()),
                );
            }
        }
    }
    // And the session's, which is in the journal of the destination alone.
    for file in std::fs::read_dir(&there).unwrap().map(|file| file.unwrap().path()) {
        if file.extension().is_some_and(|ending| ending == "json") {
            let journal: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
            secrets.push(journal["destination-key"].as_str().expect("a session's key").to_owned());
        }
    }
    assert!(secrets.len() > 10, "{}", secrets.len());
    for secret in secrets.iter().filter(|secret| secret.len() > 8) {
        assert!(!told.contains(secret.as_str()), "a secret is shown: {secret}");
    }
}
