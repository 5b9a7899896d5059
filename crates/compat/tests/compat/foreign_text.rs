//! Whatever text stands wherever in a document: what is said about it has no character that a terminal takes as a command.

use serde_json::{Map, Value, json};
use vfio_migration_compat::labels::from_pairs;
use vfio_migration_compat::{
    DeviceMap, Document, MachineManifest, Manifest, Policy, SCHEMA, SiteFacts, baseline,
    check_device_placement, check_devices, check_machines, check_placement,
};
use vfio_migration_types::is_control;

/// Texts that do something to a terminal: clear it, set its title, change colours; begin another line; change the order.
const HOSTILE: [&str; 3] =
    ["\u{1b}[2J\u{1b}]0;title\u{7}\u{9b}31m\u{7f}\r", "\nanother line", "\u{202e}\u{2066}\u{2028}"];

fn device() -> Value {
    json!({
        "schema": SCHEMA,
        "kind": "device",
        "id": "net0",
        "model": "acme.com/nic",
        "model_version": "1.2.0",
        "loads": "1.0.0-1.9.9",
        "parameters": {"queues": {"value": "four", "off": "none", "allowed": ["four", "five"]}},
        "backend": "kernel",
        "driver": {"name": "mtty", "version": "1.0", "vendor": "acme"},
        "kernel": "6.1",
        "mdev_type": "mtty-2",
        "flags": {"p2p": true, "pre_copy": true},
        "regions": [{"index": 0, "size": 4096}],
        "capabilities": [{"id": 17, "offset": 64}],
        "irqs": {"2": 2},
        "dirty": {"device_log": true},
        "firmware": "22.1",
        "host_driver": "5.1",
        "capacity": {"vram": 4096},
        "facts": {"ports": "two", "capabilities": "all"},
        "config_mask": ["ignore 0x50+8"],
        "later": {"field": "value"},
    })
}

fn plain_device() -> Value {
    let mut device = device();
    device.as_object_mut().unwrap().retain(|name, _| name != "schema" && name != "kind");
    device
}

fn machine() -> Value {
    json!({
        "schema": SCHEMA, "kind": "machine", "machine": "pc", "accelerator": "kvm", "vcpus": 1,
        "ram": [{"gpa": 0, "len": 4096}], "cpu": ["cpuid.1"], "sections": {"serial": 1}, "devices": [plain_device()],
    })
}

fn host() -> Value {
    json!({
        "schema": SCHEMA, "kind": "host", "name": "a", "cpu": ["cpuid.2"], "vcpus": 8, "memory": 1 << 30, "kernel": "6.1",
        "devices": [plain_device()], "offers": [{"device": plain_device(), "count": 3}],
        "accepts": [{"model": "acme.com/nic", "versions": "1.0.0-", "parameters": {"queues": ["four"]}}],
        "limits": {"parallel": 2},
    })
}

fn policy() -> Value {
    json!({
        "allow": [{"code": "device-parameter", "device": "net0", "model": "m", "field": "parameters.queues", "reason": "r"}],
        "config_mask": [{"vendor": 1, "rules": ["ignore 0x50+8"], "reason": "r"}],
        "map": {"net0": "net1"},
    })
}

/// `tree` in every form that has `hostile` at one place: in a text's stead, behind it, as a field's name, or as a field of
/// its own.
fn forms(tree: &Value, hostile: &str) -> Vec<Value> {
    let mut found = vec![Value::from(hostile)];
    match tree {
        Value::String(text) => found.push(format!("{text}{hostile}").into()),
        Value::Array(items) => {
            for (n, item) in items.iter().enumerate() {
                for form in forms(item, hostile) {
                    let mut items = items.clone();
                    items[n] = form;
                    found.push(items.into());
                }
            }
        }
        Value::Object(fields) => {
            let with = |name: &str, value: Value, without: Option<&String>| {
                let kept = fields.iter().filter(|(name, _)| Some(*name) != without);
                let mut fields: Map<_, _> = kept.map(|(name, value)| (name.clone(), value.clone())).collect();
                fields.insert(name.to_owned(), value);
                Value::Object(fields)
            };
            for (name, value) in fields {
                found.push(with(&format!("{name}{hostile}"), value.clone(), Some(name)));
                found.push(with(&format!("{name}{hostile}"), json!([{"no": []}]), Some(name)));
                found.extend(forms(value, hostile).into_iter().map(|form| with(name, form, None)));
            }
            found.push(with(hostile, json!("x"), None));
        }
        _ => {}
    }
    found
}

/// What is said has nothing hostile in it.
fn shown(said: impl ToString, of: &Value) {
    let said = said.to_string();
    assert!(!said.contains(is_control), "{said:?} is said of {of}");
}

fn judged(report: &vfio_migration_compat::Report, of: &Value) {
    for reason in &report.reasons {
        shown(&reason.text, of);
        shown(&reason.field, of);
        shown(&reason.code, of);
    }
    report.map.iter().for_each(|(from, to)| shown(format!("{from} {to}"), of));
}

