//! Many hosts: where devices can go, what a whole pool loads, and what schedulers are told.

use std::collections::BTreeMap;

use vfio_migration_compat::labels::{self, Attribute, node_labels, resource_device};
use vfio_migration_compat::{
    Accept, Allow, Allowed, BaselineError, DeviceManifest, HostManifest, HostOffer, IntRange, Limits,
    MachineManifest, Parameter, Policy, RamRegion, Verdict, baseline, check_device_placement,
    check_placement, matrix,
};
use vfio_migration_types::{DeviceId, Gpa, MigrationFlags};

fn device(id: &str, version: &str, queues: i64, most: i64) -> DeviceManifest {
    let queues = Parameter {
        off: Some(1.into()),
        allowed: Some(vec![Allowed::Range(IntRange { min: 1, max: most })]),
        ..Parameter::new(queues)
    };
    DeviceManifest {
        model: Some("acme.com/nic".into()),
        model_version: Some(version.into()),
        parameters: BTreeMap::from([("queues".into(), queues)]),
        flags: Some(MigrationFlags { p2p: true, pre_copy: true }),
        ..DeviceManifest::new(DeviceId::new(id).unwrap())
    }
}

fn host(name: &str, devices: Vec<DeviceManifest>) -> HostManifest {
    HostManifest {
        name: name.into(),
        devices,
        vcpus: Some(8),
        memory: Some(1 << 30),
        ..HostManifest::default()
    }
}

fn machine(devices: Vec<DeviceManifest>) -> MachineManifest {
    let ram = vec![RamRegion { gpa: Gpa(0), len: 1 << 20 }];
    MachineManifest { vcpus: 1, ram, devices, ..MachineManifest::default() }
}

#[test]
fn a_thousand_hosts_cost_as_many_comparisons_as_they_have_kinds() {
    let hosts: Vec<HostManifest> = (0..1000)
        .map(|n| {
            let own = DeviceManifest {
                // What moves tells no kinds apart.
                state_size: Some(n),
                kernel: Some(format!("6.{n}")),
                ..device(
                    &format!("vf{}", n % 7),
                    ["1.0.0", "1.1.0", "1.2.0"][usize::try_from(n).unwrap() % 3],
                    4,
                    8,
                )
            };
            host(&format!("h{n}"), vec![own])
        })
        .collect();
    let matrix = matrix(&hosts, &Policy::default()).unwrap();
    assert_eq!((matrix.devices.len(), matrix.hosts.len(), matrix.comparisons), (1000, 1000, 9));
    for (device, to, verdict) in [
        (0, 0, Verdict::Live),
        (0, 2, Verdict::Live),
        (2, 0, Verdict::No),
        (998, 999, Verdict::No),
        (999, 998, Verdict::Live),
    ] {
        let cell = matrix.cell(device, to).unwrap();
        assert_eq!(cell.verdict, verdict, "{device} to {to}");
        assert_eq!(cell.codes.is_empty(), verdict == Verdict::Live);
    }
    assert_eq!(matrix.cell(2, 0).unwrap().codes, ["device-model-version"]);
    assert_eq!((matrix.cell(1000, 0), matrix.cell(0, 1000)), (None, None));
}

#[test]
fn each_cell_is_what_asking_for_the_pair_gives() {
    let limit = Limits { max_state_bytes: Some(10), ..Limits::default() };
    let other = DeviceManifest { model: None, state_size: Some(77), ..device("other", "1.0.0", 1, 1) };
    let accepts = Some(vec![Accept { model: "acme.com/nic".into(), ..Accept::default() }]);
    let hosts = [
        host("a", vec![device("x", "1.2.0", 4, 8), device("y", "1.0.0", 8, 8)]),
        host("b", vec![other.clone()]),
        HostManifest {
            limits: limit,
            accepts,
            ..host("c", vec![DeviceManifest { state_size: Some(5), ..device("z", "1.1.0", 2, 4) }])
        },
        HostManifest {
            offers: vec![HostOffer { device: device("o", "1.9.0", 1, 4), ..HostOffer::default() }],
            ..host("d", vec![])
        },
        host("e", vec![]),
    ];
    let named = Allow { code: "device-parameter".into(), device: Some("y".into()), ..Allow::default() };
    for policy in [
        Policy::default(),
        Policy { max_state_size: Some(6), ..Policy::default() },
        Policy { allow: vec![named], ..Policy::default() },
    ] {
        let matrix = matrix(&hosts, &policy).unwrap();
        let devices: Vec<&DeviceManifest> = hosts.iter().flat_map(|host| &host.devices).collect();
        for (n, device) in devices.iter().enumerate() {
            for (to, host) in hosts.iter().enumerate() {
                let report = check_device_placement(device, host, &policy);
                let cell = matrix.cell(n, to).unwrap();
                assert_eq!(
                    cell.verdict, report.verdict,
                    "{} to {}: {cell:?} {report:?}",
                    device.id, host.name
                );
            }
        }
    }
}

