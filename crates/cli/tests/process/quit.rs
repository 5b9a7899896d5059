//! What `quit` ends, and what only `quit --force` does.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Process, Setup, Vm, command, control, fails, run, software, until};

const VM: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0007";

/// What the command prints with `--json`.
fn json_of(arguments: &[&str]) -> Value {
    serde_json::from_slice(&run(arguments).stdout).unwrap()
}

#[test]
fn quit_ends_a_guest_only_by_force() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let refused = |vm: &Vm, says: &str| {
        fails(&["quit", "--control", control(vm)], 1, says);
        assert!(vm.call("quit", json!({"force": false})).unwrap_err().contains(says));
        assert!(vm.call("quit", Value::Null).unwrap_err().contains("quit --force"));
    };
    refused(&vm, "a guest runs here, and would end with the process");
    vm.assert_runs();
    vm.call("stop", Value::Null).unwrap();
    refused(&vm, "a guest is paused here, and would end with the process");
    assert_eq!(vm.status(), "paused");
    vm.call("cont", Value::Null).unwrap();

    let leaves = |mut vm: Vm| {
        let output = run(&["quit", "--control", control(&vm)]);
        assert!(output.status.success(), "{output:?}");
        assert!(vm.process.child.wait().unwrap().success());
    };
    let incoming = ["--software", "--incoming", "tcp:127.0.0.1:0"];
    // One that waits for a guest, and one that a guest has come to, and one that it has left.
    leaves(software(dir.path(), "b", &incoming).start());
    let destination = software(dir.path(), "c", &incoming).start();
    let info = vm.migrate(&destination.incoming(), Value::Null);
    assert_eq!(info["status"], "completed", "{info}");
    until("the guest to be there", || (destination.status() == "running").then_some(()));
    refused(&destination, "a guest runs here");
    leaves(vm);
    destination.assert_runs();
    let mut destination = destination;
    destination.call("quit", json!({"force": true})).unwrap();
    assert!(destination.process.child.wait().unwrap().success());
}

/// A session or a wait that ends with the process is not its operator's cancel: who ended it, and how, is told by both sides.
#[test]
fn what_ends_with_its_process_says_by_what() {
    // The side that ends, whether its guest is under way, and what it ends by.
    let signals =
        [("SIGTERM", Some(Signal::TERM)), ("SIGINT", Some(Signal::INT)), ("SIGHUP", Some(Signal::HUP))];
    let by_quit = [("`quit`", None), ("`quit --force`", None)];
    for (name, signal) in signals.into_iter().chain(by_quit) {
        for side in ["source", "destination"] {
            // With its guest under way a source's process ends by force alone.
            if (side, name) == ("source", "`quit`") {
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let state = |name: &str| dir.path().join(name).display().to_string();
            let (here, there) = (state("here"), state("there"));
            let of_source = ["--uuid", VM, "--state-dir", &here];
            let source = Setup { vm_arguments: &of_source, devices: 0, ..Setup::new(dir.path(), "a") };
            let of_destination = ["--state-dir", &there, "--incoming", "tcp:127.0.0.1:0"];
            let destination =
                Setup { vm_arguments: &of_destination, devices: 0, ..Setup::new(dir.path(), "b") };
            let (source, destination) = (source.start(), destination.start());
            source.begin(&destination.incoming(), json!({"pause-before-switchover": true}));
            until("the switchover to wait", || {
                (source.migration()["status"] == "pre-switchover").then_some(())
            });
            let (mut ends, stays) =
                if side == "source" { (source, destination) } else { (destination, source) };
            let (events, own) = (stays.events(), ends.events());
            match signal {
                Some(signal) => {
                    let pid = i32::try_from(ends.process.pid()).unwrap();
                    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal)
                        .unwrap();
                }
                None => {
                    let force: &[&str] = if name.contains("--force") { &["--force"] } else { &[] };
                    let quit = run(&[&["quit", "--control", control(&ends)], force].concat());
                    assert!(quit.status.success(), "{quit:?}");
                }
            }
            assert!(ends.process.child.wait().unwrap().success());
            // How the session ended comes before the end of the process, and nothing behind that.
            let own: Vec<Value> = std::iter::from_fn(|| own.recv_timeout(PATIENCE).ok()).collect();
            let words: Vec<_> = own.iter().map(|event| (&event["event"], &event["data"]["status"])).collect();
            let (last, before) = words.split_last().expect("events");
            assert_eq!(last.0, "SHUTDOWN", "{name} {side}: {words:?}");
            assert!(before.contains(&(&json!("MIGRATION"), &json!("cancelled"))), "{name} {side}: {words:?}");
            let says = format!("at the {side}: the process of the {side} ends by {name}");
            let assert_told = |who: &str, migration: &Value| {
                let error =
                    migration["error"].as_str().unwrap_or_else(|| panic!("{name} {who}: {migration}"));
                assert_eq!(migration["status"], "cancelled", "{name} {who}: {migration}");
                assert!(error.contains(&says) && !error.contains("operator"), "{name} {who}: {error}");
                assert_eq!(migration["failure"]["side"], side, "{name} {who}: {migration}");
            };
            let last =
                until("its end", || Some(stays.query("query")["last"].take()).filter(|last| !last.is_null()));
            assert_told("status", &last);
            let event = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok())
                .find(|event| event["event"] == "MIGRATION" && event["data"]["status"] == "cancelled");
            assert_told("event", &event.unwrap()["data"]);
            for state in [&here, &there] {
                let history = json_of(&["history", "--state-dir", state, "--json"]);
                assert_told("history", &history["records"].as_array().unwrap().last().unwrap()["migration"]);
            }
        }
    }
}

