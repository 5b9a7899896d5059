//! Cancels and Ctrl-C end what the command and a `vm` wait for.

use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Process, Setup, Vm, command, creds, run, until};

/// The second in which a cancel must end a wait, and what a busy host adds to it.
const WITHIN: Duration = Duration::from_secs(4);

fn signal(pid: u32, signal: Signal) {
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), signal).unwrap();
}

/// A process that stands still until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn new(process: &Process) -> Self {
        signal(process.pid(), Signal::STOP);
        Self(process.pid())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.0, Signal::CONT);
    }
}

/// An address whose connections nobody accepts any more: a connect to it waits for ten seconds.
fn full_queue(path: &Path) -> (UnixListener, Vec<std::os::fd::OwnedFd>) {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let listener = UnixListener::bind(path).unwrap();
    let address = SocketAddrUnix::new(path).unwrap();
    let mut queued = Vec::new();
    loop {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        if connect(&socket, &address).is_err() {
            return (listener, queued);
        }
        queued.push(socket);
    }
}

/// Cancels the session of `vm` over its control socket, and checks how it ended.
fn cancel(vm: &Vm) {
    let begun = Instant::now();
    vm.call("migrate-cancel", Value::Null).unwrap();
    let info = vm.ended();
    assert!(begun.elapsed() < WITHIN, "the cancel took {:?}: {info}", begun.elapsed());
    assert_eq!(info["status"], "cancelled", "{info}");
    assert_eq!(vm.status(), "running");
}

/// Interrupts a command that follows a session of `vm`, and checks how both ended.
fn interrupt(vm: &Vm, following: Child) {
    until("the session", || (vm.migration()["status"] == "active").then_some(()));
    let begun = Instant::now();
    signal(following.id(), Signal::INT);
    let output = following.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(begun.elapsed() < WITHIN, "Ctrl-C took {:?}: {told}", begun.elapsed());
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("cancelled"), "{told}");
    assert_eq!(vm.migration()["status"], "cancelled");
    assert_eq!(vm.status(), "running");
}

fn following(arguments: &[&str]) -> Child {
    command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn sessions_that_wait_for_a_connection_are_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup::new(dir.path(), "a").start();
    vm.warm();
    let full = dir.path().join("full");
    let _kept = full_queue(&full);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port());
    let full = format!("unix:{}", full.display());
    let control = vm.control.to_str().unwrap();
    for to in [full.as_str(), silent.as_str()] {
        vm.begin(to, json!({}));
        cancel(&vm);
        vm.call("rehearse", json!({"uri": to})).unwrap();
        cancel(&vm);
        interrupt(&vm, following(&["migrate", "--control", control, to]));
        interrupt(&vm, following(&["rehearse", "--control", control, "--to", to]));
    }
    vm.assert_whole();
}

#[test]
fn sessions_that_wait_for_a_device_server_are_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup::new(dir.path(), "a").start();
    vm.warm();
    let control = vm.control.to_str().unwrap();
    let file = dir.path().join("file");
    let file = file.to_str().unwrap();
    let stopped = Stopped::new(&vm.devices[0]);
    let to = "tcp:127.0.0.1:1";
    vm.begin(to, json!({}));
    cancel(&vm);
    interrupt(&vm, following(&["migrate", "--control", control, to]));
    interrupt(&vm, following(&["rehearse", "--control", control, "--to", to]));
    interrupt(&vm, following(&["save", "--control", control, "-o", file]));
    drop(stopped);
    assert!(!Path::new(file).exists());
    vm.assert_whole();
}

#[test]
fn a_question_that_is_not_answered_ends_by_ctrl_c() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { devices: 0, ..Setup::new(dir.path(), "a") }.start();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("tcp:127.0.0.1:{}", silent.local_addr().unwrap().port());
    let subject = format!("vm:{}", vm.control.display());
    let mut asking = following(&["check", &subject, &to, "--tls-creds", creds()]);
    // It has connected: it waits for an answer.
    let _visitor = silent.accept().unwrap();
    let begun = Instant::now();
    signal(asking.id(), Signal::INT);
    assert!(!asking.wait().unwrap().success());
    assert!(begun.elapsed() < WITHIN, "{:?}", begun.elapsed());
}