fn read(tree: &Value) -> Document {
    Document::parse(tree.to_string().as_bytes(), "f").unwrap()
}

#[test]
fn what_is_said_of_a_manifest_is_printable() {
    let policy = Policy::default();
    let whole = [device(), machine(), host()].map(|tree| read(&tree).manifest);
    let (mut errors, mut reports) = (0, 0);
    let mut compare = |one: &Manifest, other: &Manifest, of: &Value| {
        let report = match (one, other) {
            (Manifest::Device(one), Manifest::Device(other)) => check_devices(one, other, &policy),
            (Manifest::Device(one), Manifest::Host(other)) => check_device_placement(one, other, &policy),
            (Manifest::Machine(one), Manifest::Machine(other)) => {
                check_machines(one, other, &DeviceMap::new(), &policy)
            }
            (Manifest::Machine(one), Manifest::Host(other)) => check_placement(one, other, &policy),
            _ => return,
        };
        judged(&report, of);
        reports += 1;
    };
    for hostile in HOSTILE {
        for form in [device(), machine(), host()].iter().flat_map(|tree| forms(tree, hostile)) {
            let text = form.to_string();
            match Document::parse(text.as_bytes(), &format!("file{hostile}")) {
                Ok(document) => {
                    document.unknown().iter().for_each(|path| shown(path, &form));
                    for other in &whole {
                        compare(&document.manifest, other, &form);
                        compare(other, &document.manifest, &form);
                    }
                    if let (Manifest::Host(one), Manifest::Host(other)) = (&document.manifest, &whole[2]) {
                        shown(&one.name, &form);
                        let pool = [(**one).clone(), (**other).clone()];
                        for model in ["acme.com/nic", &format!("acme.com/nic{hostile}"), hostile] {
                            if let Err(error) = baseline(&pool, model) {
                                shown(error, &form);
                            }
                        }
                    }
                }
                Err(error) => {
                    shown(&error, &form);
                    errors += 1;
                }
            }
            // What comes over the wire has no schema and no kind.
            if let Err(error) = MachineManifest::from_json(text.as_bytes()) {
                shown(error, &form);
            }
        }
    }
    assert!(errors > 300 && reports > 300, "{errors} errors and {reports} reports were looked at");
}

#[test]
fn what_is_said_of_a_policy_or_a_site_file_is_printable() {
    let mut errors = 0;
    let (one, mut two) = (device(), device());
    two["parameters"]["queues"]["value"] = "five".into();
    let (Manifest::Device(one), Manifest::Device(two)) = (read(&one).manifest, read(&two).manifest) else {
        panic!("both are devices")
    };
    for hostile in HOSTILE {
        for form in forms(&policy(), hostile) {
            match Policy::parse(form.to_string().as_bytes(), hostile) {
                Ok(policy) => judged(&check_devices(&one, &two, &policy), &form),
                Err(error) => {
                    shown(error, &form);
                    errors += 1;
                }
            }
        }
        // The same as TOML, where a text may also stand raw: as a comment, a key, a value, or as no TOML at all.
        let quoted = json!(hostile);
        for toml in [
            format!("{hostile} = 1"),
            format!("{quoted} = 1"),
            format!("# {hostile}\n{quoted} = 1"),
            format!("max_state_size = {quoted}"),
            format!("max_state_size = \"{hostile}\""),
            format!("max_state_size = {hostile}"),
            format!("[[allow]]\ncode = {quoted}"),
            format!("[map]\n{quoted} = \"net0\""),
            format!("[map]\nnet0 = {quoted}"),
            format!("[[config_mask]]\nrules = [{quoted}]"),
            format!("[{hostile}"),
            format!("[devices.net0]\n{quoted} = 1\nid = {quoted}"),
        ] {
            for error in [
                Policy::parse(toml.as_bytes(), "f").err(),
                SiteFacts::parse(toml.as_bytes(), "f")
                    .and_then(|facts| facts.fill(&Manifest::Device(one.clone()).into()))
                    .err(),
            ] {
                errors += usize::from(error.is_some());
                error.iter().for_each(|error| shown(error, &json!(toml)));
            }
        }
        for pairs in [format!("a{hostile}=1"), format!("kind={hostile}"), format!("{hostile}=\"")] {
            if let Err(error) = from_pairs(&pairs, hostile) {
                shown(error, &json!(pairs));
            }
        }
    }
    assert!(errors > 100, "{errors} errors were looked at");
}

#[test]
fn an_error_in_toml_names_its_line_and_column() {
    let error = Policy::parse(b"# a policy\nmax_state_size = \"many\"\n", "p.toml").unwrap_err();
    assert_eq!(error.path(), "max_state_size");
    assert!(error.rule().contains("line 2, column 18: "), "{error}");
    let error = Policy::parse(b"a =\n", "p.toml").unwrap_err();
    assert!(error.to_string().starts_with("p.toml: no TOML: line 1, column "), "{error}");
}
