//! Rules for a machine: what it is without its devices, and where in it they are.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::codes::{self, ReasonCode};
use crate::device::DeviceManifest;
use crate::findings::{Findings, Found};
use crate::host::HostManifest;
use crate::machine::{MachineManifest, RamRegion};
use crate::text::{list, quote, show};
use crate::tree::json;

pub(crate) fn compare(source: &MachineManifest, destination: &MachineManifest, findings: &mut Findings<'_>) {
    let mut add = |code: ReasonCode, field: &str, values: (Value, Value), text: String| {
        let (source, destination) = values;
        findings.add(code, None, Found { field: field.to_owned(), source, destination, text });
    };
    if source.machine != destination.machine {
        let (from, to) = (quote(&source.machine), quote(&destination.machine));
        let text = format!("the source is a machine of kind {from}, the destination one of kind {to}");
        add(&codes::MACHINE_KIND, "machine", (json(&source.machine), json(&destination.machine)), text);
    }
    if source.accelerator != destination.accelerator {
        let (from, to) = (quote(&source.accelerator), quote(&destination.accelerator));
        let text = format!("the vCPUs run on {from} at the source and on {to} at the destination");
        let values = (json(&source.accelerator), json(&destination.accelerator));
        add(&codes::ACCELERATOR, "accelerator", values, text);
    }
    if source.vcpus != destination.vcpus {
        let text = format!("{} vCPUs at the source, {} at the destination", source.vcpus, destination.vcpus);
        add(&codes::VCPUS, "vcpus", (json(source.vcpus), json(destination.vcpus)), text);
    }
    if source.ram != destination.ram {
        let (from, to) = (show_ram(&source.ram), show_ram(&destination.ram));
        let text = format!("RAM is laid out differently: source {from}; destination {to}");
        add(&codes::RAM_LAYOUT, "ram", (json(&source.ram), json(&destination.ram)), text);
    }
    cpu(source, &destination.cpu, "the destination's CPU", findings);
    let mut add = |code: ReasonCode, field: &str, values: (Value, Value), text: String| {
        let (source, destination) = values;
        findings.add(code, None, Found { field: field.to_owned(), source, destination, text });
    };
    for (name, version) in &source.sections {
        let field = format!("sections.{name}");
        let known = destination.sections.get(name);
        let name = quote(name);
        match known {
            None => {
                let text = format!("the destination does not know machine state {name}");
                add(&codes::SECTION_UNKNOWN, &field, (json(version), Value::Null), text);
            }
            Some(known) if known < version => {
                let text = format!(
                    "machine state {name} has version {version} at the source; the destination knows up to {known}"
                );
                add(&codes::SECTION_OLDER, &field, (json(version), json(known)), text);
            }
            Some(_) => {}
        }
    }
}

/// Where the guest sees a device is of its machine, and what its drivers found there stays so when it moves.
pub(crate) fn guest_address(
    source: &DeviceManifest,
    destination: &DeviceManifest,
    findings: &mut Findings<'_>,
) {
    let (from, to) = (source.guest_address, destination.guest_address);
    let (code, text) = match (from, to) {
        (Some(from), Some(to)) if from != to => (
            &codes::DEVICE_ADDRESS,
            format!("the guest has it at {from} on its PCI bus; at the destination it would be at {to}"),
        ),
        (Some(from), None) => (
            &codes::UNKNOWN_DEVICE_ADDRESS,
            format!(
                "the guest has it at {from} on its PCI bus; the destination does not say where it would be"
            ),
        ),
        (None, Some(to)) => (
            &codes::UNKNOWN_DEVICE_ADDRESS,
            format!(
                "the source does not say where on its PCI bus the guest has it; at the destination it would be at {to}"
            ),
        ),
        _ => return,
    };
    let field = "guest_address".to_owned();
    findings.add(code, Some(source), Found { field, source: json(from), destination: json(to), text });
}

/// Whether a host can give what the machine needs besides devices.
pub(crate) fn place(source: &MachineManifest, host: &HostManifest, findings: &mut Findings<'_>) {
    if let Some(given) = &host.cpu {
        cpu(source, given, &format!("host {}'s CPU", quote(&host.name)), findings);
    }
    let mut add = |code: ReasonCode, field: &str, source: Value, destination: Value, what: &str| {
        let text = format!(
            "{what}: the machine has {}, host {} gives {}",
            show(&source),
            quote(&host.name),
            show(&destination)
        );
        findings.add(code, None, Found { field: field.to_owned(), source, destination, text });
    };
    if host.cpu.is_none() && !source.cpu.is_empty() {
        add(&codes::UNKNOWN_HOST, "cpu", json(&source.cpu), Value::Null, "CPU features");
    }
    match host.vcpus {
        None => add(&codes::UNKNOWN_HOST, "vcpus", json(source.vcpus), Value::Null, "vCPUs"),
        Some(given) if given < source.vcpus => {
            add(&codes::HOST_VCPUS, "vcpus", json(source.vcpus), json(given), "vCPUs");
        }
        Some(_) => {}
    }
    let memory = source.memory();
    match host.memory {
        None => add(&codes::UNKNOWN_HOST, "memory", json(memory), Value::Null, "bytes of memory"),
        Some(given) if given < memory => {
            add(&codes::HOST_MEMORY, "memory", json(memory), json(given), "bytes of memory");
        }
        Some(_) => {}
    }
}

/// All features that are lacking are named: the guest must be given none of them.
fn cpu(source: &MachineManifest, given: &[String], whose: &str, findings: &mut Findings<'_>) {
    let lacking = lacking(&source.cpu, given);
    if lacking.is_empty() {
        return;
    }
    let shown: Vec<String> = lacking.iter().map(|feature| quote(feature)).collect();
    let text = format!("{whose} lacks what the guest was given: {}", shown.join(", "));
    let (source, destination) = (json(&lacking), Value::Array(Vec::new()));
    findings.add(&codes::CPU_FEATURES, None, Found { field: "cpu".to_owned(), source, destination, text });
}

/// What `given` lacks of `wanted`, in order, each once.
fn lacking<'a>(wanted: &'a [String], given: &[String]) -> Vec<&'a String> {
    let given: BTreeSet<&str> = given.iter().map(String::as_str).collect();
    let wanted: BTreeSet<&String> = wanted.iter().collect();
    wanted.into_iter().filter(|feature| !given.contains(feature.as_str())).collect()
}

fn show_ram(ram: &[RamRegion]) -> String {
    let regions = ram.iter().map(|region| format!("{:#x} bytes at {}", region.len, region.gpa));
    list(&regions.collect::<Vec<_>>())
}
