//! One test per reason code, each with its negative control; and documents as strangers may send them.

use std::collections::BTreeMap;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use vfio_migration_compat::{
    DeviceManifest, MachineManifest, ManifestError, PciIdentity, RamRegion, RegionManifest, Verdict,
    WhoCanFix, compare,
};
use vfio_migration_types::{DeviceId, Gpa, MigrationFlags};

fn device(id: &str) -> DeviceManifest {
    DeviceManifest {
        id: DeviceId::new(id).unwrap(),
        model: Some("vfio-migrate.org/sample".into()),
        model_version: Some("1.2".into()),
        backend: "vfio-user".into(),
        flags: MigrationFlags { p2p: true, pre_copy: true },
        pci: Some(PciIdentity {
            vendor: 0x5646,
            device: 0x4d53,
            subsystem_vendor: 0x5646,
            subsystem: 1,
            revision: 1,
            class: 0xff_0000,
        }),
        regions: vec![RegionManifest { index: 0, size: 0x4000 }, RegionManifest { index: 2, size: 1 << 20 }],
        irqs: BTreeMap::from([(2, 2)]),
        parameters: BTreeMap::from([("state_size".into(), "67108864".into())]),
    }
}

fn machine() -> MachineManifest {
    let strings = |words: &[&str]| words.iter().map(ToString::to_string).collect();
    MachineManifest {
        machine: "vfio-migrate/q1".into(),
        accelerator: "kvm".into(),
        vcpus: 2,
        ram: vec![RamRegion { gpa: Gpa(0), len: 3 << 30 }, RamRegion { gpa: Gpa(4 << 30), len: 1 << 30 }],
        cpu: strings(&["avx", "sse2"]),
        sections: BTreeMap::from([("vcpu".into(), 3), ("clock".into(), 1)]),
        devices: vec![device("net0"), device("net1")],
    }
}

/// The codes of all reasons after `change` was made to the destination.
fn codes<R>(change: impl FnOnce(&mut MachineManifest) -> R) -> Vec<String> {
    let mut destination = machine();
    change(&mut destination);
    codes_of(&machine(), &destination)
}

/// The codes where net0 declares no model at either side, after `change` was made to the destination's.
fn undeclared(change: impl FnOnce(&mut DeviceManifest)) -> Vec<String> {
    let mut source = machine();
    source.devices[0].model = None;
    let mut destination = source.clone();
    change(&mut destination.devices[0]);
    let (_, reasons) = compare(&source, &destination);
    for reason in &reasons {
        assert!(reason.text.contains("strict"), "{}", reason.text);
    }
    codes_of(&source, &destination)
}

fn codes_of(source: &MachineManifest, destination: &MachineManifest) -> Vec<String> {
    let (verdict, reasons) = compare(source, destination);
    assert_eq!(verdict == Verdict::Live, reasons.is_empty());
    reasons.into_iter().map(|reason| reason.code).collect()
}

fn none() -> Vec<String> {
    Vec::new()
}

#[test]
fn equal_machines_move() {
    assert_eq!(compare(&machine(), &machine()), (Verdict::Live, Vec::new()));
    assert_eq!(undeclared(|_| {}), none());
}

#[test]
fn machine_kind() {
    assert_eq!(codes(|m| m.machine = "vfio-migrate/q2".into()), ["machine-kind"]);
    assert_eq!(codes(|m| m.machine = "vfio-migrate/q1".into()), none());
}

#[test]
fn accelerator() {
    assert_eq!(codes(|m| m.accelerator = "software".into()), ["accelerator"]);
    assert_eq!(codes(|m| m.accelerator = "kvm".into()), none());
}

#[test]
fn vcpus() {
    assert_eq!(codes(|m| m.vcpus = 1), ["vcpus"]);
    assert_eq!(codes(|m| m.vcpus = 4), ["vcpus"]);
    assert_eq!(codes(|m| m.vcpus = 2), none());
}

#[test]
fn ram_layout() {
    assert_eq!(codes(|m| m.ram[0].len += 4096), ["ram-layout"]);
    assert_eq!(codes(|m| m.ram[1].gpa = Gpa(5 << 30)), ["ram-layout"]);
    assert_eq!(codes(|m| m.ram.pop()), ["ram-layout"]);
    // RAM offsets follow the order, so the order counts.
    assert_eq!(codes(|m| m.ram.reverse()), ["ram-layout"]);
    assert_eq!(codes(|m| m.ram[0].len = 3 << 30), none());
}

#[test]
fn cpu_features() {
    assert_eq!(codes(|m| m.cpu.pop()), ["cpu-features"]);
    assert_eq!(codes(|m| m.cpu.clear()), ["cpu-features"]);
    assert_eq!(codes(|m| m.cpu.push("avx512f".into())), none(), "more is fine");
    assert_eq!(codes(|m| m.cpu.reverse()), none(), "order is not");
}

