//! The reasons of a verdict, between the wire and those who read them.

use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use vfio_migration_compat::{
    Allow, DirtyTracking, MachineManifest, Policy, Reason, Report, SessionCode, Severity, Verdict, WhoCanFix,
    check_left_behind, check_source,
};
use vfio_migration_device::CapabilitiesError;
use vfio_migration_types::{Failure, Side};
use vfio_migration_wire as wire;

use crate::machine::MigratableDevice;

/// Codes of what the source, and its devices, cannot say of their writes.
pub(crate) const DIRTY: [&str; 4] = ["dirty-none", "dirty-all", "unknown-dirty", "dirty-uncovered"];
/// Codes of devices that may write into each other.
pub(crate) const PEERS: [&str; 1] = ["p2p-missing"];

/// Lets `policy` take these reasons for warnings.
pub(crate) fn allow(policy: &mut Policy, codes: &[&str], reason: &str) {
    policy.allow.extend(codes.iter().map(|code| Allow {
        code: (*code).to_owned(),
        reason: Some(reason.to_owned()),
        ..Allow::default()
    }));
}

/// As ACCEPT and REFUSE carry them.
pub(crate) fn to_wire(reasons: &[Reason]) -> Vec<wire::Reason> {
    let json = |value: &Value| if value.is_null() { String::new() } else { value.to_string() };
    let one = |reason: &Reason| wire::Reason {
        code: reason.code.clone(),
        text: reason.text.clone(),
        device: reason.device.clone().unwrap_or_default(),
        field: reason.field.clone(),
        source: json(&reason.source),
        destination: json(&reason.destination),
        severity: word(&reason.severity),
        fix: word(&reason.fix),
    };
    reasons.iter().map(one).collect()
}

/// A peer's reasons, as those of this crate. A word that this version does not know counts as the worst.
pub(crate) fn from_wire(reasons: Vec<wire::Reason>) -> Vec<Reason> {
    // A value that was cut to fit is no JSON any more, and is given as it is.
    let value = |text: String| match serde_json::from_str(&text) {
        Ok(value) => value,
        Err(_) if text.is_empty() => Value::Null,
        Err(_) => Value::String(text),
    };
    let one = |reason: wire::Reason| Reason {
        code: reason.code,
        text: reason.text,
        device: Some(reason.device).filter(|name| !name.is_empty()),
        field: reason.field,
        source: value(reason.source),
        destination: value(reason.destination),
        severity: meaning(&reason.severity).unwrap_or(Severity::No),
        fix: meaning(&reason.fix).unwrap_or(WhoCanFix::Nobody),
    };
    reasons.into_iter().map(one).collect()
}

/// What stands against moving a machine away, whatever is at the other end: by its manifest, by what its devices answer, which
/// is what a session meets, and by how its VMM hands them over. A manifest that claims more than its device can do does not
/// help it. `alone`: the devices are all of the machine, and no guest misses their PCI functions.
pub(crate) fn of_source(
    manifest: &MachineManifest,
    devices: &[MigratableDevice],
    policy: &Policy,
    alone: bool,
) -> Report {
    let mut opened = with_migration_known(manifest, devices);
    for described in &mut opened.devices {
        let moved = devices.iter().find(|moved| *moved.device.id() == described.id);
        let Some(Ok(capabilities)) = moved.map(|moved| moved.device.capabilities()) else { continue };
        described.flags = Some(capabilities.flags);
        if !capabilities.dirty_log {
            let (none, known) = (Some(false), described.dirty.unwrap_or_default());
            described.dirty = Some(DirtyTracking { device_log: none, iommu: none, container: none, ..known });
        }
    }
    let handed_over = devices.iter().filter(|moved| moved.pci.is_none() && !alone);
    let left = handed_over.filter_map(|moved| left_behind(manifest, moved, policy)).collect();
    with(check_source(&opened, policy), left)
}

/// `manifest`, with the word of each device on whether it can migrate at all.
pub(crate) fn with_migration_known(
    manifest: &MachineManifest,
    devices: &[MigratableDevice],
) -> MachineManifest {
    let mut manifest = manifest.clone();
    for described in &mut manifest.devices {
        let moved = devices.iter().find(|moved| *moved.device.id() == described.id);
        let said = moved.map(|moved| moved.device.capabilities());
        if let Some(Err(CapabilitiesError::NotMigratable(why))) = said {
            described.no_migration = Some(why.0);
        }
    }
    manifest
}

/// The reason against a device that its VMM hands over without its PCI function.
pub(crate) fn left_behind(
    manifest: &MachineManifest,
    moved: &MigratableDevice,
    policy: &Policy,
) -> Option<Reason> {
    let described = manifest.devices.iter().find(|described| described.id == *moved.device.id())?;
    check_left_behind(described, policy)
}

/// Whether a machine may go where `report` is about; `to_file`: as a snapshot, for which less must hold.
pub(crate) fn permits(report: &Report, to_file: bool) -> bool {
    let worst = if to_file { Verdict::SnapshotOnly } else { Verdict::LiveWithWarning };
    report.verdict <= worst
}

