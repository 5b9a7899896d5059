//! The main job: `demo` completes with nothing lost, in every shape that README names.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process_group};

use crate::support::{command, demo};

fn assert_verified(arguments: &[&str]) -> serde_json::Value {
    let (exit, report) = demo(arguments);
    assert_eq!(exit, 0, "{report}");
    assert_eq!(report["outcome"], "completed");
    assert_eq!(report["verified"], true);
    assert_eq!(report["caught_by"], serde_json::Value::Null);
    for kind in ["pages", "dma_blocks", "interrupts"] {
        assert_eq!(report["lost"][kind], 0, "{kind}");
        assert!(report["checked"][kind].as_u64().unwrap() > 0, "{kind}");
    }
    assert_eq!(report["ram_digest_match"], true);
    assert_eq!(report["device_digest_match"], true);
    let names: Vec<&str> =
        report["phases"].as_array().unwrap().iter().map(|phase| phase["phase"].as_str().unwrap()).collect();
    assert_eq!(names, ["P0", "P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9"]);
    report
}

#[test]
fn completes_with_the_defaults_in_separate_processes() {
    let report = assert_verified(&[]);
    let pids = &report["pids"];
    let mut all = vec![pids["source"].as_u64().unwrap(), pids["destination"].as_u64().unwrap()];
    all.extend(pids["devices"].as_array().unwrap().iter().map(|pid| pid.as_u64().unwrap()));
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 4, "source, destination and two device servers");
    for pid in all {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left behind");
    }
    // Certificates that are gone with it.
    assert_eq!(report["throwaway_certificates"], true);
    assert_eq!(report["security"]["kind"], "tls", "{report}");
    assert_eq!(report["security"]["peer"]["names"][0], "destination", "{report}");
    let downtime = report["downtime_ms"].as_u64().expect("whole milliseconds");
    assert!(downtime > 0 && downtime <= 10_000, "downtime {downtime} ms");
    let bytes = &report["bytes"];
    assert!(bytes["device_precopy"].as_u64().unwrap() >= 64 << 20, "the state moved while the guest ran");
    assert!(report["iterations"].as_u64().unwrap() >= 1);
}

#[test]
fn completes_with_three_devices() {
    assert_verified(&["--devices", "3", "--memory", "256M", "--device-state", "16M"]);
}

#[test]
fn completes_without_precopy() {
    let report = assert_verified(&["--no-precopy", "--memory", "256M", "--device-state", "16M"]);
    assert_eq!(report["bytes"]["device_precopy"], 0);
    assert!(report["bytes"]["device_stopcopy"].as_u64().unwrap() >= 16 << 20);
}

#[test]
fn completes_over_a_unix_socket() {
    let report = assert_verified(&["--transport", "unix", "--memory", "256M"]);
    assert_eq!(report["throwaway_certificates"], false);
    assert_eq!(report["security"]["kind"], "unix", "{report}");
}

#[test]
fn completes_with_a_gigabyte_of_device_state() {
    let report = assert_verified(&["--device-state", "1G", "--memory", "256M"]);
    // Said in bytes, not in time: all of it goes ahead while the guest runs, and little of it again.
    let bytes = |part: &str| report["bytes"][part].as_u64().unwrap();
    assert!(bytes("device_precopy") >= 1 << 30, "{report}");
    assert!(bytes("device_stopcopy") <= 64 << 20, "{report}");
}

#[test]
fn completes_with_the_software_guest() {
    let report = assert_verified(&["--software", "--memory", "128M", "--dirty-rate", "10M"]);
    assert_eq!(report["guest"], "software");
}

#[test]
fn a_limit_that_cannot_be_kept_leaves_the_guest_at_the_source() {
    // 256 MiB of state that can only be saved while stopped do not fit into 5 ms.
    let (exit, report) =
        demo(&["--no-precopy", "--device-state", "256M", "--memory", "128M", "--downtime-limit", "5ms"]);
    assert_eq!(exit, 3);
    assert_eq!(report["outcome"], "aborted", "{report}");
    assert_eq!(report["verified"], false);
    assert_eq!(report["lost"]["pages"], 0);
    let error = report["error"].as_str().unwrap();
    assert!(error.contains("dev0"), "it names what is too big: {error}");
}

#[test]
fn many_devices_leave_without_a_word() {
    let arguments =
        ["--devices", "16", "--memory", "192M", "--device-state", "64K", "--device-dirty-rate", "0"];
    let output = command(&["demo", "--json", "--software", "--dirty-rate", "0", "--downtime-limit", "60s"])
        .args(arguments)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    // What the VMs and the device servers have to say in between, and nothing of how they end.
    assert!(!stderr.contains("WARN") && !stderr.contains("ERROR"), "{stderr}");
}

#[test]
fn a_signal_for_the_terminal_ends_a_demo_in_order() {
    let sizes = ["--memory", "192M", "--device-state", "64K"];
    let mut demo = command(&["demo", "--json", "--software", "--devices", "3"])
        .args(sizes)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut messages = BufReader::new(demo.stderr.take().unwrap()).lines().map(Result::unwrap);
    let mut said: Vec<String> = Vec::new();
    // The last that is started: from here on there is something to end.
    for line in messages.by_ref() {
        let waits = line.contains("waits for a guest");
        said.push(line);
        if waits {
            break;
        }
    }
    kill_process_group(Pid::from_child(&demo), Signal::INT).unwrap();
    said.extend(messages);
    let said = said.join("\n");
    let output = demo.wait_with_output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (output.status.code(), &report["error"]),
        (Some(1), &"interrupted by SIGINT".into()),
        "{said}"
    );
    assert!(!said.contains("lost") && !said.contains("WARN"), "{said}");
    let pids = &report["pids"];
    let devices = pids["devices"].as_array().unwrap().iter();
    for pid in devices.chain([&pids["source"], &pids["destination"]]) {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left behind");
    }
}
