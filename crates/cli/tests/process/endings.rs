//! How a migration ended, as everybody is told: the exit code, JSON, text, `status` of both sides, events, and the guest itself.

use serde_json::{Value, json};

use crate::support::{Process, Setup, Vm, command, run, until};

const UUID: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0001";

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

/// A source, and a destination whose device has this fault.
fn pair(dir: &std::path::Path, faults: [&[&str]; 2]) -> (Vm, Vm) {
    let [here, there] = faults.map(|faults| [&["--state-size", "4M"], faults].concat());
    let source = Setup { device_arguments: &here, vm_arguments: &["--uuid", UUID], ..Setup::new(dir, "a") };
    let destination = Setup {
        device_arguments: &there,
        vm_arguments: &["--uuid", UUID, "--incoming", "tcp:127.0.0.1:0"],
        ..Setup::new(dir, "b")
    };
    (source.start(), destination.start())
}

/// `migrate --json`: exit code, what it printed on stdout and on stderr.
fn migrate(source: &Vm, to: &str) -> (Option<i32>, Value, String) {
    let limit = ["--downtime-limit", "10s"];
    let words = [&["migrate", "--json", "--control", text(&source.control)][..], &limit, &[to]].concat();
    let output = run(&words);
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code(), report, String::from_utf8(output.stderr).unwrap())
}

/// No vCPU runs: the guest's count of its loops stays.
fn assert_stands(vm: &Vm) {
    let before = vm.counter("loops");
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(vm.counter("loops"), before, "the guest runs");
}

/// Without a `vm` to ask: until the guest was started after all.
#[test]
fn a_state_directory_says_that_a_guest_could_not_be_started() {
    let dir = tempfile::tempdir().unwrap();
    let states = ["here", "there"].map(|name| dir.path().join(name).display().to_string());
    let of_source = ["--uuid", UUID, "--state-dir", &states[0]];
    let size = ["--state-size", "4M"];
    let source = Setup { device_arguments: &size, vm_arguments: &of_source, ..Setup::new(dir.path(), "a") };
    let source = source.start();
    let of_receiver = ["--uuid", UUID, "--state-dir", &states[1], "--incoming", "tcp:127.0.0.1:0"];
    let receiver = Setup {
        device_arguments: &[&size[..], &["--fault", "fail-arc:RUNNING_P2P:RUNNING:EIO:1"]].concat(),
        vm_arguments: &of_receiver,
        ..Setup::new(dir.path(), "b")
    };
    let receiver = receiver.start();
    source.warm();
    assert_eq!(migrate(&source, &receiver.incoming()).0, Some(5));
    let exit = |state: &str| run(&["status", "--state-dir", state]).status.code();
    until("the receiver's record", || (exit(&states[1]) == Some(5)).then_some(()));
    assert_eq!(exit(&states[0]), Some(5), "the source's");
    receiver.call("cont", Value::Null).unwrap();
    until("the record of the start", || (exit(&states[1]) == Some(0)).then_some(()));
}

