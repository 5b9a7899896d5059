//! Where no model is declared nothing says which differences are harmless, so whatever identifies a device must be equal.

use serde_json::Value;

use super::{DevicePair, drivers};
use crate::codes;
use crate::device::{DeviceManifest, Driver};
use crate::findings::Findings;
use crate::parameter::Parameter;
use crate::text::quote;
use crate::tree::{either, json};

/// Compares what [`layout`](super::layout) and [`versions`](super::versions) do not.
pub(crate) fn compare(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let (from, to) = (pair.source, pair.destination);
    if from.driver_name() != to.driver_name() {
        let values = || (json(from.driver_name()), json(to.driver_name()));
        pair.differs(findings, &codes::STRICT_DRIVER, "driver.name", "the driver", values);
    } else {
        let version = |driver: &Option<Driver>| driver.as_ref().and_then(|driver| driver.version.clone());
        let (source, destination) = (version(&from.driver), version(&to.driver));
        if source != destination {
            let code = if drivers::versioned_stream(pair) {
                &codes::DRIVER_VERSION_SKEW
            } else {
                &codes::STRICT_DRIVER_VERSION
            };
            let values = || (json(source), json(destination));
            pair.differs(findings, code, "driver.version", "the driver's version", values);
        }
    }
    if from.model_version != to.model_version {
        let values = || (json(&from.model_version), json(&to.model_version));
        pair.differs(findings, &codes::STRICT_MODEL_VERSION, "model_version", "the model's version", values);
    }
    if from.mdev_type != to.mdev_type {
        let values = || (json(&from.mdev_type), json(&to.mdev_type));
        pair.differs(findings, &codes::STRICT_MDEV_TYPE, "mdev_type", "the mediated device's type", values);
    }
    if from.flags != to.flags {
        let values = || (json(from.flags), json(to.flags));
        // They are of the driver, whose name and version are compared, and known only of an open device.
        let known = from.flags.is_some() && to.flags.is_some();
        let code = if known { &codes::STRICT_FLAGS } else { &codes::UNKNOWN_FLAGS };
        pair.differs(findings, code, "flags", "the set of migration flags", values);
    }
    for (name, source, destination) in either(&from.parameters, &to.parameters) {
        if findings.is_decided() {
            return;
        }
        findings.look_at(1);
        let value = |parameter: Option<&Parameter>| parameter.map(|it| it.value.clone());
        if source.map(|it| &it.value) != destination.map(|it| &it.value) {
            let what = || format!("parameter {}", quote(name));
            let field = || format!("parameters.{name}");
            let values = || (json(value(source)), json(value(destination)));
            pair.differs(findings, &codes::STRICT_PARAMETER, field, what, values);
        }
    }
    for (name, source, destination) in either(&from.facts, &to.facts) {
        if findings.is_decided() {
            return;
        }
        findings.look_at(1);
        if source != destination && !drivers::knows_fact(pair, name) {
            let what = || format!("fact {}", quote(name));
            let values = || (json(source), json(destination));
            pair.differs(findings, &codes::STRICT_FACT, || format!("facts.{name}"), what, values);
        }
    }
    unknown(pair, findings);
}

/// Says what neither side knows. It does not count against them, as there is nothing that differs.
fn unknown(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let (from, to) = (pair.source, pair.destination);
    let version = |device: &DeviceManifest| device.driver.as_ref().is_none_or(|it| it.version.is_none());
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
    if fields.iter().any(|(_, unknown)| *unknown) {
        let named = |comma: &str| {
            let unknown = fields.iter().filter(|(_, unknown)| *unknown).map(|(name, _)| *name);
            unknown.collect::<Vec<_>>().join(comma)
        };
        let text = || format!("neither side knows its {}, so that is not compared", named(", "));
        pair.say(findings, &codes::STRICT_UNKNOWN, || named(","), (Value::Null, Value::Null), text);
    }
}
