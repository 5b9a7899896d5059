//! Asking whether something fits: two machines, two devices.

use std::collections::BTreeMap;

use serde_json::Value;
use vfio_migration_types::DeviceId;

use crate::codes::{self, ReasonCode};
use crate::device::DeviceManifest;
use crate::findings::{Findings, Found};
use crate::machine::MachineManifest;
use crate::policy::{DeviceMap, Policy};
use crate::report::{Reason, Report};
use crate::rules::{device, live, machine};
use crate::tree::json;

/// Whether what `source` describes can run on what `destination` describes, and every reason.
///
/// Devices are matched by name, or by a map: `map`, and the policy's where `map` is silent. Each must be where its guest sees
/// it; their order and their back end are never reasons.
///
/// Where both sides of a device declare a model, differences that the model knows to be harmless are none: a newer
/// minor version, parameters that are allowed, more capabilities. Where neither does, whatever identifies the device
/// must be equal, and the report says that equality was strict.
///
/// What only one side knows is a warning of its own (`unknown-…`), and under strict equality a difference. What neither
/// knows is not compared.
pub fn check_machines(
    source: &MachineManifest,
    destination: &MachineManifest,
    map: &DeviceMap,
    policy: &Policy,
) -> Report {
    let mut findings = Findings::new(policy);
    let (strict, names) = compare_machines(source, destination, map, &mut findings);
    Report::of(findings.reasons, strict, names)
}

/// Compares two machines: whether equality was strict, and which device is which.
pub(crate) fn compare_machines(
    source: &MachineManifest,
    destination: &MachineManifest,
    map: &DeviceMap,
    findings: &mut Findings<'_>,
) -> (bool, BTreeMap<String, String>) {
    machine::compare(source, destination, findings);
    let from = by_name(source, true, findings);
    let to = by_name(destination, false, findings);
    let matched = match_devices(&from, &to, map, findings);
    let site = destination.config_rules.as_slice();
    let mut strict = false;
    let mut names = BTreeMap::new();
    for (id, other) in &matched {
        let (Some(source), Some(destination)) = (from.get(id), to.get(other)) else { continue };
        strict |= device::compare(source, destination, site, findings);
        machine::guest_address(source, destination, findings);
        if from.len() > 1 {
            live::peers(source, Some(destination), findings);
        }
        names.insert(id.to_string(), other.to_string());
    }
    (strict, names)
}

/// Whether anything stands against moving `source` that no destination can change: the part of [`check_machines`] that a source
/// can ask before it has talked to anybody. What is not known is no reason here.
pub fn check_source(source: &MachineManifest, policy: &Policy) -> Report {
    let mut findings = Findings::new(policy);
    let devices = by_name(source, true, &mut findings);
    for device in devices.values() {
        live::source(device, None, &mut findings);
        if devices.len() > 1 {
            live::peers(device, None, &mut findings);
        }
    }
    Report::of(findings.reasons, false, BTreeMap::new())
}

/// The reason against moving `device` without its PCI function, which only its VMM can hand over; `None` for one that has no
/// function to leave behind.
pub fn check_left_behind(device: &DeviceManifest, policy: &Policy) -> Option<Reason> {
    let mut findings = Findings::new(policy);
    live::left_behind(device, &mut findings);
    findings.reasons.pop()
}

/// The reason against moving guest RAM to a part of which nobody logs the writes, as `text` says; those of `device`, or of the
/// VMM itself.
pub fn check_uncovered(device: Option<&DeviceManifest>, text: String, policy: &Policy) -> Option<Reason> {
    let mut findings = Findings::new(policy);
    let (field, none) = ("dirty".to_owned(), Value::Null);
    let found = Found { field, source: none.clone(), destination: none, text };
    findings.add(&codes::DIRTY_UNCOVERED, device, found);
    findings.reasons.pop()
}

/// Whether the state of `source` can go to `destination`, and every reason. Names are of no matter.
pub fn check_devices(source: &DeviceManifest, destination: &DeviceManifest, policy: &Policy) -> Report {
    let mut findings = Findings::new(policy);
    let strict = device::compare(source, destination, &[], &mut findings);
    let map = BTreeMap::from([(source.id.to_string(), destination.id.to_string())]);
    Report::of(findings.reasons, strict, map)
}

type Devices<'m> = BTreeMap<&'m DeviceId, &'m DeviceManifest>;

fn by_name<'m>(machine: &'m MachineManifest, source: bool, findings: &mut Findings<'_>) -> Devices<'m> {
    let mut devices = BTreeMap::new();
    for device in &machine.devices {
        if devices.contains_key(&device.id) {
            let (side, values) = if source {
                ("source", (json(&device.id), Value::Null))
            } else {
                ("destination", (Value::Null, json(&device.id)))
            };
            let text = format!("the {side} has two devices of this name");
            of_device(findings, &codes::DEVICE_DUPLICATE, device, values, text);
        } else {
            devices.insert(&device.id, device);
        }
    }
    devices
}

/// Finds the device of the destination that each of the source's goes to.
fn match_devices<'m>(
    from: &Devices<'m>,
    to: &Devices<'m>,
    map: &DeviceMap,
    findings: &mut Findings<'_>,
) -> BTreeMap<&'m DeviceId, &'m DeviceId> {
    let policy = findings.policy();
    for (source, destination) in &map.0 {
        if !from.contains_key(source) {
            let text =
                format!("the map sends device {source} to {destination}, and the source has no such device");
            let found =
                Found { field: "map".into(), source: Value::Null, destination: json(destination), text };
            findings.add(&codes::MAP_SOURCE, None, found);
        }
    }
    let mut matched: BTreeMap<&DeviceId, &DeviceId> = BTreeMap::new();
    let mut taken: BTreeMap<&DeviceId, &DeviceId> = BTreeMap::new();
    for (id, device) in from {
        let mapped = map.destination(id).or_else(|| policy.map.destination(id));
        let Some((other, _)) = to.get_key_value(mapped.unwrap_or(id)) else {
            let (code, text): (ReasonCode, _) = match mapped {
                None => (&codes::DEVICE_MISSING, "the destination has no device of this name".to_owned()),
                Some(name) => (
                    &codes::MAP_DESTINATION,
                    format!("the map sends it to {name}, and the destination has no such device"),
                ),
            };
            of_device(findings, code, device, (json(id), Value::Null), text);
            continue;
        };
        if let Some(first) = taken.insert(other, id) {
            let text = format!("it goes to {other} at the destination, and so does {first}");
            of_device(findings, &codes::MAP_TWICE, device, (json(id), json(other)), text);
        }
        matched.insert(id, other);
    }
    for (id, device) in to.iter().filter(|(id, _)| !taken.contains_key(*id)) {
        let text = "the destination has this device, and the source does not".to_owned();
        of_device(findings, &codes::DEVICE_EXTRA, device, (Value::Null, json(id)), text);
    }
    matched
}

fn of_device(
    findings: &mut Findings<'_>,
    code: ReasonCode,
    device: &DeviceManifest,
    (source, destination): (Value, Value),
    text: String,
) {
    findings.add(code, Some(device), Found { field: "id".into(), source, destination, text });
}
