//! The rules, by what they look at. Each is pure and total: any two manifests, a list of reasons.

pub(crate) mod config;
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
use crate::findings::{Findings, Found, Lazy};
use crate::policy::MaskPolicy;
use crate::text::show;

/// Two devices that are compared.
#[derive(Clone, Copy)]
pub(crate) struct DevicePair<'m> {
    pub(crate) source: &'m DeviceManifest,
    pub(crate) destination: &'m DeviceManifest,
    /// Neither declares a model.
    pub(crate) strict: bool,
    /// Rules for config space that the destination's VM was given.
    pub(crate) site: &'m [MaskPolicy],
}

impl DevicePair<'_> {
    /// Adds a reason about a field: what both sides have there goes into its sentence.
    pub(crate) fn differs(
        self,
        findings: &mut Findings<'_>,
        code: ReasonCode,
        field: impl Lazy<String>,
        what: impl Lazy<String>,
        values: impl Lazy<(Value, Value)>,
    ) {
        let found = || {
            let (what, values) = (what.get(), values.get());
            let (from, to) = (show(&values.0), show(&values.1));
            (values, format!("{what} is {from} at the source, {to} at the destination"))
        };
        self.add(findings, code, field, found);
    }

    /// Adds a reason about a field with a sentence of its own.
    pub(crate) fn say(
        self,
        findings: &mut Findings<'_>,
        code: ReasonCode,
        field: impl Lazy<String>,
        values: impl Lazy<(Value, Value)>,
        text: impl Lazy<String>,
    ) {
        self.add(findings, code, field, || (values.get(), text.get()));
    }

    fn add(
        self,
        findings: &mut Findings<'_>,
        code: ReasonCode,
        field: impl Lazy<String>,
        found: impl FnOnce() -> ((Value, Value), String),
    ) {
        findings.add_with(code, Some(self.source), || {
            let ((source, destination), mut text) = found();
            if self.strict {
                text.push_str(" (no model is declared, so equality is strict)");
            }
            Found { field: field.get(), source, destination, text }
        });
    }
}