#[test]
fn a_wait_that_ends_with_its_process_says_by_what() {
    for (name, signal) in [("SIGTERM", Some(Signal::TERM)), ("SIGHUP", Some(Signal::HUP)), ("`quit`", None)] {
        let dir = tempfile::tempdir().unwrap();
        let (at, said) = (dir.path().join("b.control"), dir.path().join("said"));
        let words =
            ["vm", "--incoming", "unix:", "--memory", "64M", "--software", "--exit-with-stdin", "--control"];
        let incoming = format!("unix:{}", dir.path().join("b.sock").display());
        let words: Vec<_> =
            words.iter().map(|word| if *word == "unix:" { &incoming } else { *word }).collect();
        let child = command(&[&words[..], &[at.to_str().unwrap()]].concat())
            .stdin(std::process::Stdio::piped())
            .stderr(std::fs::File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let mut vm = Vm { process: Process::of(child), devices: vec![], control: at };
        until("the control socket", || vm.try_call("query", Value::Null)).expect("query");
        match signal {
            Some(signal) => {
                let pid = i32::try_from(vm.process.pid()).unwrap();
                rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), signal).unwrap();
            }
            None => assert!(run(&["quit", "--control", control(&vm)]).status.success()),
        }
        assert!(vm.process.child.wait().unwrap().success());
        let said = std::fs::read_to_string(&said).unwrap();
        assert!(said.contains(&format!("waits for a guest no more: its process ends by {name}\n")), "{said}");
        assert!(said.contains(&format!("the VM's process has ended by {name}\n")), "{said}");
        assert!(!said.contains("operator") && !said.contains("incoming` lets it"), "{said}");
    }
}

/// A wait that is cancelled is over for whoever asks for another at once.
#[test]
fn a_receiver_waits_again_as_soon_as_it_is_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let vm =
        Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "a") }.start();
    for _ in 0..5 {
        vm.call("migrate-cancel", Value::Null).unwrap();
        vm.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    }
    vm.incoming();
}

/// Who closes a connection before there is a session has no certificates to be checked for.
#[test]
fn a_receiver_that_is_gone_when_a_source_comes_is_told_as_gone() {
    let dir = tempfile::tempdir().unwrap();
    let source = software(dir.path(), "a", &["--software"]).start();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = format!("tcp:{}", listener.local_addr().unwrap());
    let gone = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        std::io::Read::read_exact(&mut stream, &mut [0]).unwrap();
        // Its close is a reset then, as of a connection that its listener has not taken.
        rustix::net::sockopt::set_socket_linger(&stream, Some(std::time::Duration::ZERO)).unwrap();
    });
    let told = source.migrate(&to, Value::Null);
    gone.join().unwrap();
    let error = told["error"].as_str().unwrap();
    assert!(error.contains("closed the connection before there was a session"), "{error}");
    assert!(!error.contains("certificate"), "{error}");
}