#[test]
fn a_destination_that_waits_is_cancelled_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "a") };
    let vm = vm.start();
    vm.incoming();
    vm.call("migrate-cancel", Value::Null).unwrap();
    until("the end of the wait", || (vm.status() == "idle").then_some(()));
    assert_eq!(vm.migration(), Value::Null, "nobody had come: no session was cancelled");
}

/// The answers that what a cancel left to be undone waits for; null when nothing is left.
fn pending(vm: &Vm) -> Value {
    vm.info()["pending-rollback"].clone()
}

/// What is left of a cancelled session is told, keeps others from beginning, and is undone when the device answers.
#[test]
fn a_device_server_that_stops_in_pre_copy_does_not_hold_a_cancel_up() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup::new(dir.path(), "a").start();
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    vm.warm();
    let to = there.incoming();
    let control = vm.control.to_str().unwrap();
    for by_signal in [false, true] {
        let following = if by_signal {
            Some(following(&["migrate", "--control", control, &to, "--bandwidth", "1M"]))
        } else {
            vm.begin(&to, json!({"max-bandwidth": 1 << 20}));
            None
        };
        until("the pre-copy", || {
            let info = vm.migration();
            (info["status"] == "active" && info["phase"] == "P3").then_some(())
        });
        let stopped = Stopped::new(&vm.devices[0]);
        let begun = Instant::now();
        match following {
            None => drop(vm.call("migrate-cancel", Value::Null).unwrap()),
            Some(following) => {
                signal(following.id(), Signal::TERM);
                let output = following.wait_with_output().unwrap();
                let told = String::from_utf8_lossy(&output.stderr);
                assert_eq!(output.status.code(), Some(1), "{told}");
                assert!(told.contains("left undone: dev0 has not answered"), "{told}");
            }
        }
        let info = vm.ended();
        assert!(begun.elapsed() < WITHIN, "the cancel took {:?}: {info}", begun.elapsed());
        assert_eq!(info["status"], "cancelled", "{info}");
        let late = &info["left-undone"][0];
        assert_eq!((&late["device"], &late["errno"]), (&json!("dev0"), &json!(110)), "{late}");
        assert_eq!(vm.status(), "running");
        assert_eq!(pending(&vm)[0]["device"], "dev0", "{}", vm.info());
        for (verb, arguments) in [
            ("migrate", json!({"uri": to})),
            ("rehearse", json!({"uri": to})),
            ("save", json!({"path": dir.path().join("file")})),
        ] {
            let refused = vm.call(verb, arguments).unwrap_err();
            assert!(refused.contains("still being undone: dev0 has not answered"), "{verb}: {refused}");
        }
        let status = run(&["status", "--control", control]);
        let told = String::from_utf8_lossy(&status.stdout);
        assert!(told.contains("still being undone: dev0 has not answered"), "{told}");
        // The receiver heard of it, and is free again.
        until("the other side", || (there.migration()["status"] == "cancelled").then_some(()));
        assert_eq!(there.incoming(), to);
        let events = vm.events();
        drop(stopped);
        until("the rest to be undone", || pending(&vm).is_null().then_some(()));
        let event = events.recv_timeout(PATIENCE).unwrap();
        assert_eq!(
            (&event["event"], &event["data"]["left-undone"]),
            (&json!("MIGRATION"), &json!([])),
            "{event}"
        );
        vm.assert_whole();
    }
    assert_eq!(vm.migrate(&to, json!({}))["status"], "completed");
    there.assert_whole();
}

