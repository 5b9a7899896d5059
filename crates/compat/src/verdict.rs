//! Comparing two manifests.
//!
//! Every reason has a code. Codes are stable: they may be added to, but one never changes its meaning; the table is
//! at [`compare`].

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::text::{list, quote, quote_or};
use crate::version::ModelVersion;
use crate::{DeviceManifest, MachineManifest, PciIdentity};

/// Whether a machine can move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It can move live.
    Live,
    /// It cannot.
    No,
}

/// Who can change a reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhoCanFix {
    /// Whoever configures the VM.
    Configuration,
    /// Whoever runs the destination host.
    DestinationHost,
    /// Whoever maintains the device's implementation.
    Device,
    /// Nobody: it is in the nature of the thing.
    Nobody,
}

/// One reason against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// A stable code, from the table of [`compare`].
    pub code: String,
    /// A sentence. Words of a manifest in it are quoted and cut, so that it can be shown.
    pub text: String,
    /// Who can change it.
    pub who: WhoCanFix,
}

/// Whether what `source` describes can run on what `destination` describes, and every reason why not: the machine's
/// first, then each device's in the source's order.
///
/// Devices are matched by name. Their order may differ, and neither that nor their back end is ever a reason.
///
/// # Codes
/// | code | what is wrong | who can fix it |
/// |---|---|---|
/// | `machine-kind` | the machines are of different kinds | configuration |
/// | `accelerator` | different hypervisors behind the vCPUs | destination host |
/// | `vcpus` | different numbers of vCPUs | configuration |
/// | `ram-layout` | RAM differs in size, place or order | configuration |
/// | `cpu-features` | the destination lacks CPU features that the guest was given | destination host |
/// | `section-unknown` | the destination does not know a section of machine state | destination host |
/// | `section-older` | the destination knows only an older version of a section | destination host |
/// | `device-duplicate` | a manifest names a device twice | configuration |
/// | `device-missing` | the destination lacks a device | configuration |
/// | `device-extra` | the destination has a device that the guest does not know | configuration |
/// | `device-model` | the models differ | configuration |
/// | `device-model-version` | the destination's model version does not load the source's | device |
/// | `device-flags` | migration flags differ (only where equality is strict) | device |
/// | `device-pci-identity` | the PCI identities differ | device |
/// | `device-regions` | the regions differ in number or size | device |
/// | `device-irqs` | the numbers of vectors differ | device |
/// | `device-parameters` | model parameters differ | configuration |
///
/// Where no model is declared there is nothing to say which differences are harmless, so equality is strict:
/// migration flags and the text of the version must be equal too, and each reason found that way says so. Where a
/// model is declared, flags are no reason: to resume, a device needs neither PRE_COPY nor P2P.
pub fn compare(source: &MachineManifest, destination: &MachineManifest) -> (Verdict, Vec<Reason>) {
    let mut reasons = Reasons::default();
    compare_machines(source, destination, &mut reasons);
    compare_device_lists(source, destination, &mut reasons);
    let verdict = if reasons.0.is_empty() { Verdict::Live } else { Verdict::No };
    (verdict, reasons.0)
}

#[derive(Default)]
struct Reasons(Vec<Reason>);

impl Reasons {
    fn add(&mut self, code: &str, who: WhoCanFix, text: String) {
        self.0.push(Reason { code: code.to_owned(), text, who });
    }
}

fn compare_machines(source: &MachineManifest, destination: &MachineManifest, reasons: &mut Reasons) {
    use WhoCanFix::{Configuration, DestinationHost};
    if source.machine != destination.machine {
        let (from, to) = (quote(&source.machine), quote(&destination.machine));
        let text = format!("the source is a machine of kind {from}, the destination one of kind {to}");
        reasons.add("machine-kind", Configuration, text);
    }
    if source.accelerator != destination.accelerator {
        let (from, to) = (quote(&source.accelerator), quote(&destination.accelerator));
        let text = format!("the vCPUs run on {from} at the source and on {to} at the destination");
        reasons.add("accelerator", DestinationHost, text);
    }
    if source.vcpus != destination.vcpus {
        let text = format!("{} vCPUs at the source, {} at the destination", source.vcpus, destination.vcpus);
        reasons.add("vcpus", Configuration, text);
    }
    if source.ram != destination.ram {
        let show = |machine: &MachineManifest| {
            let regions =
                machine.ram.iter().map(|region| format!("{:#x} bytes at {}", region.len, region.gpa));
            list(&regions.collect::<Vec<_>>())
        };
        let (from, to) = (show(source), show(destination));
        let text = format!("RAM is laid out differently: source {from}; destination {to}");
        reasons.add("ram-layout", Configuration, text);
    }
    let offered: BTreeSet<&String> = destination.cpu.iter().collect();
    let lacking = source.cpu.iter().filter(|feature| !offered.contains(feature));
    let lacking: Vec<String> = lacking.map(|feature| quote(feature)).collect();
    if !lacking.is_empty() {
        let text = format!("the destination's CPU lacks what the guest was given: {}", list(&lacking));
        reasons.add("cpu-features", DestinationHost, text);
    }
    for (name, version) in &source.sections {
        match destination.sections.get(name) {
            None => {
                let text = format!("the destination does not know machine state {}", quote(name));
                reasons.add("section-unknown", DestinationHost, text);
            }
            Some(known) if known < version => {
                let name = quote(name);
                let text = format!(
                    "machine state {name} has version {version} at the source; the destination knows up to {known}"
                );
                reasons.add("section-older", DestinationHost, text);
            }
            Some(_) => {}
        }
    }
}

