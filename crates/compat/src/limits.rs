//! What no manifest may say, however well its JSON is formed.

use std::collections::BTreeSet;
use std::fmt::Display;

use vfio_migration_types::is_control;

use crate::device::DeviceManifest;
use crate::error::ManifestError;
use crate::host::{Accept, HostManifest};
use crate::machine::MachineManifest;
use crate::parameter::Parameter;
use crate::version::{ModelVersion, VersionRanges};

/// Most items of whatever is counted.
const MAX_ITEMS: usize = 4096;
/// Most devices and offers of a host.
const MAX_HOST_DEVICES: usize = 4096;
/// Longest text, in bytes.
const MAX_TEXT: usize = 4096;

/// A breach of a limit, and where.
#[derive(Debug)]
pub(crate) struct Breach {
    path: String,
    rule: String,
}

impl Breach {
    pub(crate) fn of(self, origin: &str) -> ManifestError {
        ManifestError::new(origin, self.path.strip_prefix('.').unwrap_or(&self.path), self.rule)
    }
}

fn wrong(path: impl Display, rule: impl Display) -> Breach {
    Breach { path: path.to_string(), rule: rule.to_string() }
}

fn at_most(path: impl Display, count: usize, max: usize) -> Result<(), Breach> {
    if count > max { Err(wrong(path, format!("{count} entries (at most {max} are taken)"))) } else { Ok(()) }
}

fn short(path: impl Display, text: &str) -> Result<(), Breach> {
    if text.len() > MAX_TEXT {
        return Err(wrong(path, format!("a text of {} bytes (at most {MAX_TEXT} are taken)", text.len())));
    }
    Ok(())
}

/// Checks a device whose path in the document is `at`.
pub(crate) fn device(device: &DeviceManifest, at: &str) -> Result<(), Breach> {
    let path = |field: &str| format!("{at}.{field}");
    let texts = [
        ("model", &device.model),
        ("model_version", &device.model_version),
        ("kernel", &device.kernel),
        ("mdev_type", &device.mdev_type),
        ("no_migration", &device.no_migration),
        ("firmware", &device.firmware),
        ("host_driver", &device.host_driver),
    ];
    for (field, text) in texts {
        short(path(field), text.as_deref().unwrap_or_default())?;
    }
    short(path("loads"), device.loads.as_ref().map_or("", VersionRanges::text))?;
    if let Some(version) = &device.model_version {
        version.parse::<ModelVersion>().map_err(|error| wrong(path("model_version"), error))?;
    }
    at_most(path("parameters"), device.parameters.len(), MAX_ITEMS)?;
    for (name, parameter) in &device.parameters {
        self::parameter(parameter, &path(&format!("parameters{}", crate::tree::step(name))))?;
    }
    let regions = device.regions.as_deref().unwrap_or_default();
    at_most(path("regions"), regions.len(), MAX_ITEMS)?;
    let mut indices = BTreeSet::new();
    for (n, region) in regions.iter().enumerate() {
        if !indices.insert(region.index) {
            return Err(wrong(
                path(&format!("regions[{n}].index")),
                format!("region {} twice", region.index),
            ));
        }
    }
    let capabilities = device.capabilities.as_deref().unwrap_or_default();
    at_most(path("capabilities"), capabilities.len(), MAX_ITEMS)?;
    for (n, capability) in capabilities.iter().enumerate() {
        if capability.offset >= 4096 {
            let at = path(&format!("capabilities[{n}].offset"));
            return Err(wrong(at, format!("{} is beyond config space, 4096 bytes", capability.offset)));
        }
    }
    at_most(path("irqs"), device.irqs.as_ref().map_or(0, |irqs| irqs.len()), MAX_ITEMS)?;
    for (index, count) in device.irqs.iter().flatten() {
        if *count > 2048 {
            let at = path(&format!("irqs.{index}"));
            return Err(wrong(at, format!("{count} vectors (a PCI function has at most 2048)")));
        }
    }
    if let Some(pci) = device.pci
        && pci.class > 0xff_ffff
    {
        return Err(wrong(path("pci.class"), format!("{:#x} has more than 24 bits", pci.class)));
    }
    at_most(path("notes"), device.notes.len(), MAX_ITEMS)?;
    for (n, note) in device.notes.iter().enumerate() {
        short(path(&format!("notes[{n}].field")), &note.field)?;
        short(path(&format!("notes[{n}].text")), &note.text)?;
    }
    at_most(path("config_mask"), device.config_mask.len(), MAX_ITEMS)?;
    at_most(path("capacity"), device.capacity.len(), MAX_ITEMS)?;
    at_most(path("facts"), device.facts.len(), MAX_ITEMS)
}

