//! What a session was for is what is told of it, at both sides and afterwards: a migration, a rehearsal, a save, a restore.

use serde_json::{Value, json};

use crate::support::{PATIENCE, Setup, Vm, run, software, until};

const VM: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0011";

/// The latest record of the history in `state`.
fn last_record(state: &str) -> Value {
    let output = run(&["history", "--state-dir", state, "--json"]);
    let history: Value = serde_json::from_slice(&output.stdout).unwrap();
    history["records"].as_array().unwrap().last().unwrap().clone()
}

/// A rehearsal that stands in its setup phase, at a receiver that `cancels` it, or has it cancelled, says so as one.
fn cancelled(cancels: impl FnOnce(&Vm, &Vm)) {
    let dir = tempfile::tempdir().unwrap();
    let states = ["here", "there"].map(|name| dir.path().join(name).display().to_string());
    let device_arguments = &["--state-size", "4M", "--fault", "hang-arc:RUNNING:PRE_COPY:4000"];
    let vm_arguments = &["--uuid", VM, "--state-dir", &states[0]];
    let source = Setup { device_arguments, vm_arguments, ..Setup::new(dir.path(), "a") }.start();
    source.warm();
    let vm_arguments = &["--state-dir", &states[1], "--incoming", "tcp:127.0.0.1:0"];
    let there = Setup { vm_arguments, ..Setup::new(dir.path(), "b") }.start();
    let to = there.incoming();
    let events = there.events();
    source.call("rehearse", json!({"uri": to})).unwrap();
    until("the device to be waited for", || {
        let waits = source.migration()["waits-for"].as_array()?.is_empty();
        (!waits && !there.query("query")["migration"].is_null()).then_some(())
    });
    cancels(&source, &there);
    let last = until("its end", || Some(there.query("query")["last"].take()).filter(|last| !last.is_null()));
    let event = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok())
        .find(|event| event["event"] == "MIGRATION" && event["data"]["status"] == "cancelled");
    let record = last_record(&states[1]);
    assert_eq!(record["kind"], "rehearsal", "{record}");
    for told in [&last, &event.expect("an event")["data"], &record["migration"]] {
        assert_eq!(told["status"], "cancelled", "{told}");
        let error = told["error"].as_str().unwrap();
        assert!(error.contains("rehearsal") && !error.contains("migration"), "{error}");
    }
}

#[test]
fn a_rehearsal_that_is_cancelled_is_told_as_one_at_its_receiver() {
    cancelled(|_, there| drop(there.call("migrate-cancel", Value::Null).unwrap()));
    cancelled(|source, _| drop(source.call("migrate-cancel", Value::Null).unwrap()));
}

#[test]
fn a_restore_that_is_refused_is_told_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state").display().to_string(), dir.path().join("saved"));
    let file = file.to_str().unwrap();
    let named = ["--software", "--uuid", VM, "--state-dir", &state];
    let vm = software(dir.path(), "a", &named).start();
    vm.assert_runs();
    vm.call("save", json!({"path": file, "stop": true})).unwrap();
    assert_eq!(vm.ended()["status"], "completed", "{}", vm.migration());
    drop(vm);
    // Both have it of one moment.
    let journal = std::fs::read_to_string(dir.path().join("state").join(format!("{VM}.json"))).unwrap();
    let journal: Value = serde_json::from_str(&journal).unwrap();
    assert_eq!(journal["source-note"]["began"], last_record(&state)["began"], "{journal}");
    let restored = ["--software", "--state-dir", &state, "--restore", file];
    let mut vm = software(dir.path(), "b", &restored).start();
    vm.call("quit", json!({"force": true})).unwrap();
    vm.process.child.wait().unwrap();
    // It has been restored, and has run since: what is in the file is older.
    let output = run(&[&["vm"][..], &restored].concat());
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{told}");
    assert!(told.contains("the restore was refused") && !told.contains("migration was"), "{told}");
    let record = last_record(&state);
    assert_eq!((&record["kind"], &record["migration"]["status"]), (&json!("restore"), &json!("failed")));
    let error = record["migration"]["error"].as_str().unwrap();
    assert!(error.starts_with("the restore was refused"), "{error}");
}
