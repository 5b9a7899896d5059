//! What a session waits for is told while it waits, from its first moment on, with the time that has passed.

use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Process, Setup, Vm, command, run, until};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn signal(process: &Process, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(process.pid()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// The session under way, once it says that it waits.
fn waiting(vm: &Vm) -> Value {
    until("a session that says what it waits for", || {
        let session = vm.query("query")["migration"].take();
        session["waits-for"].as_array().is_some_and(|waits| !waits.is_empty()).then_some(session)
    })
}

#[test]
fn a_device_that_does_not_answer_is_named_in_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup::new(dir.path(), "a").start();
    let receiver = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let receiver = receiver.start();
    source.warm();
    let to = receiver.incoming();
    let file = dir.path().join("file");
    signal(&source.devices[0], Signal::STOP);
    for (verb, arguments) in [
        ("migrate", json!({"uri": to})),
        ("rehearse", json!({"uri": to})),
        ("save", json!({"path": text(&file)})),
    ] {
        source.call(verb, arguments).unwrap();
        let session = waiting(&source);
        assert_eq!(
            (&session["phase"], &session["phase-name"]),
            (&json!("P0"), &json!("plan")),
            "{verb}: {session}"
        );
        let wait = &session["waits-for"][0];
        assert_eq!(wait["device"], "dev0", "{verb}: {session}");
        assert!(wait["limit-ms"].as_u64().is_some_and(|limit| limit >= 1000), "{verb}: {session}");
        // Time does not stand still meanwhile, nor is it left out at the end.
        assert!(session["total-ms"].as_u64() >= wait["waited-ms"].as_u64(), "{verb}: {session}");
        let told = run(&["status", "--control", text(&source.control)]);
        let told = String::from_utf8(told.stdout).unwrap();
        assert!(told.contains("waits: dev0 has not answered"), "{told}");
        source.call("migrate-cancel", Value::Null).unwrap();
        let ended = source.ended();
        assert_eq!(ended["status"], "cancelled", "{ended}");
        assert!(ended["total-ms"].as_u64() >= session["total-ms"].as_u64(), "{verb}: {ended}");
    }
    signal(&source.devices[0], Signal::CONT);
    until("the device to answer", || (source.migrate(&to, json!({}))["status"] == "completed").then_some(()));
}

#[test]
fn a_destination_that_does_not_answer_is_named_in_hello() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { devices: 0, ..Setup::new(dir.path(), "a") }.start();
    // Nobody takes a connection.
    let full = dir.path().join("full.sock");
    let socket = || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    let (listener, at) = (socket(), SocketAddrUnix::new(&full).unwrap());
    bind(&listener, &at).unwrap();
    listen(&listener, 0).unwrap();
    let first = socket();
    connect(&first, &at).unwrap();
    // Somebody does, and says nothing.
    let silent = dir.path().join("silent.sock");
    let _silent = UnixListener::bind(&silent).unwrap();
    for (to, asked) in [(&full, "a request to connect"), (&silent, "what it was told of the guest")] {
        source.begin(&format!("unix:{}", to.display()), json!({}));
        let session = waiting(&source);
        assert_eq!(session["phase-name"], "hello", "{session}");
        let wait = &session["waits-for"][0];
        let says = format!("the destination has not answered {asked}");
        assert!(wait["text"].as_str().unwrap().starts_with(&says), "{session}");
        assert!(wait["limit-ms"].is_u64() && wait["device"].is_null(), "{session}");
        assert!(session["total-ms"].as_u64() >= wait["waited-ms"].as_u64(), "{session}");
        source.call("migrate-cancel", Value::Null).unwrap();
        assert_eq!(source.ended()["status"], "cancelled");
    }
}