#[test]
fn section_unknown() {
    assert_eq!(codes(|m| m.sections.remove("clock")), ["section-unknown"]);
    assert_eq!(codes(|m| m.sections.clear()), ["section-unknown", "section-unknown"]);
    assert_eq!(codes(|m| m.sections.insert("more".into(), 1)), none(), "the destination may know more");
}

#[test]
fn section_older() {
    assert_eq!(codes(|m| m.sections.insert("vcpu".into(), 2)), ["section-older"]);
    assert_eq!(codes(|m| m.sections.insert("vcpu".into(), 4)), none(), "newer is fine");
}

#[test]
fn device_duplicate() {
    assert_eq!(codes(|m| m.devices.push(device("net0"))), ["device-duplicate"]);
    let mut source = machine();
    source.devices.push(device("net1"));
    assert_eq!(codes_of(&source, &machine()), ["device-duplicate"]);
}

#[test]
fn device_missing() {
    assert_eq!(codes(|m| m.devices.pop()), ["device-missing"]);
    assert_eq!(codes(|m| m.devices.clear()), ["device-missing", "device-missing"]);
    assert_eq!(codes(|m| m.devices.reverse()), none(), "names count, not the order");
}

#[test]
fn device_extra() {
    assert_eq!(codes(|m| m.devices.push(device("net2"))), ["device-extra"]);
    assert_eq!(
        codes(|m| m.devices[1].id = DeviceId::new("net2").unwrap()),
        ["device-missing", "device-extra"]
    );
}

#[test]
fn device_model() {
    assert_eq!(codes(|m| m.devices[0].model = Some("other".into())), ["device-model"]);
    assert_eq!(codes(|m| m.devices[0].model = None), ["device-model"]);
    let mut source = machine();
    source.devices[0].model = None;
    assert_eq!(codes_of(&source, &machine()), ["device-model"]);
    assert_eq!(
        codes(|m| m.devices[0].backend = "kernel".into()),
        none(),
        "who serves the model does not matter"
    );
}

#[test]
fn device_model_version() {
    let with = |version: Option<&str>| codes(|m| m.devices[0].model_version = version.map(Into::into));
    for bad in ["1.1", "2.2", "2.0", "0.9", "1", "1.", ".2", "1.+2", "1.2.0", "1.99999999999", "one.two", ""]
    {
        assert_eq!(with(Some(bad)), ["device-model-version"], "{bad}");
    }
    assert_eq!(with(None), ["device-model-version"]);
    for good in ["1.2", "1.3", "1.10"] {
        assert_eq!(with(Some(good)), none(), "{good}");
    }
    assert_eq!(undeclared(|d| d.model_version = Some("1.3".into())), ["device-model-version"]);
    let mut neither = machine();
    neither.devices[0].model_version = None;
    assert_eq!(codes_of(&neither, &neither), none());
}

#[test]
fn device_flags_count_only_where_equality_is_strict() {
    for flags in MigrationFlags::ALL {
        assert_eq!(codes(|m| m.devices[0].flags = flags), none());
        let equal = flags == MigrationFlags { p2p: true, pre_copy: true };
        let expected: &[&str] = if equal { &[] } else { &["device-flags"] };
        assert_eq!(undeclared(|d| d.flags = flags), expected);
    }
}

#[test]
fn device_pci_identity() {
    let changes: [fn(&mut PciIdentity); 6] = [
        |pci| pci.vendor += 1,
        |pci| pci.device += 1,
        |pci| pci.subsystem_vendor += 1,
        |pci| pci.subsystem += 1,
        |pci| pci.revision += 1,
        |pci| pci.class += 1,
    ];
    for change in changes {
        assert_eq!(codes(|m| change(m.devices[0].pci.as_mut().unwrap())), ["device-pci-identity"]);
        assert_eq!(undeclared(|d| change(d.pci.as_mut().unwrap())), ["device-pci-identity"]);
    }
    assert_eq!(codes(|m| m.devices[0].pci = None), ["device-pci-identity"]);
    assert_eq!(codes(|m| m.devices.iter_mut().for_each(|d| d.pci.as_mut().unwrap().revision = 1)), none());
}

