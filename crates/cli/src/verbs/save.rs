//! `save`: asks a running `vm` to write its guest into a file, and waits for the end. Of a device alone: in `device_file`.

use serde_json::json;

use super::{device_file, status};
use crate::args::{Save, Target};
use crate::control::{MigrationState, SaveArguments, Verb};
use crate::exit::{Exit, Failure};
use crate::follow::follow;
use crate::interrupt::Interrupt;
use crate::output::{print, print_json};

pub(crate) fn run(options: &Save, interrupt: &Interrupt) -> Result<Exit, Failure> {
    match (&options.control, &options.device) {
        (Some(control), None) => {
            let target = Target { control: control.clone(), json: options.json };
            save_guest(options, &target, interrupt)
        }
        (None, Some(device)) => device_file::save(options, device, interrupt),
        _ => Err(Failure::new(Exit::Usage, "one of --control and --device says what is to be saved")),
    }
}

fn save_guest(options: &Save, target: &Target, interrupt: &Interrupt) -> Result<Exit, Failure> {
    // The `vm` may have another working directory.
    let path = std::path::absolute(&options.output)
        .map_err(|error| Failure::caused(&format!("{}", options.output.display()), &error))?;
    let path =
        path.to_str().ok_or_else(|| Failure::new(Exit::Usage, format!("{} is not UTF-8", path.display())))?;
    let arguments = SaveArguments {
        path: path.into(),
        force: options.force,
        stop: options.stop,
        verify: options.verify,
        allow_all_dirty: options.allow_all_dirty,
    };
    let mut client = target.connect()?;
    client.call(Verb::Save, json!(arguments)).map_err(|error| Failure::asked("refused", &error))?;
    let goes_on = |state| state == MigrationState::Active;
    let report = follow(&mut client, goes_on, target.json, interrupt)?;
    if target.json {
        print_json(&report)?;
    } else {
        print(status::text(&report))?;
    }
    Ok(match report.migration.status {
        MigrationState::Completed => Exit::Done,
        MigrationState::Unresolved => Exit::Unresolved,
        _ => Exit::Failed,
    })
}
