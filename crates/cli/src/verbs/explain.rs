//! `explain`: what a reason's code means.

use schemars::JsonSchema;
use serde::Serialize;
use vfio_migration_compat::{Explanation, codes, explain};

use crate::args::ask::ExplainCommand;
use crate::exit::{CliError, Exit};
use crate::output::{print, print_json};
use crate::verdict::json_word;

/// What `explain --json` prints without a code.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct ExplanationList {
    /// Every code, in the order of the rules.
    pub(crate) codes: Vec<Explanation>,
}

pub(crate) fn run(options: &ExplainCommand) -> Result<Exit, CliError> {
    let Some(code) = &options.code else {
        let all: Vec<Explanation> = codes().filter_map(explain).collect();
        if options.json {
            print_json(&ExplanationList { codes: all })?;
        } else {
            let width = all.iter().map(|entry| entry.code.len()).max().unwrap_or(0);
            let lines = all.iter().map(|entry| format!("{:width$}  {}\n", entry.code, entry.meaning));
            print(lines.collect::<String>())?;
        }
        return Ok(Exit::Done);
    };
    let Some(entry) = explain(code) else {
        return Err(CliError::failed(format!(
            "there is no reason of code '{code}'; `vfio-migrate explain` lists all of them"
        )));
    };
    if options.json {
        print_json(&entry)?;
    } else {
        print(text(&entry))?;
    }
    Ok(Exit::Done)
}

fn text(entry: &Explanation) -> String {
    let Explanation { code, meaning, cause, remedy, .. } = entry;
    let (severity, fix) = (json_word(&entry.severity), json_word(&entry.fix));
    format!(
        "{code}: {meaning}\n  verdict: {severity}\n  usually: {cause}\n  remedy:  {remedy} (who: {fix})\n"
    )
}