#[test]
fn device_regions() {
    assert_eq!(codes(|m| m.devices[0].regions[1].size *= 2), ["device-regions"]);
    assert_eq!(codes(|m| m.devices[0].regions[1].index = 4), ["device-regions"]);
    assert_eq!(codes(|m| m.devices[0].regions.pop()), ["device-regions"]);
    let extra =
        |size| move |m: &mut MachineManifest| m.devices[0].regions.push(RegionManifest { index: 7, size });
    assert_eq!(codes(extra(256)), ["device-regions"]);
    assert_eq!(codes(extra(0)), none(), "a region of no bytes is none");
    assert_eq!(codes(|m| m.devices[0].regions.reverse()), none());
}

#[test]
fn device_irqs() {
    assert_eq!(codes(|m| m.devices[0].irqs.insert(2, 3)), ["device-irqs"]);
    assert_eq!(codes(|m| m.devices[0].irqs.insert(0, 1)), ["device-irqs"]);
    assert_eq!(codes(|m| m.devices[0].irqs.clear()), ["device-irqs"]);
    assert_eq!(codes(|m| m.devices[0].irqs.insert(0, 0)), none(), "no vectors are none");
}

#[test]
fn device_parameters() {
    let set = |name: &str, value: &str| codes(|m| m.devices[0].parameters.insert(name.into(), value.into()));
    assert_eq!(set("state_size", "1"), ["device-parameters"]);
    assert_eq!(set("more", "1"), ["device-parameters"]);
    assert_eq!(codes(|m| m.devices[0].parameters.clear()), ["device-parameters"]);
    assert_eq!(set("state_size", "67108864"), none());
}

#[test]
fn every_reason_is_listed_with_who_can_fix_it() {
    let mut destination = machine();
    destination.machine = "x".into();
    destination.accelerator = "software".into();
    destination.vcpus = 9;
    destination.ram.clear();
    destination.cpu.clear();
    destination.sections = BTreeMap::from([("vcpu".into(), 1)]);
    destination.devices = vec![device("net1"), device("net7")];
    let net1 = &mut destination.devices[0];
    net1.model_version = Some("0.1".into());
    net1.pci = None;
    net1.regions.clear();
    net1.irqs.clear();
    net1.parameters.clear();
    let (verdict, reasons) = compare(&machine(), &destination);
    assert_eq!(verdict, Verdict::No);
    let found: Vec<(&str, WhoCanFix)> =
        reasons.iter().map(|reason| (reason.code.as_str(), reason.who)).collect();
    assert_eq!(
        found,
        [
            ("machine-kind", WhoCanFix::Configuration),
            ("accelerator", WhoCanFix::DestinationHost),
            ("vcpus", WhoCanFix::Configuration),
            ("ram-layout", WhoCanFix::Configuration),
            ("cpu-features", WhoCanFix::DestinationHost),
            ("section-unknown", WhoCanFix::DestinationHost),
            ("section-older", WhoCanFix::DestinationHost),
            ("device-missing", WhoCanFix::Configuration),
            ("device-model-version", WhoCanFix::Device),
            ("device-pci-identity", WhoCanFix::Device),
            ("device-regions", WhoCanFix::Device),
            ("device-irqs", WhoCanFix::Device),
            ("device-parameters", WhoCanFix::Configuration),
            ("device-extra", WhoCanFix::Configuration),
        ]
    );
    assert!(reasons.iter().all(|reason| !reason.text.contains("strict")));
}

#[test]
fn a_strangers_words_are_quoted_and_cut() {
    let mut destination = machine();
    destination.machine = format!("\u{1b}[31m\n{}", "x".repeat(10_000));
    destination.devices[0].parameters =
        (0..100).map(|n| (format!("\u{7}{n}{}", "y".repeat(500)), "z".repeat(500))).collect();
    for reason in compare(&machine(), &destination).1 {
        assert!(reason.text.len() < 4000, "{}", reason.text.len());
        assert!(!reason.text.contains(|letter: char| letter.is_control()), "{:?}", reason.text);
    }
}