#[test]
fn a_guest_that_could_not_be_started_is_no_success() {
    for (fault, arc, errno) in [
        ("fail-arc:RUNNING_P2P:RUNNING:EIO:1", ("RUNNING_P2P", "RUNNING"), Some(5)),
        ("fail-arc:STOP:RUNNING_P2P:EBUSY:1", ("STOP", "RUNNING_P2P"), Some(16)),
        ("error-arc:RUNNING_P2P:RUNNING", ("RUNNING_P2P", "RUNNING"), Some(5)),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (source, destination) = pair(dir.path(), [&[], &["--fault", fault]]);
        source.warm();
        let events = source.events();
        let (exit, report, said) = migrate(&source, &destination.incoming());
        assert_eq!(exit, Some(5), "{fault}: {report}");
        let told = &report["migration"];
        assert_eq!(
            (&told["status"], &told["guest"]),
            (&json!("not-started"), &json!("not-started")),
            "{told}"
        );
        assert_eq!(told["downtime-ms"], Value::Null, "the guest does not run yet: {told}");
        let failure = &told["failure"];
        assert_eq!(
            (&failure["side"], &failure["phase"], &failure["device"], &failure["errno"]),
            (&json!("destination"), &json!("P8"), &json!("dev0"), &json!(errno)),
            "{told}"
        );
        assert_eq!(failure["arc"], json!({"from": arc.0, "to": arc.1}), "{told}");
        let error = told["error"].as_str().unwrap();
        assert!(error.contains("dev0") && error.contains("could not start it"), "{error}");
        assert!(said.contains(error), "why is on stderr too: {said}");
        // Both sides, the event and the guests say the same.
        assert_eq!(source.query("query")["last"]["status"], "not-started");
        let end = std::iter::from_fn(|| events.recv_timeout(crate::support::PATIENCE).ok())
            .find(|event| event["event"] == "MIGRATION" && event["data"]["status"] != "active")
            .unwrap();
        assert_eq!((&end["data"]["status"], &end["data"]["failure"]), (&json!("not-started"), failure));
        assert_eq!(source.status(), "postmigrate");
        let there = until("the destination's end", || {
            Some(destination.query("query")["last"].take()).filter(|last| !last.is_null())
        });
        assert_eq!((&there["status"], &there["failure"]), (&json!("not-started"), failure), "{there}");
        assert_eq!(destination.status(), "paused");
        assert_stands(&destination);
        // Its operator can try again, where the device can.
        if fault.starts_with("fail-arc") {
            destination.call("cont", Value::Null).unwrap();
            assert_eq!(destination.status(), "running");
            // Not `assert_whole`: an interrupt that was due while it was held is late by the guest's clock.
            destination.assert_runs();
            let posted = destination.counter("least-posted");
            until("blocks of the device", || {
                (destination.counter("least-posted") > posted + 20).then_some(())
            });
            let guest = destination.guest();
            assert_eq!((&guest["pages-lost"], &guest["blocks-lost"]), (&json!(0), &json!(0)), "{guest}");
        }
    }
}

#[test]
fn what_was_left_undone_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = pair(dir.path(), [&["--fault", "fail-arc:STOP_COPY:STOP:EIO"], &[]]);
    source.warm();
    let (exit, report, said) = migrate(&source, &destination.incoming());
    let told = &report["migration"];
    assert_eq!((exit, &told["status"], &told["guest"]), (Some(0), &json!("completed"), &json!("running")));
    let undone = told["left-undone"].as_array().unwrap();
    assert_eq!((undone.len(), &undone[0]["device"]), (1, &json!("dev0")), "{told}");
    assert!(said.contains("left undone") && said.contains("dev0"), "{said}");
    assert!(told["downtime-ms"].as_f64() > Some(0.0), "{told}");
    destination.assert_whole();
}

#[test]
fn a_guest_that_never_moved_is_not_said_to_have_left() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Setup::new(dir.path(), "a").start();
    source.warm();
    let pid = rustix::process::Pid::from_raw(source.process.pid().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    // The process takes a moment to end: what it says meanwhile is what is so.
    let seen = until("the end", || match source.try_call("query", Value::Null) {
        Some(Ok(report)) => (report["vm"]["status"] != "running").then(|| report["vm"]["status"].clone()),
        _ => Some(Value::Null),
    });
    assert!(seen.is_null() || seen == "shutdown", "{seen}");
    source.process.child.wait().unwrap();
}

#[test]
fn why_it_failed_is_on_stderr_and_the_text_says_where_the_guest_is() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup::new(dir.path(), "a").start();
    source.warm();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = command(&["migrate", "--control", text(&source.control), &format!("tcp:{nobody}")]);
    let output = { output }.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains(&nobody.to_string()) && said.contains("refused"), "{said}");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("running") && printed.contains("failed"), "{printed}");
}

