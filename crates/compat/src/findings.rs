//! Reasons as rules find them.

use serde_json::Value;
use vfio_migration_types::printable;

use crate::codes::ReasonCode;
use crate::device::DeviceManifest;
use crate::policy::Policy;
use crate::report::{Reason, Verdict};

/// Findings of the rules under one policy.
pub(crate) struct Findings<'p> {
    policy: &'p Policy,
    pub(crate) reasons: Vec<Reason>,
}

/// A rule's finding about one field.
pub(crate) struct Found {
    pub(crate) field: String,
    pub(crate) source: Value,
    pub(crate) destination: Value,
    pub(crate) text: String,
}

impl<'p> Findings<'p> {
    pub(crate) fn new(policy: &'p Policy) -> Self {
        Self { policy, reasons: Vec::new() }
    }

    pub(crate) fn policy(&self) -> &'p Policy {
        self.policy
    }

    /// A reason of the machine, or of a device of the source.
    pub(crate) fn add(&mut self, code: ReasonCode, device: Option<&DeviceManifest>, found: Found) {
        let mut reason = Reason {
            code: code.code.to_owned(),
            device: device.map(|device| device.id.to_string()),
            // It holds names of parameters and sections, which are the manifest's own.
            field: printable(&found.field).into_owned(),
            source: found.source,
            destination: found.destination,
            severity: code.severity,
            fix: code.fix,
            text: match device {
                Some(device) => format!("device {}: {}", device.id, found.text),
                None => found.text,
            },
        };
        self.allow(&mut reason, device.and_then(|device| device.model.as_deref()));
        self.reasons.push(reason);
    }

    /// Turns into a warning what the policy allows.
    fn allow(&self, reason: &mut Reason, model: Option<&str>) {
        let named = |want: &Option<String>, is: Option<&str>| want.is_none() || want.as_deref() == is;
        let allowed = self.policy.allow.iter().find(|allow| {
            allow.code == reason.code
                && named(&allow.device, reason.device.as_deref())
                && named(&allow.model, model)
                && named(&allow.field, Some(&reason.field))
        });
        let Some(allow) = allowed else { return };
        reason.severity = reason.severity.min(crate::severity::Severity::Warning);
        let why =
            allow.reason.as_ref().map_or_else(String::new, |why| format!(": {}", crate::text::quote(why)));
        reason.text.push_str(&format!(" (allowed by policy{why})"));
    }

    pub(crate) fn verdict(&self) -> Verdict {
        self.reasons.iter().map(|reason| Verdict::from(reason.severity)).max().unwrap_or_default()
    }
}
