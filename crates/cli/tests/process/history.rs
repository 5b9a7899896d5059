//! What can be told of a migration afterwards: by the processes that took part, and without them.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Setup, creds, run, until};

const VM: &str = "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d43";

fn json_of(arguments: &[&str]) -> Value {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Each record in short: kind, direction, status.
fn short(history: &Value) -> Vec<String> {
    let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let records = history["records"].as_array().unwrap();
    let line = |record: &Value| {
        let migration = &record["migration"];
        format!("{} {} {}", word(&record["kind"]), word(&migration["direction"]), word(&migration["status"]))
    };
    records.iter().map(line).collect()
}

#[test]
fn a_day_of_sessions_is_told_without_any_vm() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let (here, there) = (here.to_str().unwrap(), there.to_str().unwrap());
    let of_source = ["--uuid", VM, "--state-dir", here];
    let source = Setup { vm_arguments: &of_source, ..Setup::new(dir.path(), "a") }.start();
    let of_destination = ["--state-dir", there, "--incoming", "tcp:127.0.0.1:0"];
    let destination = Setup { vm_arguments: &of_destination, ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    let control = source.control.to_str().unwrap();

    // Rehearsed, to nobody, cancelled, saved, moved.
    let rehearsed = run(&["rehearse", "--control", control, "--to", &destination.incoming()]);
    assert!(rehearsed.status.success(), "{rehearsed:?}");
    let nobody = format!("unix:{}", dir.path().join("nobody").display());
    let failed = source.migrate(&nobody, json!({}));
    assert_eq!(failed["status"], "failed", "{failed}");
    source.begin(&destination.incoming(), json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    source.call("migrate-cancel", Value::Null).unwrap();
    let cancelled = source.ended();
    assert_eq!(cancelled["status"], "cancelled", "{cancelled}");
    let phases = cancelled["phases"].as_array().unwrap();
    assert!(phases.iter().any(|time| time["phase"] == "P3" && time["name"] == "pre-copy"), "{cancelled}");
    assert!(phases.iter().all(|time| time["ms"].is_u64()), "{cancelled}");
    // People read its name.
    let text = String::from_utf8(run(&["status", "--control", control]).stdout).unwrap();
    assert!(text.contains("in pre-copy") && !text.contains("P3"), "{text}");
    for time in ["total-ms", "verify-ms", "downtime-limit-ms"] {
        assert!(cancelled[time].is_u64(), "{time}: {cancelled}");
    }
    let file = dir.path().join("guest").display().to_string();
    let saved = run(&["save", "--control", control, "-o", &file]);
    assert!(saved.status.success(), "{saved:?}");
    if destination.status() != "inmigrate" {
        destination.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    }
    let moved = source.migrate(&destination.incoming(), json!({}));
    assert_eq!(moved["status"], "completed", "{moved}");
    // What it came to there is written once the guest runs.
    until("the guest there", || (destination.status() == "running").then_some(()));
    drop((source, destination));

    let history = json_of(&["history", "--state-dir", here, "--json"]);
    let sessions = [
        "rehearsal outgoing rehearsed",
        "migration outgoing failed",
        "migration outgoing cancelled",
        "save outgoing completed",
        "migration outgoing completed",
    ];
    assert_eq!(short(&history), sessions, "{history}");
    assert_eq!(history["unreadable"], 0);
    let records = history["records"].as_array().unwrap();
    assert_eq!(records[1]["peer"], nobody.as_str(), "{history}");
    assert_eq!(records[3]["peer"], format!("file:{file}"), "{history}");
    for record in records {
        assert_eq!(record["vm"], VM);
        assert_eq!(record["attempt"].as_str().map(str::len), Some(32), "{record}");
        let (began, ended) = (record["began"].as_str().unwrap(), record["ended"].as_str().unwrap());
        assert!(began <= ended && began.ends_with('Z') && began.len() == 24, "{record}");
    }
    let last = &records[4];
    assert!(last["migration"]["downtime-ms"].is_u64(), "{last}");
    assert!(last["migration"]["expected-downtime-ms"].is_u64(), "{last}");
    assert_eq!(last["migration"]["downtime-limit-ms"], 10_000, "{last}");

    // The other side tells of the same attempts.
    let arrived = json_of(&["history", "--state-dir", there, "--vm", VM, "--json"]);
    let sessions =
        ["rehearsal incoming rehearsed", "migration incoming failed", "migration incoming completed"];
    let told = short(&arrived);
    assert_eq!(told.len(), 3, "{arrived}");
    assert_eq!((&told[0], &told[2]), (&sessions[0].to_owned(), &sessions[2].to_owned()), "{arrived}");
    let (ours, theirs) = (&history["records"], &arrived["records"]);
    for (ours, theirs) in [(&ours[0], &theirs[0]), (&ours[2], &theirs[1]), (&ours[4], &theirs[2])] {
        assert_eq!(ours["attempt"], theirs["attempt"]);
    }

    // For people, and only the last.
    let text = run(&["history", "--state-dir", here, "--last", "1"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("migration to tcp:127.0.0.1:") && text.contains("completed after"), "{text}");

    // Who owns it, without any vm.
    for (state, owner, side, word) in
        [(here, "elsewhere", "source", "released"), (there, "here", "destination", "owner")]
    {
        let status = json_of(&["status", "--state-dir", state, "--json"]);
        let vm = &status["vms"][0];
        assert_eq!(status["vms"].as_array().map(Vec::len), Some(1), "{status}");
        assert_eq!(
            (&vm["uuid"], &vm["owner"], &vm["epoch"]),
            (&json!(VM), &json!(owner), &json!(1)),
            "{status}"
        );
        assert_eq!(vm[side]["state"], word, "{status}");
        assert_eq!(vm[side]["attempt"], last["attempt"], "{status}");
        assert_eq!(vm["last"]["attempt"], last["attempt"], "{status}");
        assert_eq!(vm["process"], false, "{status}");
        assert!(vm[side]["began"].as_str() <= vm[side]["written"].as_str(), "{status}");
        let text = run(&["status", "--state-dir", state]);
        assert!(String::from_utf8(text.stdout).unwrap().contains(VM));
    }
}

#[test]
fn a_guest_that_ended_in_a_file_is_found_by_the_journal_and_its_way_back_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("guest"));
    let (state, file) = (state.to_str().unwrap(), file.to_str().unwrap());
    let of_vm = ["--uuid", VM, "--state-dir", state];
    let vm = Setup { vm_arguments: &of_vm, ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let running = json_of(&["status", "--state-dir", state, "--json"]);
    let known = &running["vms"][0];
    assert_eq!(
        (&known["uuid"], &known["process"], &known["owner"]),
        (&json!(VM), &json!(true), &json!("unknown"))
    );
    let saved = run(&["save", "--control", vm.control.to_str().unwrap(), "-o", file, "--stop"]);
    assert!(saved.status.success(), "{saved:?}");
    drop(vm);
    let status = json_of(&["status", "--state-dir", state, "--json"]);
    assert_eq!(status["vms"][0]["owner"], "elsewhere", "{status}");
    assert_eq!(status["vms"][0]["peer"], format!("file:{file}"), "{status}");
    let refused = run(&["vm", "--memory", "64M", "--uuid", VM, "--state-dir", state]);
    let stderr = String::from_utf8(refused.stderr).unwrap();
    assert!(stderr.contains(file) && stderr.contains("--restore"), "{stderr}");

    let restore = [&of_vm[..], &["--restore", file]].concat();
    let back = Setup { vm_arguments: &restore, ..Setup::new(dir.path(), "b") }.start();
    let status = json_of(&["status", "--state-dir", state, "--json"]);
    assert_eq!((&status["vms"][0]["owner"], &status["vms"][0]["process"]), (&json!("here"), &json!(true)));
    drop(back);
    let history = json_of(&["history", "--state-dir", state, "--json"]);
    assert_eq!(short(&history), ["save outgoing completed", "restore incoming completed"], "{history}");
    assert_eq!(history["records"][1]["peer"], format!("file:{file}"), "{history}");
}

#[test]
fn a_history_that_cannot_be_written_is_said_and_fails_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    // No file can be appended to by this name.
    std::fs::create_dir_all(state.join("history.jsonl")).unwrap();
    let of_vm = ["--state-dir", state.to_str().unwrap()];
    let source = Setup { vm_arguments: &of_vm, ..Setup::new(dir.path(), "a") }.start();
    let incoming = ["--incoming", "tcp:127.0.0.1:0"];
    let destination = Setup { vm_arguments: &incoming, ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    let moved = source.migrate(&destination.incoming(), json!({}));
    assert_eq!(moved["status"], "completed", "{moved}");
}

#[test]
fn each_session_is_a_line_at_its_beginning_and_one_at_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("dev.sock").display().to_string();
    let mut device = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
        .args(["device", "--socket", &socket, "--state-size", "4M", "--exit-with-stdin"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("the device", || std::path::Path::new(&socket).exists().then_some(()));
    let control = dir.path().join("a.control").display().to_string();
    let named = format!("vfio-user:{socket},id=dev0");
    let mut source = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
        .args(["vm", "--memory", "64M", "--uuid", VM, "--device", &named, "--control", &control])
        .args(["--tls-creds", creds(), "--exit-with-stdin"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let incoming = ["--incoming", "tcp:127.0.0.1:0"];
    let destination = Setup { vm_arguments: &incoming, ..Setup::new(dir.path(), "b") }.start();
    until("the vm", || run(&["status", "--control", &control]).status.success().then_some(()));
    let nobody = format!("unix:{}", dir.path().join("nobody").display());
    assert_eq!(run(&["migrate", "--control", &control, &nobody]).status.code(), Some(1));
    let moved = run(&["migrate", "--control", &control, "--downtime-limit", "10s", &destination.incoming()]);
    assert!(moved.status.success(), "{moved:?}");
    drop((source.stdin.take(), device.stdin.take()));
    let said = |output: std::process::Output| String::from_utf8(output.stderr).unwrap();
    let (source, device) =
        (said(source.wait_with_output().unwrap()), said(device.wait_with_output().unwrap()));
    for part in [
        format!("migration of VM {VM} to {nobody}: failed after"),
        format!("migration of VM {VM} to tcp:127.0.0.1:"),
        "begins (attempt ".into(),
        "completed after".into(),
        ", downtime ".into(),
    ] {
        assert!(source.contains(&part), "{part}: {source}");
    }
    for part in ["saving begins, with the device running", "saving ended: "] {
        assert!(device.contains(part), "{part}: {device}");
    }
}

/// A guest that ended with its process is not "here as it was before", in no history.
#[test]
fn a_source_whose_process_ends_is_told_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let state = |name: &str| dir.path().join(name).display().to_string();
    let (here, there) = (state("here"), state("there"));
    let of_source = ["--uuid", VM, "--state-dir", &here];
    let source = Setup { vm_arguments: &of_source, devices: 0, ..Setup::new(dir.path(), "a") }.start();
    let of_destination = ["--state-dir", &there, "--incoming", "tcp:127.0.0.1:0"];
    let destination = Setup { vm_arguments: &of_destination, devices: 0, ..Setup::new(dir.path(), "b") };
    let destination = destination.start();
    source.begin(&destination.incoming(), json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    // Its stdin is closed, which ends it as a signal does.
    drop(source);
    until("the end of the session there", || destination.query("query")["migration"].is_null().then_some(()));
    for state in [&here, &there] {
        let history = json_of(&["history", "--state-dir", state, "--json"]);
        let last = &history["records"].as_array().unwrap().last().unwrap()["migration"];
        let error = last["error"].as_str().unwrap();
        assert_eq!(last["status"], "cancelled", "{last}");
        assert!(
            error.contains("the process of the source ends by the end of its stdin, and the guest with it"),
            "{error}"
        );
        assert!(!error.contains("as it was before") && !error.contains("operator"), "{error}");
    }
}
