//! One question, one answer: what `check`, `rehearse` and `migrate` say of the same guest and the same receiver.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Setup, Vm, creds, run, until};

const UUID: &str = "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d47";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A `vm` whose state is kept in `state`.
fn vm(dir: &Path, name: &str, state: &Path, more: &[&str]) -> Vm {
    let arguments = [&["--uuid", UUID, "--state-dir", text(state)], more].concat();
    Setup { vm_arguments: &arguments, ..Setup::new(dir, name) }.start()
}

/// Exit code and stdout of a verb, which a message must be able to show.
fn asked(arguments: &[&str]) -> (Option<i32>, String) {
    let output = run(arguments);
    eprintln!("{arguments:?}: {output:?}");
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_guest_that_returns_is_told_the_same_by_check_rehearse_and_migrate() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let first = vm(dir.path(), "a", &here, &[]);
    let other = vm(dir.path(), "b", &there, &["--incoming", "tcp:127.0.0.1:0"]);
    first.warm();
    let gone = first.migrate(&other.incoming(), json!({"downtime-limit": 10_000}));
    assert_eq!(gone["status"], "completed", "{gone}");

    // To where it came from, and once more from there.
    let (mut left, mut source) = (first, other);
    for (name, state) in [("c", &here), ("d", &there)] {
        // Its process may end before the answer is read.
        drop(left.try_call("quit", Value::Null));
        drop(left);
        let receiver = vm(dir.path(), name, state, &["--incoming", "tcp:127.0.0.1:0"]);
        let (control, to) = (text(&source.control).to_owned(), receiver.incoming());
        let named = format!("vm:{control}");
        let (checked, said) =
            asked(&["check", "--tls-creds", creds(), "--live", "--timeout", "60s", &named, &to]);
        let (rehearsed, _) =
            asked(&["rehearse", "--control", &control, "--downtime-limit", "10s", "--to", &to]);
        let (moved, _) = asked(&["migrate", "--control", &control, "--downtime-limit", "10s", &to]);
        assert_eq!([checked, rehearsed, moved], [Some(0); 3], "{said}");
        receiver.assert_runs();
        (left, source) = (source, receiver);
    }
    source.assert_whole();
}

/// The records in a history, once there are `count`: a receiver writes its own when the source has its answer already.
fn records(state: &Path, count: usize) -> Vec<Value> {
    until("the records", || {
        let (exit, told) = asked(&["history", "--state-dir", text(state), "--json"]);
        assert_eq!(exit, Some(0));
        let history: Value = serde_json::from_str(&told).unwrap();
        Some(history["records"].as_array().unwrap().clone()).filter(|records| records.len() >= count)
    })
}

#[test]
fn a_file_names_no_vm_and_is_judged_by_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let source = vm(dir.path(), "a", &here, &[]);
    let receiver = vm(dir.path(), "b", &there, &["--incoming", "tcp:127.0.0.1:0"]);
    let manifest = dir.path().join("machine.json");
    let named = format!("vm:{}", text(&source.control));
    assert_eq!(asked(&["describe", &named, "-o", text(&manifest)]).0, Some(0));

    let (exit, said) = asked(&[
        "check",
        "--tls-creds",
        creds(),
        "--timeout",
        "60s",
        text(&manifest),
        &receiver.incoming(),
        "--json",
    ]);
    let report: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((exit, &report["verdict"]), (Some(0), &json!("live")), "{said}");
    // What does not fit is told all the same.
    let other = dir.path().join("other.json");
    let text_of = std::fs::read_to_string(&manifest).unwrap();
    let mut document: Value = serde_json::from_str(&text_of).unwrap();
    document["devices"][0]["id"] = json!("nic7");
    std::fs::write(&other, document.to_string()).unwrap();
    let (exit, said) = asked(&[
        "check",
        "--tls-creds",
        creds(),
        "--timeout",
        "60s",
        text(&other),
        &receiver.incoming(),
        "--json",
    ]);
    let report: Value = serde_json::from_str(&said).unwrap();
    let codes: Vec<&Value> = report["reasons"].as_array().unwrap().iter().map(|one| &one["code"]).collect();
    assert_eq!(exit, Some(3), "{said}");
    assert!(codes.contains(&&json!("device-missing")) && !codes.contains(&&json!("other-vm")), "{said}");

    // The receiver is who it was, and no VM was made up.
    assert_eq!(receiver.info()["uuid"], UUID);
    let told = records(&there, 2);
    let short: Vec<_> = told.iter().map(|record| (&record["kind"], &record["vm"])).collect();
    assert_eq!(short, [(&json!("check"), &Value::Null); 2], "{told:?}");
    let (exit, shown) = asked(&["history", "--state-dir", text(&there)]);
    assert!(exit == Some(0) && !shown.contains("VM ") && shown.contains("check from"), "{shown}");
    assert_eq!(asked(&["status", "--state-dir", text(&there)]).0, Some(0));
}

