//! A guest into a file and back, through the command.

use crate::support::{Setup, run};

const UUID: &[&str] = &["--uuid", "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d42"];

#[test]
fn a_saved_guest_comes_back_whole_and_only_once() {
    let dir = tempfile::tempdir().unwrap();
    let (state, file) = (dir.path().join("state"), dir.path().join("guest"));
    let (state, file) = (state.to_str().unwrap(), file.to_str().unwrap());
    let of_vm = [UUID, &["--state-dir", state]].concat();
    let vm = Setup { vm_arguments: &of_vm, ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let control = vm.control.to_str().unwrap();
    let output = run(&["save", "--control", control, "-o", file, "--verify", "--json"]);
    assert!(output.status.success(), "{output:?}");
    vm.assert_runs();
    let again = run(&["save", "--control", control, "-o", file]);
    assert_eq!(again.status.code(), Some(1), "it overwrote a file");
    let output = run(&["save", "--control", control, "-o", file, "--force", "--stop", "--verify"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(vm.status(), "postmigrate");
    let restore = [&of_vm[..], &["--restore", file]].concat();
    let back = Setup { vm_arguments: &restore, ..Setup::new(dir.path(), "b") }.start();
    back.assert_whole();
    drop(back);
    let twice = run(&["vm", "--memory", "64M", "--restore", file, "--state-dir", state]);
    assert_eq!(twice.status.code(), Some(3), "{twice:?}");
}

#[test]
fn a_guest_is_restored_paused_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let (file, control) = (dir.path().join("guest"), vm.control.to_str().unwrap().to_owned());
    let file = file.to_str().unwrap();
    let saved = run(&["save", "--control", &control, "-o", file, "--stop"]);
    assert!(saved.status.success(), "{saved:?}");
    let restore = [UUID, &["--restore", file, "--paused"]].concat();
    let back = Setup { vm_arguments: &restore, ..Setup::new(dir.path(), "b") }.start();
    assert_eq!(back.status(), "paused");
    let last = back.query("query")["last"].take();
    assert_eq!((&last["status"], &last["direction"]), (&"completed".into(), &"incoming".into()), "{last}");
    let loops = back.counter("loops");
    assert_eq!(back.counter("loops"), loops, "it runs");
    back.call("cont", serde_json::Value::Null).unwrap();
    back.assert_whole();
}

#[test]
fn a_save_tells_how_long_the_guest_was_paused() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let (file, control) = (dir.path().join("guest"), vm.control.to_str().unwrap());
    let saved = run(&["save", "--control", control, "-o", file.to_str().unwrap(), "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&saved.stdout).unwrap();
    assert_eq!(report["vm"]["status"], "running", "{report}");
    assert!(report["migration"]["downtime-ms"].as_u64().is_some_and(|stood| stood > 0), "{report}");
}