#[test]
fn placement_gives_each_device_one_and_the_best_first() {
    // x fits both; y fits a alone: x must make room.
    let (x, y) = (device("x", "1.0.0", 1, 1), device("y", "1.2.0", 1, 1));
    let to = host("h", vec![device("a", "1.2.0", 1, 1), device("b", "1.0.0", 1, 1)]);
    for devices in [vec![x.clone(), y.clone()], vec![y.clone(), x.clone()]] {
        let report = check_placement(&machine(devices), &to, &Policy::default());
        assert_eq!(report.verdict, Verdict::Live, "{report:?}");
        assert_eq!(report.map, BTreeMap::from([("x".into(), "b".into()), ("y".into(), "a".into())]));
    }
    // A live place is taken before one with a warning.
    let warned = DeviceManifest { firmware: Some("1".into()), ..device("a", "1.0.0", 1, 1) };
    let to = host("h", vec![warned, device("b", "1.0.0", 1, 1)]);
    let report = check_placement(&machine(vec![x.clone()]), &to, &Policy::default());
    assert_eq!((report.verdict, report.map["x"].as_str()), (Verdict::Live, "b"));
    // With all taken the reasons against the nearest are listed.
    let to = host("h", vec![device("b", "1.1.0", 1, 1)]);
    let report = check_placement(&machine(vec![y]), &to, &Policy::default());
    let codes: Vec<&str> = report.reasons.iter().map(|reason| reason.code.as_str()).collect();
    assert_eq!((report.verdict, codes), (Verdict::No, vec!["device-model-version", "host-no-device"]));
    assert!(report.map.is_empty());
    // An offer is good for as many as it says.
    let offer = |count| HostOffer { device: device("o", "1.0.0", 1, 1), count, ..HostOffer::default() };
    let three = machine(["p", "q", "r"].map(|id| device(id, "1.0.0", 1, 1)).to_vec());
    for (count, verdict) in [(Some(3), Verdict::Live), (Some(2), Verdict::No), (None, Verdict::No)] {
        let to = HostManifest { offers: vec![offer(count)], ..host("h", vec![]) };
        assert_eq!(check_placement(&three, &to, &Policy::default()).verdict, verdict);
    }
}

#[test]
fn a_policys_map_decides_the_place() {
    let x = device("x", "1.0.0", 1, 1);
    let to = host("h", vec![device("a", "1.0.0", 1, 1), device("b", "1.0.0", 1, 1)]);
    let map = |to: &str| Policy {
        map: [(DeviceId::new("x").unwrap(), DeviceId::new(to).unwrap())].into_iter().collect(),
        ..Policy::default()
    };
    let report = check_placement(&machine(vec![x.clone()]), &to, &map("b"));
    assert_eq!((report.verdict, report.map["x"].as_str()), (Verdict::Live, "b"));
    assert_eq!(check_placement(&machine(vec![x]), &to, &map("c")).verdict, Verdict::No);
}

#[test]
fn a_baseline_is_the_newest_that_all_load() {
    let pool = [
        host("a", vec![device("x", "1.4.0", 8, 8)]),
        host("b", vec![device("x", "1.2.0", 4, 4), device("y", "1.3.0", 2, 6)]),
        HostManifest {
            offers: vec![HostOffer { device: device("o", "1.9.0", 1, 16), ..HostOffer::default() }],
            ..host("c", vec![])
        },
    ];
    let found = baseline(&pool, "acme.com/nic").unwrap();
    assert_eq!(
        (found.version.as_str(), &found.parameters),
        ("1.3.0", &BTreeMap::from([("queues".into(), 6.into())]))
    );
    // Each host of the pool takes a device that was made so.
    let made = device("new", &found.version, 6, 6);
    for host in &pool {
        let verdict = check_device_placement(&made, host, &Policy::default()).verdict;
        assert_eq!(verdict, Verdict::Live, "{}", host.name);
    }
    // And one that is newer is refused somewhere.
    let newer = device("new", "1.4.0", 6, 6);
    assert!(
        pool.iter()
            .any(|host| check_device_placement(&newer, host, &Policy::default()).verdict == Verdict::No)
    );
    let more = device("new", "1.3.0", 7, 7);
    assert!(
        pool.iter()
            .any(|host| check_device_placement(&more, host, &Policy::default()).verdict == Verdict::No)
    );
}

