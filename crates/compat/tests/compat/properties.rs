//! What holds of any manifests.

use std::collections::BTreeMap;

use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use vfio_migration_compat::{
    Allow, Allowed, Capability, DeviceManifest, DeviceMap, DirtyTracking, Driver, IntRange, MachineManifest,
    Parameter, PciIdentity, Policy, RamRegion, RegionManifest, Scalar, Severity, Verdict, check_devices,
    check_machines, check_source, codes, worse,
};
use vfio_migration_types::{DeviceId, Gpa, MigrationFlags};

fn scalar() -> impl Strategy<Value = Scalar> {
    prop_oneof![
        any::<bool>().prop_map(Scalar::Bool),
        (-2i64..9).prop_map(Scalar::Int),
        "[ab]{0,2}".prop_map(Scalar::Text)
    ]
}

fn parameter() -> impl Strategy<Value = Parameter> {
    let range = (-2i64..3, 0i64..4).prop_map(|(min, more)| Allowed::Range(IntRange { min, max: min + more }));
    let allowed = prop_oneof![scalar().prop_map(Allowed::Value), range];
    (scalar(), option::of(scalar()), option::of(vec(allowed, 0..3)))
        .prop_map(|(value, off, allowed)| Parameter { value, off, allowed })
}

fn pci() -> impl Strategy<Value = PciIdentity> {
    (1u16..3, 1u16..3, 0u8..3).prop_map(|(vendor, device, revision)| PciIdentity {
        vendor,
        device,
        revision,
        class: 0x02_0000,
        ..PciIdentity::default()
    })
}

fn capability() -> impl Strategy<Value = Capability> {
    (any::<bool>(), 1u16..4, 0x10u16..0x14, option::of(4u16..6))
        .prop_map(|(extended, id, offset, len)| Capability { extended, id, offset: offset * 4, len })
}

fn version() -> impl Strategy<Value = Option<String>> {
    option::of(prop_oneof![Just("1.0.0"), Just("1.1"), Just("2.0.0"), Just("x")].prop_map(str::to_owned))
}

fn word() -> impl Strategy<Value = Option<String>> {
    option::of("[ab]".prop_map(|word| word))
}

prop_compose! {
    fn layout()(
        pci in option::of(pci()),
        regions in option::of(btree_map(0u32..4, 0u64..3, 0..3)),
        capabilities in option::of(vec(capability(), 0..4)),
        irqs in option::of(btree_map(0u32..3, 0u32..3, 0..3)),
        page_sizes in option::of(prop_oneof![Just(0), Just(4096u64), Just(0x1_1000u64)]),
    ) -> DeviceManifest {
        let regions = regions.map(|map| {
            map.into_iter().map(|(index, size)| RegionManifest { index, size, ..RegionManifest::default() }).collect()
        });
        DeviceManifest { pci, regions, capabilities, irqs, iommu_page_sizes: page_sizes, ..DeviceManifest::default() }
    }
}

prop_compose! {
    /// A device of any kind.
    fn any_device()(
        layout in layout(),
        model in word(),
        model_version in version(),
        loads in option::of(prop_oneof![Just("1.0-1.9"), Just("2.0-")].prop_map(|text| text.parse().unwrap())),
        parameters in btree_map("[pq]", parameter(), 0..3),
        driver in option::of((prop_oneof![Just("mtty"), Just("qat_vfio_pci"), Just("mlx5_vfio_pci"), Just("other")], version())),
        flags in option::of(any::<(bool, bool)>()),
        firmware in word(),
        host_driver in word(),
        facts in btree_map(prop_oneof![Just("ports"), Just("capabilities"), Just("z")].prop_map(str::to_owned), scalar(), 0..3),
        dirty in option::of((option::of(any::<bool>()), option::of(any::<bool>()), option::of(any::<bool>()))),
        state_size in option::of(0u64..9),
    ) -> DeviceManifest {
        let dirty = dirty.map(|(device_log, iommu, all_dirty)| DirtyTracking { device_log, iommu, all_dirty, ..DirtyTracking::default() });
        let driver = driver.map(|(name, version)| Driver { version, ..Driver::new(name) });
        let flags = flags.map(|(p2p, pre_copy)| MigrationFlags { p2p, pre_copy });
        DeviceManifest {
            model, model_version, loads, parameters, driver, flags, firmware, host_driver, facts, dirty, state_size, ..layout
        }
    }
}

prop_compose! {
    fn any_machine()(
        machine in "[ab]",
        vcpus in 1u32..3,
        ram in vec((0u64..3, 0u64..3), 0..3),
        cpu in vec("[ab]", 0..3),
        sections in btree_map("[ab]", 0u32..3, 0..3),
        devices in vec((prop_oneof![Just("d0"), Just("d1"), Just("d2")], any_device()), 0..4),
    ) -> MachineManifest {
        let devices = devices.into_iter().map(|(id, device)| DeviceManifest { id: DeviceId::new(id).unwrap(), ..device });
        MachineManifest {
            machine, vcpus, cpu, sections,
            ram: ram.into_iter().map(|(gpa, len)| RamRegion { gpa: Gpa(gpa << 12), len: len << 12 }).collect(),
            devices: devices.collect(),
            ..MachineManifest::default()
        }
    }
}

