//! What a guest's driver sees of a device: PCI identity, regions, interrupts, capabilities.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::DevicePair;
use crate::codes::{self, ReasonCode};
use crate::device::{Capability, DeviceManifest, PciIdentity, RegionManifest};
use crate::findings::Findings;
use crate::tree::json;

/// Compares the PCI layout of two devices.
pub(crate) fn compare(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    identity(pair, findings);
    regions(pair, findings);
    irqs(pair, findings);
    capabilities(pair, findings);
}

fn identity(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let (from, to) = (pair.source.pci, pair.destination.pci);
    if from == to {
        return;
    }
    let same_but_revision =
        from.zip(to).is_some_and(|(from, to)| PciIdentity { revision: to.revision, ..from } == to);
    let code = match (from, to) {
        _ if pair.strict => &codes::DEVICE_PCI_IDENTITY,
        (None, _) | (_, None) => &codes::UNKNOWN_PCI_IDENTITY,
        _ if same_but_revision => &codes::DEVICE_PCI_REVISION,
        _ => &codes::DEVICE_PCI_IDENTITY,
    };
    let show = |pci: Option<PciIdentity>| pci.map_or_else(|| "PCI identity unknown".to_owned(), show_pci);
    let text = format!("{} at the source, {} at the destination", show(from), show(to));
    pair.say(findings, code, "pci", (json(from), json(to)), text);
}

fn show_pci(pci: PciIdentity) -> String {
    format!(
        "PCI {:04x}:{:04x} subsystem {:04x}:{:04x} revision {:02x} class {:06x}",
        pci.vendor, pci.device, pci.subsystem_vendor, pci.subsystem, pci.revision, pci.class
    )
}

fn regions(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    // A region of no bytes is a region that is not there: back ends differ in whether they list those.
    let by_index = |device: &DeviceManifest| -> Option<BTreeMap<u32, RegionManifest>> {
        let there = device.regions.as_ref()?.iter().filter(|region| region.size != 0);
        Some(there.map(|region| (region.index, *region)).collect())
    };
    let codes = (&codes::DEVICE_REGIONS, &codes::UNKNOWN_REGIONS);
    let maps = (by_index(pair.source), by_index(pair.destination));
    let Some((from, to)) = both(pair, findings, codes, "regions", "the list of regions", maps) else {
        return;
    };
    for index in from.keys().chain(to.keys()).collect::<BTreeSet<_>>() {
        let (from, to) = (from.get(index), to.get(index));
        let size = |region: Option<&RegionManifest>| region.map_or(0, |region| region.size);
        if size(from) != size(to) {
            let values = (json(size(from)), json(size(to)));
            let text = format!(
                "region {index} has {:#x} bytes at the source, {:#x} at the destination",
                size(from),
                size(to)
            );
            pair.say(findings, codes.0, format!("regions.{index}.size"), values, text);
            continue;
        }
        let access = |pick: fn(&RegionManifest) -> Option<bool>| (from.and_then(pick), to.and_then(pick));
        for (name, (from, to)) in
            [("read", access(|region| region.read)), ("write", access(|region| region.write))]
        {
            // Of a region whose size is known, access may be unknown at one side: nothing is gained by a warning.
            if from.zip(to).is_some_and(|(from, to)| from != to) {
                let what = format!("{name} access to region {index}");
                let field = format!("regions.{index}.{name}");
                pair.differs(findings, codes.0, field, &what, (json(from), json(to)));
            }
        }
    }
}

