//! The largest that documents may be, where what is done with them could grow faster than they do. What is counted is work, which
//! is the same on every machine.

use std::collections::BTreeMap;

use vfio_migration_compat::{
    Allow, DeviceManifest, HostManifest, HostOffer, MachineManifest, Matrix, Parameter, Policy, PoolMachine,
    Scalar, Verdict, baselines, check_device_placement, check_machines, check_placement, machine_matrix,
    matrix,
};
use vfio_migration_types::DeviceId;

/// Most devices of a host, and as many offers.
const MOST: i64 = 4096;

fn device(n: i64, value: i64) -> DeviceManifest {
    DeviceManifest {
        model: Some("acme.com/nic".into()),
        model_version: Some("1.2.0".into()),
        parameters: BTreeMap::from([("queues".into(), Parameter::new(value))]),
        ..DeviceManifest::new(DeviceId::new(format!("d{n}")).unwrap())
    }
}

/// A host of `count` devices and offers each, no two of any host alike.
fn host(name: &str, first: i64, count: i64, make: impl Fn(i64) -> DeviceManifest) -> HostManifest {
    let offers =
        (first + MOST..first + MOST + count).map(|n| HostOffer { device: make(n), ..HostOffer::default() });
    HostManifest {
        name: name.into(),
        devices: (first..first + count).map(&make).collect(),
        offers: offers.collect(),
        ..HostManifest::default()
    }
}

fn rows(matrix: &Matrix) -> Vec<Vec<Verdict>> {
    matrix.cells.iter().map(|row| row.iter().map(|cell| cell.verdict).collect()).collect()
}

#[test]
fn the_largest_hosts_cost_a_few_comparisons_for_each_device() {
    let makes: [fn(i64) -> DeviceManifest; 2] =
        [|n| device(n, n), |n| DeviceManifest { model: Some(format!("acme.com/{n}")), ..device(n, 1) }];
    for make in makes {
        let hosts = [host("a", 0, MOST, make), host("b", 2 * MOST, MOST, make)];
        let found = matrix(&hosts, &Policy::default()).unwrap();
        assert!(found.comparisons <= 4 * 8192, "{}", found.comparisons);
        // A device goes to its own host alone, and that is all that there is to tell.
        assert_eq!(rows(&found), [[Verdict::Live, Verdict::No], [Verdict::No, Verdict::Live]]);
        assert_eq!(found.devices.len(), 8192);
        assert_eq!(baselines(&hosts).iter().filter(|(_, found)| found.is_ok()).count(), 0);
    }
}

/// Devices that differ in little, so that some of them fit: each combination once.
fn varied() -> Vec<DeviceManifest> {
    let mut all = Vec::new();
    for model in [None, Some("acme.com/nic"), Some("acme.com/gpu")] {
        for version in ["1.2.0", "1.3.0"] {
            for value in [None, Some(1), Some(2)] {
                for (off, allowed) in [(false, "null"), (true, "[1,3]"), (false, r#"[{"min":2,"max":5}]"#)] {
                    let n = i64::try_from(all.len()).unwrap();
                    let mut own = DeviceManifest {
                        model: model.map(Into::into),
                        model_version: Some(version.into()),
                        parameters: BTreeMap::new(),
                        ..device(n, 0)
                    };
                    if let Some(value) = value {
                        let off = off.then_some(Scalar::Int(value));
                        let allowed = serde_json::from_str(allowed).unwrap();
                        own.parameters
                            .insert("queues".into(), Parameter { off, allowed, ..Parameter::new(value) });
                    }
                    all.push(own);
                }
            }
        }
    }
    all
}

#[test]
fn what_is_left_out_changes_no_answer() {
    let all = varied();
    // Each a host of its own, and some of several.
    let mut hosts: Vec<HostManifest> = all
        .iter()
        .map(|device| HostManifest {
            name: device.id.to_string(),
            devices: vec![device.clone()],
            ..HostManifest::default()
        })
        .collect();
    hosts.extend(all.chunks(7).enumerate().map(|(n, devices)| HostManifest {
        name: format!("several{n}"),
        devices: devices.to_vec(),
        ..HostManifest::default()
    }));
    let allow = |code: &str| Allow { code: code.into(), ..Allow::default() };
    for policy in [
        Policy::default(),
        Policy { allow: vec![allow("device-model")], ..Policy::default() },
        Policy { allow: vec![allow("device-parameter"), allow("strict-parameter")], ..Policy::default() },
    ] {
        let found = matrix(&hosts, &policy).unwrap();
        let devices = hosts.iter().flat_map(|host| &host.devices);
        for (n, device) in devices.enumerate() {
            for (to, host) in hosts.iter().enumerate() {
                let report = check_device_placement(device, host, &policy);
                let cell = found.cell(n, to).unwrap();
                assert_eq!(cell.verdict, report.verdict, "{} to {}", device.id, host.name);
                if host.devices.len() == 1 {
                    let mut codes: Vec<&str> =
                        report.reasons.iter().map(|reason| reason.code.as_str()).collect();
                    codes.retain(|code| *code != "host-no-device");
                    codes.dedup();
                    assert_eq!(cell.codes, codes, "{} to {}", device.id, host.name);
                }
            }
        }
    }
}

#[test]
fn machines_go_to_hosts_and_to_each_other_as_a_check_of_the_two_says() {
    let all = varied();
    let machines: Vec<PoolMachine> = all
        .chunks(2)
        .enumerate()
        .map(|(n, devices)| PoolMachine {
            name: format!("vm{n}"),
            manifest: MachineManifest {
                vcpus: if n % 2 == 0 { 1 } else { 2 },
                devices: devices.to_vec(),
                ..MachineManifest::default()
            },
        })
        .collect();
    let hosts: Vec<HostManifest> = all
        .chunks(5)
        .enumerate()
        .map(|(n, devices)| HostManifest {
            name: format!("h{n}"),
            vcpus: Some(1),
            memory: Some(1),
            devices: devices.to_vec(),
            ..HostManifest::default()
        })
        .collect();
    let policy = Policy::default();
    let to_hosts = machine_matrix(&machines, &hosts, &policy).unwrap();
    let to_machines = machine_matrix(&machines, &[], &policy).unwrap();
    assert_eq!((to_hosts.hosts.len(), to_machines.hosts.len()), (hosts.len(), machines.len()));
    assert!(to_hosts.devices.is_empty() && to_hosts.machines.len() == machines.len());
    for (n, machine) in machines.iter().enumerate() {
        for (to, host) in hosts.iter().enumerate() {
            let report = check_placement(&machine.manifest, host, &policy);
            assert_eq!(to_hosts.machine_cell(n, to).unwrap().verdict, report.verdict, "{n} to {to}");
        }
        for (to, other) in machines.iter().enumerate() {
            let report = check_machines(&machine.manifest, &other.manifest, &policy.map, &policy);
            let cell = to_machines.machine_cell(n, to).unwrap();
            let mut codes: Vec<&str> = report.reasons.iter().map(|reason| reason.code.as_str()).collect();
            codes.sort_unstable();
            codes.dedup();
            assert_eq!((cell.verdict, &cell.codes), (report.verdict, &codes), "{n} to {to}");
        }
    }
}