#[test]
fn a_receiver_whose_device_does_not_answer_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup::new(dir.path(), "a").start();
    let receiver = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let receiver = receiver.start();
    source.warm();
    let to = receiver.incoming();
    signal(&receiver.devices[0], Signal::STOP);
    source.begin(&to, json!({}));
    let session = waiting(&receiver);
    let wait = &session["waits-for"][0];
    assert_eq!((&session["direction"], &wait["device"]), (&json!("incoming"), &json!("dev0")), "{session}");
    assert!(wait["limit-ms"].is_u64(), "{session}");
    source.call("migrate-cancel", Value::Null).unwrap();
    source.ended();
    // The machine that is built anew after that waits for the same device.
    source.begin(&to, json!({}));
    let named = until("the device to be named again", || {
        let session = receiver.query("query")["migration"].take();
        let waits = session["waits-for"].as_array()?.clone();
        (!waits.is_empty()).then_some(waits)
    });
    assert_eq!(named[0]["device"], "dev0", "{named:?}");
    source.call("migrate-cancel", Value::Null).unwrap();
    source.ended();
    signal(&receiver.devices[0], Signal::CONT);
}

/// The guest asks its device too, and the session waits behind that: the limit that it tells is the one that it keeps. What it waits
/// for is part of it from the first moment on, by which it is said to have begun.
#[test]
fn the_limit_that_is_told_is_kept_and_counts_from_when_it_began() {
    let dir = tempfile::tempdir().unwrap();
    let (state, said, file) = (dir.path().join("state"), dir.path().join("said"), dir.path().join("file"));
    let vm_arguments = &["--state-dir", text(&state), "--exit-with-stdin"];
    let setup = Setup { vm_arguments, ..Setup::new(dir.path(), "a") };
    let (devices, words) = setup.prepare();
    let child = command(&words.iter().map(String::as_str).collect::<Vec<_>>())
        .stdin(std::process::Stdio::piped())
        .stderr(std::fs::File::create(&said).unwrap())
        .spawn()
        .unwrap();
    let source = Vm { process: Process::of(child), devices, control: dir.path().join("a.control") };
    until("the control socket", || source.try_call("query", Value::Null)).expect("query");
    source.warm();
    signal(&source.devices[0], Signal::STOP);
    let receiver = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let receiver = receiver.start();
    let to = receiver.incoming();
    for (verb, arguments, what) in [
        ("save", json!({"path": text(&file)}), "save of VM"),
        ("migrate", json!({"uri": to}), "migration of VM"),
    ] {
        source.call(verb, arguments).unwrap();
        let session = waiting(&source);
        let limit = session["waits-for"][0]["limit-ms"].as_u64().unwrap();
        let begun = std::fs::read_to_string(&said).unwrap();
        assert!(
            begun.lines().any(|line| line.contains(what) && line.contains(" begins (attempt ")),
            "{begun}"
        );
        let ended = source.ended();
        assert_eq!(
            (&ended["status"], &ended["failure"]["device"]),
            (&json!("failed"), &json!("dev0")),
            "{ended}"
        );
        let total = ended["total-ms"].as_u64().unwrap();
        // A busy host adds to it, but not another question, nor the guest's own.
        assert!((limit - 1_000..limit + 6_000).contains(&total), "{verb} told {limit} ms: {ended}");
    }
    signal(&source.devices[0], Signal::CONT);
    // What it did not answer is not taken for something that it does not have.
    let moved = source.migrate(&to, json!({}));
    assert_eq!(moved["status"], "completed", "{moved}");
    let history = run(&["history", "--state-dir", text(&state), "--json"]);
    let history: Value = serde_json::from_slice(&history.stdout).unwrap();
    for record in history["records"].as_array().unwrap() {
        let at = |which: &str| seconds_of_day(record[which].as_str().unwrap());
        let took = (at("ended") + 86_400 - at("began")) % 86_400;
        assert!(took + 1 >= record["migration"]["total-ms"].as_u64().unwrap() / 1000, "{record}");
    }
}

/// The time of day in `2026-11-30T16:20:57Z`, in seconds.
fn seconds_of_day(time: &str) -> u64 {
    let parts = time[11..19].split(':').map(|part| part.parse::<u64>().unwrap());
    parts.fold(0, |seconds, part| seconds * 60 + part)
}
