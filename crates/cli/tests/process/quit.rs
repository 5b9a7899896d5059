//! What `quit` ends, and what only `quit --force` does.

use serde_json::{Value, json};

use crate::support::{Vm, control, fails, run, software, until};

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
