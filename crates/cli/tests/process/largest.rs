//! The largest that each document may be, given to the verbs that read it, under limits on CPU time and memory that the kernel
//! keeps; and one that is larger, which is refused by name.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Map, Value, json};
use vfio_user_peer::{Server, StopHandle};

use crate::foreign_servers::Null;

/// CPU seconds: many times what any of them takes with the release profile, and enough without optimisation.
const CPU: u32 = if cfg!(debug_assertions) { 100 } else { 30 };
/// KiB of address space.
const MEMORY: u32 = 1 << 20;
/// Most items of a list or object.
const MOST: usize = 4096;
/// Longest manifest in a file, and on the wire or from a server.
const FILE: usize = 8 << 20;
const WIRE: usize = 1 << 20;
/// Longest policy, and longest site file.
const SITE: usize = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs the command under the limits: exit code, what it said on stdout and the beginning of what it said on stderr.
fn limited(arguments: &[&str]) -> (Option<i32>, String, String) {
    let script = format!(r#"ulimit -t {CPU} && ulimit -v {MEMORY} && exec "$0" "$@""#);
    let output = Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_vfio-migrate")])
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).chars().take(500).collect();
    (output.status.code(), String::from_utf8(output.stdout).unwrap(), said)
}

fn ends(arguments: &[&str], exit: i32) -> String {
    let (found, out, said) = limited(arguments);
    assert_eq!(found, Some(exit), "{arguments:?}: {said}");
    out
}

/// That what is too large is refused, with the file's name and the limit.
fn refused(arguments: &[&str], file: &Path, limit: usize) {
    let (found, _, said) = limited(arguments);
    let name = file.file_name().unwrap().to_str().unwrap();
    assert!(
        found == Some(1) && said.contains(name) && said.contains(&limit.to_string()),
        "{arguments:?}: {found:?} {said}"
    );
}

fn object(name: &str, members: usize, value: impl Fn(usize) -> Value) -> Map<String, Value> {
    (0..members).map(|n| (format!("{name}{n}"), value(n))).collect()
}

fn list(value: impl Fn(usize) -> Value) -> Vec<Value> {
    (0..MOST).map(value).collect()
}

/// A device that has `most` of everything; no two values of two `which` are the same.
fn device(which: usize, most: usize) -> Value {
    let object = |name: &str, value: &dyn Fn(usize) -> Value| object(name, most, value);
    let list = |value: &dyn Fn(usize) -> Value| (0..most).map(value).collect::<Vec<_>>();
    json!({
        "id": "net0", "model": "example.org/nic", "model_version": "1.2.0",
        "loads": (0..64).map(|n| format!("{n}.{which}.0-{n}.{which}.9")).collect::<Vec<_>>().join(","),
        "dirty": {"device_log": true},
        "pci": {"vendor": 0x1234, "device": 1, "subsystem_vendor": 0, "subsystem": 0, "revision": 0, "class": 0x02_0000},
        "config_mask": list(&|n| json!(format!("ignore {n:#x}+1"))),
        "capabilities": list(&|n| json!({"id": n % 256, "offset": n, "extended": true, "len": which})),
        "regions": list(&|n| json!({"index": n, "size": which, "read": true})),
        "irqs": (0..most).map(|n| (n.to_string(), json!(which))).collect::<Map<_, _>>(),
        "facts": object("f", &|_| json!(which)),
        "capacity": object("c", &|_| json!(which)),
        "notes": list(&|n| json!({"field": format!("n{n}"), "text": "."})),
        "parameters": object("p", &|n| json!({"value": which, "allowed": [n + 10, {"min": n + 20, "max": n + 30}]})),
    })
}

fn machine(which: usize) -> Value {
    let small = |n: usize| {
        let parameters: Map<_, _> = (0..64)
            .map(|p| (format!("p{p}"), json!({"value": which, "allowed": [n + 10, p + 20]})))
            .collect();
        json!({"id": format!("net{n}"), "model": "example.org/nic", "model_version": "1.2.0",
            "dirty": {"device_log": true}, "parameters": parameters})
    };
    json!({
        "machine": "m", "accelerator": "kvm", "vcpus": 1,
        "ram": list(|n| json!({"gpa": n << 20, "len": 4096 * which})),
        "cpu": list(|n| json!(format!("feature{which}-{n}"))),
        "sections": object(&format!("s{which}-"), MOST, |_| json!(1)),
        "devices": (0..64).map(small).collect::<Vec<_>>(),
    })
}

/// `manifest` as a document, made `len` bytes long by fields that nobody knows, each within its limits.
fn filled(manifest: Value, kind: &str, len: usize) -> String {
    let mut document = manifest;
    document["schema"] = json!("vfio-migrate.org/manifest/1");
    document["kind"] = json!(kind);
    let mut left = len - document.to_string().len() - r#","zz-fill":[""]"#.len();
    let mut fill = Vec::new();
    // A text with its quotes and comma: the last takes what is left.
    while left > 4096 + 8 {
        fill.push("z".repeat(4000));
        left -= 4003;
    }
    fill.push("z".repeat(left));
    document["zz-fill"] = json!(fill);
    let text = document.to_string();
    assert_eq!(text.len(), len);
    text
}

