//! The answer: a verdict, and every reason for it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::codes::SessionCode;
use crate::severity::{Severity, WhoCanFix};

/// Whether something can move. Greater is worse.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It can move live.
    #[default]
    Live,
    /// It can, and somebody should know something.
    LiveWithWarning,
    /// It cannot move live; it can be saved to a file and restored from it.
    SnapshotOnly,
    /// It can move neither live nor by a snapshot.
    No,
}

impl From<Severity> for Verdict {
    fn from(severity: Severity) -> Self {
        match severity {
            Severity::Note => Self::Live,
            Severity::Warning => Self::LiveWithWarning,
            Severity::SnapshotOnly => Self::SnapshotOnly,
            Severity::No => Self::No,
        }
    }
}

/// One thing that differs or is missing between the sides, and what it does to the verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Reason {
    /// A stable code; [`explain`](crate::explain) knows it.
    pub code: String,
    /// The source's name of the device; `null` where it is of the machine.
    pub device: Option<String>,
    /// The field of the manifest, as a path: `parameters.queues`.
    pub field: String,
    /// What the source has there.
    pub source: Value,
    /// What the destination has there.
    pub destination: Value,
    /// What it does to the verdict.
    pub severity: Severity,
    /// Who can change it.
    pub fix: WhoCanFix,
    /// A sentence. Words of a manifest in it are quoted and cut, so that it can be shown.
    pub text: String,
}

impl Reason {
    /// A reason of `code` that is not of a rule here: its severity and who can fix it are the table's.
    pub fn new(code: SessionCode, text: impl Into<String>) -> Self {
        let entry = code.explanation();
        Self {
            device: None,
            field: String::new(),
            source: Value::Null,
            destination: Value::Null,
            severity: entry.severity,
            fix: entry.fix,
            text: text.into(),
            code: entry.code.to_owned(),
        }
    }
}

/// A verdict and every reason for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// Whether it can move.
    pub verdict: Verdict,
    /// A device declares no model at either side, so that equality was strict.
    pub strict: bool,
    /// All reasons: the machine's first, then by device, code and field.
    pub reasons: Vec<Reason>,
    /// Which device of the destination stands for which of the source.
    pub map: BTreeMap<String, String>,
}

impl Report {
    /// A report of these reasons, put in order.
    pub(crate) fn of(mut reasons: Vec<Reason>, strict: bool, map: BTreeMap<String, String>) -> Self {
        reasons.sort_by(|a, b| order(a).cmp(&order(b)));
        reasons.dedup();
        let worst = reasons.iter().map(|reason| Verdict::from(reason.severity)).max();
        Self { verdict: worst.unwrap_or_default(), strict, reasons, map }
    }

    /// The reasons that stand against moving live.
    pub fn against(&self) -> impl Iterator<Item = &Reason> {
        self.reasons.iter().filter(|reason| reason.severity >= Severity::SnapshotOnly)
    }
}

fn order(reason: &Reason) -> (Option<&str>, &str, &str, std::cmp::Reverse<Severity>, &str) {
    let worst_first = std::cmp::Reverse(reason.severity);
    (reason.device.as_deref(), &reason.code, &reason.field, worst_first, &reason.text)
}

/// What holds where two sides have answered by policies of their own: the worse verdict, and the reasons of both. A
/// reason that both give counts once, as the worse of the two has it; sides of one policy agree, and nothing changes.
pub fn worse(a: Report, b: Report) -> Report {
    let mut reasons = a.reasons;
    reasons.extend(b.reasons);
    let mut all = Report::of(reasons, a.strict || b.strict, a.map);
    all.reasons.dedup_by(|later, kept| {
        (&later.device, &later.code, &later.field, &later.source, &later.destination)
            == (&kept.device, &kept.code, &kept.field, &kept.source, &kept.destination)
    });
    for (from, to) in b.map {
        all.map.entry(from).or_insert(to);
    }
    all.verdict = all.verdict.max(a.verdict).max(b.verdict);
    all
}
