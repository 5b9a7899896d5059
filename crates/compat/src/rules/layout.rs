//! What a guest's driver sees of a device: PCI identity, regions, interrupts, capabilities.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::DevicePair;
use super::config::{ConfigMask, header, identity_bytes};
use crate::codes::{self, ReasonCode};
use crate::device::{Capability, DeviceManifest, PciIdentity, RegionManifest};
use crate::findings::{Findings, Lazy};
use crate::tree::{either, json};

/// Compares the PCI layout of two devices.
pub(crate) fn compare(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    for rule in [identity, regions, irqs, capabilities] {
        if findings.is_decided() {
            break;
        }
        rule(pair, findings);
    }
}

/// Lists that differ are sorted before they are compared, which is more work for each item than to look at it.
fn look_at(findings: &Findings<'_>, pair: DevicePair<'_>, len: fn(&DeviceManifest) -> Option<usize>) {
    let items = [pair.source, pair.destination].map(|device| len(device).unwrap_or(0));
    findings.look_at(4 * (items[0] + items[1]));
}

pub(crate) fn identity(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let (from, to) = (pair.source.pci, pair.destination.pci);
    if from == to {
        if from.is_none() && (is_function(pair.source) || is_function(pair.destination)) {
            let text = "it has BARs or message interrupts, and neither side says what its PCI identity is";
            let values = (Value::Null, Value::Null);
            let pair = DevicePair { strict: false, ..pair };
            pair.say(findings, &codes::NO_PCI_IDENTITY, "pci", values, || text.to_owned());
        }
        return;
    }
    let show = |pci: Option<PciIdentity>| pci.map_or_else(|| "PCI identity unknown".to_owned(), show_pci);
    let text = || format!("{} at the source, {} at the destination", show(from), show(to));
    if let (Some(from), Some(to)) = (from, to) {
        let rules = ConfigMask::of(pair, findings.policy());
        findings.look_at(rules.len());
        if rules.exempt(identity_bytes(from, to)) {
            return exempt(pair, findings, "pci", || (json(from), json(to)), text);
        }
    }
    let same_but_revision =
        from.zip(to).is_some_and(|(from, to)| PciIdentity { revision: to.revision, ..from } == to);
    let code = match (from, to) {
        _ if pair.strict => &codes::DEVICE_PCI_IDENTITY,
        (None, _) | (_, None) => &codes::UNKNOWN_PCI_IDENTITY,
        _ if same_but_revision => &codes::DEVICE_PCI_REVISION,
        _ => &codes::DEVICE_PCI_IDENTITY,
    };
    pair.say(findings, code, "pci", || (json(from), json(to)), text);
}

/// A device with what only a PCI function has: BARs (VFIO regions 0 to 5), vectors of MSI or MSI-X (VFIO interrupts 1 and 2).
fn is_function(device: &DeviceManifest) -> bool {
    let bars = device.regions.iter().flatten().any(|region| region.index <= 5 && region.size > 0);
    bars || device.irqs.iter().flatten().any(|(index, count)| [1, 2].contains(index) && *count > 0)
}

fn show_pci(pci: PciIdentity) -> String {
    format!(
        "PCI {:04x}:{:04x} subsystem {:04x}:{:04x} revision {:02x} class {:06x}",
        pci.vendor, pci.device, pci.subsystem_vendor, pci.subsystem, pci.revision, pci.class
    )
}

fn regions(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    if pair.source.regions == pair.destination.regions {
        return;
    }
    look_at(findings, pair, |device| device.regions.as_ref().map(Vec::len));
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
    for (index, from, to) in either(&from, &to) {
        let size = |region: Option<&RegionManifest>| region.map_or(0, |region| region.size);
        if size(from) != size(to) {
            let (from, to) = (size(from), size(to));
            let text =
                || format!("region {index} has {from:#x} bytes at the source, {to:#x} at the destination");
            let values = || (json(from), json(to));
            pair.say(findings, codes.0, || format!("regions.{index}.size"), values, text);
            continue;
        }
        let access = |pick: fn(&RegionManifest) -> Option<bool>| (from.and_then(pick), to.and_then(pick));
        for (name, (from, to)) in
            [("read", access(|region| region.read)), ("write", access(|region| region.write))]
        {
            // Of a region whose size is known, access may be unknown at one side: nothing is gained by a warning.
            if from.zip(to).is_some_and(|(from, to)| from != to) {
                let what = || format!("{name} access to region {index}");
                let field = || format!("regions.{index}.{name}");
                pair.differs(findings, codes.0, field, what, || (json(from), json(to)));
            }
        }
    }
}