/// An arc that never ends: the process that has it ends all the same.
#[test]
fn an_arc_that_never_ends_holds_neither_a_cancel_nor_the_end_up() {
    let dir = tempfile::tempdir().unwrap();
    let faulty = &["--state-size", "4M", "--fault", "hang-arc:RUNNING:PRE_COPY"];
    let mut vm = Setup { device_arguments: faulty, ..Setup::new(dir.path(), "a") }.start();
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    vm.warm();
    vm.begin(&there.incoming(), json!({}));
    // On a busy host something else may be waited for before.
    until("the arc", || {
        let waits = vm.migration()["waits-for"].as_array()?.first().cloned()?;
        (!waits["arc"].is_null()).then_some(())
    });
    let begun = Instant::now();
    vm.call("migrate-cancel", Value::Null).unwrap();
    let info = vm.ended();
    assert!(begun.elapsed() < WITHIN, "{:?}: {info}", begun.elapsed());
    assert_eq!(info["status"], "cancelled", "{info}");
    assert_eq!(info["left-undone"][0]["arc"], json!({"from": "RUNNING", "to": "PRE_COPY"}), "{info}");
    assert!(
        info["error"].as_str().unwrap().contains("the guest is here; not all of it was undone by then"),
        "{info}"
    );
    assert_eq!(pending(&vm)[0]["arc"], json!({"from": "RUNNING", "to": "PRE_COPY"}));
    let begun = Instant::now();
    signal(vm.process.pid(), Signal::TERM);
    assert!(vm.process.child.wait().unwrap().success());
    assert!(begun.elapsed() < WITHIN, "{:?}", begun.elapsed());
}

/// A guest that is paused waits for its device, and it is told which, in status and event.
#[test]
fn a_cancel_in_the_switchover_says_which_device_it_waits_for() {
    let dir = tempfile::tempdir().unwrap();
    let faulty = &["--state-size", "4M", "--fault", "hang-arc:PRE_COPY:PRE_COPY_P2P:5000"];
    let vm = Setup { device_arguments: faulty, ..Setup::new(dir.path(), "a") }.start();
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    vm.warm();
    vm.begin(&there.incoming(), json!({}));
    until("the switchover", || (vm.migration()["phase"] == "P4" && vm.status() == "paused").then_some(()));
    let events = vm.events();
    let begun = Instant::now();
    vm.call("migrate-cancel", Value::Null).unwrap();
    let event = events.recv_timeout(PATIENCE).unwrap();
    assert!(begun.elapsed() < WITHIN, "{:?}", begun.elapsed());
    let waits = &event["data"]["waits-for"][0];
    assert_eq!(
        (&event["data"]["status"], &waits["device"]),
        (&json!("cancelling"), &json!("dev0")),
        "{event}"
    );
    assert_eq!(waits["arc"], json!({"from": "PRE_COPY", "to": "PRE_COPY_P2P"}), "{event}");
    assert_eq!(waits["limit-ms"], 30_000, "{event}");
    let status = run(&["status", "--control", vm.control.to_str().unwrap()]);
    let told = String::from_utf8_lossy(&status.stdout);
    assert!(
        told.contains("cancelling") && told.contains("waits: dev0 has not answered PRE_COPY to"),
        "{told}"
    );
    assert!(told.contains("at most 30 s"), "{told}");
    let info = vm.ended();
    assert_eq!((&info["status"], &info["left-undone"]), (&json!("cancelled"), &json!([])), "{info}");
    // The arc took five seconds, and the guest stood that long.
    assert!((3_000..60_000).contains(&info["downtime-ms"].as_u64().unwrap()), "{info}");
    assert_eq!(vm.status(), "running");
    vm.assert_whole();
}

