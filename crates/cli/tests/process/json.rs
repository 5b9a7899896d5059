//! Every verb with `--json`, when it does what it was asked for and when it does not: one JSON object on stdout, which a validator
//! that is not ours finds to be what the schema says and nothing more.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Process, Setup, creds, run, until};

/// Reads `[{"case", "schema", "document"}]` and says which documents are not by their schemas. A field that no schema
/// names is an error: an object that is flattened of several is looked at as a whole.
const VALIDATOR: &str = r#"
import json, sys
import jsonschema

def strict(schema, part=False):
    if isinstance(schema, dict):
        whole = "properties" in schema
        for key, value in schema.items():
            if key in ("properties", "$defs", "patternProperties"):
                for inner in value.values():
                    strict(inner)
            elif key in ("allOf", "anyOf", "oneOf"):
                for inner in value:
                    strict(inner, part or whole)
            elif isinstance(value, dict):
                strict(value)
        if whole and not part and "additionalProperties" not in schema:
            schema["unevaluatedProperties"] = False

failed = False
for case in json.load(sys.stdin):
    with open(case["schema"]) as file:
        schema = json.load(file)
    jsonschema.Draft202012Validator.check_schema(schema)
    strict(schema)
    for error in jsonschema.Draft202012Validator(schema).iter_errors(case["document"]):
        failed = True
        print(case["case"], error.json_path, error.message[:500])
sys.exit(failed)
"#;

fn top() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Verbs and schemas, as the documentation lists them.
fn listed() -> BTreeSet<(String, String)> {
    let page = std::fs::read_to_string(top().join("docs/json.md")).unwrap();
    let rows = page.lines().filter(|line| line.starts_with("| ") && line.contains("](schemas/"));
    rows.map(|row| {
        let verb = row.split('|').nth(1).unwrap().trim().trim_matches('`').to_owned();
        let schema = row.split("](schemas/").nth(1).unwrap().split(".json").next().unwrap().to_owned();
        (verb, schema)
    })
    .collect()
}

/// Documents that are validated together, at the end.
#[derive(Default)]
struct Documents {
    cases: Vec<Value>,
    reached: BTreeSet<(String, String)>,
}