/// Some of the sweep in `src/vm/fault_sweep`, by real processes: also the faults that end the device's own.
#[test]
fn what_is_said_of_a_fault_is_what_is() {
    // The fault at the source, at the destination, how it ends, and the exit code.
    let cases: [(&[&str], &[&str], &str, i32); 7] = [
        (&["fail-arc:RUNNING:PRE_COPY:EIO"], &[], "failed", 1),
        (&["error-arc:PRE_COPY_P2P:STOP_COPY"], &[], "failed", 1),
        (&["die-in-read:100000"], &[], "failed", 1),
        (&["enodev-mid-stream:100000"], &[], "failed", 1),
        (&[], &["error-arc:RESUMING:STOP"], "failed", 1),
        (&[], &["hang-arc:RESUMING:STOP:200"], "completed", 0),
        (&["wrong-size-estimate:1000"], &["short-read:4096"], "completed", 0),
    ];
    for (here, there, status, exit) in cases {
        let dir = tempfile::tempdir().unwrap();
        let words = |faults: &[&'static str]| -> Vec<&str> {
            faults.iter().flat_map(|fault| ["--fault", *fault]).collect()
        };
        let (source, destination) = pair(dir.path(), [&words(here), &words(there)]);
        source.warm();
        let (code, report, said) = migrate(&source, &destination.incoming());
        let told = &report["migration"];
        let case = format!("{here:?} {there:?}: {told}\n{said}");
        assert_eq!((code, told["status"].as_str()), (Some(exit), Some(status)), "{case}");
        assert_eq!(source.query("query")["last"]["status"], status, "{case}");
        let theirs = until("the destination's end", || {
            Some(destination.query("query")["last"].take()).filter(|last| !last.is_null())
        });
        assert_eq!(theirs["status"], status, "{case}\n{theirs}");
        if exit == 0 {
            assert_eq!(
                (source.status(), destination.status()),
                ("postmigrate".into(), "running".into()),
                "{case}"
            );
            destination.assert_whole();
        } else {
            let error = told["error"].as_str().unwrap();
            assert!(said.contains(error) && error.contains("dev0"), "{case}");
            assert_eq!(
                (source.status(), destination.status()),
                ("running".into(), "inmigrate".into()),
                "{case}"
            );
            source.assert_runs();
        }
    }
}

/// A device takes longer than the guest may be paused: both sides tell that, of the same device, and nothing else later.
#[test]
fn a_device_that_outlasts_the_downtime_limit_is_one_cause_at_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = pair(dir.path(), [&["--fault", "hang-arc:PRE_COPY_P2P:STOP_COPY:3000"], &[]]);
    source.warm();
    let here = source.migrate(&destination.incoming(), json!({"downtime-limit": 1000}));
    let there = until("the destination's end", || {
        Some(destination.query("query")["last"].take()).filter(|last| !last.is_null())
    });
    assert_eq!((&here["status"], &there["status"]), (&json!("failed"), &json!("failed")), "{here} {there}");
    assert_eq!(here["failure"], there["failure"]);
    let failure = &here["failure"];
    assert_eq!((&failure["side"], &failure["device"]), (&json!("source"), &json!("dev0")), "{failure}");
    assert_eq!(failure["arc"], json!({"from": "PRE_COPY_P2P", "to": "STOP_COPY"}), "{failure}");
    source.assert_runs();
}

/// Each reason of a refusal is a line with its code, in the log as everywhere.
#[test]
fn a_refusal_is_told_in_the_log_by_the_lines_that_tell_it_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let said = dir.path().join("said");
    let (devices, words) =
        Setup { devices: 2, vm_arguments: &["--exit-with-stdin"], ..Setup::new(dir.path(), "a") }.prepare();
    let child = command(&words.iter().map(String::as_str).collect::<Vec<_>>())
        .stdin(std::process::Stdio::piped())
        .stderr(std::fs::File::create(&said).unwrap())
        .spawn()
        .unwrap();
    let source = Vm { process: Process::of(child), devices, control: dir.path().join("a.control") };
    until("the control socket", || source.try_call("query", Value::Null)).expect("query");
    let there = ["--incoming", "tcp:127.0.0.1:0"];
    let there = Setup { devices: 0, vm_arguments: &there, ..Setup::new(dir.path(), "b") }.start();
    let refused = source.migrate(&there.incoming(), json!({}));
    assert!(refused["reasons"].as_array().is_some_and(|reasons| reasons.len() > 1), "{refused}");
    let said = std::fs::read_to_string(&said).unwrap();
    let head: Vec<_> = said.lines().filter(|line| line.contains(": refused after")).collect();
    assert!(head.len() == 1 && head[0].ends_with("it was refused:"), "{said}");
    for reason in refused["reasons"].as_array().unwrap() {
        let told = format!("{} [{}]", reason["text"].as_str().unwrap(), reason["code"].as_str().unwrap());
        assert!(said.lines().any(|line| line.contains(" INFO ") && line.ends_with(&told)), "{told}: {said}");
    }
}