/// A device's failure when it was tried, as a reason. One that is late, or whose server is gone, has not answered: no verdict.
pub(crate) fn of_device_failure(failure: &Failure) -> Option<Reason> {
    let unanswered = [Errno::TIMEDOUT, Errno::CONNRESET].map(|errno| errno.raw_os_error().unsigned_abs());
    if failure.errno.is_some_and(|errno| unanswered.contains(&errno)) {
        return None;
    }
    let device = failure.device.clone()?;
    let arc = failure.arc.map(|(from, to)| format!("{from} to {to}"));
    let side = failure.side;
    let found = serde_json::json!({
        "side": side, "phase": failure.phase, "arc": arc, "errno": failure.errno,
    });
    let (source, destination) = match side {
        Side::Source => (found, Value::Null),
        Side::Destination => (Value::Null, found),
    };
    let text = failure.to_string();
    Some(Reason {
        device: Some(device),
        field: "migration".into(),
        source,
        destination,
        ..Reason::new(SessionCode::DeviceFailed, text)
    })
}

/// A migration that would not come to its end within its limits, as a reason.
pub(crate) fn of_obstacle(failure: &Failure) -> Reason {
    let (device, field) = (failure.device.clone(), "downtime".to_owned());
    Reason { device, field, ..Reason::new(SessionCode::RehearsalObstacle, failure.to_string()) }
}

/// The report that a peer's reasons were taken from, as far as they have it.
pub(crate) fn report(reasons: &[Reason]) -> Report {
    let worst = reasons.iter().map(|reason| Verdict::from(reason.severity)).max();
    Report {
        // A refusal without a reason is a refusal.
        verdict: worst.unwrap_or(Verdict::No),
        strict: reasons.iter().any(|reason| reason.code.starts_with("strict-")),
        reasons: reasons.to_vec(),
        ..Report::default()
    }
}

/// `report`, and those of `found` that it does not have already, with other values perhaps.
pub(crate) fn with_missing(report: Report, mut found: Vec<Reason>) -> Report {
    let what = |reason: &Reason| (reason.device.clone(), reason.code.clone(), reason.field.clone());
    found.retain(|reason| !report.reasons.iter().any(|known| what(known) == what(reason)));
    with(report, found)
}

/// `report`, and what was found besides.
pub(crate) fn with(mut report: Report, found: Vec<Reason>) -> Report {
    let worst = found.iter().map(|reason| Verdict::from(reason.severity)).max();
    report.verdict = worst.map_or(report.verdict, |worst| worst.max(report.verdict));
    report.reasons.extend(found);
    report
}

/// The sentences of all reasons with their codes, for an error's text.
pub(crate) fn sentences(reasons: &[Reason]) -> String {
    let against = reasons.iter().filter(|reason| reason.severity >= Severity::SnapshotOnly);
    let texts: Vec<String> = against
        .map(|reason| match &reason.device {
            Some(device) if !reason.text.contains(device.as_str()) => {
                format!("device {device}: {} [{}]", reason.text, reason.code)
            }
            _ => format!("{} [{}]", reason.text, reason.code),
        })
        .collect();
    if texts.is_empty() { "no reason was given".into() } else { texts.join("; ") }
}

fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
}

fn meaning<T: DeserializeOwned>(word: &str) -> Option<T> {
    serde_json::from_value(Value::String(word.to_owned())).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vfio_migration_types::Phase;

    use super::*;

    #[test]
    fn reasons_cross_the_wire_as_they_are() {
        let reason = Reason {
            code: "device-regions".into(),
            device: Some("net0".into()),
            field: "regions.0.size".into(),
            source: json!(4096),
            destination: Value::Null,
            severity: Severity::No,
            fix: WhoCanFix::HostDriver,
            text: "BAR 0 differs".into(),
        };
        let warning =
            Reason { device: None, severity: Severity::Warning, source: json!("a"), ..reason.clone() };
        let reasons = [reason, warning];
        assert_eq!(from_wire(to_wire(&reasons)), reasons);
    }

    #[test]
    fn a_device_that_failed_stands_in_the_column_of_its_side() {
        let failure =
            Failure::new(Side::Source, Phase::Iterate, "device net0: reading failed").of_device("net0");
        let reason = of_device_failure(&failure).unwrap();
        assert_eq!((&reason.source["side"], &reason.destination), (&json!("source"), &Value::Null));
        let reason = of_device_failure(&Failure { side: Side::Destination, ..failure }).unwrap();
        assert_eq!((&reason.source, &reason.destination["side"]), (&Value::Null, &json!("destination")));
    }

    #[test]
    fn what_is_not_understood_is_no_permission() {
        let strange = wire::Reason { code: "new".into(), severity: "dire".into(), ..wire::Reason::default() };
        let cut = wire::Reason { source: "{\"cut".into(), ..strange };
        let [reason] = from_wire(vec![cut]).try_into().unwrap();
        assert_eq!((reason.severity, reason.source), (Severity::No, json!("{\"cut")));
    }
}
