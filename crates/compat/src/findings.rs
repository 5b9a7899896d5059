//! Reasons as rules find them.

use std::cell::Cell;

use serde_json::Value;
use vfio_migration_types::printable;

use crate::codes::ReasonCode;
use crate::device::DeviceManifest;
use crate::policy::{Allow, Policy};
use crate::report::{Reason, Verdict};
use crate::severity::Severity;

/// Findings of the rules under one policy.
pub(crate) struct Findings<'p> {
    policy: &'p Policy,
    kept: Kept<'p>,
    /// Whole reasons, where they are kept.
    pub(crate) reasons: Vec<Reason>,
    /// Codes of the reasons, where nothing else is kept.
    pub(crate) codes: Vec<&'static str>,
    rank: Rank,
}

/// How far something is from moving live. Less is nearer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) verdict: Verdict,
    /// Number of reasons.
    pub(crate) count: usize,
}

impl Rank {
    /// As far as nothing is.
    pub(crate) const FARTHEST: Self = Self { verdict: Verdict::No, count: usize::MAX };
}

/// What is kept of a finding. Where millions of pairs are compared, the sentences of all but one are for nobody.
#[derive(Clone, Copy)]
enum Kept<'p> {
    Reasons,
    Codes(&'p Comparing),
    /// The rank alone, and once it is no less than this one, not even that.
    Rank(&'p Comparing, Rank),
}

/// What many comparisons under one policy share.
pub(crate) struct Comparing {
    /// The codes that the policy says something of.
    allowed: Vec<&'static str>,
    work: Cell<u64>,
}

impl Comparing {
    pub(crate) fn under(policy: &Policy) -> Self {
        let named = |code: &&str| policy.allow.iter().any(|allow| allow.code == *code);
        Self { allowed: crate::codes::codes().filter(named).collect(), work: Cell::new(0) }
    }

    pub(crate) fn allows(&self, code: ReasonCode) -> bool {
        self.allowed.iter().any(|known| std::ptr::eq(*known, code.code))
    }

    /// What was looked at so far: items of lists, and more for each pair. A few nanoseconds each.
    pub(crate) fn work(&self) -> u64 {
        self.work.get()
    }

    fn add(&self, work: usize) {
        self.work.set(self.work.get().saturating_add(work as u64));
    }
}

/// Work of a pair of devices of which nothing needs a look at a list.
const WORK_OF_A_PAIR: usize = 8;

/// A rule's finding about one field.
pub(crate) struct Found {
    pub(crate) field: String,
    pub(crate) source: Value,
    pub(crate) destination: Value,
    pub(crate) text: String,
}

impl<'p> Findings<'p> {
    pub(crate) fn new(policy: &'p Policy) -> Self {
        Self::keeping(policy, Kept::Reasons)
    }

    /// Findings of which only the codes are kept.
    pub(crate) fn codes(policy: &'p Policy, comparing: &'p Comparing) -> Self {
        comparing.add(WORK_OF_A_PAIR);
        Self::keeping(policy, Kept::Codes(comparing))
    }

    /// Findings of which only the rank is kept, and only as long as it is less than `bound`.
    pub(crate) fn rank_below(policy: &'p Policy, comparing: &'p Comparing, bound: Rank) -> Self {
        comparing.add(WORK_OF_A_PAIR);
        Self::keeping(policy, Kept::Rank(comparing, bound))
    }

    fn keeping(policy: &'p Policy, kept: Kept<'p>) -> Self {
        Self { policy, kept, reasons: Vec::new(), codes: Vec::new(), rank: Rank::default() }
    }

    pub(crate) fn policy(&self) -> &'p Policy {
        self.policy
    }

    /// A reason of the machine, or of a device of the source.
    pub(crate) fn add(&mut self, code: ReasonCode, device: Option<&DeviceManifest>, found: Found) {
        self.add_with(code, device, || found);
    }

    /// The same, told only where somebody reads it.
    pub(crate) fn add_with(
        &mut self,
        code: ReasonCode,
        device: Option<&DeviceManifest>,
        found: impl FnOnce() -> Found,
    ) {
        let severity = match self.comparing() {
            Some(comparing) if !comparing.allows(code) => code.severity,
            Some(comparing) => {
                comparing.add(self.policy.allow.len());
                self.severity(code, device, &found().field).0
            }
            None => {
                let found = found();
                let (severity, allow) = self.severity(code, device, &found.field);
                self.reasons.push(reason(code, severity, allow, device, found));
                severity
            }
        };
        if matches!(self.kept, Kept::Codes(_)) {
            self.codes.push(code.code);
        }
        self.rank.verdict = self.rank.verdict.max(severity.into());
        self.rank.count += 1;
    }

    /// What a reason weighs under the policy, and the entry that makes it a warning.
    fn severity(
        &self,
        code: ReasonCode,
        device: Option<&DeviceManifest>,
        field: &str,
    ) -> (Severity, Option<&'p Allow>) {
        let named = |want: &Option<String>, is: Option<&str>| want.is_none() || want.as_deref() == is;
        let allow = self.policy.allow.iter().find(|allow| {
            allow.code == code.code
                && named(&allow.device, device.map(|device| device.id.as_str()))
                && named(&allow.model, device.and_then(|device| device.model.as_deref()))
                && named(&allow.field, Some(field))
        });
        (if allow.is_some() { code.severity.min(Severity::Warning) } else { code.severity }, allow)
    }

    pub(crate) fn rank(&self) -> Rank {
        self.rank
    }

    pub(crate) fn verdict(&self) -> Verdict {
        self.rank.verdict
    }

    fn comparing(&self) -> Option<&'p Comparing> {
        match self.kept {
            Kept::Reasons => None,
            Kept::Codes(comparing) | Kept::Rank(comparing, _) => Some(comparing),
        }
    }

    /// So many items are looked at.
    pub(crate) fn look_at(&self, items: usize) {
        if let Some(comparing) = self.comparing() {
            comparing.add(items);
        }
    }

    /// Nothing that could still be found is of any matter.
    pub(crate) fn is_decided(&self) -> bool {
        matches!(self.kept, Kept::Rank(_, bound) if self.rank >= bound)
    }
}

fn reason(
    code: ReasonCode,
    severity: Severity,
    allow: Option<&Allow>,
    device: Option<&DeviceManifest>,
    found: Found,
) -> Reason {
    let mut text = match device {
        Some(device) => format!("device {}: {}", device.id, found.text),
        None => found.text,
    };
    if let Some(allow) = allow {
        let why =
            allow.reason.as_ref().map_or_else(String::new, |why| format!(": {}", crate::text::quote(why)));
        text.push_str(&format!(" (allowed by policy{why})"));
    }
    Reason {
        code: code.code.to_owned(),
        device: device.map(|device| device.id.to_string()),
        // It holds names of parameters and sections, which are the manifest's own.
        field: printable(&found.field).into_owned(),
        source: found.source,
        destination: found.destination,
        severity,
        fix: code.fix,
        text,
    }
}

/// A part of a finding, at hand or still to be made.
pub(crate) trait Lazy<T> {
    fn get(self) -> T;
}

impl<T, F: FnOnce() -> T> Lazy<T> for F {
    fn get(self) -> T {
        self()
    }
}

impl Lazy<String> for String {
    fn get(self) -> String {
        self
    }
}

impl Lazy<String> for &str {
    fn get(self) -> String {
        self.to_owned()
    }
}

impl Lazy<(Value, Value)> for (Value, Value) {
    fn get(self) -> (Value, Value) {
        self
    }
}