impl Documents {
    /// Runs a verb, which ends with `exit` and prints a document of `schema`.
    fn take(&mut self, arguments: &[&str], exit: i32, schema: &str) -> Value {
        let words = [arguments, &["--json"]].concat();
        let output = run(&words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("{words:?}: {error}: {:?}, {stderr}", String::from_utf8_lossy(&output.stdout))
        });
        assert_eq!(output.status.code(), Some(exit), "{words:?}: {document}, {stderr}");
        assert!(document.is_object(), "{words:?}: {document}");
        let failed = schema == "failure" || (schema == "migrate" && exit != 0);
        if failed {
            assert_eq!(document["exit"], exit, "{words:?}: {document}");
            assert!(!document["error"]["class"].as_str().unwrap().is_empty(), "{words:?}: {document}");
            assert!(!document["error"]["desc"].as_str().unwrap().is_empty(), "{words:?}: {document}");
        }
        self.add(arguments, schema, document)
    }

    fn add(&mut self, arguments: &[&str], schema: &str, document: Value) -> Value {
        let verb = if schema == "failure" { "any" } else { arguments[0] };
        self.reached.insert((verb.into(), schema.into()));
        let file = top().join("docs/schemas").join(format!("{schema}.json"));
        self.cases.push(json!({"case": arguments.join(" "), "schema": file, "document": document}));
        document
    }

    /// Validates what has come, where there is a validator.
    fn validate(&self) {
        let python = |script: &str| {
            let mut python = Command::new("python3");
            python.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            python
        };
        let there = python("from jsonschema import Draft202012Validator").stdin(Stdio::null()).output();
        if !there.is_ok_and(|output| output.status.success()) {
            eprintln!(
                "SKIPPED: no python3 with jsonschema, so nothing but the command has looked at its JSON"
            );
            return;
        }
        let mut child = python(VALIDATOR).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(Value::from(self.cases.clone()).to_string().as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_every_verb_prints_is_what_its_schema_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut documents = Documents::default();

    // Without a `vm`.
    let (a, b) = (path("a.sock"), path("b.sock"));
    let devices = [&a, &b].map(|socket| {
        Process::start(&["device", "--state-size", "4M", "--socket", text(socket), "--param", "queues=8"])
    });
    until("the servers to listen", || (a.exists() && b.exists()).then_some(()));
    documents.take(&["devices", text(&a)], 0, "devices");
    documents.take(&["devices"], 0, "devices");
    documents.take(&["devices", "--nonsense"], 2, "failure");
    let doctor = run(&["doctor", "--json"]);
    documents.add(&["doctor"], "doctor", serde_json::from_slice(&doctor.stdout).unwrap());
    documents.take(&["doctor", "--memory", "lots"], 2, "failure");
    let device = documents.take(&["describe", text(&a)], 0, "manifest-device");
    std::fs::write(path("device.json"), device.to_string()).unwrap();
    let mut less = device;
    less["parameters"]["queues"]["value"] = 4.into();
    std::fs::write(path("less.json"), less.to_string()).unwrap();
    let mut host = documents.take(&["describe", "--host"], 0, "manifest-host");
    host["devices"] = json!([less]);
    host["devices"][0].as_object_mut().unwrap().retain(|name, _| name != "schema" && name != "kind");
    std::fs::write(path("host.json"), host.to_string()).unwrap();
    std::fs::write(path("other.json"), host.to_string()).unwrap();
    let (device, less) = (path("device.json"), path("less.json"));
    let (host, other) = (path("host.json"), path("other.json"));
    let (device, less, host, other) = (text(&device), text(&less), text(&host), text(&other));
    documents.take(&["describe", host, "--format", "node-labels"], 0, "node-labels");
    documents.take(&["describe", host, "--format", "resource-attributes"], 0, "resource-attributes");
    documents.take(&["describe", host, "--format", "list"], 2, "failure");
    documents.take(&["describe", device, "--format", "node-labels"], 2, "failure");
    documents.take(&["describe", "/nonexistent"], 1, "failure");
    documents.take(&["check", text(&a), text(&b)], 0, "check");
    documents.take(&["check", device, less], 3, "check");
    documents.take(&["check", device, host], 3, "check");
    documents.take(&["check", device], 2, "failure");
    documents.take(&["check", device, "/nonexistent"], 1, "failure");
    documents.take(&["check", "--matrix", host, other], 0, "check-matrix");
    documents.take(&["check", "--matrix", device], 2, "failure");
    documents.take(&["check", "--baseline", host], 0, "check-baseline");
    documents.take(&["check", "--baseline", "--model", "none", host], 3, "check-baseline");
    let codes = documents.take(&["explain"], 0, "explain-list");
    documents.take(&["explain", codes["codes"][0]["code"].as_str().unwrap()], 0, "explain");
    documents.take(&["explain", "no-such-code"], 1, "failure");
    let (ca, pki) = (path("ca"), path("pki"));
    let (ca, pki) = (text(&ca), text(&pki));
    documents.take(&["tls", "init", ca], 0, "tls-made");
    documents.take(&["tls", "init", ca], 1, "failure");
    documents.take(&["tls", "host", "host-a", "--ca", ca, "--output", pki], 0, "tls-made");
    documents.take(&["tls", "host", "no host", "--ca", ca], 2, "failure");
    documents.take(&["tls", "show", pki], 0, "tls-show");
    documents.take(&["tls", "pin", pki], 0, "tls-pin");
    documents.take(&["tls", "pin", ca], 1, "failure");
    let made = documents.take(&["tls", "revoke", "host-a", "--ca", ca], 0, "tls-made");
    assert_eq!(made["revoked"], 2, "{made}");
    documents.take(&["tls", "revoke", "host-b", "--ca", ca], 1, "failure");
    documents.take(&["tls", "show", pki], 0, "tls-show");
    std::fs::copy(path("ca/ca-crl.pem"), path("pki/ca-crl.pem")).unwrap();
    let shown = documents.take(&["tls", "show", pki], 1, "tls-show");
    assert_eq!(shown["revocation-lists"][0]["revoked"], 2, "{shown}");
    documents.take(&["tls", "nonsense"], 2, "failure");
    let (server, file) = (format!("vfio-user:{}", text(&a)), path("device.img"));
    documents.take(&["save", "--device", &server, "-o", text(&file)], 0, "device-file");
    documents.take(&["save", "--device", &server, "-o", text(&file)], 1, "failure");
    documents.take(&["restore", "--device", &server, text(&file)], 0, "device-file");
    documents.take(&["restore", "--device", &server, "/nonexistent"], 1, "failure");
    drop(devices);
    let demo = ["demo", "--software", "--memory", "64M", "--device-state", "4M", "--dirty-rate", "1M"];
    documents.take(&[&demo[..], &["--downtime-limit", "30s"]].concat(), 0, "demo");
    documents.take(&["demo", "--memory", "1M"], 2, "demo");
    documents.take(&["demo", "--memory", "lots"], 2, "failure");

    // With two of them.
    let software = &["--software"][..];
    let state = path("state");
    let software = &[software, &["--state-dir", text(&state)]].concat()[..];
    let source = Setup { vm_arguments: software, ..Setup::new(dir.path(), "source") }.start();
    let waiting = &["--software", "--incoming", "tcp:127.0.0.1:0"][..];
    let destination = Setup { vm_arguments: waiting, ..Setup::new(dir.path(), "destination") }.start();
    let control = |vm: &crate::support::Vm| vm.control.display().to_string();
    let (from, to) = (control(&source), control(&destination));
    let (from, to) = (["--control", from.as_str()], ["--control", to.as_str()]);
    let uri = destination.incoming();
    documents.take(&["status", from[0], from[1]], 0, "status");
    documents.take(&["status", to[0], to[1]], 0, "status");
    documents.take(&["describe", &format!("vm:{}", from[1])], 0, "manifest-machine");
    documents.take(&["check", &format!("vm:{}", from[1]), &uri, "--tls-creds", creds()], 0, "check");
    for verb in ["cancel", "continue"] {
        documents.take(&[verb, from[0], from[1]], 1, "failure");
    }
    documents.take(&["set", from[0], from[1], "--bandwidth", "1M"], 1, "failure");
    documents.take(&["stop", from[0], from[1]], 0, "acknowledged");
    documents.take(&["cont", from[0], from[1]], 0, "acknowledged");
    documents.take(&["incoming", from[0], from[1], "tcp:127.0.0.1:0"], 1, "failure");
    source.warm();
    let nobody = format!("unix:{}", text(&path("nobody")));
    documents.take(&["migrate", from[0], from[1], &nobody], 1, "migrate");
    documents.take(&["migrate", from[0], from[1], "carrier-pigeon:1"], 2, "failure");
    documents.take(&["rehearse", from[0], from[1], "--to", &uri, "--downtime-limit", "30s"], 0, "rehearse");
    documents.take(&["rehearse", from[0], from[1], "--to", &nobody], 1, "failure");
    let guest = path("guest.img");
    documents.take(&["save", from[0], from[1], "-o", text(&guest)], 0, "migrate");
    documents.take(&["save", from[0], from[1], "-o", "/nonexistent/guest.img"], 1, "migrate");
    // A migration that waits can be told other limits, and can be told to go on or to end.
    let wait = &["--detach", "--pause-before-switchover", "--downtime-limit", "30s"][..];
    let begin = |documents: &mut Documents| {
        documents.take(&[&["migrate", from[0], from[1], &uri][..], wait].concat(), 0, "migrate");
        until("the migration to wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
    };
    begin(&mut documents);
    documents.take(&["set", from[0], from[1], "--downtime-limit", "30s"], 0, "acknowledged");
    documents.take(&["status", from[0], from[1]], 0, "status");
    documents.take(&["status", to[0], to[1]], 0, "status");
    documents.take(&["continue", from[0], from[1]], 0, "acknowledged");
    assert_eq!(source.ended()["status"], "completed");
    documents.take(&["status", from[0], from[1]], 0, "status");
    documents.take(&["status", to[0], to[1]], 0, "status");
    documents.take(&["incoming", from[0], from[1], "tcp:127.0.0.1:0"], 0, "acknowledged");
    // And back, at once.
    until("the guest to run there", || (destination.status() == "running").then_some(()));
    let back = source.incoming();
    let limit = ["--downtime-limit", "30s"];
    documents.take(&["migrate", to[0], to[1], &back, limit[0], limit[1]], 0, "migrate");
    until("the guest to run here", || (source.status() == "running").then_some(()));
    let listener = std::os::unix::net::UnixListener::bind(path("silent")).unwrap();
    let silent = format!("unix:{}", text(&path("silent")));
    documents.take(&["migrate", from[0], from[1], &silent, "--detach"], 0, "migrate");
    documents.take(&["cancel", from[0], from[1]], 0, "acknowledged");
    drop(listener);
    documents.take(&["quit", from[0], from[1]], 1, "failure");
    documents.take(&["quit", "--force", from[0], from[1]], 0, "acknowledged");
    documents.take(&["history", "--state-dir", text(&state)], 0, "history");
    documents.take(&["history", "--state-dir", "/nonexistent"], 1, "failure");
    documents.take(&["status", "--state-dir", text(&state)], 0, "status-state-dir");
    documents.take(&["status", "--state-dir", "/nonexistent"], 1, "failure");
    for verb in ["quit", "stop", "cont", "cancel", "continue", "status"] {
        documents.take(&[verb, "--control", "/nonexistent"], 1, "failure");
    }

    documents.validate();
    assert_eq!(documents.reached, listed(), "what is listed in docs/json.md is what was looked at");
}

#[test]
fn a_command_line_that_makes_no_sense_is_a_failure_in_json() {
    let mut documents = Documents::default();
    for words in [
        &["fly"][..],
        &["migrate"],
        &["status", "--nonsense"],
        &["set", "--control", "/nonexistent"],
        &["save", "-o", "/nonexistent/x"],
        &["demo", "--devices", "0"],
        &["check"],
        &["describe"],
        &["incoming", "--control", "/nonexistent", "carrier-pigeon:1"],
    ] {
        documents.take(words, 2, "failure");
    }
    // Behind `--` it is a word like any other.
    assert!(run(&["explain", "--nonsense", "--", "--json"]).stdout.is_empty());
    let valued = run(&["migrate", "--json=x", "--control", "/nowhere", "unix:/nowhere"]);
    let document: Value = serde_json::from_slice(&valued.stdout).expect("a document");
    assert_eq!((valued.status.code(), &document["exit"]), (Some(2), &json!(2)), "{document}");
    documents.validate();
}
