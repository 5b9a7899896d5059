//! VMs moved by hand over their control sockets: again and again, paused, cancelled, killed.

use crate::support::{Process, Setup, run, until};
use serde_json::{Value, json};

const UUID: &[&str] = &["--uuid", "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d41"];

fn incoming() -> Vec<&'static str> {
    [UUID, &["--incoming", "tcp:127.0.0.1:0"]].concat()
}

#[test]
fn moves_to_and_fro_ten_times_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let mut here = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let mut there = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    here.warm();
    let mut first = None;
    for turn in 1..=10 {
        let info = here.migrate(&there.incoming(), json!({"verify": true}));
        assert_eq!(info["status"], "completed", "turn {turn}: {info}");
        assert_eq!(here.status(), "postmigrate");
        assert_eq!(there.info()["epoch"], turn, "each commit begins an epoch");
        there.assert_runs();
        here.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
        here.incoming();
        std::mem::swap(&mut here, &mut there);
        // Turn 2 is the first that finds both processes in the state every later even turn finds them in.
        if turn == 2 {
            first =
                Some([&here, &there].map(|vm| {
                    (vm.process.holdings(), vm.process.own_memory_kib(), vm.process.memory_files())
                }));
        }
    }
    here.assert_whole();
    for (vm, before) in [&here, &there].into_iter().zip(first.unwrap()) {
        // A control connection that was just closed takes a moment to go.
        until("as few descriptors and threads as before", || {
            let (descriptors, threads) = vm.process.holdings();
            (descriptors <= before.0.0 && threads <= before.0.1).then_some(())
        });
        let after = vm.process.own_memory_kib();
        assert!(after < before.1 + (16 << 10), "memory grew from {} to {after} KiB", before.1);
        assert!(vm.process.memory_files() <= before.2, "a memory file was left mapped");
    }
}

#[test]
fn a_paused_guest_arrives_paused() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let destination = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    source.call("stop", Value::Null).unwrap();
    let loops = source.counter("loops");
    let info = source.migrate(&destination.incoming(), json!({"verify": true}));
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(destination.status(), "paused");
    assert_eq!(destination.counter("loops"), loops, "it has not run");
    destination.call("cont", Value::Null).unwrap();
    destination.assert_whole();
}

