//! The files that are generated from the code and checked in: man pages, completions, schemas.

use std::path::Path;

use clap::CommandFactory;
use clap_complete::{Generator, Shell};
use schemars::{Schema, schema_for};
use vfio_migration_compat::{
    DeviceManifest, Explanation, HostManifest, MachineManifest, Matrix, Policy, Report,
};

use crate::args::Cli;
use crate::completions;
use crate::control::event::ControlEvent;
use crate::control::guest::GuestInfo;
use crate::control::protocol::{
    FollowedReport, IncomingArguments, MigrateArguments, MigrationInfo, ParameterArguments, SaveArguments,
    StatusReport,
};
use crate::control::refused::Refused;
use crate::control::rehearsal::RehearseArguments;
use crate::demo::report::DemoReport;
use crate::exit::{CliError, Exit, FailureReport};
use crate::history::HistoryRecord;
use crate::verbs::check::pool::BaselineReport;
use crate::verbs::device_file::DeviceFileReport;
use crate::verbs::devices::report::DevicesReport;
use crate::verbs::doctor::DoctorReport;
use crate::verbs::history::HistoryReport;
use crate::verbs::moves::{ActionReply, RehearseReport};
use crate::verbs::state_dir::StateDirReport;

/// Writes `man/`, `completions/` and `docs/schemas/` under `top`.
pub(crate) fn generate(top: &Path) -> Result<Exit, CliError> {
    let doing =
        |error: std::io::Error| CliError::caused(&format!("cannot write under {}", top.display()), &error);
    let (man, completions, schemas) = (top.join("man"), top.join("completions"), top.join("docs/schemas"));
    for dir in [&man, &completions, &schemas] {
        std::fs::create_dir_all(dir).map_err(doing)?;
    }
    clap_mangen::generate_to(Cli::command(), &man).map_err(doing)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        let file = completions.join(shell.file_name("vfio-migrate"));
        std::fs::write(file, completions::script(shell)).map_err(doing)?;
    }
    for (name, schema) in schemas_by_name() {
        let mut text = serde_json::to_string_pretty(&schema)
            .map_err(|error| CliError::caused(&format!("cannot write the schema of {name}"), &error))?;
        text.push('\n');
        std::fs::write(schemas.join(format!("{name}.json")), text).map_err(doing)?;
    }
    Ok(Exit::Done)
}

/// Every schema, by the name of its file in `docs/schemas`.
fn schemas_by_name() -> Vec<(&'static str, Schema)> {
    vec![
        ("demo", schema_for!(DemoReport)),
        ("status", schema_for!(StatusReport)),
        ("migrate", schema_for!(FollowedReport)),
        ("device-file", schema_for!(DeviceFileReport)),
        ("devices", schema_for!(DevicesReport)),
        ("doctor", schema_for!(DoctorReport)),
        ("failure", schema_for!(FailureReport)),
        ("acknowledged", schema_for!(ActionReply)),
        ("query", schema_for!(StatusReport)),
        ("status-state-dir", schema_for!(StateDirReport)),
        ("history", schema_for!(HistoryReport)),
        ("history-record", schema_for!(HistoryRecord)),
        ("query-guest", schema_for!(GuestInfo)),
        ("migration", schema_for!(MigrationInfo)),
        ("migrate-arguments", schema_for!(MigrateArguments)),
        ("rehearse", schema_for!(RehearseReport)),
        ("rehearse-arguments", schema_for!(RehearseArguments)),
        ("save-arguments", schema_for!(SaveArguments)),
        ("migrate-incoming-arguments", schema_for!(IncomingArguments)),
        ("migrate-set-parameters-arguments", schema_for!(ParameterArguments)),
        ("event", schema_for!(ControlEvent)),
        ("error", schema_for!(Refused)),
        ("manifest-device", schema_for!(DeviceManifest)),
        ("manifest-machine", schema_for!(MachineManifest)),
        ("manifest-host", schema_for!(HostManifest)),
        ("policy", schema_for!(Policy)),
        ("check", schema_for!(Report)),
        ("check-matrix", schema_for!(Matrix)),
        ("check-baseline", schema_for!(BaselineReport)),
        ("explain", schema_for!(Explanation)),
    ]
}