fn any_policy() -> impl Strategy<Value = Policy> {
    let allow = proptest::sample::subsequence(codes().collect::<Vec<_>>(), 0..20);
    (allow, option::of(0u64..9), any::<bool>()).prop_map(|(allow, max_state_size, require_declared_model)| {
        Policy {
            allow: allow.into_iter().map(|code| Allow { code: code.into(), ..Allow::default() }).collect(),
            max_state_size,
            require_declared_model,
            ..Policy::default()
        }
    })
}

/// Whether it migrates live at all: something exact logs its writes, or nothing is known of that.
fn migratable(mut device: DeviceManifest) -> DeviceManifest {
    device.dirty = device.dirty.map(|_| DirtyTracking { device_log: Some(true), ..DirtyTracking::default() });
    device
}

fn machine_of(devices: &[&DeviceManifest]) -> MachineManifest {
    MachineManifest {
        devices: devices.iter().map(|device| (*device).clone()).collect(),
        ..MachineManifest::default()
    }
}

proptest! {
    #[test]
    fn a_migratable_device_goes_to_itself(device in any_device()) {
        let device = migratable(device);
        let report = check_devices(&device, &device, &Policy::default());
        // A PCI function whose identity nobody says may be another's, whatever else is equal.
        let function = device.regions.iter().flatten().any(|region| region.index < 6 && region.size > 0)
            || device.irqs.iter().flatten().any(|(index, count)| matches!(index, 1 | 2) && *count > 0);
        let unsaid = function && device.pci.is_none();
        let verdict = if unsaid { Verdict::LiveWithWarning } else { Verdict::Live };
        prop_assert_eq!(report.verdict, verdict, "{:?}", report);
        prop_assert_eq!(report.strict, device.model.is_none());
        let worse = report.reasons.iter().filter(|reason| reason.severity != Severity::Note);
        let worse: Vec<&str> = worse.map(|reason| reason.code.as_str()).collect();
        prop_assert_eq!(worse, if unsaid { vec!["no-pci-identity"] } else { vec![] });
        let machine = machine_of(&[&device]);
        prop_assert_eq!(check_machines(&machine, &machine, &DeviceMap::new(), &Policy::default()).verdict, verdict);
    }

    #[test]
    fn under_a_model_a_capability_more_never_worsens(a in any_device(), b in any_device(), more in capability()) {
        let (mut a, mut b) = (a, b);
        a.model = Some("m".into());
        b.model = Some("m".into());
        let before = check_devices(&a, &b, &Policy::default());
        prop_assume!(b.capabilities.is_some());
        b.capabilities.as_mut().unwrap().push(more);
        let after = check_devices(&a, &b, &Policy::default());
        prop_assert!(after.verdict <= before.verdict, "{:?} {:?}", before, after);
        prop_assert!(after.reasons.len() <= before.reasons.len());
    }

    #[test]
    fn under_a_model_more_values_never_worsen(a in any_device(), b in any_device(), more in scalar()) {
        let (mut a, mut b) = (a, b);
        a.model = Some("m".into());
        b.model = Some("m".into());
        let before = check_devices(&a, &b, &Policy::default());
        for parameter in b.parameters.values_mut() {
            parameter.allowed.get_or_insert_default().push(Allowed::Value(more.clone()));
        }
        prop_assert!(check_devices(&a, &b, &Policy::default()).verdict <= before.verdict);
    }

    #[test]
    fn under_strict_equality_any_difference_is_a_reason(a in any_device(), b in any_device()) {
        let (mut a, mut b) = (migratable(a), migratable(b));
        a.model = None;
        b.model = None;
        // Ranges are nobody's where no model is declared.
        a.loads = None;
        b.loads = None;
        let report = check_devices(&a, &b, &Policy::default());
        prop_assert!(report.strict);
        let counts = report.reasons.iter().any(|reason| reason.severity > Severity::Note && !reason.field.starts_with("iommu") && reason.field != "dirty");
        let rule = ["qat_vfio_pci", "mtty"].contains(&a.driver_name().unwrap_or_default());
        // A driver's own rule may find a difference harmless.
        prop_assert!(counts == (a.identity() != b.identity()) || rule && !counts, "{:?}", report);
    }

    #[test]
    fn reasons_do_not_depend_on_order(a in any_machine(), b in any_machine(), policy in any_policy()) {
        let report = check_machines(&a, &b, &DeviceMap::new(), &policy);
        let turned = |machine: &MachineManifest| {
            let mut machine = machine.clone();
            // Of two devices of one name the first counts.
            if machine.devices.iter().map(|device| &device.id).collect::<std::collections::BTreeSet<_>>().len() == machine.devices.len() {
                machine.devices.reverse();
            }
            machine.cpu.reverse();
            for device in &mut machine.devices {
                device.regions.iter_mut().for_each(|regions| regions.reverse());
                device.capabilities.iter_mut().for_each(|capabilities| capabilities.reverse());
            }
            machine
        };
        prop_assert_eq!(check_machines(&turned(&a), &turned(&b), &DeviceMap::new(), &policy), report);
    }

    #[test]
    fn with_one_policy_both_sides_agree_and_with_two_the_worse_holds(
        a in any_machine(), b in any_machine(), ours in any_policy(), theirs in any_policy(),
    ) {
        let check = |policy| check_machines(&a, &b, &DeviceMap::new(), policy);
        let (source, destination) = (check(&ours), check(&theirs));
        prop_assert_eq!(worse(source.clone(), check(&ours)), source.clone());
        let both = worse(source.clone(), destination.clone());
        prop_assert_eq!(&worse(destination.clone(), source.clone()), &both);
        prop_assert_eq!(both.verdict, source.verdict.max(destination.verdict));
        for reason in source.reasons.iter().chain(&destination.reasons) {
            prop_assert!(both.reasons.iter().any(|one| one.code == reason.code && one.severity >= reason.severity));
        }
        let of_reasons = both.reasons.iter().map(|reason| Verdict::from(reason.severity)).max();
        prop_assert_eq!(both.verdict, of_reasons.unwrap_or_default());
    }

    #[test]
    fn what_a_policy_allows_is_a_warning(a in any_device(), b in any_device()) {
        let all = codes().map(|code| Allow { code: code.into(), ..Allow::default() }).collect();
        let report = check_devices(&a, &b, &Policy { allow: all, ..Policy::default() });
        prop_assert!(report.verdict <= Verdict::LiveWithWarning);
        prop_assert_eq!(report.reasons.len(), check_devices(&a, &b, &Policy::default()).reasons.len());
    }

    /// What a source finds alone is among what the pair gives, with the same weight: it never refuses what the pair allows.
    #[test]
    fn a_source_alone_finds_nothing_that_the_pair_does_not(a in any_machine(), b in any_machine(), policy in any_policy()) {
        let pair = check_machines(&a, &b, &DeviceMap::new(), &policy);
        let matched = |device: &Option<String>| {
            b.devices.iter().any(|other| device.as_deref().is_none_or(|name| name == other.id.as_str()))
        };
        for reason in check_source(&a, &policy).reasons.iter().filter(|reason| matched(&reason.device)) {
            prop_assert!(pair.reasons.iter().any(|found| {
                (&found.code, &found.device, &found.field, found.severity)
                    == (&reason.code, &reason.device, &reason.field, reason.severity)
            }), "{:?}", reason);
        }
    }

    #[test]
    fn machines_read_back(machine in any_machine()) {
        if let Ok(json) = machine.to_json() {
            let back = MachineManifest::from_json(&json).unwrap();
            prop_assert_eq!(&back, &machine);
            prop_assert_eq!(back.identity_digest(), machine.identity_digest());
        }
    }

    #[test]
    fn the_digest_sees_what_identifies_and_nothing_that_moves(device in any_device()) {
        let digest = device.identity();
        let moved = DeviceManifest {
            id: DeviceId::new("other").unwrap(),
            backend: "x".into(),
            kernel: Some("9.9".into()),
            capacity: BTreeMap::from([("vram".into(), 7)]),
            state_size: Some(77),
            iommu_page_sizes: Some(1),
            guest_address: Some("00:1f.7".parse().unwrap()),
            dirty: None,
            ..device.clone()
        };
        prop_assert_eq!(moved.identity(), digest);
        let elsewhere = DeviceManifest { guest_address: moved.guest_address, ..device.clone() };
        prop_assert_ne!(machine_of(&[&elsewhere]).identity_digest(), machine_of(&[&device]).identity_digest());
        let changes: [fn(&mut DeviceManifest); 12] = [
            |device| device.model = Some("zz".into()),
            |device| device.model_version = Some("77.0".into()),
            |device| device.firmware = Some("zz".into()),
            |device| device.host_driver = Some("zz".into()),
            |device| device.driver = Some(Driver::new("zz")),
            |device| device.mdev_type = Some("zz".into()),
            |device| device.pci = Some(PciIdentity { vendor: 77, ..PciIdentity::default() }),
            |device| device.irqs = Some(BTreeMap::from([(7, 7)])),
            |device| device.regions = Some(vec![RegionManifest { index: 7, size: 77, ..RegionManifest::default() }]),
            |device| device.capabilities = Some(vec![Capability { id: 77, ..Capability::default() }]),
            |device| drop(device.facts.insert("zz".into(), Scalar::Int(7))),
            |device| drop(device.parameters.insert("zz".into(), Parameter::new(7))),
        ];
        for change in changes {
            let mut other = device.clone();
            change(&mut other);
            prop_assert_ne!(other.identity(), digest);
            let with = machine_of(&[&device]).identity_digest();
            prop_assert_ne!(machine_of(&[&other]).identity_digest(), with);
        }
    }
}