#[test]
fn a_rehearsal_that_is_refused_is_one_at_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let source = vm(dir.path(), "a", &here, &[]);
    let (control, named) = (text(&source.control), format!("vm:{}", text(&source.control)));
    let arguments = ["--uuid", UUID, "--state-dir", text(&there), "--incoming", "tcp:127.0.0.1:0"];
    let smaller = Setup { vm_arguments: &arguments, devices: 0, ..Setup::new(dir.path(), "b") }.start();
    let to = smaller.incoming();
    assert_eq!(asked(&["check", "--tls-creds", creds(), "--timeout", "60s", &named, &to]).0, Some(3));
    assert_eq!(asked(&["rehearse", "--control", control, "--to", &to]).0, Some(3));
    assert_eq!(asked(&["migrate", "--control", control, &to]).0, Some(3));
    let kinds =
        |state, count| records(state, count).iter().map(|record| record["kind"].clone()).collect::<Vec<_>>();
    assert_eq!(kinds(&here, 2), ["rehearsal", "migration"]);
    assert_eq!(kinds(&there, 3), ["check", "rehearsal", "migration"]);
}

#[test]
fn whoever_tells_of_a_refusal_names_its_codes() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let start = |name: &str, state: &Path, queues: &str, more: &[&str]| {
        let arguments = [&["--uuid", UUID, "--state-dir", text(state)], more].concat();
        let device = ["--state-size", "4M", "--param", queues];
        Setup { device_arguments: &device, vm_arguments: &arguments, ..Setup::new(dir.path(), name) }.start()
    };
    let source = start("a", &here, "queues=8", &[]);
    let receiver = start("b", &there, "queues=4", &["--incoming", "tcp:127.0.0.1:0"]);
    let (control, to) = (text(&source.control), receiver.incoming());
    let named = format!("vm:{control}");
    let told = |arguments: &[&str], exit: i32| {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    let checked = told(&["check", "--tls-creds", creds(), "--timeout", "60s", &named, &to], 3);
    let reason: Vec<&str> = checked.lines().filter(|line| line.contains("[device-parameter]")).collect();
    let [reason] = reason[..] else { panic!("{checked}") };
    let hint = "`vfio-migrate explain CODE` says what to do about each";
    // The same sentence everywhere, with its code, and what can be done with that.
    for (arguments, exit) in [
        (&["rehearse", "--control", control, "--to", &to][..], 3),
        (&["migrate", "--control", control, &to], 3),
        (&["status", "--control", control], 0),
        (&["status", "--control", text(&receiver.control)], 0),
        (&["history", "--state-dir", text(&here)], 0),
        (&["history", "--state-dir", text(&there)], 0),
    ] {
        // The receiver tells it when the source has its answer already.
        until("the reason", || {
            let told = told(arguments, exit);
            Some(()).filter(|()| told.contains(reason.trim()) && told.contains(hint))
        });
    }
    // And in one line, for programs and logs.
    let error = source.migration()["error"].as_str().unwrap().to_owned();
    assert!(error.contains("[device-parameter]") && !error.contains('\n'), "{error}");
    let theirs = receiver.migration()["error"].as_str().unwrap().to_owned();
    assert!(theirs.contains("[device-parameter]"), "{theirs}");
}

#[test]
fn many_questions_fill_neither_the_history_nor_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let source = vm(dir.path(), "a", &here, &[]);
    source.warm();
    let receiver = vm(dir.path(), "b", &there, &["--incoming", "tcp:127.0.0.1:0"]);
    let (named, to) = (format!("vm:{}", text(&source.control)), receiver.incoming());
    let begun = Instant::now();
    for _ in 0..25 {
        let (exit, said) = asked(&["check", "--tls-creds", creds(), "--timeout", "60s", &named, &to]);
        assert_eq!(exit, Some(0), "{said}");
    }
    let files: Vec<_> = std::fs::read_dir(&there).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert!(files.iter().all(|name| name.to_string_lossy().starts_with("history.jsonl")), "{files:?}");
    // What moves a guest is there, however many asked.
    let moved = source.migrate(&to, json!({"downtime-limit": 10_000}));
    assert_eq!(moved["status"], "completed", "{moved}");
    let kinds: Vec<_> = records(&there, 21).iter().map(|record| record["kind"].clone()).collect();
    let checks = kinds.iter().filter(|kind| **kind == "check").count();
    // Of each minute that it took.
    assert!(checks < 25 || begun.elapsed() > Duration::from_secs(60), "{kinds:?}");
    assert!(checks >= 20, "{kinds:?}");
    assert_eq!(kinds.last().unwrap(), "migration", "{kinds:?}");
}