fn irqs(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    if pair.source.irqs == pair.destination.irqs {
        return;
    }
    look_at(findings, pair, |device| device.irqs.as_ref().map(BTreeMap::len));
    let counts = |device: &DeviceManifest| -> Option<BTreeMap<u32, u32>> {
        let there = device.irqs.as_ref()?.iter().filter(|(_, count)| **count != 0);
        Some(there.map(|(index, count)| (*index, *count)).collect())
    };
    let codes = (&codes::DEVICE_IRQS, &codes::UNKNOWN_IRQS);
    let maps = (counts(pair.source), counts(pair.destination));
    let Some((from, to)) = both(pair, findings, codes, "irqs", "the list of interrupts", maps) else {
        return;
    };
    for (index, from, to) in either(&from, &to) {
        let (from, to) = (from.copied().unwrap_or(0), to.copied().unwrap_or(0));
        if from != to {
            let kind = match index {
                0 => "INTx",
                1 => "MSI",
                2 => "MSI-X",
                _ => "its own",
            };
            let text = || {
                format!("interrupts {index} ({kind}): {from} vectors at the source, {to} at the destination")
            };
            pair.say(findings, codes.0, || format!("irqs.{index}"), || (json(from), json(to)), text);
        }
    }
}

pub(crate) fn capabilities(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    if pair.source.capabilities == pair.destination.capabilities {
        return;
    }
    look_at(findings, pair, |device| device.capabilities.as_ref().map(Vec::len));
    let codes = (&codes::DEVICE_CAPABILITIES, &codes::UNKNOWN_CAPABILITIES);
    let lists = (pair.source.capabilities.as_deref(), pair.destination.capabilities.as_deref());
    let name = "the list of PCI capabilities";
    let Some((from, to)) = both(pair, findings, codes, "capabilities", name, lists) else { return };
    let (from, to): (BTreeSet<_>, BTreeSet<_>) =
        (from.iter().copied().collect(), to.iter().copied().collect());
    let rules = ConfigMask::of(pair, findings.policy());
    findings.look_at(rules.len());
    for capability in &from {
        if !has(&to, capability, pair.strict) {
            let instead = of_kind(&to, capability);
            let text = || match instead {
                Some(other) => {
                    format!("{} at the source, {} at the destination", show(capability), show(other))
                }
                None => format!("the destination lacks {}", show(capability)),
            };
            let values = || (json(capability), json(instead));
            let bytes = header(capability).chain(instead.into_iter().flat_map(header));
            if rules.exempt(bytes) {
                exempt(pair, findings, || capability_field(capability), values, text);
                continue;
            }
            pair.say(findings, codes.0, || capability_field(capability), values, text);
        }
    }
    // A guest's driver does not look for what was not there when it started. Where equality is strict, that is a difference still.
    // So it is where a rule asks for just these bytes.
    let asked = |other: &Capability| header(other).any(|offset| rules.say(offset) == Some(true));
    let counts = |other: &&Capability| pair.strict || asked(other);
    let new = to.iter().filter(counts).filter(|other| of_kind(&from, other).is_none());
    for capability in new {
        let text = || format!("only the destination has {}", show(capability));
        let values = || (Value::Null, json(capability));
        if rules.exempt(header(capability)) {
            exempt(pair, findings, || capability_field(capability), values, text);
            continue;
        }
        pair.say(findings, codes.0, || capability_field(capability), values, text);
    }
}

/// The first of a kind, in the order of the set: by kind, then place, then length, one that is not known before the others.
fn of_kind<'m>(all: &'m BTreeSet<Capability>, wanted: &Capability) -> Option<&'m Capability> {
    let (extended, id) = (wanted.extended, wanted.id);
    let first = Capability { extended, id, offset: 0, len: None };
    let found = all.range(first..).next();
    found.filter(|found| (found.extended, found.id) == (extended, id))
}

/// A difference in bytes that a rule leaves out: whoever gave it knew, whether or not a model is declared.
fn exempt(
    pair: DevicePair<'_>,
    findings: &mut Findings<'_>,
    field: impl Lazy<String>,
    values: impl Lazy<(Value, Value)>,
    text: impl FnOnce() -> String,
) {
    let text = || format!("{}; a rule for config space leaves that out", text());
    DevicePair { strict: false, ..pair }.say(findings, &codes::CONFIG_EXEMPT, field, values, text);
}

/// Whether a capability is there at the same place. A length that one side does not know differs where equality is strict alone.
fn has(all: &BTreeSet<Capability>, own: &Capability, strict: bool) -> bool {
    if strict || own.len.is_some() {
        let unknown = Capability { len: None, ..*own };
        return all.contains(own) || !strict && all.contains(&unknown);
    }
    let found = all.range(*own..).next();
    found.is_some_and(|found| Capability { len: None, ..*found } == *own)
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
            let text = || format!("{what} is known at the {known} and not at the {not}");
            let values = || (side(from.is_some()), side(from.is_none()));
            pair.say(findings, code, field, values, text);
            None
        }
    }
}