#[test]
fn a_parameter_that_some_do_not_know_stays_off() {
    let mut newer = device("x", "1.4.0", 4, 4);
    let rss = Parameter {
        off: Some(false.into()),
        allowed: Some(vec![Allowed::Value(false.into())]),
        ..Parameter::new(true)
    };
    newer.parameters.insert("rss".into(), rss);
    let pool = [host("a", vec![newer.clone()]), host("b", vec![device("x", "1.4.0", 4, 4)])];
    let found = baseline(&pool, "acme.com/nic").unwrap();
    assert_eq!(found.parameters["rss"], false.into());
    newer.parameters.get_mut("rss").unwrap().allowed = None;
    let pool = [host("a", vec![newer.clone()]), host("b", vec![device("x", "1.4.0", 4, 4)])];
    assert!(
        matches!(baseline(&pool, "acme.com/nic"), Err(BaselineError::NoValue(name, _)) if name.contains("rss"))
    );
    assert_eq!(baseline(&pool[..1], "acme.com/nic").unwrap().parameters["rss"], true.into());
    // Where it cannot be off, and each has a device that does not know it, it is left out.
    newer.parameters.get_mut("rss").unwrap().off = None;
    let pool = [host("a", vec![newer, device("y", "1.4.0", 4, 4)]), pool[1].clone()];
    assert!(!baseline(&pool, "acme.com/nic").unwrap().parameters.contains_key("rss"));
}

#[test]
fn a_pool_without_a_baseline_says_why() {
    let pool = [host("a", vec![device("x", "1.4.0", 4, 4)]), host("b", vec![device("x", "2.0.0", 4, 4)])];
    let error = baseline(&pool, "acme.com/nic").unwrap_err();
    assert!(error.to_string().contains("\"b\" has 2.0.0"), "{error}");
    assert!(matches!(baseline(&pool, "other"), Err(BaselineError::NoDevice(host, _)) if host.contains('a')));
    assert_eq!(baseline(&[], "acme.com/nic"), Err(BaselineError::Empty));
    let mut loads = pool.clone();
    loads[1].devices[0].loads = Some("1.0-1.3".parse().unwrap());
    assert_eq!(baseline(&loads, "acme.com/nic").unwrap().version, "1.3.0");
}

fn legal(text: &str, max: usize) -> bool {
    let end = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= max
        && end(bytes.first())
        && end(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

#[test]
fn labels_are_legal_and_tell_models_apart() {
    let mut odd = device("odd", "1.0.0", 1, 1);
    odd.model = Some(format!("acme.com/{}/ü b", "long".repeat(30)));
    let mut odder = odd.clone();
    odder.model = Some(format!("acme.com/{}/ü c", "long".repeat(30)));
    odder.id = DeviceId::new("odder").unwrap();
    let mut own = host("a", vec![device("x", "1.2.0", 1, 1), device("y", "1.10.0", 1, 1), odd, odder]);
    own.offers =
        vec![HostOffer { device: device("o", "1.3.0", 1, 1), count: Some(6), ..HostOffer::default() }];
    own.kernel = Some("6.12.0-1 ".into());
    let labels = node_labels(&own);
    assert_eq!(labels["vfio-migrate.org/version.acme.com_nic"], "1.10.0");
    assert_eq!(labels["vfio-migrate.org/devices.acme.com_nic"], "8");
    assert_eq!(labels.len(), 7, "{labels:?}");
    for (name, value) in &labels {
        let (prefix, name) = name.split_once('/').unwrap();
        assert!(prefix == labels::PREFIX && legal(name, 63) && legal(value, 63), "{name}={value}");
    }
}

#[test]
fn attributes_are_typed_legal_and_not_too_many() {
    let mut own = device("VF_0.a", "1.2", 4, 4);
    own.parameters.insert("a b".into(), Parameter::new("x".repeat(100)));
    own.parameters.insert("on".into(), Parameter::new(true));
    own.capacity = BTreeMap::from([("vram".into(), 1 << 30)]);
    let rendered = resource_device(&own);
    assert_eq!(rendered.name, "vf-0-a");
    let json = serde_json::to_value(&rendered).unwrap();
    assert_eq!(json["attributes"]["vfio-migrate.org/modelVersion"]["version"], "1.2.0");
    assert_eq!(json["attributes"]["vfio-migrate.org/param_queues"]["int"], 4);
    assert_eq!(json["attributes"]["vfio-migrate.org/param_on"]["bool"], true);
    assert_eq!(json["capacity"]["vfio-migrate.org/vram"]["value"], "1073741824");
    own.parameters = (0..100).map(|n| (format!("p{n}"), Parameter::new(n))).collect();
    let rendered = resource_device(&own);
    assert_eq!(rendered.attributes.len() + rendered.capacity.len(), 32);
    for (name, value) in &rendered.attributes {
        let name = name.strip_prefix("vfio-migrate.org/").unwrap();
        assert!(
            name.len() <= 32 && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'),
            "{name}"
        );
        if let Attribute::String(text) = value {
            assert!(text.len() <= 64, "{text}");
        }
    }
}
