//! Descriptors as addresses: a `vm` takes those that it was started with, and none of its own.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Process, Setup, Vm, control, fails, software, until};

const OWN: &str = "is no socket that this process was started with";

/// Starts the `vm` with `socket` as its descriptor 5.
fn started_with(socket: impl Into<OwnedFd>, setup: &Setup<'_>) -> Vm {
    let (devices, words) = setup.prepare();
    let child = Command::new("sh")
        .args(["-c", "exec \"$@\" --exit-with-stdin 5>&1 1>/dev/null", "sh"])
        .arg(env!("CARGO_BIN_EXE_vfio-migrate"))
        .args(words)
        .stdin(Stdio::piped())
        .stdout(socket.into())
        .spawn()
        .unwrap();
    let control = setup.dir.join(format!("{}.control", setup.name));
    let vm = Vm { process: Process::of(child), devices, control };
    until("the control socket", || vm.try_call("query", Value::Null)).unwrap();
    vm
}

/// The numbers of all that the process has open, and one more.
fn open(vm: &Vm) -> Vec<u32> {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", vm.process.pid())).unwrap();
    let mut numbers: Vec<u32> =
        entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    numbers.push(987);
    numbers
}

#[test]
fn a_guest_moves_over_a_socket_that_both_were_started_with() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    let source = started_with(here, &software(dir.path(), "a", &["--software"]));
    let words = ["--software", "--incoming", "fd:5"];
    let destination = started_with(there, &software(dir.path(), "b", &words));
    // A session that does not begin leaves the socket for one that does.
    let other = software(dir.path(), "c", &["--software", "--incoming", "tcp:127.0.0.1:0"]).start();
    source.begin(&other.incoming(), json!({"pause-before-switchover": true}));
    until("the wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    let refused = source.call("migrate", json!({"uri": "fd:5"})).unwrap_err();
    assert!(refused.contains("under way"), "{refused}");
    source.query("migrate-cancel");
    assert_eq!(source.ended()["status"], "cancelled");
    let info = source.migrate("fd:5", json!({}));
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(destination.ended()["status"], "completed");
    destination.assert_runs();
    for vm in [&source, &destination] {
        let verb = if vm.control == source.control { "migrate-incoming" } else { "migrate" };
        let refused = vm.call(verb, json!({"uri": "fd:5"})).unwrap_err();
        assert!(refused.contains("has been used"), "{refused}");
    }
    destination.assert_runs();
}

#[test]
fn a_receiver_waits_at_a_socket_that_listens_already() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in.sock");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let bound = [format!("tcp:{}", tcp.local_addr().unwrap()), format!("unix:{}", path.display())];
    let sockets: [OwnedFd; 2] = [tcp.into(), UnixListener::bind(&path).unwrap().into()];
    for ((socket, bound), names) in sockets.into_iter().zip(bound).zip([["a", "b"], ["c", "d"]]) {
        let source = software(dir.path(), names[0], &["--software"]).start();
        let words = ["--software", "--incoming", "fd:5"];
        let destination = started_with(socket, &software(dir.path(), names[1], &words));
        assert_eq!(destination.incoming(), bound);
        // It is no connection: a session that is none leaves it for the next.
        source.call("rehearse", json!({"uri": bound})).unwrap();
        assert_eq!(source.ended()["status"], "rehearsed");
        until("the machine", || (destination.info()["not-ready"].is_null()).then_some(()));
        let info = source.migrate(&bound, json!({}));
        assert_eq!(info["status"], "completed", "{info}");
        assert_eq!(destination.ended()["status"], "completed");
        destination.assert_runs();
    }
    assert!(path.exists(), "the file of a socket that was handed over is not ours");
}

#[test]
fn a_rehearsal_uses_up_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    let source = started_with(here, &software(dir.path(), "a", &["--software"]));
    let words = ["--software", "--incoming", "fd:5"];
    let _destination = started_with(there, &software(dir.path(), "b", &words));
    source.call("rehearse", json!({"uri": "fd:5"})).unwrap();
    let info = source.ended();
    assert_eq!(info["status"], "rehearsed", "{info}");
    let refused = source.call("migrate", json!({"uri": "fd:5"})).unwrap_err();
    assert!(refused.contains("has been used"), "{refused}");
    source.assert_runs();
}

#[test]
fn nothing_that_a_vm_opened_itself_is_an_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = Setup::new(dir.path(), "a").start();
    for number in open(&vm) {
        for verb in ["migrate", "rehearse"] {
            let answer = vm.call(verb, json!({"uri": format!("fd:{number}")}));
            assert!(answer.as_ref().is_err_and(|why| why.contains(OWN)), "{verb} fd:{number}: {answer:?}");
        }
    }
    assert!(vm.info().get("lost-devices").is_none_or(|lost| *lost == json!([])), "{}", vm.info());
    vm.assert_whole();
    let pid = Pid::from_raw(vm.process.pid().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let status = until("its end", || vm.process.child.try_wait().unwrap());
    assert!(status.success(), "{status}");
}

#[test]
fn nothing_that_a_receiver_or_a_question_opened_itself_is_an_address() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software", "--incoming", "tcp:127.0.0.1:0"]).start();
    vm.query("migrate-cancel");
    until("the end of the wait", || (vm.status() != "inmigrate").then_some(()));
    for number in open(&vm) {
        let answer = vm.call("migrate-incoming", json!({"uri": format!("fd:{number}")}));
        assert!(answer.as_ref().is_err_and(|why| why.contains(OWN)), "fd:{number}: {answer:?}");
    }
    let asking = software(dir.path(), "b", &["--software"]).start();
    let source = format!("vm:{}", control(&asking));
    for number in (0..10).chain([987]) {
        let address = format!("fd:{number}");
        fails(&["vm", "--software", "--memory", "32M", "--incoming", &address], 1, OWN);
        fails(&["check", &source, &address], 1, OWN);
    }
    // It waits again all the same.
    vm.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    assert_eq!(vm.status(), "inmigrate");
}
