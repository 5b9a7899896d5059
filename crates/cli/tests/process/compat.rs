//! `describe`, `check`, `explain`, `rehearse`: asked first, answered with reasons, and nothing left behind.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{Process, Setup, Vm, creds, run, until};

const UUID: &[&str] = &["--uuid", "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d42"];

/// Exit code and the JSON object on stdout.
fn json_of(arguments: &[&str]) -> (i32, Value) {
    let output = run(&[arguments, &["--json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    let value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{arguments:?}: {error}: {stderr}"));
    (output.status.code().unwrap(), value)
}

/// Exit code and stderr.
fn failure_of(arguments: &[&str]) -> (i32, String) {
    let output = run(arguments);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn codes(report: &Value) -> Vec<&str> {
    report["reasons"].as_array().unwrap().iter().map(|reason| reason["code"].as_str().unwrap()).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A device server, and its socket.
fn server(dir: &TempDir, name: &str, more: &[&str]) -> (Process, PathBuf) {
    let socket = dir.path().join(name);
    let process =
        Process::start(&[&["device", "--state-size", "4M", "--socket", text(&socket)], more].concat());
    until("the server to listen", || socket.exists().then_some(()));
    (process, socket)
}

#[test]
fn two_sockets_are_compared_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (_a, a) = server(&dir, "a", &["--model-version", "1.2.0", "--param", "queues=8"]);
    let (_b, b) = server(&dir, "b", &["--model-version", "1.2.0", "--param", "queues=8"]);
    let (_newer, newer) = server(&dir, "newer", &["--model-version", "1.3.0", "--param", "queues=8"]);
    let (_less, less) = server(&dir, "less", &["--model-version", "1.2.0", "--param", "queues=4"]);
    let (_other, other) = server(&dir, "other", &["--model", "example.org/other", "--param", "queues=8"]);
    let (_unlogged, unlogged) = server(&dir, "unlogged", &["--no-dirty-log"]);

    let (exit, same) = json_of(&["check", text(&a), text(&b)]);
    assert_eq!(
        (exit, same["verdict"].as_str(), same["strict"].as_bool()),
        (0, Some("live"), Some(false)),
        "{same}"
    );
    assert_eq!(codes(&same), [""; 0]);
    assert_eq!(json_of(&["check", text(&a), text(&newer)]).0, 0, "a newer minor version loads it");

    for (from, to, code) in
        [(&newer, &a, "device-model-version"), (&a, &less, "device-parameter"), (&a, &other, "device-model")]
    {
        let (exit, report) = json_of(&["check", text(from), text(to)]);
        assert_eq!((exit, report["verdict"].as_str()), (3, Some("no")), "{report}");
        assert!(codes(&report).contains(&code), "{code} in {report}");
        for reason in report["reasons"].as_array().unwrap() {
            for field in ["code", "device", "field", "source", "destination", "severity", "fix"] {
                assert!(reason.get(field).is_some(), "{field} in {reason}");
            }
        }
        // What is asked for is what is said: the same in words.
        let words = String::from_utf8(run(&["check", text(from), text(to)]).stdout).unwrap();
        assert!(words.starts_with("no\n") && words.contains(code), "{words}");
    }

    // Without a log of its DMA a device cannot move live; a policy may take the price.
    let (exit, report) = json_of(&["check", text(&unlogged), text(&unlogged)]);
    assert_eq!((exit, report["verdict"].as_str()), (0, Some("snapshot-only")), "{report}");
    let policy = dir.path().join("policy.toml");
    let allowed: String = codes(&report)
        .iter()
        .map(|code| format!("[[allow]]\ncode = \"{code}\"\nreason = \"a small guest\"\n"))
        .collect();
    std::fs::write(&policy, allowed).unwrap();
    let (exit, report) = json_of(&["check", text(&unlogged), text(&unlogged), "--policy", text(&policy)]);
    assert_eq!((exit, report["verdict"].as_str()), (0, Some("live-with-warning")), "{report}");
}

#[test]
fn a_manifest_can_be_kept_and_compared_later() {
    let dir = tempfile::tempdir().unwrap();
    let (_a, a) = server(&dir, "a", &["--param", "queues=8"]);
    let file = dir.path().join("a.json");
    let output = run(&["describe", text(&a), "--name", "net0", "-o", text(&file)]);
    assert!(output.status.success() && output.stdout.is_empty());
    let manifest: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    assert_eq!((manifest["kind"].as_str(), manifest["id"].as_str()), (Some("device"), Some("net0")));
    assert_eq!(manifest["firmware"], Value::Null, "what is not known is null");
    assert_eq!(json_of(&["check", text(&file), text(&a)]).0, 0);

    let list = dir.path().join("a.list");
    assert!(run(&["describe", text(&file), "--format", "list", "-o", text(&list)]).status.success());
    let (exit, report) = json_of(&["check", text(&list), text(&a)]);
    assert_eq!((exit, report["verdict"].as_str()), (0, Some("live")), "{report}");

    let site = dir.path().join("site.toml");
    std::fs::write(&site, "[devices.net0]\nfirmware = \"22.1\"\n").unwrap();
    let filled = dir.path().join("filled.json");
    assert!(run(&["describe", text(&file), "--site", text(&site), "-o", text(&filled)]).status.success());
    let manifest: Value = serde_json::from_slice(&std::fs::read(&filled).unwrap()).unwrap();
    assert_eq!(manifest["firmware"], "22.1");
    std::fs::write(&site, "[devices.net0]\nmodel = \"another\"\n").unwrap();
    let (exit, said) = failure_of(&["describe", text(&file), "--site", text(&site)]);
    assert!(exit == 1 && said.contains("model"), "{said}");
}

/// A slip in a server's manifest, and what is not its to say, are told where they are seen: on stderr, in the manifest, in
/// the report.
#[test]
fn what_a_server_declares_in_vain_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (_a, a) =
        server(&dir, "a", &["--field", "firmwear=22", "--field", r#"flags={"p2p":true,"pre_copy":true}"#]);
    let (_b, b) = server(&dir, "b", &["--field", r#"firmware="22""#]);
    let output = run(&["describe", text(&a)]);
    let said = String::from_utf8(output.stderr).unwrap();
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    for field in ["firmwear", "flags"] {
        assert!(said.contains(field), "{field} in {said}");
        assert!(
            manifest["notes"].as_array().unwrap().iter().any(|note| note["field"] == field),
            "{manifest}"
        );
    }
    let (exit, report) = json_of(&["check", text(&a), text(&a)]);
    assert_eq!((exit, report["verdict"].as_str()), (0, Some("live")), "{report}");
    let notes = report["reasons"].as_array().unwrap().iter();
    assert_eq!(notes.filter(|reason| reason["code"] == "field-ignored").count(), 4, "{report}");
    let output = run(&["describe", text(&b)]);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((manifest["firmware"].as_str(), &manifest["notes"]), (Some("22"), &Value::Null));
}

#[test]
fn this_host_describes_itself() {
    let output = run(&["describe", "--host", "--name", "here"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((manifest["kind"].as_str(), manifest["name"].as_str()), (Some("host"), Some("here")));
    assert!(manifest["memory"].as_u64().unwrap() > 1 << 20 && manifest["vcpus"].as_u64().unwrap() > 0);
    for format in ["node-labels", "list"] {
        assert!(run(&["describe", "--host", "--format", format]).status.success());
    }
}

#[test]
fn manifests_from_strangers_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let good = json!({"schema": "vfio-migrate.org/manifest/1", "kind": "device", "id": "net0"});
    let file = dir.path().join("bad.json");
    let nested = format!("{}1{}", "[".repeat(100), "]".repeat(100));
    for (bad, path) in [
        ("{".to_owned(), ""),
        (good.to_string().replace("manifest/1", "manifest/9"), "schema"),
        (good.to_string().replace("\"device\"", "\"thing\""), "kind"),
        (good.to_string().replace("\"net0\"", "7"), "id"),
        (good.to_string().replacen('{', "{\"id\": \"x\", ", 1), "id"),
        (good.to_string().replacen('{', &format!("{{\"deep\": {nested}, "), 1), "deep"),
        (
            good.to_string().replacen('{', "{\"regions\": [{\"index\": 0, \"size\": -1}], ", 1),
            "regions[0].size",
        ),
    ] {
        std::fs::write(&file, &bad).unwrap();
        let (exit, said) = failure_of(&["check", text(&file), text(&file)]);
        assert_eq!(exit, 1, "{bad}: {said}");
        assert!(said.contains(text(&file)) && said.contains(path), "{bad}: {said}");
    }
    std::fs::write(&file, good.to_string().replacen('{', "{\"rack\": 7, ", 1)).unwrap();
    let output = run(&["check", text(&file), text(&file)]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("rack"), "what is not known is reported: {said}");
    let kept = run(&["describe", text(&file)]);
    assert!(String::from_utf8_lossy(&kept.stdout).contains("rack"), "and kept");
}

#[test]
fn codes_are_explained() {
    let (exit, all) = json_of(&["explain"]);
    assert_eq!(exit, 0);
    for entry in all["codes"].as_array().unwrap() {
        let code = entry["code"].as_str().unwrap();
        assert_eq!(json_of(&["explain", code]), (0, entry.clone()));
    }
    let (exit, said) = failure_of(&["explain", "no-such-code"]);
    assert!(exit == 1 && said.contains("no-such-code"), "{said}");
}

fn host(dir: &TempDir, name: &str, version: &str) -> PathBuf {
    let pci = json!({"vendor": 0x1234, "device": 1, "subsystem_vendor": 0, "subsystem": 0, "revision": 0, "class": 0x02_0000});
    let device = json!({
        "id": "net0", "model": "example.org/nic", "model_version": version, "flags": {"p2p": true, "pre_copy": true},
        "dirty": {"device_log": true}, "pci": pci, "regions": [{"index": 0, "size": 4096}], "irqs": {"2": 4},
        "parameters": {"queues": {"value": 8, "allowed": [{"min": 1, "max": 16}]}},
    });
    let host =
        json!({"schema": "vfio-migrate.org/manifest/1", "kind": "host", "name": name, "devices": [device]});
    let file = dir.path().join(format!("{name}.json"));
    std::fs::write(&file, host.to_string()).unwrap();
    file
}

#[test]
fn a_pool_of_hosts_has_a_matrix_and_a_baseline() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<PathBuf> = [("a", "1.2.0"), ("b", "1.4.0"), ("c", "1.2.0")]
        .map(|(name, version)| host(&dir, name, version))
        .into();
    let files: Vec<&str> = files.iter().map(|file| text(file)).collect();
    let (exit, matrix) = json_of(&[&["check", "--matrix"], files.as_slice()].concat());
    assert_eq!(exit, 0, "{matrix}");
    let verdict = |device: usize, host: usize| {
        let (row, column) = (&matrix["devices"][device]["group"], &matrix["hosts"][host]["group"]);
        let cell = &matrix["cells"][usize::try_from(row.as_u64().unwrap()).unwrap()];
        cell[usize::try_from(column.as_u64().unwrap()).unwrap()]["verdict"].clone()
    };
    assert_eq!((verdict(0, 1), verdict(1, 0)), (json!("live"), json!("no")), "{matrix}");
    let table = run(&[&["check", "--matrix"], files.as_slice()].concat());
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(table.contains("b/net0") && table.contains("device-model-version"), "{table}");

    let (exit, report) = json_of(&[&["check", "--baseline"], files.as_slice()].concat());
    let baseline = &report["baselines"][0];
    assert_eq!(
        (exit, baseline["version"].as_str(), baseline["model"].as_str()),
        (0, Some("1.2.0"), Some("example.org/nic"))
    );
    let folder = text(dir.path());
    assert_eq!(json_of(&["check", "--baseline", folder, "--model", "example.org/nic"]), (0, report.clone()));
    let (exit, report) = json_of(&["check", "--baseline", folder, "--model", "example.org/other"]);
    assert_eq!((exit, report["without"][0]["model"].as_str()), (3, Some("example.org/other")), "{report}");
}

#[test]
fn a_host_has_the_vfio_user_devices_that_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (_free, free) = server(&dir, "free.sock", &["--param", "queues=8"]);
    let vm = Setup::new(dir.path(), "a").start();
    let root = dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let file = dir.path().join("h1.json");
    let describe =
        |more: &[&str]| run(&[&["describe", "--host", "--name", "h1", "--root", text(&root)], more].concat());
    let (socket, control) = (format!("vfio-user:{}", free.display()), control(&vm));
    let output = describe(&[&socket, &control, text(&free), "-o", text(&file)]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let host: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let devices = host["devices"].as_array().unwrap();
    let names: Vec<&str> = devices.iter().map(|device| device["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["free", "a-dev0", "free-2"]);
    assert!(
        devices.iter().all(|device| device["backend"] == "vfio-user" && device["model"].is_string()),
        "{host}"
    );
    assert_eq!(json_of(&["check", &control, text(&file)]).1["map"]["dev0"], "a-dev0");

    // Which machine can go where: the one that runs, and one that needs what the host has not.
    let machine = dir.path().join("web2.json");
    assert!(run(&["describe", &control, "-o", text(&machine)]).status.success());
    let other =
        std::fs::read_to_string(&machine).unwrap().replace("vfio-migrate.org/sample", "example.org/other");
    std::fs::write(&machine, other).unwrap();
    let (exit, matrix) = json_of(&["check", "--matrix", &control, text(&machine), text(&file)]);
    assert_eq!((exit, matrix["devices"].as_array().map(Vec::len)), (0, Some(0)), "{matrix}");
    let names: Vec<&str> =
        matrix["machines"].as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, [control.as_str(), "web2"]);
    assert_ne!(matrix["cells"][0][0]["verdict"], "no", "{matrix}");
    assert_eq!(matrix["cells"][1][0]["verdict"], "no", "{matrix}");
    let words = run(&["check", "--matrix", &control, text(&machine)]);
    let words = String::from_utf8(words.stdout).unwrap();
    assert!(words.contains("machines A: ") && words.contains("device-model"), "{words}");
    let (exit, report) = json_of(&["check", "--baseline", &control, text(&file)]);
    assert_eq!((exit, report["baselines"][0]["model"].as_str()), (0, Some("vfio-migrate.org/sample")));

    for (wrong, exit, why) in [
        (vec!["vfio:0000:00:00.0"], 2, "listed anyway"),
        (vec!["tcp:127.0.0.1:1"], 2, "receiver"),
        (vec![text(&file)], 2, "a host"),
        (vec!["/nowhere.sock"], 1, "/nowhere.sock"),
    ] {
        let output = describe(&wrong);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(exit) && said.contains(why), "{wrong:?}: {said}");
    }
    assert_eq!(failure_of(&["describe", text(&free), text(&free)]).0, 2);
}

#[test]
fn a_matrix_leaves_no_name_out_and_says_when_there_is_none() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<PathBuf> = (0..20).map(|n| host(&dir, &format!("host{n}"), "1.2.0")).collect();
    let mut all: Vec<&str> = files.iter().map(|file| text(file)).collect();
    let newer = host(&dir, "newer", "1.3.0");
    all.push(text(&newer));
    let output = crate::support::command(&[&["check", "--matrix"], all.as_slice()].concat())
        .env("COLUMNS", "60")
        .output()
        .unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    for n in 0..20 {
        assert!(table.contains(&format!("host{n}/net0")), "{table}");
    }
    assert!(!table.contains(" more") && table.contains("newer/net0"), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 60), "{table}");

    let empty = dir.path().join("empty.json");
    let manifest = json!({"schema": "vfio-migrate.org/manifest/1", "kind": "host", "name": "bare"});
    std::fs::write(&empty, manifest.to_string()).unwrap();
    let (exit, said) = failure_of(&["check", "--matrix", text(&empty)]);
    assert!(
        exit == 1 && said.contains("none of these hosts has a device") && said.contains("bare"),
        "{said}"
    );
}

fn pair(dir: &TempDir, there: &[&str]) -> (Vm, Vm) {
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let incoming = [UUID, &["--incoming", "tcp:127.0.0.1:0"]].concat();
    let device_arguments = [&["--state-size", "4M"], there].concat();
    let destination =
        Setup { vm_arguments: &incoming, device_arguments: &device_arguments, ..Setup::new(dir.path(), "b") };
    (source, destination.start())
}

fn control(vm: &Vm) -> String {
    format!("vm:{}", vm.control.display())
}

#[test]
fn a_pair_that_does_not_fit_is_refused_and_the_guest_never_notices() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = pair(&dir, &["--param", "queues=4"]);
    source.warm();
    let address = destination.incoming();
    let by_manifest = json_of(&["check", &control(&source), &control(&destination)]);
    let by_asking = json_of(&["check", &control(&source), &address, "--tls-creds", creds()]);
    for (exit, report) in [&by_manifest, &by_asking] {
        assert_eq!((*exit, report["verdict"].as_str()), (3, Some("no")), "{report}");
        assert!(codes(report).contains(&"device-parameter-new"), "{report}");
    }
    let rehearsed = json_of(&["rehearse", "--control", text(&source.control), "--to", &address]);
    assert_eq!((rehearsed.0, rehearsed.1["verdict"].as_str()), (3, Some("no")), "{rehearsed:?}");

    let events = source.events();
    let info = source.migrate(&address, Value::Null);
    assert_eq!(
        (info["status"].as_str(), info["incompatible"].as_bool()),
        (Some("failed"), Some(true)),
        "{info}"
    );
    assert!(codes(&info).contains(&"device-parameter-new"), "{info}");
    assert_eq!(info["downtime-ms"], Value::Null);
    assert!(!events.try_iter().any(|event| event["event"] == "STOP"), "the guest was paused");
    let theirs = until("the destination's end", || {
        let info = destination.migration();
        (info["status"] == "failed").then_some(info)
    });
    assert_eq!(codes(&theirs), codes(&info), "both users hear the same");
    source.assert_whole();
}

#[test]
fn a_rehearsal_says_what_a_migration_would_and_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = pair(&dir, &[]);
    source.warm();
    let vms = [&source, &destination];
    let holdings = || vms.map(|vm| (vm.process.holdings(), vm.process.memory_files()));
    let rehearse = |more: &[&str]| {
        let address = destination.incoming();
        let control = text(&source.control);
        let limit = ["--downtime-limit", "10s"];
        json_of(&[&["rehearse", "--control", control, "--to", &address], limit.as_slice(), more].concat())
    };
    let asked = json_of(&["check", &control(&source), &destination.incoming(), "--tls-creds", creds()]);
    assert_eq!((asked.0, asked.1["verdict"].as_str()), (0, Some("live")), "{}", asked.1);

    let (exit, found) = rehearse(&[]);
    assert_eq!((exit, found["verdict"].as_str()), (0, Some("live")), "{found}");
    for rate in ["wire", "ram_dirty"] {
        assert!(found["rates"][rate].as_u64().is_some(), "{rate}: {found}");
    }
    assert!(
        found["rates"].get("load").is_some() && found["rates"]["devices"].get("dev0").is_some(),
        "{found}"
    );
    let parts = found["parts"].as_array().unwrap();
    let total: f64 = parts.iter().map(|part| part["ms"].as_f64().unwrap()).sum();
    assert!((total - found["predicted_downtime_ms"].as_f64().unwrap()).abs() < 0.01, "{found}");
    let basis = |name: &str| parts.iter().find(|part| part["name"] == name).map(|part| part["basis"].clone());
    assert_eq!(basis("ram"), Some(json!("measured")));
    assert_eq!(basis("device dev0"), Some(json!("declared")));
    assert_eq!(basis("start"), Some(json!("unknown")), "what nobody measured is said to be so");

    // Once its machine is whole again.
    destination.incoming();
    let before = holdings();
    let (exit, found) = rehearse(&["--pause"]);
    assert_eq!(exit, 0, "{found}");
    let unmeasured: Vec<&Value> =
        found["parts"].as_array().unwrap().iter().filter(|part| part["basis"] != "measured").collect();
    assert_eq!(unmeasured.len(), 1, "all but the start is measured: {found}");
    source.assert_whole();
    assert_eq!(source.migration()["status"], "rehearsed");
    until("as few descriptors, threads and mappings as before", || {
        let after = holdings();
        (0..2)
            .all(|n| {
                let ((descriptors, threads), mapped) = after[n];
                descriptors <= before[n].0.0 && threads <= before[n].0.1 && mapped <= before[n].1
            })
            .then_some(())
    });

    // And then it moves.
    let info = source.migrate(&destination.incoming(), json!({"verify": true}));
    assert_eq!(info["status"], "completed", "{info}");
    destination.assert_whole();
}

#[test]
fn a_device_without_pre_copy_says_what_was_not_rehearsed() {
    let dir = tempfile::tempdir().unwrap();
    let plain: &[&str] = &["--state-size", "4M", "--no-precopy"];
    let source = Setup { vm_arguments: UUID, device_arguments: plain, ..Setup::new(dir.path(), "a") }.start();
    let incoming = [UUID, &["--incoming", "tcp:127.0.0.1:0"]].concat();
    let there =
        Setup { vm_arguments: &incoming, device_arguments: plain, ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    let address = there.incoming();
    let arguments =
        ["rehearse", "--control", text(&source.control), "--to", &address, "--downtime-limit", "10s"];
    let (exit, found) = json_of(&arguments);
    assert_eq!(exit, 0, "{found}");
    assert!(codes(&found).contains(&"rehearsal-not-tried"), "{found}");
    there.incoming();
    let (exit, found) = json_of(&[arguments.as_slice(), &["--pause"]].concat());
    assert_eq!(exit, 0, "{found}");
    assert!(!codes(&found).contains(&"rehearsal-not-tried"), "{found}");
    source.assert_whole();
}

#[test]
fn a_limit_that_cannot_be_met_is_told_alike_by_a_rehearsal_and_a_migration() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = pair(&dir, &[]);
    source.warm();
    let address = destination.incoming();
    let limits = ["--downtime-limit", "1us", "--give-up", "1s"];
    let base = ["rehearse", "--control", text(&source.control), "--to", &address];
    let (exit, found) = json_of(&[base.as_slice(), &limits].concat());
    assert_eq!((exit, found["verdict"].as_str()), (3, Some("no")), "{found}");
    assert!(codes(&found).contains(&"rehearsal-obstacle"), "{found}");
    assert_one_verdict(&source, &destination, &["rehearsal-obstacle"], true);
    let address = destination.incoming();
    let base = ["migrate", "--control", text(&source.control), &address];
    let (exit, ended) = json_of(&[base.as_slice(), &limits].concat());
    let migration = &ended["migration"];
    assert_eq!(
        (exit, &migration["status"], &migration["downtime-ms"]),
        (3, &json!("failed"), &json!(null)),
        "{ended}"
    );
    assert!(codes(migration).contains(&"rehearsal-obstacle"), "{ended}");
    assert_one_verdict(&source, &destination, &["rehearsal-obstacle"], true);
    // What needs most of it is measured, and may be another thing each time.
    for reasons in [&found["reasons"], &migration["reasons"]] {
        let mut reasons = reasons.as_array().unwrap().iter();
        let obstacle = reasons.find(|reason| reason["code"] == "rehearsal-obstacle").unwrap();
        let said = obstacle["text"].as_str().unwrap();
        assert!(
            said.starts_with("in the pre-copy phase at the source: ") && said.contains("in the time given"),
            "{said}"
        );
    }
    source.assert_whole();
}

/// Both sides tell of the last attempt why not, by these reasons, and whether another comes to the same.
fn assert_one_verdict(source: &Vm, destination: &Vm, expected: &[&str], incompatible: bool) {
    let of = |side: &Vm| side.query("query")["last"].take();
    let ours = of(source);
    let theirs =
        until("the other side's end", || Some(of(destination)).filter(|it| it["attempt"] == ours["attempt"]));
    for told in [&ours, &theirs] {
        assert_eq!((codes(told), &told["incompatible"]), (expected.to_vec(), &json!(incompatible)), "{told}");
    }
    for told in ["status", "reasons"] {
        assert_eq!(ours[told], theirs[told], "{told}: {ours} {theirs}");
    }
}

/// A device that fails as it is tried, on whichever side: one list.
#[test]
fn a_device_that_failed_is_told_alike_by_both_sides() {
    for fault in ["fail-arc:RUNNING:PRE_COPY:EIO", "fail-arc:STOP:RESUMING:EIO"] {
        let dir = tempfile::tempdir().unwrap();
        let device_arguments = &["--state-size", "4M", "--fault", fault];
        let setup = |name| Setup { vm_arguments: UUID, device_arguments, ..Setup::new(dir.path(), name) };
        let source = setup("a").start();
        source.warm();
        let incoming = [UUID, &["--incoming", "tcp:127.0.0.1:0"]].concat();
        let there = Setup { vm_arguments: &incoming, ..setup("b") }.start();
        source.call("rehearse", json!({"uri": there.incoming(), "downtime-limit": 60_000})).unwrap();
        assert_eq!(source.ended()["status"], "rehearsed", "{fault}: {}", source.migration());
        assert_one_verdict(&source, &there, &["device-failed"], true);
        let info = source.migrate(&there.incoming(), json!({}));
        assert_eq!(info["status"], "failed", "{fault}: {info}");
        assert_one_verdict(&source, &there, &["device-failed"], false);
    }
}

#[test]
fn devices_may_have_other_names_at_the_destination() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: UUID, ..Setup::new(dir.path(), "a") }.start();
    let (_server, socket) = server(&dir, "nic", &[]);
    let device = format!("vfio-user:{},id=nic7", socket.display());
    let incoming = [UUID, &["--incoming", "tcp:127.0.0.1:0", "--device", &device]].concat();
    let there = Setup { vm_arguments: &incoming, devices: 0, ..Setup::new(dir.path(), "b") }.start();
    source.warm();
    let (exit, report) = json_of(&["check", &control(&source), &control(&there)]);
    assert!(exit == 3 && codes(&report).contains(&"device-missing"), "{report}");
    let (exit, report) = json_of(&[
        "check",
        &control(&source),
        &there.incoming(),
        "--map",
        "dev0=nic7",
        "--tls-creds",
        creds(),
    ]);
    assert_eq!((exit, report["map"]["dev0"].as_str()), (0, Some("nic7")), "{report}");
    there.incoming();
    let info = source.migrate(&there.incoming(), json!({"verify": true, "device-map": {"dev0": "nic7"}}));
    assert_eq!(info["status"], "completed", "{info}");
    there.assert_whole();
}
