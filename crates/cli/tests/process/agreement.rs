//! One question, one answer: whatever keeps a guest from moving, `check`, `rehearse` and `migrate` say the same of it.

use std::path::Path;

use serde_json::Value;

use crate::support::{Setup, run, until};

/// What the three are asked about: options of the device at the source and at the destination, devices of each, the verdict, and
/// the codes of what stands against it.
struct Case {
    from: &'static [&'static str],
    to: &'static [&'static str],
    devices: usize,
    verdict: &'static str,
    codes: &'static [&'static str],
}

const fn case(
    from: &'static [&'static str],
    to: &'static [&'static str],
    devices: usize,
    verdict: &'static str,
    codes: &'static [&'static str],
) -> Case {
    Case { from, to, devices, verdict, codes }
}

/// Each option of `device` that changes what can move.
const CASES: [Case; 12] = [
    case(&[], &[], 1, "live", &[]),
    case(&["--no-precopy"], &["--no-precopy"], 1, "live", &[]),
    case(&["--no-precopy"], &[], 1, "live", &[]),
    case(&["--no-dirty-log"], &["--no-dirty-log"], 1, "snapshot-only", &["dirty-none"]),
    case(&[], &["--no-dirty-log"], 1, "live", &[]),
    case(&["--no-p2p"], &["--no-p2p"], 1, "live", &[]),
    case(&["--no-p2p"], &["--no-p2p"], 2, "no", &["p2p-missing"]),
    case(&["--no-migration"], &["--no-migration"], 1, "no", &["device-not-migratable"]),
    case(&[], &["--no-migration"], 1, "no", &["device-not-migratable"]),
    case(&["--model-version", "1.1.0"], &[], 1, "no", &["device-model-version"]),
    case(&["--model", "example.org/other"], &[], 1, "no", &["device-model"]),
    case(&["--param", "queues=8"], &["--param", "queues=4"], 1, "no", &["device-parameter"]),
];

/// Exit code and document.
fn asked(arguments: &[&str]) -> (i32, Value) {
    let output = run(&[arguments, &["--json"]].concat());
    let document = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{arguments:?}: {error}: {}", String::from_utf8_lossy(&output.stderr))
    });
    (output.status.code().expect("no signal"), document)
}

/// The codes of the reasons that stand against a live migration, each once.
fn against(report: &Value) -> Vec<&str> {
    let reasons = report["reasons"].as_array().expect("reasons");
    let grave =
        reasons.iter().filter(|reason| reason["severity"] == "no" || reason["severity"] == "snapshot-only");
    let mut codes: Vec<&str> = grave.map(|reason| reason["code"].as_str().expect("a code")).collect();
    codes.sort_unstable();
    codes.dedup();
    codes
}

fn agree(dir: &Path, n: usize, case: &Case) {
    let Case { from, to, devices, verdict, codes } = *case;
    let what = format!("{from:?} to {to:?}, {devices} devices");
    let state: &[&str] = &["--state-size", "1M"];
    let name = |side: &str| format!("{side}{n}");
    let address = format!("unix:{}", dir.join(name("mig")).display());
    let (from, to) = ([state, from].concat(), [state, to].concat());
    let source = Setup { devices, device_arguments: &from, ..Setup::new(dir, &name("a")) }.start();
    let destination = Setup {
        devices,
        device_arguments: &to,
        vm_arguments: &["--incoming", &address],
        ..Setup::new(dir, &name("b"))
    }
    .start();
    destination.incoming();
    let control = source.control.display().to_string();
    let (vm, moves) = (format!("vm:{control}"), verdict == "live");
    let exit = if moves { 0 } else { 3 };

    let (checked, report) = asked(&["check", "--live", "--timeout", "60s", &vm, &address]);
    assert_eq!((checked, report["verdict"].as_str()), (exit, Some(verdict)), "{what}: {report}");
    assert_eq!(against(&report), codes, "{what}: {report}");
    let (checked, _) = asked(&["check", "--timeout", "60s", &vm, &address]);
    assert_eq!(checked, if verdict == "no" { 3 } else { 0 }, "{what}: a snapshot is a way too");

    // A receiver whose machine was refused makes another.
    until("the destination to wait again", || destination.info()["incoming"].as_str().map(|_| ()));
    let (rehearsed, report) =
        asked(&["rehearse", "--control", &control, "--to", &address, "--downtime-limit", "10s"]);
    assert_eq!((rehearsed, report["verdict"].as_str()), (exit, Some(verdict)), "{what}: {report}");
    assert_eq!(against(&report), codes, "{what}: {report}");

    until("the destination to wait again", || destination.info()["incoming"].as_str().map(|_| ()));
    let (moved, report) = asked(&["migrate", "--control", &control, &address, "--downtime-limit", "10s"]);
    let migration = &report["migration"];
    assert_eq!(moved, exit, "{what}: {report}");
    assert_eq!(migration["status"], if moves { "completed" } else { "failed" }, "{what}: {report}");
    assert_eq!(migration["incompatible"], !moves, "{what}: {report}");
    assert_eq!(against(migration), codes, "{what}: {report}");
    if moves {
        return;
    }
    source.assert_runs();
    // What the verdict says of a snapshot is so as well.
    let file = dir.join(name("file")).display().to_string();
    let (saved, report) = asked(&["save", "--control", &control, "-o", &file]);
    let of_pair_alone = !codes.contains(&"p2p-missing") && source_can(from.as_slice());
    assert_eq!(saved, if of_pair_alone { 0 } else { 3 }, "{what}: {report}");
}

/// Whether the source's device has migration: then it can be saved, wherever else it does not fit.
fn source_can(from: &[&str]) -> bool {
    !from.contains(&"--no-migration")
}

#[test]
fn what_check_rehearse_and_migrate_say_is_one_answer() {
    let dir = tempfile::tempdir().expect("a folder");
    for (n, case) in CASES.iter().enumerate() {
        agree(dir.path(), n, case);
    }
}