/// A receiver whose device does not answer tells who waits for it, and holds up neither the source nor its own end.
#[test]
fn a_receiver_whose_device_does_not_answer_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup::new(dir.path(), "a").start();
    vm.warm();
    let other = Setup { devices: 0, vm_arguments: &["--software"], ..Setup::new(dir.path(), "c") }.start();
    for (name, by_source) in [("b", true), ("d", false)] {
        let faulty = &["--state-size", "4M", "--fault", "hang-arc:STOP:RESUMING"];
        let arguments = &["--incoming", "tcp:127.0.0.1:0"];
        let there =
            Setup { device_arguments: faulty, vm_arguments: arguments, ..Setup::new(dir.path(), name) };
        let mut there = there.start();
        let to = there.incoming();
        vm.begin(&to, json!({}));
        until("the arc", || there.migration()["waits-for"].as_array()?.first().cloned());
        let begun = Instant::now();
        if by_source {
            vm.call("migrate-cancel", Value::Null).unwrap();
        } else {
            there.call("migrate-cancel", Value::Null).unwrap();
        }
        let info = vm.ended();
        assert!(begun.elapsed() < WITHIN, "{:?}: {info}", begun.elapsed());
        assert_eq!((&info["status"], &info["left-undone"]), (&json!("cancelled"), &json!([])), "{info}");
        vm.assert_runs();
        let waits = until("the device to be named", || {
            let info = there.migration();
            (info["status"] == "cancelling").then(|| info["waits-for"][0].clone())
        });
        assert_eq!(waits["device"], "dev0", "{waits}");
        let refused = other.migrate(&to, json!({}));
        let why = refused["error"].as_str().unwrap();
        assert!(why.contains("still being undone; dev0 has not answered"), "{refused}");
        let begun = Instant::now();
        if by_source {
            signal(there.process.pid(), Signal::TERM);
        } else {
            // The process may be gone before its answer is read.
            drop(there.try_call("quit", Value::Null));
        }
        assert!(there.process.child.wait().unwrap().success());
        assert!(begun.elapsed() < WITHIN, "{:?}", begun.elapsed());
    }
    vm.assert_whole();
}

/// The guest is paused, and its device does not answer: the process ends by a signal all the same, and the guest with it.
#[test]
fn a_switchover_that_stands_still_does_not_hold_the_end_up() {
    let dir = tempfile::tempdir().unwrap();
    let faulty = &["--state-size", "4M", "--fault", "hang-arc:PRE_COPY:PRE_COPY_P2P"];
    let mut vm = Setup { device_arguments: faulty, ..Setup::new(dir.path(), "a") }.start();
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    vm.warm();
    let to = there.incoming();
    vm.begin(&to, json!({}));
    until("the switchover", || (vm.migration()["phase"] == "P4" && vm.status() == "paused").then_some(()));
    let begun = Instant::now();
    signal(vm.process.pid(), Signal::TERM);
    assert!(vm.process.child.wait().unwrap().success());
    assert!(begun.elapsed() < WITHIN, "{:?}", begun.elapsed());
    until("the other side", || (there.migration()["status"] == "cancelled").then_some(()));
    assert_eq!(there.incoming(), to);
}

/// A `vm` that stands still in the middle of a session: one Ctrl-C ends whoever follows, with what is known.
#[test]
fn one_signal_ends_whoever_follows_a_vm_that_has_fallen_silent() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { devices: 0, ..Setup::new(dir.path(), "a") }.start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port());
    let control = vm.control.to_str().unwrap();
    for arguments in [
        ["migrate", "--control", control, &silent].as_slice(),
        &["rehearse", "--control", control, "--to", &silent],
    ] {
        let following = following(arguments);
        until("the session", || (vm.migration()["status"] == "active").then_some(()));
        let stopped = Stopped::new(&vm.process);
        let begun = Instant::now();
        signal(following.id(), Signal::INT);
        let output = following.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(begun.elapsed() < Duration::from_secs(5) + WITHIN, "{:?}: {told}", begun.elapsed());
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("it was told to cancel") && told.contains("`status` tells"), "{told}");
        drop(stopped);
        assert_eq!(vm.ended()["status"], "cancelled", "it heard of it all the same");
    }
}

/// With a guest half way the machine is given up first: whoever begins another wait at once need not know.
#[test]
fn a_receiver_that_was_cancelled_half_way_waits_again_when_told_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let here = Setup::new(dir.path(), "a").start();
    here.warm();
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    here.begin(&there.incoming(), json!({"max-bandwidth": 1 << 20}));
    until("the guest to be half way", || {
        (there.migration()["transferred"]["ram"].as_u64()? > 0).then_some(())
    });
    there.call("migrate-cancel", Value::Null).unwrap();
    there.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    assert_eq!(here.ended()["status"], "cancelled");
    let info = here.migrate(&there.incoming(), json!({"downtime-limit": 60_000}));
    assert_eq!(info["status"], "completed", "{info}");
    there.assert_runs();
}
