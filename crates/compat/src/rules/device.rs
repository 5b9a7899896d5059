//! Rules for a pair of devices, in their order: model, version, parameters, layout, capabilities, versions behind it.

use serde_json::Value;

use super::{DevicePair, config, drivers, layout, live, strict, versions};
use crate::codes;
use crate::device::DeviceManifest;
use crate::findings::{Findings, Found};
use crate::parameter::Parameter;
use crate::policy::MaskPolicy;
use crate::text::{list, quote, sentence};
use crate::tree::{either, json};
use crate::version::{ModelVersion, VersionRanges};

/// Compares two devices, all rules but those that need the whole machine; `site`: the rules for config space that the destination's VM was
/// given. Returns whether equality was strict.
pub(crate) fn compare(
    source: &DeviceManifest,
    destination: &DeviceManifest,
    site: &[MaskPolicy],
    findings: &mut Findings<'_>,
) -> bool {
    let strict = source.model.is_none() && destination.model.is_none();
    let pair = DevicePair { source, destination, strict, site };
    if source.model != destination.model {
        let values = || (json(&source.model), json(&destination.model));
        let undeclared =
            |model: &Option<String>| model.as_ref().map_or("undeclared".into(), |name| quote(name));
        let text = || {
            let (from, to) = (undeclared(&source.model), undeclared(&destination.model));
            format!("the model is {from} at the source, {to} at the destination")
        };
        pair.say(findings, &codes::DEVICE_MODEL, "model", values, text);
    } else if !strict {
        version(pair, findings);
    }
    let declared = if strict { strict::compare } else { parameters };
    let rules =
        [declared, layout::compare, versions::compare, config::untold, drivers::compare, live::pair, notes];
    for rule in rules {
        if findings.is_decided() {
            break;
        }
        rule(pair, findings);
    }
    strict
}

/// What the maker of either device declared in vain.
fn notes(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    for (device, side) in [(pair.source, "source"), (pair.destination, "destination")] {
        for note in &device.notes {
            let text =
                format!("{} is declared at the {side} in vain: {}", quote(&note.field), sentence(&note.text));
            let (there, none) = (Value::from(note.text.as_str()), Value::Null);
            let (source, destination) = if side == "source" { (there, none) } else { (none, there) };
            let field = note.field.clone();
            findings.add(
                &codes::FIELD_IGNORED,
                Some(pair.source),
                Found { field, source, destination, text },
            );
        }
    }
}

/// Major, then minor, or a range that the destination declares.
fn version(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let (from, to) = (&pair.source.model_version, &pair.destination.model_version);
    let values = || (json(from), json(to));
    let (Some(from), Some(to)) = (from, to) else {
        if from != to {
            let field = "model_version";
            pair.differs(findings, &codes::UNKNOWN_MODEL_VERSION, field, "the model's version", values);
        }
        return;
    };
    if from == to {
        return;
    }
    let declared = pair.destination.loads.as_ref();
    findings.look_at(declared.map_or(0, VersionRanges::len));
    let (source, destination) = (from.parse::<ModelVersion>(), to.parse::<ModelVersion>());
    let code = match (source, destination) {
        (Ok(source), Ok(destination)) if destination.loads(source) => return,
        (Ok(source), _) if declared.is_some_and(|ranges| ranges.contain(source)) => return,
        (Ok(source), Ok(destination)) if source.major != destination.major => &codes::DEVICE_MODEL_MAJOR,
        _ => &codes::DEVICE_MODEL_VERSION,
    };
    let text = || {
        let (from, to) = (quote(from), quote(to));
        format!(
            "the model's version is {from} at the source; the destination has {to}, which does not load it"
        )
    };
    pair.say(findings, code, "model_version", values, text);
}

/// Each parameter that is on must be known and its value taken.
fn parameters(pair: DevicePair<'_>, findings: &mut Findings<'_>) {
    let (from, to) = (&pair.source.parameters, &pair.destination.parameters);
    for (name, source, destination) in either(from, to) {
        if findings.is_decided() {
            return;
        }
        findings.look_at(1 + destination.and_then(|it| it.allowed.as_ref()).map_or(0, Vec::len));
        let field = || format!("parameters.{name}");
        let what = || format!("parameter {}", quote(name));
        let value = |parameter: Option<&Parameter>| parameter.map_or(Value::Null, |it| it.value.json());
        let values = || (value(source), value(destination));
        match (source, destination) {
            (Some(source), Some(destination)) if !destination.takes(&source.value) => {
                let text = || {
                    let (what, from, to) = (what(), &source.value, &destination.value);
                    format!("{what} is {from} at the source; the destination has {to}{}", taken(destination))
                };
                pair.say(findings, &codes::DEVICE_PARAMETER, field, values, text);
            }
            (Some(source), None) if source.off.as_ref() != Some(&source.value) => {
                let value = &source.value;
                let text =
                    || format!("{} is {value} at the source; the destination does not know it", what());
                pair.say(findings, &codes::DEVICE_PARAMETER_UNKNOWN, field, values, text);
            }
            (None, Some(destination))
                if !destination.off.as_ref().is_some_and(|off| destination.takes(off)) =>
            {
                let value = &destination.value;
                let text =
                    || format!("{} is {value} at the destination; the source does not know it", what());
                pair.say(findings, &codes::DEVICE_PARAMETER_NEW, field, values, text);
            }
            _ => {}
        }
    }
}

fn taken(parameter: &Parameter) -> String {
    match &parameter.allowed {
        Some(allowed) if !allowed.is_empty() => {
            let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
            format!(" and takes {}", list(&allowed))
        }
        _ => String::new(),
    }
}
