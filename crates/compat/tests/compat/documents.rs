//! Documents as strangers may send them: what is wrong is named by place and rule, and nothing panics.

use proptest::prelude::*;
use serde_json::{Value, json};
use vfio_migration_compat::labels::{from_pairs, to_pairs};
use vfio_migration_compat::{
    DeviceManifest, Document, HostManifest, MachineManifest, Manifest, ManifestError, Parameter, Policy,
    SCHEMA, Scalar,
};
use vfio_migration_types::DeviceId;

fn device() -> Value {
    json!({
        "schema": SCHEMA,
        "kind": "device",
        "id": "net0",
        "model": "acme.com/nic",
        "model_version": "1.2.0",
        "parameters": {"queues": {"value": 4, "off": 1, "allowed": [{"min": 1, "max": 4}, 8]}, "on": true},
        "flags": {"p2p": true, "pre_copy": false},
        "pci": {"vendor": 1, "device": 2, "subsystem_vendor": 3, "subsystem": 4, "revision": 5, "class": 6},
        "regions": [{"index": 0, "size": 4096}],
        "capabilities": [{"id": 17, "offset": 64}],
        "irqs": {"2": 2},
        "facts": {"name with = and .": "true", "empty": ""},
        "config_mask": ["ignore 0x50+8"],
    })
}

fn host() -> Value {
    let mut device = device();
    device.as_object_mut().unwrap().retain(|name, _| name != "schema" && name != "kind");
    json!({"schema": SCHEMA, "kind": "host", "name": "a", "devices": [device], "offers": [{"device": device, "count": 3}]})
}

fn parse(tree: &Value) -> Result<Document, ManifestError> {
    Document::parse(tree.to_string().as_bytes(), "file.json")
}

/// `change` is refused at `path` with a rule that says `rule`.
fn refused(mut tree: Value, change: impl FnOnce(&mut Value), path: &str, rule: &str) {
    parse(&tree).unwrap();
    change(&mut tree);
    let error = parse(&tree).unwrap_err();
    assert_eq!((error.origin(), error.path()), ("file.json", path), "{error}");
    assert!(error.rule().contains(rule), "{error}");
    assert!(error.to_string().starts_with("file.json: ") && error.to_string().contains(path), "{error}");
}

#[test]
fn a_breach_is_named_by_file_place_and_rule() {
    let cases: &[(&str, Value, &str, &str)] = &[
        ("/schema", json!("vfio-migrate.org/manifest/2"), "schema", "another version"),
        ("/schema", json!("x"), "schema", "no schema of a manifest"),
        ("/schema", json!(1), "schema", "must be text"),
        ("/kind", json!("cat"), "kind", "want device, machine or host"),
        ("/id", json!("a/b"), "id", "cannot name a device"),
        ("/model", json!(7), "model", "invalid type"),
        ("/model_version", json!("one"), "model_version", "want X.Y.Z"),
        ("/regions/0/size", json!(-1), "regions[0].size", "invalid value"),
        ("/regions/0/size", json!(1.5), "regions[0].size", "must be whole"),
        ("/regions", json!([{"index": 1, "size": 1}, {"index": 1, "size": 2}]), "regions[1].index", "twice"),
        ("/irqs/2", json!(70000), "irqs.2", "at most 2048"),
        ("/pci/class", json!(1 << 25), "pci.class", "24 bits"),
        ("/pci/vendor", json!(65536), "pci.vendor", "invalid value"),
        ("/capabilities/0/offset", json!(4096), "capabilities[0].offset", "beyond config space"),
        ("/parameters/queues/value", json!([]), "parameters.queues.value", "invalid type"),
        ("/parameters/queues/allowed/0/max", json!(0), "parameters.queues.allowed[0]", "empty"),
        ("/config_mask/0", json!("skip"), "config_mask[0]", "no rule for config space"),
        ("/model", json!("x".repeat(5000)), "model", "5000 bytes"),
    ];
    for (at, value, path, rule) in cases {
        refused(device(), |tree| *tree.pointer_mut(at).unwrap() = value.clone(), path, rule);
    }
    let cases: &[(&str, Value, &str, &str)] = &[
        ("/name", json!(""), "name", "needs a name"),
        ("/devices/0/irqs/2", json!(3000), "devices[0].irqs.2", "2048"),
        ("/offers/0/device/model_version", json!("1"), "offers[0].device.model_version", "X.Y.Z"),
        ("/offers/0/count", json!(-1), "offers[0].count", "invalid value"),
    ];
    for (at, value, path, rule) in cases {
        refused(host(), |tree| *tree.pointer_mut(at).unwrap() = value.clone(), path, rule);
    }
    let twice = |tree: &mut Value| {
        let first = tree["devices"][0].clone();
        tree["devices"].as_array_mut().unwrap().push(first);
    };
    refused(host(), twice, "devices[1].id", "net0 twice");
    let accepts = |tree: &mut Value| tree["accepts"] = json!([{"model": "m", "versions": "2-1"}]);
    refused(host(), accepts, "accepts[0].versions", "version ranges");
}

