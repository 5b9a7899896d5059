//! What a live migration needs besides two devices that fit: a dirty tracker, peer-to-peer DMA that can be stopped, room.

use serde_json::Value;

use super::DevicePair;
use crate::codes;
use crate::device::{DeviceManifest, DirtyTracking};
use crate::findings::{Findings, Found};
use crate::host::HostManifest;
use crate::scalar::Scalar;
use crate::text::sentence;
use crate::tree::json;
use crate::version::ModelVersion;

/// What stands against moving a machine's device whatever is at the other end: so much a source knows before it has talked
/// to anybody. `destination` is the device there, where it is known.
pub(crate) fn source(
    source: &DeviceManifest,
    destination: Option<&DeviceManifest>,
    findings: &mut Findings<'_>,
) {
    if let Some(why) = &source.no_migration {
        cannot_migrate(source, (json(why), Value::Null), why, findings);
    }
    dirty(source, destination, findings);
    policy(source, findings);
}

/// Checks one device for live migration to another.
pub(crate) fn pair(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    source(pair.source, Some(pair.destination), findings);
    if let Some(why) = &pair.destination.no_migration {
        let values = (Value::Null, json(why));
        cannot_migrate(
            pair.source,
            values,
            &format!("{} at the destination: {why}", pair.destination.id),
            findings,
        );
    }
    page_size(pair, findings);
}

/// A device without any migration goes nowhere, not into a file either.
fn cannot_migrate(
    device: &DeviceManifest,
    (source, destination): (Value, Value),
    why: &str,
    findings: &mut Findings<'_>,
) {
    let text = format!("it cannot migrate: {}", sentence(why));
    let found = Found { field: "no_migration".into(), source, destination, text };
    findings.add(&codes::NOT_MIGRATABLE, Some(device), found);
}

/// The source's tracker: the destination's is of no matter until the way back.
fn dirty(source: &DeviceManifest, destination: Option<&DeviceManifest>, findings: &mut Findings<'_>) {
    let (from, to) = (source.dirty, destination.and_then(|destination| destination.dirty));
    let (code, text) = match tracked(from) {
        Some(Tracked::Exactly) => return,
        Some(Tracked::Nothing) => (
            &codes::DIRTY_NONE,
            "it has no log of its DMA writes, and nothing else logs them: nobody would know which pages it wrote",
        ),
        Some(Tracked::Everything) => (
            &codes::DIRTY_ALL,
            "it has no log of its DMA writes: all memory that it may write counts as dirty, each time",
        ),
        // That nothing is known is said of a pair of which one side knows more.
        None if destination.is_none_or(|destination| destination.dirty == from) => return,
        None => (&codes::UNKNOWN_DIRTY, "the source does not say who logs its DMA writes"),
    };
    let found =
        Found { field: "dirty".into(), source: json(from), destination: json(to), text: text.to_owned() };
    findings.add(code, Some(source), found);
}

enum Tracked {
    Exactly,
    Everything,
    Nothing,
}

fn tracked(dirty: Option<DirtyTracking>) -> Option<Tracked> {
    let dirty = dirty?;
    let trackers = [dirty.device_log, dirty.iommu, dirty.container];
    if dirty.all_dirty == Some(true) {
        Some(Tracked::Everything)
    } else if trackers.contains(&Some(true)) {
        Some(Tracked::Exactly)
    } else if dirty.device_log == Some(false) && dirty.iommu == Some(false) {
        Some(Tracked::Nothing)
    } else {
        None
    }
}

/// What was mapped in small pages must be mapped again.
fn page_size(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let smallest = |device: &DeviceManifest| {
        device.iommu_page_sizes.filter(|sizes| *sizes != 0).map(|sizes| 1u64 << sizes.trailing_zeros())
    };
    if let (Some(from), Some(to)) = (smallest(pair.source), smallest(pair.destination))
        && from < to
    {
        let what = "the smallest page of the IOMMU";
        let pair = DevicePair { strict: false, ..pair };
        pair.differs(findings, &codes::IOMMU_PAGE_SIZE, "iommu_page_sizes", what, (json(from), json(to)));
    }
}

fn policy(source: &DeviceManifest, findings: &mut Findings<'_>) {
    let policy = findings.policy();
    if policy.require_declared_model && source.model.is_none() {
        let text = "the policy wants a declared model, and there is none".to_owned();
        let (field, destination) = ("model".to_owned(), Value::Null);
        let found = Found { field, source: Value::Null, destination, text };
        findings.add(&codes::POLICY_MODEL, Some(source), found);
    }
    state(source, findings);
}

/// The policy's limit on a device's state.
pub(crate) fn state(source: &DeviceManifest, findings: &mut Findings<'_>) {
    let limit = findings.policy().max_state_size;
    state_size(source, (limit, "the policy allows", &codes::POLICY_STATE_SIZE), findings);
}

