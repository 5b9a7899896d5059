//! A receiver waits until a guest has arrived, whatever comes and goes before that.

use std::io::{Read, Write};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Process, Setup, Vm, creds, run, until};

const UUID: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0002";

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

fn source(dir: &std::path::Path) -> Vm {
    let source = Setup { vm_arguments: &["--uuid", UUID], ..Setup::new(dir, "a") }.start();
    source.warm();
    source
}

fn receiver(dir: &std::path::Path, more: &[&str]) -> Vm {
    let words = [&["--uuid", UUID, "--incoming", "tcp:127.0.0.1:0"], more].concat();
    Setup { vm_arguments: &words, ..Setup::new(dir, "b") }.start()
}

/// The end of the next session at the receiver, which waits on at the same address.
fn next_end(receiver: &Vm, events: &std::sync::mpsc::Receiver<Value>, at: &str) -> Value {
    let end = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok())
        .find(|event| event["event"] == "MIGRATION" && event["data"]["status"] != "active")
        .expect("an end")["data"]
        .take();
    let report = receiver.query("query");
    assert_eq!(report["last"]["status"], end["status"], "{report}");
    assert_eq!(report["migration"], Value::Null, "nothing is under way: {report}");
    assert_eq!(
        (&report["vm"]["status"], &report["vm"]["incoming"]),
        (&json!("inmigrate"), &json!(at)),
        "{report}"
    );
    end
}

/// The next refusal at the receiver, which counts it and waits on as if nobody had come.
fn next_refusal(receiver: &Vm, events: &std::sync::mpsc::Receiver<Value>, at: &str) -> Value {
    let before = receiver.query("query")["last"].take();
    let refused = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok())
        .inspect(|event| assert_ne!(event["event"], "MIGRATION", "a refusal is no session: {event}"))
        .find(|event| event["event"] == "MIGRATION_REFUSED")
        .expect("a refusal")["data"]
        .take();
    let report = receiver.query("query");
    assert_eq!(report["vm"]["refused"]["last"], refused, "{report}");
    assert_eq!((&report["last"], &report["vm"]["incoming"]), (&before, &json!(at)), "{report}");
    refused
}

fn assert_arrives(source: &Vm, receiver: &Vm) {
    let info = source.migrate(&receiver.incoming(), json!({}));
    assert_eq!(info["status"], "completed", "{info}");
    receiver.assert_whole();
}

#[test]
fn it_waits_on_after_everything_but_a_guest() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let receiver = receiver(dir.path(), &[]);
    let at = receiver.incoming();
    let events = receiver.events();
    let report = receiver.query("query");
    assert_eq!((&report["migration"], &report["last"]), (&Value::Null, &Value::Null), "{report}");
    let watched = run(&["status", "--watch", "--control", text(&receiver.control)]);
    assert_eq!(watched.status.code(), Some(0), "it ends: nothing is under way");

    // A question about another VM.
    let others = tempfile::tempdir().unwrap();
    let other = Setup::new(others.path(), "other").start();
    let asked = run(&["check", &format!("vm:{}", text(&other.control)), &at, "--tls-creds", creds()]);
    assert_eq!(asked.status.code(), Some(3), "{asked:?}");
    let refused = next_refusal(&receiver, &events, &at);
    assert_eq!((&refused["code"], &refused["wanted"]), (&json!("other-vm"), &json!("ask")), "{refused}");

    // A question that is answered.
    let asked = run(&["check", &format!("vm:{}", text(&source.control)), &at, "--tls-creds", creds()]);
    assert_eq!(asked.status.code(), Some(0), "{asked:?}");
    assert_eq!(next_end(&receiver, &events, &at)["status"], "rehearsed");

    // A stranger with a VM that is not expected.
    let info = other.migrate(&at, json!({}));
    assert_eq!((&info["status"], &info["incompatible"]), (&json!("failed"), &json!(true)), "{info}");
    let refused = next_refusal(&receiver, &events, &at);
    assert_eq!((&refused["code"], &refused["wanted"]), (&json!("other-vm"), &json!("move")), "{refused}");
    assert_eq!(refused["vm"], other.info()["uuid"]);

    // An attempt that its operator cancels, and one whose source dies.
    source.begin(&at, json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    assert_eq!(receiver.migration()["status"], "active");
    source.call("migrate-cancel", Value::Null).unwrap();
    assert_eq!(source.ended()["status"], "cancelled");
    assert_eq!(next_end(&receiver, &events, &at)["status"], "cancelled", "a cancel is one, at both sides");
    let dying = tempfile::tempdir().unwrap();
    let mut dying = Setup { vm_arguments: &["--uuid", UUID], ..Setup::new(dying.path(), "c") }.start();
    dying.begin(&at, json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (dying.migration()["status"] == "pre-switchover").then_some(()));
    dying.process.kill();
    assert_eq!(next_end(&receiver, &events, &at)["status"], "failed");

    // Garbage is not even a session.
    let mut stranger = std::net::TcpStream::connect(at.strip_prefix("tcp:").unwrap()).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let _ = stranger.read_to_end(&mut Vec::new());

    assert_arrives(&source, &receiver);
    assert_eq!(receiver.query("query")["last"]["status"], "completed");
}