/// What the session waits for never answers: it ends in the history and for whoever follows it all the same.
#[test]
fn a_session_that_the_end_does_not_wait_for_is_told_and_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state").display().to_string();
    let vm_arguments = &["--state-dir", &state];
    let device_arguments = &["--state-size", "4M", "--fault", "hang-arc:PRE_COPY:PRE_COPY_P2P"];
    let vm = Setup { device_arguments, vm_arguments, ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    let events = vm.events();
    vm.begin(&there.incoming(), json!({"downtime-limit": 60_000}));
    until("the device to be waited for", || {
        (!vm.migration()["waits-for"].as_array()?.is_empty()).then_some(())
    });
    vm.call("quit", json!({"force": true})).unwrap();
    let ended = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok())
        .find(|event| event["event"] == "MIGRATION" && event["data"]["status"] == "cancelled")
        .expect("the end of the session");
    let error = ended["data"]["error"].as_str().unwrap();
    assert!(
        error.contains("quit") && error.contains("dev0 has not answered PRE_COPY to PRE_COPY_P2P"),
        "{error}"
    );
    let record = until("the record", || {
        let output = run(&["history", "--state-dir", &state, "--json"]);
        let records: Value = serde_json::from_slice(&output.stdout).ok()?;
        let last = records["records"].as_array()?.last()?.clone();
        Some(last)
    });
    assert_eq!(record["migration"]["status"], "cancelled", "{record}");
}

/// The second in which a process must end, and what a busy host adds to it: it would be asked for 240 s otherwise.
const WITHIN: Duration = Duration::from_secs(30);

/// Ends the process of `vm` by a signal, or else by `quit --force`.
fn end(vm: &Vm, by: Option<Signal>) {
    match by {
        Some(by) => {
            kill_process(Pid::from_raw(i32::try_from(vm.process.pid()).unwrap()).unwrap(), by).unwrap()
        }
        None => {
            let quit = run(&["quit", "--force", "--control", control(vm)]);
            assert!(quit.status.success(), "{quit:?}");
        }
    }
}

/// COMMIT was sent, and no answer comes: it is told what is waited for, and the end of the process does not wait for it. Nobody
/// knows whose the guest is then, and whoever followed it, its event and its history say that, and what to do.
#[test]
fn a_process_that_ends_behind_its_commit_says_that_nobody_knows_whose_the_guest_is() {
    // What the source ends by, and whether the destination has died before.
    for (name, by, dies) in [
        ("SIGTERM", Some(Signal::TERM), true),
        ("`quit --force`", None, true),
        ("SIGTERM", Some(Signal::TERM), false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state").display().to_string();
        let vm_arguments = &["--uuid", VM, "--state-dir", &state];
        let mut source = Setup { vm_arguments, ..Setup::new(dir.path(), "a") }.start();
        source.warm();
        let device_arguments = &["--state-size", "4M", "--fault", "hang-arc:STOP:RUNNING_P2P:60s"];
        let vm_arguments = &["--incoming", "tcp:127.0.0.1:0"];
        let mut there = Setup { device_arguments, vm_arguments, ..Setup::new(dir.path(), "b") }.start();
        let to = there.incoming();
        let words = ["migrate", "--json", "--downtime-limit", "60s", "--control", control(&source), &to];
        let following =
            command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a process");
        until("the commit", || (source.migration()["phase-name"] == "run").then_some(()));
        if dies {
            there.process.kill();
            let waits =
                until("what is waited for", || source.migration()["waits-for"].as_array()?.first().cloned());
            let told = waits["text"].as_str().unwrap();
            assert!(told.starts_with("the destination has not answered whose the guest is"), "{waits}");
            assert!(told.contains("the connection is gone"), "{waits}");
            assert!((100_000..=240_000).contains(&waits["limit-ms"].as_u64().unwrap()), "{waits}");
            let status = run(&["status", "--control", control(&source)]);
            let status = String::from_utf8_lossy(&status.stdout);
            assert!(
                status.contains("waits: the destination has not answered whose the guest is"),
                "{status}"
            );
        }
        let events = source.events();
        let begun = Instant::now();
        end(&source, by);
        assert_eq!(source.process.child.wait().unwrap().code(), Some(4), "{name}: as `status` says");
        assert!(begun.elapsed() < WITHIN, "{name}: {:?}", begun.elapsed());
        let Output { status, stdout, stderr } = following.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&stderr);
        let report: Value = serde_json::from_slice(&stdout).unwrap_or_else(|error| panic!("{error}: {told}"));
        assert_eq!((status.code(), &report["exit"]), (Some(4), &json!(4)), "{report}: {told}");
        let event = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok())
            .find(|event| event["event"] == "MIGRATION" && event["data"]["status"] == "unresolved");
        let history = json_of(&["history", "--state-dir", &state, "--json"]);
        let record = &history["records"].as_array().unwrap().last().unwrap()["migration"];
        for (who, migration) in
            [("answer", &report["migration"]), ("event", &event.unwrap()["data"]), ("history", record)]
        {
            assert_eq!(migration["status"], "unresolved", "{name} {who}: {migration}");
            let error = migration["error"].as_str().unwrap();
            for part in
                [format!("ended by {name}"), format!("Look at {to}"), format!("remove {state}/{VM}.json")]
            {
                assert!(error.contains(&part), "{name} {who}: {error}");
            }
            assert!(!error.contains("it is paused here"), "{name} {who}: {error}");
        }
        let left = run(&["status", "--state-dir", &state]);
        assert_eq!(left.status.code(), Some(4), "{left:?}");
    }
}