#[test]
fn a_guest_paused_and_resumed_in_mid_migration_arrives_whole() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let destination = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    source.begin(&destination.incoming(), json!({"pause-before-switchover": true, "verify": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    for _ in 0..3 {
        source.call("stop", Value::Null).unwrap();
        assert_eq!(source.status(), "paused");
        source.call("cont", Value::Null).unwrap();
        source.assert_runs();
    }
    source.call("migrate-continue", Value::Null).unwrap();
    let info = source.ended();
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(destination.status(), "running");
    destination.assert_whole();
}

#[test]
fn a_cancelled_migration_leaves_the_guest_and_can_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let destination = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    source.begin(&destination.incoming(), json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    assert!(source.call("migrate", json!({"uri": "tcp:127.0.0.1:1"})).unwrap_err().contains("migrat"));
    source.call("migrate-cancel", Value::Null).unwrap();
    let info = source.ended();
    assert_eq!(info["status"], "cancelled", "{info}");
    assert_eq!(source.status(), "running");
    source.assert_whole();
    // The destination waits on, with a machine built anew.
    let info = source.migrate(&destination.incoming(), json!({"verify": true}));
    assert_eq!(info["status"], "completed", "{info}");
    destination.assert_whole();
}

#[test]
fn a_killed_destination_leaves_the_guest_running_at_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let mut destination = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    source.begin(&destination.incoming(), json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    destination.process.kill();
    let info = source.ended();
    assert_eq!(info["status"], "failed", "{info}");
    assert!(info["error"].as_str().is_some_and(|error| !error.is_empty()));
    assert_eq!(source.status(), "running");
    source.assert_whole();
}

#[test]
fn a_killed_device_server_at_the_destination_leaves_the_guest_at_the_source() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let mut destination = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    source.begin(&destination.incoming(), json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    destination.devices[0].kill();
    source.call("migrate-continue", Value::Null).ok();
    let info = source.ended();
    assert_eq!(info["status"], "failed", "{info}");
    assert!(info["error"].as_str().unwrap().contains("dev0"), "it names the device: {info}");
    assert_eq!(source.status(), "running");
    source.assert_whole();
}

#[test]
fn a_device_server_that_dies_under_a_running_guest_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = Setup { vm_arguments: UUID, devices: 2, ..Setup::new(dir.path(), "a") }.start();
    let destination = Setup { vm_arguments: &incoming(), devices: 2, ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    let events = source.events();
    assert_eq!(source.info()["lost-devices"], json!([]));
    source.devices[1].kill();
    let event = events.recv_timeout(crate::support::PATIENCE).expect("an event");
    assert_eq!(
        (&event["event"], &event["data"]["device"]),
        (&json!("DEVICE_LOST"), &json!("dev1")),
        "{event}"
    );
    // In whichever call it was noticed: it is gone, and not merely late.
    let why = event["data"]["why"].as_str().unwrap();
    assert!(!why.is_empty() && !why.contains("time limit"), "{event}");
    let status = source.info();
    assert_eq!(status["lost-devices"], json!(["dev1"]), "{status}");
    assert_eq!(status["status"], "running", "{status}");
    source.assert_runs();
    // A server that is started again knows nothing of what the guest did with the device.
    let socket = dir.path().join("a-dev1.sock");
    source.devices[1] =
        Process::start(&["device", "--socket", socket.to_str().unwrap(), "--state-size", "4M"]);
    until("the server to listen", || std::os::unix::net::UnixStream::connect(&socket).ok());
    source.assert_runs();
    assert_eq!(source.info()["lost-devices"], json!(["dev1"]));
    source.begin(&destination.incoming(), json!({}));
    let info = source.ended();
    assert_eq!(info["status"], "failed", "{info}");
    assert!(info["error"].as_str().unwrap().contains("dev1"), "it names the device: {info}");
    assert_eq!(destination.info()["lost-devices"], json!([]));
}

/// A device without pre-copy is not read while RAM is copied: nothing but the event can end that.
#[test]
fn a_device_server_that_dies_while_ram_is_copied_ends_the_migration() {
    let dir = tempfile::tempdir().unwrap();
    let device_arguments: &[&str] = &["--state-size", "4M", "--no-precopy"];
    let source = Setup { vm_arguments: UUID, device_arguments, ..Setup::new(dir.path(), "a") };
    let mut source = source.start();
    let destination = Setup { vm_arguments: &incoming(), device_arguments, ..Setup::new(dir.path(), "b") };
    let destination = destination.start();
    source.warm();
    source.begin(&destination.incoming(), json!({"max-bandwidth": 64 << 10}));
    until("RAM to be copied", || (source.migration()["transferred"]["ram"].as_u64() > Some(0)).then_some(()));
    source.devices[0].kill();
    let info = source.ended();
    assert_eq!(info["status"], "failed", "{info}");
    let error = info["error"].as_str().unwrap();
    assert!(error.contains("device dev0 was lost") && error.contains("at the source"), "{info}");
    // What is said of the guest is so: it was never paused, and is not now.
    assert!(error.contains("the guest is here, without device dev0") && !error.contains("paused"), "{info}");
    assert_eq!(source.status(), "running");
    source.assert_runs();
}

#[test]
fn busy_devices_starve_neither_the_timer_nor_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { devices: 2, ..Setup::new(dir.path(), "a") }.start();
    until("blocks", || (vm.counter("dma-blocks") > 4000).then_some(()));
    // By count and not by time: pages are written by the timer's ticks.
    assert!(vm.counter("pages-written") > 100, "{}", vm.guest());
    // The walk over the blocks comes round, and finds those of every flow.
    vm.assert_whole();
}

#[test]
fn limits_can_be_changed_while_it_runs() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let destination = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    // Slower than the guest dirties: it cannot converge.
    source.begin(&destination.incoming(), json!({"max-bandwidth": 1 << 20, "downtime-limit": 300}));
    until("pre-copy", || (source.migration()["phase"] == "P3").then_some(()));
    let refused = source.call("migrate-continue", Value::Null).unwrap_err();
    assert!(refused.contains("does not wait"), "{refused}");
    source
        .call("migrate-set-parameters", json!({"max-bandwidth": "none", "downtime-limit": 10_000}))
        .unwrap();
    let info = source.ended();
    assert_eq!(info["status"], "completed", "{info}");
    destination.assert_whole();
}