fn parameter(parameter: &Parameter, at: &str) -> Result<(), Breach> {
    let allowed = parameter.allowed.as_deref().unwrap_or_default();
    at_most(format!("{at}.allowed"), allowed.len(), MAX_ITEMS)?;
    for (n, allowed) in allowed.iter().enumerate() {
        if let crate::parameter::Allowed::Range(range) = allowed
            && range.min > range.max
        {
            let at = format!("{at}.allowed[{n}]");
            return Err(wrong(at, format!("the range {} to {} is empty", range.min, range.max)));
        }
    }
    Ok(())
}

pub(crate) fn machine(machine: &MachineManifest) -> Result<(), Breach> {
    short("machine", &machine.machine)?;
    short("accelerator", &machine.accelerator)?;
    at_most("devices", machine.devices.len(), MachineManifest::MAX_DEVICES)?;
    at_most("ram", machine.ram.len(), MAX_ITEMS)?;
    at_most("cpu", machine.cpu.len(), MAX_ITEMS)?;
    at_most("sections", machine.sections.len(), MAX_ITEMS)?;
    at_most("config_rules", machine.config_rules.len(), MAX_ITEMS)?;
    for (n, rules) in machine.config_rules.iter().enumerate() {
        at_most(format!("config_rules[{n}].rules"), rules.rules.len(), MAX_ITEMS)?;
    }
    let mut bytes = 0u64;
    for (n, region) in machine.ram.iter().enumerate() {
        let sum = bytes.checked_add(region.len);
        let Some(sum) = sum.filter(|_| region.gpa.0.checked_add(region.len).is_some()) else {
            return Err(wrong(format!("ram[{n}]"), "it ends beyond 2^64"));
        };
        bytes = sum;
    }
    devices(&machine.devices, "devices", |device| device)
}

pub(crate) fn host(host: &HostManifest) -> Result<(), Breach> {
    short("name", &host.name)?;
    if host.name.is_empty() {
        return Err(wrong("name", "a host needs a name"));
    }
    // It stands in tables, one line each.
    if host.name.contains(is_control) {
        return Err(wrong("name", "a host's name has no control characters"));
    }
    at_most("cpu", host.cpu.as_ref().map_or(0, Vec::len), MAX_ITEMS)?;
    at_most("devices", host.devices.len(), MAX_HOST_DEVICES)?;
    at_most("offers", host.offers.len(), MAX_HOST_DEVICES)?;
    devices(&host.devices, "devices", |device| device)?;
    devices(&host.offers, "offers", |offer| &offer.device)?;
    for (n, Accept { versions, parameters, .. }) in host.accepts.iter().flatten().enumerate() {
        short(format!("accepts[{n}].versions"), versions.as_ref().map_or("", VersionRanges::text))?;
        at_most(format!("accepts[{n}].parameters"), parameters.len(), MAX_ITEMS)?;
    }
    Ok(())
}

fn devices<T>(list: &[T], name: &str, of: fn(&T) -> &DeviceManifest) -> Result<(), Breach> {
    let mut ids = BTreeSet::new();
    let nested = if name == "offers" { ".device" } else { "" };
    for (n, one) in list.iter().enumerate() {
        let at = format!("{name}[{n}]{nested}");
        if !ids.insert(&of(one).id) {
            return Err(wrong(format!("{at}.id"), format!("{} twice", of(one).id)));
        }
        device(of(one), &at)?;
    }
    Ok(())
}
