//! Where no model is declared nothing says which differences are harmless, so whatever identifies a device must be equal.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{DevicePair, drivers};
use crate::codes;
use crate::findings::Findings;
use crate::text::quote;
use crate::tree::json;

/// Compares what [`layout`](super::layout) and [`versions`](super::versions) do not.
pub(crate) fn compare(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let (from, to) = (pair.source, pair.destination);
    if from.driver_name() != to.driver_name() {
        let values = (json(from.driver_name()), json(to.driver_name()));
        pair.differs(findings, &codes::STRICT_DRIVER, "driver.name", "the driver", values);
    } else {
        let version =
            |device: &crate::device::DeviceManifest| device.driver.clone().and_then(|driver| driver.version);
        let (source, destination) = (version(from), version(to));
        if source != destination {
            let code = if drivers::versioned_stream(pair) {
                &codes::DRIVER_VERSION_SKEW
            } else {
                &codes::STRICT_DRIVER_VERSION
            };
            let values = (json(source), json(destination));
            pair.differs(findings, code, "driver.version", "the driver's version", values);
        }
    }
    if from.model_version != to.model_version {
        let values = (json(&from.model_version), json(&to.model_version));
        pair.differs(findings, &codes::STRICT_MODEL_VERSION, "model_version", "the model's version", values);
    }
    if from.mdev_type != to.mdev_type {
        let values = (json(&from.mdev_type), json(&to.mdev_type));
        pair.differs(findings, &codes::STRICT_MDEV_TYPE, "mdev_type", "the mediated device's type", values);
    }
    if from.flags != to.flags {
        let values = (json(from.flags), json(to.flags));
        // They are of the driver, whose name and version are compared, and known only of an open device.
        let known = from.flags.is_some() && to.flags.is_some();
        let code = if known { &codes::STRICT_FLAGS } else { &codes::UNKNOWN_FLAGS };
        pair.differs(findings, code, "flags", "the set of migration flags", values);
    }
    for name in from.parameters.keys().chain(to.parameters.keys()).collect::<BTreeSet<_>>() {
        let value =
            |device: &crate::device::DeviceManifest| device.parameters.get(name).map(|it| it.value.json());
        let (source, destination) = (value(from), value(to));
        if source != destination {
            let what = format!("parameter {}", quote(name));
            let values = (source.unwrap_or(Value::Null), destination.unwrap_or(Value::Null));
            pair.differs(findings, &codes::STRICT_PARAMETER, format!("parameters.{name}"), &what, values);
        }
    }
    for name in from.facts.keys().chain(to.facts.keys()).collect::<BTreeSet<_>>() {
        let (source, destination) = (from.facts.get(name), to.facts.get(name));
        if source != destination && !drivers::knows_fact(pair, name) {
            let what = format!("fact {}", quote(name));
            let values = (json(source), json(destination));
            pair.differs(findings, &codes::STRICT_FACT, format!("facts.{name}"), &what, values);
        }
    }
    unknown(pair, findings);
}

/// Says what neither side knows. It does not count against them, as there is nothing that differs.
fn unknown(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let (from, to) = (pair.source, pair.destination);
    let version =
        |device: &crate::device::DeviceManifest| device.driver.as_ref().is_none_or(|it| it.version.is_none());
    let fields = [
        ("driver", from.driver.is_none() && to.driver.is_none()),
        ("driver.version", version(from) && version(to)),
        ("firmware", from.firmware.is_none() && to.firmware.is_none()),
        ("flags", from.flags.is_none() && to.flags.is_none()),
        ("pci", from.pci.is_none() && to.pci.is_none()),
        ("regions", from.regions.is_none() && to.regions.is_none()),
        ("irqs", from.irqs.is_none() && to.irqs.is_none()),
        ("capabilities", from.capabilities.is_none() && to.capabilities.is_none()),
    ];
    let fields: Vec<&str> = fields.iter().filter(|(_, unknown)| *unknown).map(|(name, _)| *name).collect();
    if !fields.is_empty() {
        let text = format!("neither side knows its {}, so that is not compared", fields.join(", "));
        pair.say(findings, &codes::STRICT_UNKNOWN, fields.join(","), (Value::Null, Value::Null), text);
    }
}
