//! Verdicts and their reasons for people, wherever they are told: by `check` and `rehearse`, of a session that was refused, and of
//! one in the history.

use serde::Serialize;
use serde_json::Value;
use vfio_migration_compat::{Reason, Report, Severity};
use vfio_migration_types::printable;

use crate::control::protocol::MigrationInfo;

/// Where the reader of a reason is: its values are one side's and the other's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    AtSource,
    AtDestination,
}

/// The report: the verdict, then the reasons against it, then notes.
pub(crate) fn text(report: &Report) -> String {
    let mut text = json_word(&report.verdict);
    if report.strict {
        text.push_str(
            " (strict: a device declares no model, so everything that identifies it must be equal)",
        );
    }
    text.push('\n');
    text.push_str(&lines(&report.reasons, Reader::AtSource));
    for (from, to) in report.map.iter().filter(|(from, to)| from != to) {
        text.push_str(&format!("  {from} goes to {to}\n"));
    }
    text.push_str(hint(&report.reasons));
    text
}

/// Why a session did not come to what it was for: its error, or lines with the reasons for which it was refused, as `check` has them.
pub(crate) fn why(migration: &MigrationInfo) -> Option<String> {
    if !migration.incompatible || migration.reasons.is_empty() {
        return migration.error.as_deref().map(|error| format!("{}\n", printable(error)));
    }
    let incoming = migration.direction.as_deref() == Some("incoming");
    let reader = if incoming { Reader::AtDestination } else { Reader::AtSource };
    let reasons = &migration.reasons;
    // One that was undone first says what became of that, too.
    let what = migration.failure.as_ref().and(migration.error.as_deref()).unwrap_or("it was refused:");
    Some(format!("{}\n{}{}", printable(what), lines(reasons, reader), hint(reasons)))
}

fn lines(reasons: &[Reason], reader: Reader) -> String {
    let mut reasons: Vec<&Reason> = reasons.iter().collect();
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.severity));
    reasons.into_iter().map(|reason| line(reason, reader)).collect()
}

fn hint(reasons: &[Reason]) -> &'static str {
    if reasons.iter().any(|reason| reason.severity > Severity::Note) {
        "`vfio-migrate explain CODE` says what to do about each\n"
    } else {
        ""
    }
}

fn line(reason: &Reason, reader: Reader) -> String {
    // Its texts may be anybody's, and are one line each.
    let (text, code) = (printable(&reason.text), printable(&reason.code));
    let mut line = format!("  {:13} {text} [{code}]\n                ", json_word(&reason.severity));
    if let (Some(source), Some(destination)) = (value(&reason.source), value(&reason.destination))
        && !(reason.source.is_null() && reason.destination.is_null())
    {
        let (here, there) = match reader {
            Reader::AtSource => (source, destination),
            Reader::AtDestination => (destination, source),
        };
        line.push_str(&format!("{}: {here} here, {there} there; ", printable(&reason.field)));
    }
    line.push_str(&format!("who can fix it: {}\n", json_word(&reason.fix)));
    line
}

/// A value, cut when it is long: it may be anybody's. `None` for one that is made of others: the reason's text says what matters of it.
fn value(value: &Value) -> Option<String> {
    const SHOWN: usize = 60;
    let text = match value {
        Value::Null => "not known".to_owned(),
        Value::Object(_) => return None,
        value => value.to_string(),
    };
    let long = text.chars().count() > SHOWN;
    match value {
        Value::Array(_) if long => None,
        _ if long => Some(text.chars().take(SHOWN).chain(['…']).collect()),
        _ => Some(text),
    }
}

/// The name of an enum's value, as JSON has it.
pub(crate) fn json_word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => "?".into(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vfio_migration_compat::{SessionCode, WhoCanFix};

    use super::*;
    use crate::control::protocol::MigrationStatus;

    fn reason(source: Value, destination: Value) -> Reason {
        Reason {
            field: "queues".into(),
            source,
            destination,
            severity: Severity::No,
            fix: WhoCanFix::Configuration,
            ..Reason::new(SessionCode::DeviceFailed, "it \nis\x1b[2J so")
        }
    }

    #[test]
    fn a_refusal_is_told_from_where_its_reader_is() {
        let told = |direction: &str| {
            let migration = MigrationInfo {
                direction: Some(direction.into()),
                incompatible: true,
                error: Some("in one line".into()),
                reasons: vec![reason(json!(8), json!(4))],
                ..MigrationInfo::new(MigrationStatus::Failed)
            };
            why(&migration).unwrap()
        };
        let here = told("outgoing");
        assert!(here.contains("queues: 8 here, 4 there"), "{here}");
        assert!(here.contains("[device-failed]") && here.contains("explain CODE"), "{here}");
        assert!(told("incoming").contains("queues: 4 here, 8 there"));
        assert_eq!(here.lines().count(), 4, "{here}");
    }

    #[test]
    fn no_value_is_cut_json() {
        let failed = json!({"side": "destination", "arc": "RESUMING to STOP", "errno": 5, "phase": "ready"});
        let long: Vec<u32> = (0..100).collect();
        for value in [failed, json!(long)] {
            let told = line(&reason(Value::Null, value), Reader::AtSource);
            assert!(!told.contains("{\"") && !told.contains('…') && !told.contains("not known"), "{told}");
            assert!(told.contains("who can fix it"), "{told}");
        }
        assert!(
            line(&reason(json!([1, 2]), Value::Null), Reader::AtSource)
                .contains("[1,2] here, not known there")
        );
        assert!(line(&reason(json!("x".repeat(99)), Value::Null), Reader::AtSource).contains('…'));
    }
}