#[test]
fn a_refused_migration_can_be_tried_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let words = ["--uuid", UUID, "--incoming", "tcp:127.0.0.1:0"];
    let setup = Setup {
        device_arguments: &["--state-size", "4M", "--param", "queues=4"],
        vm_arguments: &words,
        ..Setup::new(dir.path(), "b")
    };
    let mut receiver = setup.start();
    let at = receiver.incoming();
    for _ in 0..2 {
        let info = source.migrate(&at, json!({}));
        assert_eq!((&info["status"], &info["incompatible"]), (&json!("failed"), &json!(true)), "{info}");
    }
    // Its operator gives it another device: the receiver takes that one up by itself.
    let socket = dir.path().join("b-dev0.sock");
    receiver.devices[0].kill();
    until("the loss to be seen", || {
        let info = receiver.info();
        info["not-ready"].as_str().is_some_and(|why| why.contains("dev0")).then_some(())
    });
    // That passes: no refusal, and nothing about the two does not fit.
    let info = source.migrate(&at, json!({}));
    assert_eq!(
        (&info["status"], &info["incompatible"], &info["failure"]["side"]),
        (&json!("failed"), &json!(false), &json!("destination")),
        "nothing can arrive: {info}"
    );
    assert!(info["error"].as_str().unwrap().contains("dev0"), "{info}");
    let asked = run(&["check", &format!("vm:{}", text(&source.control)), &at, "--tls-creds", creds()]);
    assert_eq!(asked.status.code(), Some(1), "{asked:?}");
    receiver.devices[0] = Process::start(&["device", "--socket", text(&socket), "--state-size", "4M"]);
    until("the receiver to be ready", || receiver.info()["not-ready"].is_null().then_some(()));
    assert_arrives(&source, &receiver);
}

/// Starts the receiver's device server again, at the same path.
fn restart_device(dir: &std::path::Path, receiver: &mut Vm) {
    let socket = dir.join("b-dev0.sock");
    receiver.devices[0] = Process::start(&["device", "--socket", text(&socket), "--state-size", "4M"]);
    until("the server to listen", || std::os::unix::net::UnixStream::connect(&socket).ok());
}

#[test]
fn a_device_server_that_is_started_again_is_taken_back_while_nobody_looks() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let mut receiver = receiver(dir.path(), &[]);
    let at = receiver.incoming();
    receiver.devices[0].kill();
    restart_device(dir.path(), &mut receiver);
    // At once: whether the loss was seen meanwhile or not.
    let info = source.migrate(&at, json!({"verify": true}));
    assert_eq!(info["status"], "completed", "{info}");
    receiver.assert_whole();
    assert_eq!(receiver.info()["lost-devices"], json!([]));
}

