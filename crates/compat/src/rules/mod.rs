//! The rules, by what they look at. Each is pure and total: any two manifests, a list of reasons.

pub(crate) mod device;
pub(crate) mod drivers;
pub(crate) mod layout;
pub(crate) mod live;
pub(crate) mod machine;
pub(crate) mod strict;
pub(crate) mod versions;

use serde_json::Value;

use crate::codes::ReasonCode;
use crate::device::DeviceManifest;
use crate::findings::{Findings, Found};
use crate::text::show;

/// Two devices that are compared.
#[derive(Clone, Copy)]
pub(crate) struct DevicePair<'m> {
    pub(crate) source: &'m DeviceManifest,
    pub(crate) destination: &'m DeviceManifest,
    /// Neither declares a model.
    pub(crate) strict: bool,
}

impl DevicePair<'_> {
    /// Adds a reason about a field: what both sides have there goes into its sentence.
    pub(crate) fn differs(
        self,
        findings: &mut Findings<'_>,
        code: ReasonCode,
        field: impl Into<String>,
        what: &str,
        values: (Value, Value),
    ) {
        let (from, to) = (show(&values.0), show(&values.1));
        self.say(
            findings,
            code,
            field,
            values,
            format!("{what} is {from} at the source, {to} at the destination"),
        );
    }

    /// Adds a reason about a field with a sentence of its own.
    pub(crate) fn say(
        self,
        findings: &mut Findings<'_>,
        code: ReasonCode,
        field: impl Into<String>,
        (source, destination): (Value, Value),
        mut text: String,
    ) {
        if self.strict {
            text.push_str(" (no model is declared, so equality is strict)");
        }
        findings.add(code, Some(self.source), Found { field: field.into(), source, destination, text });
    }
}