fn file(dir: &Path, name: &str, content: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn manifests_of_devices_and_machines() {
    let dir = tempfile::tempdir().unwrap();
    let make =
        |name: &str, manifest: Value, kind: &str| file(dir.path(), name, &filled(manifest, kind, FILE));
    let devices = [1, 2].map(|n| make(&format!("device{n}.json"), device(n, MOST), "device"));
    let machines = [1, 2].map(|n| make(&format!("machine{n}.json"), machine(n), "machine"));
    let [a, b] = devices.each_ref().map(|path| text(path));
    let [m, n] = machines.each_ref().map(|path| text(path));
    for (arguments, exit) in [
        (vec!["check", a, b], 3),
        (vec!["check", a, a, "--json"], 0),
        (vec!["describe", a, "--format", "list"], 0),
        (vec!["describe", a, "--format", "resource-attributes"], 0),
        (vec!["check", m, n], 3),
        (vec!["check", m, n, "--json"], 3),
        (vec!["check", "--matrix", m, n], 0),
        (vec!["check", "--baseline", m, n], 0),
    ] {
        let out = ends(&arguments, exit);
        assert!(!out.is_empty(), "{arguments:?}");
    }
    // The same as pairs of path and value, which are longer.
    let shorter = file(dir.path(), "shorter.json", &filled(device(1, MOST), "device", FILE / 2));
    let shorter = text(&shorter);
    let pairs = file(dir.path(), "device.pairs", &ends(&["describe", shorter, "--format", "list"], 0));
    let same = ends(&["check", text(&pairs), shorter, "--json"], 0);
    assert_eq!(serde_json::from_str::<Value>(&same).unwrap()["verdict"], "live", "{same}");

    let large = filled(device(1, MOST), "device", FILE) + " ";
    refused(&["check", text(&file(dir.path(), "large.json", &large)), a], Path::new("large.json"), FILE);
}

#[test]
fn manifests_of_hosts() {
    let dir = tempfile::tempdir().unwrap();
    let device = |n: i64| {
        json!({"id": format!("d{n}"), "model": "example.org/nic", "model_version": "1.2.0",
            "dirty": {"device_log": true}, "parameters": {"queues": n}})
    };
    let files: Vec<String> = [0, 10_000]
        .map(|first| {
            let devices: Vec<Value> = (first..first + 4096).map(device).collect();
            let offers: Vec<Value> = (first + 5000..first + 9096).map(|n| json!({"device": device(n)})).collect();
            let host = json!({"schema": "vfio-migrate.org/manifest/1", "kind": "host", "name": format!("h{first}"),
                "devices": devices, "offers": offers});
            let file = dir.path().join(format!("{first}.json"));
            std::fs::write(&file, host.to_string()).unwrap();
            text(&file).to_owned()
        })
        .into();
    let one = dir.path().join("one.json");
    let mut device = device(-1);
    device["schema"] = json!("vfio-migrate.org/manifest/1");
    device["kind"] = json!("device");
    std::fs::write(&one, device.to_string()).unwrap();
    let [a, b] = [files[0].as_str(), files[1].as_str()];
    for (arguments, exit) in [
        (vec!["check", "--matrix", a, b], 0),
        (vec!["check", "--matrix", a, b, "--json"], 0),
        (vec!["check", "--baseline", a, b], 3),
        (vec!["check", text(&one), a], 3),
        (vec!["describe", a, "--format", "list"], 0),
        (vec!["describe", a, "--format", "node-labels"], 0),
        (vec!["describe", a, "--format", "resource-attributes"], 0),
    ] {
        ends(&arguments, exit);
    }
}

#[test]
fn policies_and_site_files() {
    let dir = tempfile::tempdir().unwrap();
    let devices =
        [1, 2].map(|n| file(dir.path(), &format!("{n}.json"), &filled(device(n, MOST / 2), "device", WIRE)));
    let [a, b] = devices.each_ref().map(|path| text(path));
    let allow = |n: usize| {
        json!({"code": "device-parameter", "device": format!("net{n}"), "model": "example.org/nic",
            "field": format!("parameters.p{n}"), "reason": "r".repeat(600)})
    };
    let masks = |n: usize| json!({"vendor": n, "rules": ["ignore 0x50+8", "compare 0x9c+4"]});
    let policy = json!({
        "allow": (0..1024).map(allow).collect::<Vec<_>>(),
        "config_mask": (0..1024).map(masks).collect::<Vec<_>>(),
        "map": (0..1024).map(|n| (format!("net{n}"), json!(format!("nic{n}")))).collect::<Map<_, _>>(),
    });
    let as_json = policy.to_string();
    let mut as_toml = String::new();
    for entry in policy["allow"].as_array().unwrap() {
        as_toml.push_str("[[allow]]\n");
        for (name, value) in entry.as_object().unwrap() {
            writeln!(as_toml, "{name} = {value}").unwrap();
        }
    }
    assert!(as_json.len() > SITE / 2 && as_toml.len() > SITE / 2);
    let spaces = |text: &str| " ".repeat(SITE - text.len());
    for (name, content) in [("policy.json", &as_json), ("policy.toml", &as_toml)] {
        let whole = file(dir.path(), name, &(spaces(content) + content));
        let out = ends(&["check", a, b, "--policy", text(&whole), "--json"], 3);
        assert!(out.contains("device-parameter"), "{name}");
        let large = file(dir.path(), name, &(spaces(content) + " " + content));
        refused(&["check", a, b, "--policy", text(&large)], &large, SITE);
    }

    let host = json!({"schema": "vfio-migrate.org/manifest/1", "kind": "host", "name": "h",
        "devices": list(|n| json!({"id": format!("d{n}")}))});
    let host = file(dir.path(), "host.json", &host.to_string());
    let mut site = String::from("[devices.\"*\"]\nmodel = \"example.org/nic\"\n");
    for n in 0..MOST {
        write!(
            site,
            "[devices.d{n}]\nfirmware = \"{n}\"\nfacts = {{ ports = {n} }}\nmdev_type = \"{}\"\n",
            "t".repeat(160)
        )
        .unwrap();
    }
    assert!(site.len() > SITE / 2 && site.len() < SITE, "{}", site.len());
    let whole = file(dir.path(), "site.toml", &(site.clone() + &"\n".repeat(SITE - site.len())));
    let out = ends(&["describe", text(&host), "--site", text(&whole)], 0);
    assert_eq!(out.matches("example.org/nic").count(), MOST);
    let large = file(dir.path(), "site.toml", &(site.clone() + &"\n".repeat(SITE - site.len() + 1)));
    refused(&["describe", text(&host), "--site", text(&large)], &large, SITE);
}

#[test]
fn histories() {
    const HISTORY: usize = 2 << 20;
    const LINE: usize = 64 << 10;
    const VM: &str = "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d43";
    let dir = tempfile::tempdir().unwrap();
    let line = |fill: usize| {
        let reasons: Vec<Value> = (0..256).map(|n| json!(format!("reason {n}"))).collect();
        let record = json!({"version": 1, "vm": VM, "kind": "migration", "began": "2026-01-01T00:00:00Z",
            "ended": "2026-01-01T00:00:00Z", "migration": {"status": "failed", "total-ms": 7,
            "error": "e".repeat(fill), "of-another-version": reasons}});
        record.to_string() + "\n"
    };
    let short = line(0).len();
    let longest = line(LINE - short);
    assert_eq!(longest.len(), LINE);
    let most = HISTORY / LINE;
    // Long ones in one file, short ones in the other.
    std::fs::write(dir.path().join("history.jsonl"), longest.repeat(most)).unwrap();
    let record = json!({"version": 1, "vm": VM, "kind": "check", "began": "x", "ended": "y",
        "migration": {"status": "failed", "total-ms": 7}});
    let record = record.to_string() + "\n";
    let count = HISTORY / record.len();
    std::fs::write(dir.path().join("history.jsonl.1"), record.repeat(count)).unwrap();
    let told = ends(&["history", "--state-dir", text(dir.path())], 0);
    assert!(told.lines().count() >= most + count, "{}", told.lines().count());
    let told: Value =
        serde_json::from_str(&ends(&["history", "--state-dir", text(dir.path()), "--json"], 0)).unwrap();
    assert_eq!(told["records"].as_array().unwrap().len(), most + count);
    ends(&["status", "--state-dir", text(dir.path())], 0);
    let larger = longest.repeat(most) + "\n";
    std::fs::write(dir.path().join("history.jsonl"), larger).unwrap();
    refused(&["history", "--state-dir", text(dir.path())], &dir.path().join("history.jsonl"), HISTORY);
}

#[test]
fn manifests_of_servers() {
    let dir = tempfile::tempdir().unwrap();
    let serve = |name: &str, len: usize| {
        let manifest = filled(device(1, MOST / 2), "device", len);
        let path = dir.path().join(name);
        let server = Server::bind(&path).unwrap();
        std::thread::spawn(move || server.serve(&Null(Some(manifest.into())), &StopHandle::new().unwrap()));
        path
    };
    let largest = serve("largest.sock", WIRE);
    let told: Value = serde_json::from_str(&ends(&["describe", text(&largest)], 0)).unwrap();
    assert_eq!(told["parameters"].as_object().map(Map::len), Some(MOST / 2));
    ends(&["check", text(&largest), text(&largest)], 3);
    let larger = serve("larger.sock", WIRE + 1);
    let (exit, _, said) = limited(&["describe", text(&larger)]);
    assert!(exit == Some(1) && said.contains("larger.sock"), "{said}");
}