fn state_size(
    source: &DeviceManifest,
    (limit, whose, code): (Option<u64>, &str, codes::ReasonCode),
    findings: &mut Findings<'_>,
) {
    let Some(limit) = limit else { return };
    let (code, text) = match source.state_size {
        None => (&codes::UNKNOWN_STATE_SIZE, format!("its state has no known size; {whose} {limit} bytes")),
        Some(size) if size > limit => (code, format!("its state has {size} bytes; {whose} {limit}")),
        Some(_) => return,
    };
    let found =
        Found { field: "state_size".into(), source: json(source.state_size), destination: json(limit), text };
    findings.add(code, Some(source), found);
}

/// With several devices each must be able to stop what it does to the others before the first is stopped (uAPI:
/// `VFIO_MIGRATION_P2P`).
pub(crate) fn peers(
    source: &DeviceManifest,
    destination: Option<&DeviceManifest>,
    findings: &mut Findings<'_>,
) {
    let there = destination.and_then(|destination| destination.flags);
    let (code, text) = match source.flags {
        Some(flags) if flags.p2p => return,
        Some(_) => (
            &codes::P2P_MISSING,
            "it cannot stop its peer-to-peer DMA (no P2P migration states), and there are other devices",
        ),
        None if there.is_none() => return,
        None => (
            &codes::UNKNOWN_FLAGS,
            "the source does not say whether it can stop its peer-to-peer DMA, and there are other devices",
        ),
    };
    let found = Found {
        field: "flags.p2p".into(),
        source: json(source.flags.map(|flags| flags.p2p)),
        destination: json(there.map(|flags| flags.p2p)),
        text: text.to_owned(),
    };
    findings.add(code, Some(source), found);
}

/// A PCI function whose VMM hands over the device alone: config space, BARs and interrupts are in no device's stream.
pub(crate) fn left_behind(source: &DeviceManifest, findings: &mut Findings<'_>) {
    let bars = source.regions.iter().flatten().filter(|region| region.index <= 5 && region.size > 0).count();
    let vectors: u32 =
        source.irqs.iter().flat_map(|irqs| irqs.values()).fold(0, |sum, n| sum.saturating_add(*n));
    if source.pci.is_none() && bars == 0 && vectors == 0 {
        return;
    }
    let text = format!(
        "its PCI function does not move with it: config space, {bars} BARs and {vectors} interrupts would stay behind"
    );
    let (field, none) = ("pci".to_owned(), Value::Null);
    findings.add(
        &codes::PCI_LEFT_BEHIND,
        Some(source),
        Found { field, source: none.clone(), destination: none, text },
    );
}

/// Checks what a host takes, and bears.
pub(crate) fn host(source: &DeviceManifest, host: &HostManifest, findings: &mut Findings<'_>) {
    let whose = (host.limits.max_state_bytes, "the host bears", &codes::HOST_STATE_SIZE);
    state_size(source, whose, findings);
    let Some(accepts) = &host.accepts else { return };
    let models: Vec<_> =
        accepts.iter().filter(|accept| Some(&accept.model) == source.model.as_ref()).collect();
    let mut refuse = |field: &str, value: Value, text: String| {
        let models: Vec<&String> = accepts.iter().map(|accept| &accept.model).collect();
        let found = Found { field: field.to_owned(), source: value, destination: json(models), text };
        findings.add(&codes::HOST_ACCEPTS, Some(source), found);
    };
    if models.is_empty() {
        return refuse("model", json(&source.model), "the host does not accept its model".to_owned());
    }
    let version = source.model_version.as_deref().and_then(|text| text.parse::<ModelVersion>().ok());
    let taken = models.iter().filter(|accept| match &accept.versions {
        None => true,
        Some(ranges) => version.is_some_and(|version| ranges.contain(version)),
    });
    let taken: Vec<_> = taken.collect();
    if taken.is_empty() {
        let text = "the host does not accept this version of its model".to_owned();
        return refuse("model_version", json(&source.model_version), text);
    }
    let value = |name: &String| source.parameters.get(name).map(|parameter| &parameter.value);
    let allows = |name: &String, allowed: &Vec<crate::parameter::Allowed>| {
        value(name).is_none_or(|value: &Scalar| allowed.iter().any(|one| one.contains(value)))
    };
    if taken.iter().any(|accept| accept.parameters.iter().all(|(name, allowed)| allows(name, allowed))) {
        return;
    }
    let breach = taken.iter().flat_map(|accept| &accept.parameters).find(|(name, all)| !allows(name, all));
    if let Some((name, _)) = breach {
        let text = format!("the host does not accept the value of parameter {}", crate::text::quote(name));
        refuse(&format!("parameters.{name}"), json(value(name)), text);
    }
}
