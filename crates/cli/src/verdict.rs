//! The report of `check` and `rehearse` for people.

use serde::Serialize;
use serde_json::Value;
use vfio_migration_compat::{Reason, Report, Severity};

/// The report: the verdict, then the reasons against it, then notes.
pub(crate) fn text(report: &Report) -> String {
    let mut text = json_word(&report.verdict);
    if report.strict {
        text.push_str(
            " (strict: a device declares no model, so everything that identifies it must be equal)",
        );
    }
    text.push('\n');
    let mut reasons: Vec<&Reason> = report.reasons.iter().collect();
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.severity));
    for reason in reasons {
        text.push_str(&line(reason));
    }
    for (from, to) in report.map.iter().filter(|(from, to)| from != to) {
        text.push_str(&format!("  {from} goes to {to}\n"));
    }
    if report.reasons.iter().any(|reason| reason.severity > Severity::Note) {
        text.push_str("`vfio-migrate explain CODE` says what to do about each\n");
    }
    text
}

fn line(reason: &Reason) -> String {
    let mut line = format!("  {:13} {} [{}]\n", json_word(&reason.severity), reason.text, reason.code);
    if !(reason.source.is_null() && reason.destination.is_null()) {
        let (source, destination) = (value(&reason.source), value(&reason.destination));
        line.push_str(&format!("                {}: {source} here, {destination} there; ", reason.field));
    } else {
        line.push_str("                ");
    }
    line.push_str(&format!("who can fix it: {}\n", json_word(&reason.fix)));
    line
}

/// A value, cut when it is long: it may be anybody's.
fn value(value: &Value) -> String {
    const SHOWN: usize = 60;
    let text = if value.is_null() { "not known".to_owned() } else { value.to_string() };
    if text.chars().count() <= SHOWN { text } else { text.chars().take(SHOWN).chain(['…']).collect() }
}

/// The name of an enum's value, as JSON has it.
pub(crate) fn json_word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => "?".into(),
    }
}
