//! `explain`: what a code means, of whichever verb.

use schemars::JsonSchema;
use serde::Serialize;
use vfio_migration_compat::{Severity, WhoCanFix, codes, explain};
use vfio_migration_device::host::ObstacleCode;

use crate::args::ask::ExplainCommand;
use crate::check_id::CheckId;
use crate::exit::{CliError, Exit};
use crate::output::{print, print_json};
use crate::verdict::json_word;

/// What `explain --json` says of a code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(rename = "Explanation")]
pub(crate) struct ExplainedCode {
    /// Stable name: `dirty-all`.
    code: &'static str,
    /// Which verbs say it.
    of: CodeOrigin,
    /// What it does to the verdict, unless a policy allows it; `null` for a code that has no verdict.
    severity: Option<Severity>,
    /// Who can change it; `null` where that is in the remedy alone.
    fix: Option<WhoCanFix>,
    /// What was found, in a sentence; of a check: what is looked at.
    meaning: &'static str,
    /// What it usually comes from; `null` where the meaning says it.
    cause: Option<&'static str>,
    /// What to do about it.
    remedy: &'static str,
    /// What other verbs mean by the same code; absent where no other has it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    also: Vec<ExplainedCode>,
}

/// What `explain --json` prints without a code.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct ExplanationList {
    /// Every code that any verb can print.
    pub(crate) codes: Vec<ExplainedCode>,
}

/// Which verbs say a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum CodeOrigin {
    /// A reason of `check`, `rehearse`, `migrate` and `save`.
    Reason,
    /// Why a device of `devices` cannot migrate as it stands.
    Device,
    /// A check of `doctor`.
    Host,
}

/// Every code that any verb can print, from the tables that those verbs take them from.
fn all() -> Vec<ExplainedCode> {
    let reasons = codes().filter_map(explain).map(|entry| ExplainedCode {
        code: entry.code,
        of: CodeOrigin::Reason,
        severity: Some(entry.severity),
        fix: Some(entry.fix),
        meaning: entry.meaning,
        cause: Some(entry.cause),
        remedy: entry.remedy,
        also: Vec::new(),
    });
    let plain = |code, of, meaning, remedy| ExplainedCode {
        code,
        of,
        severity: None,
        fix: None,
        meaning,
        cause: None,
        remedy,
        also: Vec::new(),
    };
    let devices = ObstacleCode::ALL
        .iter()
        .map(move |code| plain(code.name(), CodeOrigin::Device, code.meaning(), code.remedy()));
    let checks =
        CheckId::ALL.iter().map(move |id| plain(id.name(), CodeOrigin::Host, id.meaning(), id.remedy()));
    let mut all: Vec<ExplainedCode> = Vec::new();
    for entry in reasons.chain(devices).chain(checks) {
        match all.iter_mut().find(|known| known.code == entry.code) {
            Some(known) => known.also.push(entry),
            None => all.push(entry),
        }
    }
    all
}

pub(crate) fn run(options: &ExplainCommand) -> Result<Exit, CliError> {
    let Some(code) = &options.code else {
        let all = all();
        if options.json {
            print_json(&ExplanationList { codes: all })?;
        } else {
            let width = all.iter().map(|entry| entry.code.len()).max().unwrap_or(0);
            let lines = all.iter().map(|entry| format!("{:width$}  {}\n", entry.code, entry.meaning));
            print(lines.collect::<String>())?;
        }
        return Ok(Exit::Done);
    };
    let Some(entry) = all().into_iter().find(|entry| entry.code == code) else {
        return Err(CliError::failed(format!(
            "there is no code '{code}'; `vfio-migrate explain` lists all of them"
        )));
    };
    if options.json {
        print_json(&entry)?;
    } else {
        print(text(&entry))?;
    }
    Ok(Exit::Done)
}

fn text(entry: &ExplainedCode) -> String {
    let ExplainedCode { code, of, severity, fix, meaning, cause, remedy, also } = entry;
    let mut text = format!("{code}: {meaning}\n");
    match of {
        CodeOrigin::Reason => {}
        CodeOrigin::Device => text.push_str("  said by: devices\n"),
        CodeOrigin::Host => text.push_str("  said by: doctor\n"),
    }
    if let Some(severity) = severity {
        text.push_str(&format!("  verdict: {}\n", json_word(severity)));
    }
    if let Some(cause) = cause {
        text.push_str(&format!("  usually: {cause}\n"));
    }
    text.push_str(&format!("  remedy:  {remedy}"));
    if let Some(fix) = fix {
        text.push_str(&format!(" (who: {})", json_word(fix)));
    }
    text.push('\n');
    also.iter().for_each(|other| text.push_str(&self::text(other)));
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_code_of_each_verb_is_explained_once() {
        let codes: Vec<&str> = all().iter().map(|entry| entry.code).collect();
        assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), codes.len(), "one code, one meaning");
        for name in ["dirty-none", "in-use", "memlock"] {
            assert!(codes.contains(&name), "{name}");
        }
        for entry in all().iter().flat_map(|entry| std::iter::once(entry).chain(&entry.also)) {
            assert!(entry.meaning.ends_with('.') && entry.remedy.ends_with('.'), "{entry:?}");
        }
    }
}