fn compare_device_lists(source: &MachineManifest, destination: &MachineManifest, reasons: &mut Reasons) {
    let from = by_name(source, "source", reasons);
    let to = by_name(destination, "destination", reasons);
    // By the source's order, not by name; a duplicate is compared once.
    for device in &source.devices {
        if !from.get(&device.id).is_some_and(|first| std::ptr::eq(*first, device)) {
            continue;
        }
        match to.get(&device.id) {
            Some(other) => compare_devices(device, other, reasons),
            None => {
                let text = format!("the destination has no device {}", device.id);
                reasons.add("device-missing", WhoCanFix::Configuration, text);
            }
        }
    }
    for id in to.keys().filter(|id| !from.contains_key(*id)) {
        let text = format!("the destination has a device {id} that the source does not have");
        reasons.add("device-extra", WhoCanFix::Configuration, text);
    }
}

fn by_name<'m>(
    machine: &'m MachineManifest,
    side: &str,
    reasons: &mut Reasons,
) -> BTreeMap<&'m vfio_migration_types::DeviceId, &'m DeviceManifest> {
    let mut devices = BTreeMap::new();
    for device in &machine.devices {
        if devices.contains_key(&device.id) {
            let text = format!("the {side} has two devices called {}", device.id);
            reasons.add("device-duplicate", WhoCanFix::Configuration, text);
        } else {
            devices.insert(&device.id, device);
        }
    }
    devices
}

fn compare_devices(source: &DeviceManifest, destination: &DeviceManifest, reasons: &mut Reasons) {
    use WhoCanFix::{Configuration, Device};
    let id = &source.id;
    let strict = source.model.is_none() && destination.model.is_none();
    let mut add = |code: &str, who, what: String| {
        let why = if strict { " (no model is declared, so equality is strict)" } else { "" };
        reasons.add(code, who, format!("device {id}: {what}{why}"));
    };
    if source.model != destination.model {
        let show = |device: &DeviceManifest| quote_or(device.model.as_deref(), "undeclared");
        let what =
            format!("the model is {} at the source, {} at the destination", show(source), show(destination));
        add("device-model", Configuration, what);
    } else if let Some(what) = version_mismatch(source, destination, strict) {
        add("device-model-version", Device, what);
    }
    if strict && source.flags != destination.flags {
        let what = format!(
            "migration flags are {:#x} at the source, {:#x} at the destination",
            source.flags.bits(),
            destination.flags.bits()
        );
        add("device-flags", Device, what);
    }
    if source.pci != destination.pci {
        let show = |pci: Option<PciIdentity>| pci.map_or_else(|| "no PCI function".to_owned(), show_pci);
        let what =
            format!("{} at the source, {} at the destination", show(source.pci), show(destination.pci));
        add("device-pci-identity", Device, what);
    }
    // A region of no bytes is a region that is not there: back ends differ in whether they list those.
    let regions = |device: &DeviceManifest| -> BTreeMap<u32, u64> {
        device
            .regions
            .iter()
            .filter(|region| region.size != 0)
            .map(|region| (region.index, region.size))
            .collect()
    };
    if let Some(what) = differences(
        |index| format!("region {index}"),
        &regions(source),
        &regions(destination),
        |n| format!("{n:#x} bytes"),
    ) {
        add("device-regions", Device, what);
    }
    let irqs = |device: &DeviceManifest| -> BTreeMap<u32, u32> {
        device.irqs.iter().filter(|(_, count)| **count != 0).map(|(index, count)| (*index, *count)).collect()
    };
    if let Some(what) = differences(
        |index| format!("IRQ index {index}"),
        &irqs(source),
        &irqs(destination),
        |n| format!("{n} vectors"),
    ) {
        add("device-irqs", Device, what);
    }
    let (from, to) = (&source.parameters, &destination.parameters);
    if let Some(what) =
        differences(|name| format!("parameter {}", quote(name)), from, to, |value| quote(value))
    {
        add("device-parameters", Configuration, what);
    }
}

fn version_mismatch(source: &DeviceManifest, destination: &DeviceManifest, strict: bool) -> Option<String> {
    let (from, to) = (source.model_version.as_deref(), destination.model_version.as_deref());
    if from == to {
        return None;
    }
    let parse = |text: Option<&str>| text.and_then(|text| text.parse::<ModelVersion>().ok());
    if !strict
        && let (Some(source), Some(destination)) = (parse(from), parse(to))
        && destination.loads(source)
    {
        return None;
    }
    let (from, to) = (quote_or(from, "undeclared"), quote_or(to, "undeclared"));
    Some(format!(
        "the model version is {from} at the source; the destination has {to}, which does not load it"
    ))
}

fn show_pci(pci: PciIdentity) -> String {
    format!(
        "PCI {:04x}:{:04x} subsystem {:04x}:{:04x} revision {:02x} class {:06x}",
        pci.vendor, pci.device, pci.subsystem_vendor, pci.subsystem, pci.revision, pci.class
    )
}

/// Where two maps differ, in words; `None` when they are equal.
fn differences<K: Ord, V: PartialEq>(
    name: impl Fn(&K) -> String,
    source: &BTreeMap<K, V>,
    destination: &BTreeMap<K, V>,
    show: impl Fn(&V) -> String,
) -> Option<String> {
    let show = |value: Option<&V>| value.map_or_else(|| "none".to_owned(), &show);
    let added = destination.keys().filter(|key| !source.contains_key(key));
    let texts: Vec<String> = source
        .keys()
        .chain(added)
        .filter(|key| source.get(key) != destination.get(key))
        .map(|key| {
            let (from, to) = (show(source.get(key)), show(destination.get(key)));
            format!("{}: {from} at the source, {to} at the destination", name(key))
        })
        .collect();
    (!texts.is_empty()).then(|| list(&texts))
}