#[test]
fn text_that_is_no_tree_is_refused_with_its_place() {
    let error = |text: &str| Document::parse(text.as_bytes(), "f").unwrap_err();
    assert_eq!(error("{\"a\":{\"b\":1,\"b\":2}}").path(), "a.b");
    assert!(error("{\"a\":{\"b\":1,\"b\":2}}").rule().contains("twice"));
    assert!(error(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000))).rule().contains("deeper"));
    let many = format!("{{\"a\":[{}0]}}", "0,".repeat(4096));
    assert_eq!((error(&many).path(), error(&many).rule().contains("more than 4096")), ("a", true));
    assert!(error(&" ".repeat(Document::MAX_BYTES + 1)).rule().contains("at most"));
    for text in ["", "{", "[]", "null", "{\"schema\":1e400}", "{} {}", "{\"kind\":\"device\"}"] {
        assert!(Document::parse(text.as_bytes(), "f").is_err(), "{text}");
    }
}

#[test]
fn unknown_fields_are_listed_and_kept() {
    let mut tree = host();
    tree["later"] = json!({"deep": [1, 2]});
    tree["limits"] = json!({"watts": 3});
    tree["devices"][0]["colour"] = json!("blue");
    tree["devices"][0]["pci"]["lane"] = json!(4);
    tree["devices"][0]["flags"]["post_copy"] = json!(false);
    tree["devices"][0]["parameters"]["queues"]["description"] = json!("how many");
    tree["offers"][0]["device"]["regions"][0]["cached"] = json!(true);
    let document = parse(&tree).unwrap();
    let mut unknown = document.unknown();
    unknown.sort();
    assert_eq!(
        unknown,
        [
            "devices[0].colour",
            "devices[0].flags.post_copy",
            "devices[0].parameters.queues.description",
            "devices[0].pci.lane",
            "later",
            "limits.watts",
            "offers[0].device.regions[0].cached"
        ]
    );
    let back = Document::parse(document.to_json().as_bytes(), "f").unwrap();
    assert_eq!((&back.unknown(), &back.manifest), (&document.unknown(), &document.manifest));
    let printed: Value = serde_json::from_str(&document.to_json()).unwrap();
    assert_eq!(printed["devices"][0]["pci"]["lane"], 4);
    assert_eq!(printed["later"]["deep"][1], 2);
    assert!(parse(&device()).unwrap().unknown().is_empty());
    // What was only mentioned as unknown is no longer, once it is left out.
    assert!(
        Document::from(match back.manifest {
            Manifest::Host(host) => HostManifest { extra: Default::default(), ..*host },
            other => panic!("{other:?}"),
        })
        .unknown()
        .is_empty()
    );
}

#[test]
fn printing_is_stable_and_what_is_unknown_is_null() {
    let document = parse(&device()).unwrap();
    let text = document.to_json();
    assert_eq!(parse(&serde_json::from_str(&text).unwrap()).unwrap().to_json(), text);
    let printed: Value = serde_json::from_str(&text).unwrap();
    for name in ["firmware", "driver", "dirty", "state_size", "loads"] {
        assert!(printed[name].is_null(), "{name}");
    }
    let Manifest::Device(device) = &document.manifest else { panic!("{document:?}") };
    assert_eq!(device.parameters["on"], Parameter::new(true));
    assert_eq!(document.manifest.kind(), "device");
}

