//! `save`: asks a running `vm` to write its guest into a file, and waits for the end. Of a device alone: in `device_file`.

use std::path::Path;

use serde_json::json;

use crate::args::moves::Save;
use crate::control::protocol::{MigrationState, SaveArguments, Verb};
use crate::exit::{Exit, Failure};
use crate::follow::{OnInterrupt, follow, text};
use crate::interrupt::Interrupt;
use crate::output::{print, print_json};
use crate::target::Target;

pub(crate) fn run(options: &Save, control: &Path, interrupt: &Interrupt) -> Result<Exit, Failure> {
    let target = Target { control: control.to_owned(), json: options.json };
    // The `vm` may have another working directory.
    let path = std::path::absolute(&options.output)
        .map_err(|error| Failure::caused(&format!("{}", options.output.display()), &error))?;
    let path =
        path.to_str().ok_or_else(|| Failure::new(Exit::Usage, format!("{} is not UTF-8", path.display())))?;
    let arguments = SaveArguments { path: path.into(), options: options.options.clone() };
    let mut client = target.connect()?;
    client.call(Verb::Save, json!(arguments)).map_err(|error| error.failure("refused"))?;
    let goes_on = |state| state == MigrationState::Active;
    let report = follow(&mut client, goes_on, options.json, interrupt, OnInterrupt::Cancel)?;
    if options.json {
        print_json(&report)?;
    } else {
        print(text(&report))?;
    }
    Ok(match report.migration.status {
        MigrationState::Completed => Exit::Done,
        MigrationState::Unresolved => Exit::Unresolved,
        _ => Exit::Failed,
    })
}
