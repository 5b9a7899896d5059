//! What stands behind a device's place in `vm --device`.

use std::path::Path;
use std::process::Output;

use crate::support::{Process, Setup, Vm, control, creds, fails, run, until};
use serde_json::json;

const INCOMING: &[&str] = &["--incoming", "tcp:127.0.0.1:0"];

/// A `vm` whose devices have these options, each served with these arguments.
fn start(dir: &Path, name: &str, options: &[&str], device_arguments: &[&str], vm: &[&str]) -> Vm {
    let mut arguments = vec!["--uuid".to_owned(), "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d42".into()];
    let mut servers = Vec::new();
    for (number, options) in options.iter().enumerate() {
        let socket = dir.join(format!("{name}{number}.sock"));
        let path = socket.to_str().unwrap();
        let server = ["device", "--socket", path, "--state-size", "1M"];
        servers.push(Process::start(&[&server[..], device_arguments].concat()));
        until("the socket", || socket.exists().then_some(()));
        arguments.extend(["--device".into(), format!("vfio-user:{path},id=dev{number}{options}")]);
    }
    let words: Vec<&str> = arguments.iter().map(String::as_str).chain(vm.iter().copied()).collect();
    let mut vm = Setup { devices: 0, vm_arguments: &words, ..Setup::new(dir, name) }.start();
    vm.devices = servers;
    vm
}

#[test]
fn a_device_whose_pre_copy_is_broken_moves_without_it() {
    let broken = ["--fault", "fail-arc:RUNNING:PRE_COPY:EIO"];
    for (option, status) in [("", "failed"), (",pre-copy=on", "failed"), (",pre-copy=off", "completed")] {
        let dir = tempfile::tempdir().unwrap();
        let source = start(dir.path(), "a", &[option], &broken, &[]);
        let destination = start(dir.path(), "b", &[""], &broken, INCOMING);
        source.warm();
        let info = source.migrate(&destination.incoming(), json!({"verify": true}));
        assert_eq!(info["status"], status, "'{option}': {info}");
        if status == "completed" {
            destination.assert_whole();
        } else {
            assert!(info["error"].to_string().contains("RUNNING to PRE_COPY"), "{info}");
        }
    }
}

#[test]
fn a_device_is_in_the_slot_that_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let source = start(dir.path(), "a", &["", ",slot=1", ",slot=31"], &[], &[]);
    // By another way to the same three slots.
    let destination = start(dir.path(), "b", &[",slot=2", "", ",slot=31"], &[], INCOMING);
    source.warm();
    let info = source.migrate(&destination.incoming(), json!({"verify": true}));
    assert_eq!(info["status"], "completed", "{info}");
    destination.assert_whole();
}

#[test]
fn a_device_that_the_guest_would_find_in_another_slot_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = start(dir.path(), "a", &["", ""], &[], &[]);
    source.warm();
    // The first as it would be by another order of its devices; the second is where the guest has it.
    let destination = start(dir.path(), "b", &[",slot=3", ",slot=2"], &[], INCOMING);
    let (from, to) = (format!("vm:{}", control(&source)), destination.incoming());
    let told = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    let check = run(&["check", &from, &to, "--tls-creds", creds()]);
    assert_eq!(check.status.code(), Some(3), "{check:?}");
    let rehearse = run(&["rehearse", "--control", control(&source), "--to", &to]);
    assert_eq!(rehearse.status.code(), Some(3), "{rehearse:?}");
    for output in [&check, &rehearse] {
        let text = told(output);
        assert!(
            text.contains("device dev0: the guest has it at 00:01.0") && text.contains("be at 00:03.0"),
            "{text}"
        );
        assert!(text.contains("[device-address]") && !text.contains("dev1"), "{text}");
    }
    let files =
        [("a.json", &from), ("b.json", &format!("vm:{}", control(&destination)))].map(|(name, vm)| {
            let file = dir.path().join(name).display().to_string();
            // What was refused had the machine there, which is built anew.
            until("its manifest", || run(&["describe", vm, "-o", &file]).status.success().then_some(()));
            file
        });
    let check = run(&["check", &files[0], &files[1], "--json"]);
    assert_eq!(check.status.code(), Some(3), "{check:?}");
    assert_eq!(told(&check).matches("device-address").count(), 1, "{check:?}");
    let info = source.migrate(&to, json!({}));
    assert_eq!(info["status"], "failed", "{info}");
    assert_eq!(info["reasons"][0]["code"], "device-address", "{info}");
    source.assert_runs();
}

#[test]
fn devices_in_another_order_move_when_each_is_given_its_slot() {
    let dir = tempfile::tempdir().unwrap();
    let source = start(dir.path(), "a", &["", ""], &[], &[]);
    source.warm();
    let map = json!({"dev0": "dev1", "dev1": "dev0"});
    let refused = start(dir.path(), "b", &["", ""], &[], INCOMING);
    let info = source.migrate(&refused.incoming(), json!({"device-map": map}));
    assert_eq!(info["status"], "failed", "{info}");
    assert_eq!(info["reasons"].to_string().matches("device-address").count(), 2, "{info}");
    let destination = start(dir.path(), "c", &[",slot=2", ",slot=1"], &[], INCOMING);
    let info = source.migrate(&destination.incoming(), json!({"device-map": map, "verify": true}));
    assert_eq!(info["status"], "completed", "{info}");
    destination.assert_whole();
}

#[test]
fn options_that_mean_nothing_are_told() {
    let vm = |device: &str, says: &str| fails(&["vm", "--memory", "64M", "--device", device], 2, says);
    vm("vfio-user:/x,id=a,addr=5", "no option addr");
    vm("vfio-user:/x,id=a,slot=32", "slot=32 is not 1 to 31");
    vm("vfio-user:/x,id=a,pre-copy=never", "neither on nor off");
    vm("mdev:83b8f4f2-509f-382f-3c1e-e6bfe0fa1001,id=a,vf-token=1", "no UUID");
    vm(
        "vfio-user:/x,id=a,vf-token=83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        "vf-token is for a PCI function, by its address",
    );
    let twice = ["vm", "--device", "vfio-user:/x,id=a,slot=4", "--device", "vfio-user:/y,id=b,slot=4"];
    fails(&twice, 2, "are both to be in slot 4");
    fails(&["save", "--device", "vfio-user:/x,slot=4", "-o", "/tmp/x.dev"], 2, "no slot");
}