#[test]
fn documents_out_of_bounds_are_refused() {
    let json = machine().to_json().unwrap();
    assert_eq!(MachineManifest::from_json(&json).unwrap(), machine());
    let text = String::from_utf8(json).unwrap();
    let refused = |text: &str| MachineManifest::from_json(text.as_bytes()).unwrap_err();

    let long = format!("{text}{}", " ".repeat(MachineManifest::MAX_BYTES + 1 - text.len()));
    assert!(matches!(refused(&long), ManifestError::TooLong(n) if n == MachineManifest::MAX_BYTES + 1));
    MachineManifest::from_json(&long.as_bytes()[..MachineManifest::MAX_BYTES]).unwrap();

    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for bad in [
        "",
        "{}",
        "[]",
        "null",
        &text[..text.len() - 1],
        &format!("{text}x"),
        &deep,
        &text.replace("net0", "n/0"),
    ] {
        assert!(matches!(refused(bad), ManifestError::Malformed(_)), "{bad:.80}");
    }
    for field in ["\"machine\":", "\"gpa\":", "\"backend\":", "\"p2p\":", "\"subsystem\":", "\"size\":"] {
        let unknown = text.replacen(field, &format!("\"later\":1,{field}"), 1);
        assert_ne!(unknown, text);
        let error = refused(&unknown);
        let ManifestError::Malformed(cause) = &error else { panic!("{error:?}") };
        assert!(cause.to_string().contains("unknown field `later`"), "{cause}");
    }

    let mut many = machine();
    many.devices = (0..64).map(|n| device(&format!("d{n}"))).collect();
    MachineManifest::from_json(&many.to_json().unwrap()).unwrap();
    many.devices.push(device("one-more"));
    assert!(matches!(many.to_json(), Err(ManifestError::TooMany { what: "devices", count: 65, max: 64 })));
    let raw = serde_json::to_string(&many).unwrap();
    assert!(matches!(refused(&raw), ManifestError::TooMany { what: "devices", .. }));

    let mut twice = machine();
    twice.devices[1].id = DeviceId::new("net0").unwrap();
    assert!(matches!(refused(&serde_json::to_string(&twice).unwrap()), ManifestError::Twice(_)));
    let mut twice = machine();
    twice.devices[1].regions[1].index = 0;
    assert!(matches!(refused(&serde_json::to_string(&twice).unwrap()), ManifestError::Twice(_)));

    let mut huge = machine();
    huge.machine = "x".repeat(MachineManifest::MAX_BYTES);
    assert!(matches!(huge.to_json(), Err(ManifestError::TooLong(_))));
}

fn any_device() -> impl Strategy<Value = DeviceManifest> {
    let pci = any::<(u16, u16, u16, u16, u8, u32)>().prop_map(
        |(vendor, device, subsystem_vendor, subsystem, revision, class)| PciIdentity {
            vendor,
            device,
            subsystem_vendor,
            subsystem,
            revision,
            class,
        },
    );
    let regions = btree_map(any::<u32>(), any::<u64>(), 0..5)
        .prop_map(|map| map.into_iter().map(|(index, size)| RegionManifest { index, size }).collect());
    (
        option::of(".{0,12}"),
        option::of("[0-9.]{0,5}"),
        ".{0,8}",
        any::<(bool, bool)>(),
        option::of(pci),
        regions,
        btree_map(any::<u32>(), any::<u32>(), 0..4),
        btree_map(".{0,6}", ".{0,6}", 0..4),
    )
        .prop_map(|(model, model_version, backend, (p2p, pre_copy), pci, regions, irqs, parameters)| {
            DeviceManifest {
                id: DeviceId::new("x").unwrap(),
                model,
                model_version,
                backend,
                flags: MigrationFlags { p2p, pre_copy },
                pci,
                regions,
                irqs,
                parameters,
            }
        })
}

fn any_machine() -> impl Strategy<Value = MachineManifest> {
    let ram = any::<(u64, u64)>().prop_map(|(gpa, len)| RamRegion { gpa: Gpa(gpa), len });
    (
        ".{0,12}",
        ".{0,8}",
        any::<u32>(),
        vec(ram, 0..4),
        vec(".{0,8}", 0..5),
        btree_map(".{0,8}", any::<u32>(), 0..4),
        vec(any_device(), 0..4),
    )
        .prop_map(|(machine, accelerator, vcpus, ram, cpu, sections, mut devices)| {
            for (n, device) in devices.iter_mut().enumerate() {
                device.id = DeviceId::new(format!("d{n}")).unwrap();
            }
            MachineManifest { machine, accelerator, vcpus, ram, cpu, sections, devices }
        })
}

proptest! {
    #[test]
    fn documents_read_back(manifest in any_machine()) {
        let json = manifest.to_json().unwrap();
        let back = MachineManifest::from_json(&json).unwrap();
        prop_assert_eq!(&back, &manifest);
        prop_assert_eq!(back.to_json().unwrap(), json);
        prop_assert_eq!(compare(&manifest, &back).0, Verdict::Live);
    }

    #[test]
    fn any_two_manifests_compare_without_panic(a in any_machine(), b in any_machine()) {
        let (verdict, reasons) = compare(&a, &b);
        prop_assert_eq!(verdict == Verdict::Live, reasons.is_empty());
    }

    #[test]
    fn damaged_documents_never_panic(manifest in any_machine(), at: proptest::sample::Index, byte: u8) {
        let mut json = manifest.to_json().unwrap();
        let at = at.index(json.len());
        json[at] = byte;
        if let Ok(other) = MachineManifest::from_json(&json) {
            compare(&manifest, &other);
        }
    }
}