fn irqs(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let counts = |device: &DeviceManifest| -> Option<BTreeMap<u32, u32>> {
        let there = device.irqs.as_ref()?.iter().filter(|(_, count)| **count != 0);
        Some(there.map(|(index, count)| (*index, *count)).collect())
    };
    let codes = (&codes::DEVICE_IRQS, &codes::UNKNOWN_IRQS);
    let maps = (counts(pair.source), counts(pair.destination));
    let Some((from, to)) = both(pair, findings, codes, "irqs", "the list of interrupts", maps) else {
        return;
    };
    for index in from.keys().chain(to.keys()).collect::<BTreeSet<_>>() {
        let count = |map: &BTreeMap<u32, u32>| map.get(index).copied().unwrap_or(0);
        let (from, to) = (count(&from), count(&to));
        if from != to {
            let kind = match index {
                0 => "INTx",
                1 => "MSI",
                2 => "MSI-X",
                _ => "its own",
            };
            let text =
                format!("interrupts {index} ({kind}): {from} vectors at the source, {to} at the destination");
            pair.say(findings, codes.0, format!("irqs.{index}"), (json(from), json(to)), text);
        }
    }
}

fn capabilities(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let codes = (&codes::DEVICE_CAPABILITIES, &codes::UNKNOWN_CAPABILITIES);
    let lists = (pair.source.capabilities.clone(), pair.destination.capabilities.clone());
    let name = "the list of PCI capabilities";
    let Some((from, to)) = both(pair, findings, codes, "capabilities", name, lists) else { return };
    let (from, to): (BTreeSet<_>, BTreeSet<_>) = (from.into_iter().collect(), to.into_iter().collect());
    for capability in &from {
        if !to.iter().any(|other| fits(pair, *capability, *other)) {
            let instead = to.iter().find(|other| kind(other) == kind(capability));
            let text = match instead {
                Some(other) => {
                    format!("{} at the source, {} at the destination", show(capability), show(other))
                }
                None => format!("the destination lacks {}", show(capability)),
            };
            let values = (json(capability), json(instead));
            pair.say(findings, codes.0, capability_field(capability), values, text);
        }
    }
    // A guest's driver does not look for what was not there when it started. Where equality is strict, that is a difference still.
    let new = to.iter().filter(|other| !from.iter().any(|own| kind(own) == kind(other)));
    for capability in new.filter(|_| pair.strict) {
        let text = format!("only the destination has {}", show(capability));
        let values = (Value::Null, json(capability));
        pair.say(findings, codes.0, capability_field(capability), values, text);
    }
}

fn kind(capability: &Capability) -> (bool, u16) {
    (capability.extended, capability.id)
}

fn fits(pair: DevicePair<'_>, own: Capability, other: Capability) -> bool {
    let len = if pair.strict {
        own.len == other.len
    } else {
        own.len.zip(other.len).is_none_or(|(own, other)| own == other)
    };
    kind(&own) == kind(&other) && own.offset == other.offset && len
}

fn show(capability: &Capability) -> String {
    let extended = if capability.extended { "extended " } else { "" };
    let len = capability.len.map_or_else(String::new, |len| format!(", {len} bytes"));
    format!("{extended}capability {:#x} at {:#x}{len}", capability.id, capability.offset)
}

fn capability_field(capability: &Capability) -> String {
    let extended = if capability.extended { "extended-" } else { "" };
    format!("capabilities.{extended}{:#x}@{:#x}", capability.id, capability.offset)
}

/// Both sides' values, when both are known; a reason when only one is.
fn both<T>(
    pair: DevicePair<'_>,
    findings: &mut Findings<'_>,
    (strict, unknown): (ReasonCode, ReasonCode),
    field: &str,
    what: &str,
    values: (Option<T>, Option<T>),
) -> Option<(T, T)> {
    match values {
        (Some(from), Some(to)) => Some((from, to)),
        (None, None) => None,
        (from, _) => {
            let code = if pair.strict { strict } else { unknown };
            let side = |known: bool| json(known.then_some("known"));
            let (known, not) =
                if from.is_some() { ("source", "destination") } else { ("destination", "source") };
            let text = format!("{what} is known at the {known} and not at the {not}");
            pair.say(findings, code, field, (side(from.is_some()), side(from.is_none())), text);
            None
        }
    }
}