#[test]
fn a_device_server_that_is_started_again_is_taken_back_between_two_attempts() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let mut receiver = receiver(dir.path(), &[]);
    let at = receiver.incoming();
    let events = receiver.events();
    // It dies with half a state in it.
    source.begin(&at, json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    receiver.devices[0].kill();
    source.call("migrate-continue", Value::Null).ok();
    let info = source.ended();
    assert_eq!(info["status"], "failed", "{info}");
    assert!(info["error"].as_str().unwrap().contains("dev0"), "{info}");
    assert_eq!(next_end(&receiver, &events, &at)["status"], "failed");
    restart_device(dir.path(), &mut receiver);
    // And again, with nothing in it, after an attempt that it survived.
    until("the receiver to be ready", || receiver.info()["not-ready"].is_null().then_some(()));
    source.begin(&at, json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    source.call("migrate-cancel", Value::Null).unwrap();
    assert_eq!(source.ended()["status"], "cancelled");
    assert_eq!(next_end(&receiver, &events, &at)["status"], "cancelled");
    receiver.devices[0].kill();
    restart_device(dir.path(), &mut receiver);
    let info = source.migrate(&at, json!({"verify": true}));
    assert_eq!(info["status"], "completed", "{info}");
    receiver.assert_whole();
}

/// One whose device is not that of [`source`].
fn receiver_that_does_not_fit(dir: &std::path::Path, more: &[&str]) -> Vm {
    let words = [&["--uuid", UUID, "--incoming", "tcp:127.0.0.1:0"], more].concat();
    let device_arguments = &["--state-size", "4M", "--param", "queues=4"];
    Setup { device_arguments, vm_arguments: &words, ..Setup::new(dir, "b") }.start()
}

#[test]
fn who_is_refused_is_written_down_and_a_question_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let state = dir.path().join("state");
    let receiver = receiver_that_does_not_fit(dir.path(), &["--once", "--state-dir", text(&state)]);
    let at = receiver.incoming();
    // Somebody who is not expected ends no wait, and fills no history.
    let others = tempfile::tempdir().unwrap();
    let other = Setup::new(others.path(), "other").start();
    assert_eq!(other.migrate(&at, json!({}))["status"], "failed");
    until("the refusal to be counted", || (receiver.info()["refused"]["count"] == 1).then_some(()));
    assert_eq!(receiver.incoming(), at);
    let asked = run(&["check", &format!("vm:{}", text(&source.control)), &at, "--tls-creds", creds()]);
    assert_eq!(asked.status.code(), Some(3), "{asked:?}");
    until("the question to end", || (receiver.query("query")["migration"].is_null()).then_some(()));
    assert_eq!(receiver.incoming(), at, "it waits on");
    let info = source.migrate(&at, json!({}));
    assert_eq!((&info["status"], &info["incompatible"]), (&json!("failed"), &json!(true)), "{info}");
    until("the wait to end", || (receiver.status() == "failed").then_some(()));
    let history = run(&["history", "--state-dir", text(&state), "--json"]);
    let history: Value = serde_json::from_slice(&history.stdout).unwrap();
    let told = |n: usize| {
        let record = &history["records"][n];
        let migration = &record["migration"];
        (
            record["kind"].clone(),
            record["vm"].clone(),
            migration["status"].clone(),
            record["attempt"].is_string(),
        )
    };
    let ended = |kind: &str, status: &str| (json!(kind), json!(UUID), json!(status), true);
    assert_eq!([told(0), told(1)], [ended("check", "rehearsed"), ended("migration", "failed")], "{history}");
}

#[test]
fn a_rehearsal_that_is_cancelled_is_so_at_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let receiver = receiver(dir.path(), &[]);
    let events = receiver.events();
    let at = receiver.incoming();
    source.call("rehearse", json!({"uri": at, "max-bandwidth": 200_000})).unwrap();
    until("the rehearsal to be in pre-copy", || {
        (source.migration()["phase-name"] == "pre-copy").then_some(())
    });
    source.call("migrate-cancel", Value::Null).unwrap();
    assert_eq!(source.ended()["status"], "cancelled");
    let end = next_end(&receiver, &events, &at);
    assert_eq!(
        (&end["status"], end["error"].as_str().unwrap().contains("rehearsal")),
        (&json!("cancelled"), true),
        "{end}"
    );
}