#[test]
fn a_vm_that_has_moved_or_may_have_is_not_started_here_again() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state").display().to_string();
    let uuid = UUID[1];
    let arguments = [UUID, &["--state-dir", &state]].concat();
    let mut source = Setup { vm_arguments: &arguments, ..Setup::new(dir.path(), "a") }.start();
    let destination = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    let info = source.migrate(&destination.incoming(), json!({}));
    assert_eq!(info["status"], "completed", "{info}");
    source.process.kill();
    let again = [&["vm", "--memory", "64M"], UUID, &["--state-dir", &state]].concat();
    let refused = run(&again);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("another host"), "{stderr}");
    // As a source leaves it that was killed between its journal and the answer.
    let journal = dir.path().join("state").join(format!("{uuid}.json"));
    let text = std::fs::read_to_string(&journal).unwrap();
    assert!(text.contains("released"), "{text}");
    std::fs::write(&journal, text.replace("released", "committing")).unwrap();
    let refused = run(&again);
    let stderr = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(4), "{stderr}");
    assert!(stderr.contains("undecided"), "{stderr}");
    let told = run(&["status", "--state-dir", &state]);
    let said = String::from_utf8_lossy(&told.stdout);
    assert_eq!(told.status.code(), Some(4), "{said}");
    for text in [&stderr, &said] {
        assert!(text.contains("Look at tcp:127.0.0.1:") && text.contains("then start `vm` again"), "{text}");
    }
    destination.assert_whole();
}

#[test]
fn two_vms_without_an_identity_move_as_readme_says() {
    let dir = tempfile::tempdir().unwrap();
    let destination =
        Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") }.start();
    let source = Setup::new(dir.path(), "a").start();
    let id = source.info()["uuid"].clone();
    assert_ne!(destination.info()["uuid"], id);
    source.warm();
    let control = source.control.display().to_string();
    let moved = run(&["migrate", "--control", &control, "--downtime-limit", "10s", &destination.incoming()]);
    assert_eq!(moved.status.code(), Some(0), "{}", String::from_utf8_lossy(&moved.stderr));
    assert_eq!(destination.info()["uuid"], id, "it took the guest's identity");
    destination.assert_whole();
    // And back, with the identity that it has.
    let control = source.control.display().to_string();
    assert_eq!(run(&["incoming", "--control", &control, "tcp:127.0.0.1:0"]).status.code(), Some(0));
    let info = destination.migrate(&source.incoming(), json!({}));
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(source.info()["uuid"], id);
    source.assert_whole();
}

#[test]
fn the_time_given_does_not_run_while_the_operator_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let destination = Setup { vm_arguments: &incoming(), ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    source.begin(&destination.incoming(), json!({"pause-before-switchover": true, "give-up-after": 20_000}));
    let waits = || (source.migration()["status"] == "pre-switchover").then(|| source.migration());
    let began = until("the switchover to wait", waits);
    // Half a minute of rounds would be hundreds at twenty each second.
    let ms = |info: &Value| info["total-ms"].as_f64().unwrap();
    let now = until("more time than was given", || {
        let now = source.migration();
        (ms(&now) > 22_000.0).then_some(now)
    });
    assert_eq!(now["status"], "pre-switchover", "{now}");
    let rounds = now["iterations"].as_u64().unwrap() - began["iterations"].as_u64().unwrap();
    assert!(rounds < 60, "{rounds} rounds while only the operator was waited for");
    source.call("migrate-continue", Value::Null).unwrap();
    let info = source.ended();
    assert_eq!(info["status"], "completed", "{info}");
    destination.assert_whole();
}

#[test]
fn a_guest_that_is_to_arrive_paused_does() {
    let dir = tempfile::tempdir().unwrap();
    for (round, asked_there) in [false, true].into_iter().enumerate() {
        let dir = dir.path().join(round.to_string());
        std::fs::create_dir(&dir).unwrap();
        let paused: &[&str] = if asked_there { &["--paused"] } else { &[] };
        let incoming = [&incoming()[..], paused].concat();
        let source = Setup { vm_arguments: UUID, ..Setup::new(&dir, "a") }.start();
        let destination = Setup { vm_arguments: &incoming, ..Setup::new(&dir, "b") }.start();
        source.warm();
        let more = if asked_there { json!({}) } else { json!({"suspend": true, "ram-crc": true}) };
        let info = source.migrate(&destination.incoming(), more);
        assert_eq!(info["status"], "completed", "{info}");
        assert_eq!(destination.status(), "paused");
        let loops = destination.counter("loops");
        assert_eq!(destination.counter("loops"), loops);
        destination.call("cont", Value::Null).unwrap();
        assert_eq!(destination.status(), "running");
        destination.assert_whole();
    }
}
