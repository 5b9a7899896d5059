//! What goes over the control socket while a migration is followed.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use crate::support::{PATIENCE, Setup, command, until};

/// Passes one connection on to a control socket, and counts the requests.
fn counting(path: &Path, control: &Path) -> Arc<AtomicU64> {
    let listener = UnixListener::bind(path).unwrap();
    let server = UnixStream::connect(control).unwrap();
    let requests = Arc::new(AtomicU64::new(0));
    let counter = requests.clone();
    std::thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let pass_on = |from: &UnixStream, to: &UnixStream, count: Option<Arc<AtomicU64>>| {
            let (from, mut to) = (BufReader::new(from.try_clone().unwrap()), to.try_clone().unwrap());
            std::thread::spawn(move || {
                // Until one of the two leaves.
                for line in from.lines().map_while(Result::ok) {
                    if let Some(count) = &count {
                        count.fetch_add(1, Ordering::SeqCst);
                    }
                    if to.write_all(format!("{line}\n").as_bytes()).is_err() {
                        return;
                    }
                }
                let _ = to.shutdown(std::net::Shutdown::Both);
            });
        };
        pass_on(&server, &client, None);
        pass_on(&client, &server, Some(counter));
    });
    requests
}

#[test]
fn a_watched_migration_is_asked_for_once_and_then_followed_by_its_events() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup::new(dir.path(), "a").start();
    let incoming = ["--incoming", "tcp:127.0.0.1:0"];
    let destination = Setup { vm_arguments: &incoming, ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    let events = source.events();
    // No switchover is as short as that: it iterates on.
    source.begin(&destination.incoming(), json!({"downtime-limit": 1}));

    let proxy = dir.path().join("proxy.control");
    let requests = counting(&proxy, &source.control);
    let began = Instant::now();
    let watching = command(&["status", "--watch", "--json", "--control", proxy.to_str().unwrap()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    until("the first request", || (requests.load(Ordering::SeqCst) > 0).then_some(()));
    let pass = |event: &Value| event["event"] == "MIGRATION_PASS";
    events.try_iter().for_each(drop);
    for _ in 0..20 {
        let event = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok()).find(&pass).expect("a pass");
        // It says what there is to know, as an answer would.
        assert_eq!(event["data"]["pass"], event["data"]["iterations"], "{event}");
        assert_eq!(event["data"]["status"], "active", "{event}");
        assert!(event["data"]["remaining"].is_u64() && event["data"]["rate"].is_u64(), "{event}");
    }
    source.call("migrate-set-parameters", json!({"downtime-limit": 10_000})).unwrap();

    let output = watching.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["last"]["status"], "completed", "{report}");
    assert_eq!(report["vm"]["status"], "postmigrate", "{report}");
    // One at first, one at the end for where the guest is, and one for each second that events left silent.
    let (asked, seconds) = (requests.load(Ordering::SeqCst), began.elapsed().as_secs());
    assert!(asked <= 2 + seconds, "{asked} requests in {seconds} s");
    // The event of the end may come behind the answer that the watcher had.
    let end = |event: &Value| event["event"] == "MIGRATION" && event["data"]["status"] == "completed";
    let last = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok()).find(end).expect("an end");
    // Times are left out: a fraction that is read and written again may differ in its last digit.
    for member in ["status", "direction", "iterations", "transferred", "device-digest-match", "error"] {
        assert_eq!(
            last["data"][member], report["last"][member],
            "{member}: the event has what the answer has"
        );
    }
}