#[test]
fn a_guest_that_did_not_come_can_be_started_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let words = ["--uuid", UUID, "--state-dir", text(&state)];
    let source = Setup { vm_arguments: &words, ..Setup::new(dir.path(), "a") }.start();
    source.warm();
    let receiver = receiver(dir.path(), &["--state-dir", text(&state)]);
    let at = receiver.incoming();
    source.begin(&at, json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    source.call("migrate-cancel", Value::Null).unwrap();
    assert_eq!(source.ended()["status"], "cancelled");
    until("the receiver to hear of it", || (receiver.query("query")["migration"].is_null()).then_some(()));
    drop(source);
    // The receiver waits on, and has no part of the VM that it was offered.
    let again = Setup { vm_arguments: &words, ..Setup::new(dir.path(), "c") }.start();
    again.warm();
    assert_eq!(receiver.incoming(), at);
    assert_arrives(&again, &receiver);
}

#[test]
fn it_accepts_again_once_descriptors_are_to_be_had() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let receiver = receiver(dir.path(), &[]);
    let at = receiver.incoming();
    let pid = Pid::from_raw(receiver.process.pid().try_into().unwrap());
    let few = Rlimit { current: Some(3), ..getrlimit(Resource::Nofile) };
    let before = prlimit(pid, Resource::Nofile, few).unwrap();
    let mut refused = std::net::TcpStream::connect(at.strip_prefix("tcp:").unwrap()).unwrap();
    // The connection lies in the backlog: nothing can be accepted, and nothing can be asked over the control socket.
    std::thread::sleep(std::time::Duration::from_millis(500));
    prlimit(pid, Resource::Nofile, before).unwrap();
    // Read to its end: what comes is no migration.
    refused.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let _ = refused.read_to_end(&mut Vec::new());
    assert_eq!(receiver.status(), "inmigrate");
    assert_arrives(&source, &receiver);
}

#[test]
fn once_is_once() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = receiver_that_does_not_fit(dir.path(), &["--once"]);
    let info = source(dir.path()).migrate(&receiver.incoming(), json!({}));
    assert_eq!(info["status"], "failed", "{info}");
    until("it to give up", || (receiver.status() == "failed").then_some(()));
    let said = run(&["status", "--control", text(&receiver.control)]);
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    receiver.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    receiver.incoming();
}

#[test]
fn its_operator_ends_the_wait() {
    let dir = tempfile::tempdir().unwrap();
    let receiver = receiver(dir.path(), &[]);
    receiver.incoming();
    receiver.call("migrate-cancel", Value::Null).unwrap();
    until("the wait to end", || (receiver.status() == "idle").then_some(()));
    // Nobody had come: there is no session that was cancelled.
    assert_eq!(receiver.query("query")["last"], Value::Null);
}

#[test]
fn a_guest_brings_the_size_of_its_ram_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let control = dir.path().join("b.control");
    let socket = dir.path().join("b-dev0.sock");
    let device = Process::start(&["device", "--socket", text(&socket), "--state-size", "4M"]);
    let device_word = format!("vfio-user:{},id=dev0", text(&socket));
    let words =
        ["vm", "--control", text(&control), "--device", &device_word, "--incoming", "tcp:127.0.0.1:0"];
    let words = [&words[..], &["--tls-creds", creds()]].concat();
    let receiver = Vm { process: Process::start(&words), devices: vec![device], control: control.clone() };
    until("the control socket", || receiver.try_call("query", Value::Null)).expect("query");
    assert_eq!(receiver.info()["memory"], Value::Null, "nobody has said");
    let status = String::from_utf8(run(&["status", "--control", text(&control)]).stdout).unwrap();
    assert!(status.contains("RAM as its guest has") && !status.contains("512"), "{status}");
    // While it comes: how much it has, and not what is left, which only its source knows.
    source.begin(&receiver.incoming(), json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    assert!(source.migration()["remaining"].is_u64());
    let report = receiver.query("query");
    assert_eq!(
        (&report["vm"]["memory"], &report["migration"]["remaining"]),
        (&json!(64 << 20), &Value::Null)
    );
    let status = String::from_utf8(run(&["status", "--control", text(&control)]).stdout).unwrap();
    assert!(!status.contains(" left"), "{status}");
    source.call("migrate-cancel", Value::Null).unwrap();
    source.ended();
    assert_arrives(&source, &receiver);
    assert_eq!(receiver.info()["memory"], 64 << 20);
    // The same of a snapshot.
    let file = dir.path().join("guest.img");
    let saved = run(&["save", "--stop", "--control", text(&control), "-o", text(&file)]);
    assert_eq!(saved.status.code(), Some(0), "{saved:?}");
    let restored = dir.path().join("c.control");
    let words = ["vm", "--control", text(&restored), "--device", &device_word, "--restore", text(&file)];
    let restored = Vm { process: Process::start(&words), devices: vec![], control: restored.clone() };
    until("the control socket", || restored.try_call("query", Value::Null)).expect("query");
    assert_eq!(restored.info()["memory"], 64 << 20);
    restored.assert_whole();
}