#[test]
fn what_a_server_declares_has_the_name_it_was_given() {
    let id = DeviceId::new("mine").unwrap();
    let declared = DeviceManifest::declared(br#"{"id":"x","model":"m","later":1}"#, id.clone(), "s").unwrap();
    assert_eq!((&declared.id, declared.model.as_deref()), (&id, Some("m")));
    assert_eq!(declared.extra["later"], 1);
    let vain: Vec<&str> = declared.notes.iter().map(|note| note.field.as_str()).collect();
    assert_eq!(vain, ["id", "later"]);
    let text = br#"{"schema":"x","parameters":{"q":{"value":1,"alowed":[1]}},"flags":{"p2p":1},"regions":7}"#;
    let declared = DeviceManifest::declared(text, id.clone(), "s").unwrap();
    let vain: Vec<&str> = declared.notes.iter().map(|note| note.field.as_str()).collect();
    assert_eq!(vain, ["flags", "regions", "parameters.q.alowed"]);
    assert_eq!((declared.flags, declared.regions), (None, None));
    let error = DeviceManifest::declared(br#"{"facts":{"a":{}}}"#, id.clone(), "s").unwrap_err();
    assert_eq!(error.path(), "facts.a");
    assert!(DeviceManifest::declared(b"[]", id, "s").is_err());
}

#[test]
fn lines_read_back() {
    for tree in [device(), host()] {
        let document = parse(&tree).unwrap();
        let lines = to_pairs(&document);
        let back = from_pairs(&lines, "f").unwrap();
        assert_eq!(back.manifest, document.manifest, "{lines}");
        assert_eq!(to_pairs(&back), lines);
    }
    let lines = to_pairs(&parse(&device()).unwrap());
    for line in ["kind=device\n", "model_version=1.2.0\n", "regions[0].size=4096\n", "facts.empty=\"\"\n"] {
        assert!(lines.contains(line), "{lines}");
    }
    assert!(lines.contains("facts[\"name with = and .\"]=\"true\"\n"), "{lines}");
    assert!(!lines.contains("firmware"), "{lines}");
    let good =
        format!("# a comment\n\nschema={SCHEMA}\nkind=device\nid=d\nregions[0].index=1\nregions[0].size=2\n");
    from_pairs(&good, "f").unwrap();
    for (bad, rule) in [
        ("id=e", "said before"),
        ("nonsense", "no path=value"),
        ("=1", "no path=value"),
        ("a..b=1", "no path=value"),
        ("a=[1]", "no path=value"),
        ("regions[9].size=1", "one after the other"),
        ("regions[0].size.x=1", "something else"),
        ("id.x=1", "something else"),
        ("model={", "no path=value"),
    ] {
        let error = from_pairs(&format!("{good}{bad}\n"), "f").unwrap_err();
        assert!(error.rule().contains(rule) && error.path() == "line 8", "{bad}: {error}");
    }
}

#[test]
fn policies_are_read_from_toml_and_json_and_typos_are_refused() {
    let text = "max_state_size = 4096\nrequire_declared_model = true\n\n[[allow]]\ncode = \"strict-parameter\"\nfield = \"parameters.ecc\"\nreason = \"tried\"\n\n[[config_mask]]\nvendor = 0x10de\nrules = [\"ignore 0x50+8\"]\n\n[map]\nnet0 = \"eth0\"\n";
    let policy = Policy::parse(text.as_bytes(), "site.toml").unwrap();
    assert_eq!((policy.max_state_size, policy.allow.len(), policy.map.0.len()), (Some(4096), 1, 1));
    let json = serde_json::to_string(&policy).unwrap();
    assert_eq!(Policy::parse(json.as_bytes(), "site.json").unwrap(), policy);
    assert_eq!(Policy::parse(b"", "empty").unwrap(), Policy::default());
    let pci = vfio_migration_compat::PciIdentity { vendor: 0x10de, ..Default::default() };
    assert_eq!(policy.mask_rules(Some(pci), &[]).len(), 1);
    assert_eq!(policy.mask_rules(None, &[]).len(), 0);
    for (text, path, rule) in [
        ("alow = []", "", "unknown field"),
        ("[[allow]]\ncode = \"x\"", "allow[0].code", "no reason of code"),
        ("[[allow]]\ncode = \"vcpus\"\nfeild = \"x\"", "allow[0].feild", "unknown field"),
        ("max_state_size = -1", "max_state_size", "invalid value"),
        ("max_state_size = 1.5", "max_state_size", "invalid type"),
        ("map = 1", "map", "invalid type"),
        ("[[config_mask]]\nrules = [\"x\"]", "config_mask[0].rules[0]", "no rule"),
        ("= 1", "", "TOML"),
    ] {
        let error = Policy::parse(text.as_bytes(), "p").unwrap_err();
        let placed = error.path() == path || path.is_empty() || error.path() == "allow[0]";
        assert!(placed && error.rule().contains(rule), "{text}: {error}");
    }
}

#[test]
fn scalars_are_read_as_they_are_typed() {
    assert_eq!(Scalar::typed("true"), Scalar::Bool(true));
    assert_eq!(Scalar::typed("-7"), Scalar::Int(-7));
    assert_eq!(Scalar::typed("7x"), Scalar::from("7x"));
    let big = json!({"schema": SCHEMA, "kind": "device", "id": "d", "facts": {"n": u64::MAX}});
    let error = parse(&big).unwrap_err();
    assert_eq!((error.path(), error.rule().contains("2^63")), ("facts.n", true));
}

proptest! {
    #[test]
    fn damaged_documents_never_panic_and_name_a_place(at: proptest::sample::Index, byte: u8, cut: bool) {
        let mut bytes = host().to_string().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if cut {
            bytes.truncate(at);
        }
        if let Err(error) = Document::parse(&bytes, "f") {
            prop_assert!(!error.rule().is_empty());
        }
        let _ = MachineManifest::from_json(&bytes);
        let _ = Policy::parse(&bytes, "f");
        let _ = from_pairs(&String::from_utf8_lossy(&bytes), "f");
    }

    #[test]
    fn damaged_lines_never_panic(at: proptest::sample::Index, byte in 32u8..127) {
        let mut bytes = to_pairs(&parse(&host()).unwrap()).into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Err(error) = from_pairs(&String::from_utf8_lossy(&bytes), "f") {
            prop_assert!(!error.rule().is_empty());
        }
    }

    #[test]
    fn any_text_of_lines_never_panics(text in "([a-c\\[\\]0-9\".={}]{0,12}\n){0,6}") {
        let _ = from_pairs(&text, "f");
    }
}

/// docs/devices.md tells the author of a server of every field that there is, and its example has none in vain.
#[test]
fn the_manifest_of_a_server_is_documented() {
    let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs");
    let page = std::fs::read_to_string(format!("{docs}/devices.md")).unwrap();
    let (_, section) = page.split_once("## The manifest of a vfio-user server").unwrap();
    let (section, _) = section.split_once("\n## ").unwrap();
    let schema = std::fs::read(format!("{docs}/schemas/manifest-device.json")).unwrap();
    let schema: Value = serde_json::from_slice(&schema).unwrap();
    let (makers, rest) = section.split_once("Not the maker's to say").unwrap();
    for field in schema["properties"].as_object().unwrap().keys().filter(|field| *field != "notes") {
        let found_out = DeviceManifest::FOUND_OUT.contains(&field.as_str());
        let (told, shown) =
            if found_out { (rest, format!("`{field}`")) } else { (makers, format!("| `{field}` |")) };
        assert!(told.contains(&shown), "{field} is not told of");
    }
    let (_, example) = section.split_once("```json\n").unwrap();
    let (example, _) = example.split_once("```").unwrap();
    let id = DeviceId::new("net0").unwrap();
    let declared = DeviceManifest::declared(example.as_bytes(), id, "the example").unwrap();
    assert_eq!(declared.notes, []);
    assert_eq!(declared.parameters.len(), 2);
}