/// A `vm` whose process ends has said how its session ended, and need not be there to be asked.
#[test]
fn whoever_follows_a_session_knows_its_end_from_the_event_when_the_vm_ends_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    vm.begin("tcp:127.0.0.1:1", Value::Null);
    let ended = vm.ended();
    let attempt = "00112233445566778899aabbccddeeff";
    let document = |status: &str, error: Value| {
        let mut document = ended.clone();
        (document["status"], document["error"]) = (json!(status), error);
        (document["attempt"], document["failure"]) = (json!(attempt), Value::Null);
        document
    };
    let mut active = vm.query("query");
    active["migration"] = document("active", Value::Null);
    let event = |data: Value| json!({"event": "MIGRATION", "timestamp": {"seconds": 1, "microseconds": 0}, "data": data});
    // The one before is told late, and is not taken for this one.
    let told = [event(ended.clone()), event(document("cancelled", json!("the process ends by SIGTERM")))];
    let save = dir.path().join("x").display().to_string();
    for verb in ["migrate", "save"] {
        // Told before it is asked, and while it is.
        for asked in [2, 3] {
            let path = dir.path().join(format!("{verb}{asked}"));
            let listener = UnixListener::bind(&path).unwrap();
            let (active, told) = (active.clone(), told.clone());
            let serving = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                writeln!(stream, "{}", json!({"vfio-migrate": {"version": "1"}})).unwrap();
                let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
                for answer in [json!({}), active].iter().take(asked) {
                    requests.next().unwrap().unwrap();
                    writeln!(stream, "{}", json!({"return": answer})).unwrap();
                }
                let [before, end] = told;
                if asked == 3 {
                    writeln!(stream, "{before}").unwrap();
                    requests.next().unwrap().unwrap();
                }
                writeln!(stream, "{end}").unwrap();
            });
            let words: &[&str] = match verb {
                "migrate" => &["migrate", "tcp:127.0.0.1:1"],
                _ => &["save", "-o", &save],
            };
            let output = run(&[words, &["--json", "--control", path.to_str().unwrap()]].concat());
            let said = String::from_utf8_lossy(&output.stdout);
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(output.status.code(), Some(1), "{verb} {asked}: {said}");
            let migration = &report["migration"];
            assert_eq!(
                (&migration["status"], &migration["attempt"], &migration["error"]),
                (&json!("cancelled"), &json!(attempt), &json!("the process ends by SIGTERM")),
                "{verb} {asked}: {said}"
            );
            assert_eq!(report["vm"]["status"], "shutdown", "{verb} {asked}: {said}");
            serving.join().unwrap();
        }
    }
}