#[test]
fn one_that_takes_the_guests_ram_is_asked_so() {
    let dir = tempfile::tempdir().unwrap();
    let source =
        Setup { devices: 0, vm_arguments: &["--software", "--uuid", UUID], ..Setup::new(dir.path(), "a") }
            .start();
    let receiver = |name: &str, more: &[&str]| {
        let control = dir.path().join(name);
        let words = [
            "vm",
            "--software",
            "--uuid",
            UUID,
            "--incoming",
            "tcp:127.0.0.1:0",
            "--tls-creds",
            creds(),
            "--control",
            text(&control),
        ];
        let process = Process::start(&[&words[..], more].concat());
        let asked = format!("vm:{}", text(&control));
        until("the receiver", || {
            run(&["status", "--control", text(&control)]).status.success().then_some(())
        });
        (process, asked)
    };
    let (_any, any) = receiver("any", &[]);
    let (_other, other) = receiver("other", &["--memory", "32M"]);
    let from = format!("vm:{}", text(&source.control));
    let check = |to: &str| {
        let output = run(&["check", &from, to]);
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (exit, told) = check(&any);
    assert_eq!(exit, Some(0), "{told}");
    // And by a manifest that was kept.
    let file = dir.path().join("any.json");
    assert!(run(&["describe", &any, "-o", text(&file)]).status.success());
    let kept: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert!(!kept.to_string().contains("\"len\""), "it tells a size: {kept}");
    assert_eq!(check(text(&file)).0, Some(0));
    let matrix = run(&["check", "--matrix", "--json", &from, text(&file)]);
    let matrix: Value = serde_json::from_slice(&matrix.stdout).unwrap();
    assert_eq!(matrix["cells"][0][1], json!({"verdict": "live", "codes": []}), "{matrix}");
    // The control: a size that the operator gave is told.
    let (exit, told) = check(&other);
    assert_eq!(exit, Some(3), "{told}");
    assert!(told.contains("RAM is laid out differently"), "{told}");
}

/// A wait that is over is told by whoever ended it, and by the receiver.
#[test]
fn a_receiver_that_waits_no_more_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { devices: 0, ..Setup::new(dir.path(), "a") }.start();
    for (name, once) in [("b", false), ("c", true)] {
        let (control, said) = (dir.path().join(format!("{name}.control")), dir.path().join(name));
        let at = format!("unix:{}", dir.path().join(format!("{name}.sock")).display());
        let mut words = vec!["vm", "--control", text(&control), "--incoming", &at, "--exit-with-stdin"];
        words.extend(once.then_some("--once"));
        let stderr = std::fs::File::create(&said).unwrap();
        let child = crate::support::command(&words)
            .stdin(std::process::Stdio::piped())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let receiver = Vm { process: Process::of(child), devices: vec![], control: control.clone() };
        until("the control socket", || receiver.try_call("query", Value::Null)).expect("query");
        let why = if once {
            source.begin(&receiver.incoming(), json!({"pause-before-switchover": true}));
            until("the switchover to wait", || {
                (source.migration()["status"] == "pre-switchover").then_some(())
            });
            source.call("migrate-cancel", Value::Null).unwrap();
            "its one session has ended without a guest"
        } else {
            let cancelled = run(&["cancel", "--control", text(&control)]);
            let told = String::from_utf8(cancelled.stdout).unwrap();
            assert!(told.contains("the wait for a guest ends"), "{told}");
            "its operator cancelled"
        };
        until("the end of the wait", || (receiver.status() != "inmigrate").then_some(()));
        until("its word on stderr", || {
            let told = std::fs::read_to_string(&said).unwrap();
            told.contains(&format!("waits for a guest no more: {why}")).then_some(())
        });
    }
}
