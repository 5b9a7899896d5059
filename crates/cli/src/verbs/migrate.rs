//! `migrate`: asks a running `vm` to move, and waits for the end.

use serde_json::json;

use crate::args::moves::Migrate;
use crate::control::protocol::{MigrateArguments, MigrationState, Verb};
use crate::exit::{Exit, Failure};
use crate::follow::{OnInterrupt, follow, text};
use crate::interrupt::Interrupt;
use crate::output::{print, print_json};
use crate::words::uri;

pub(crate) fn run(options: &Migrate, interrupt: &Interrupt) -> Result<Exit, Failure> {
    // A word that is no address is a usage error, whether or not the `vm` can be reached.
    uri(&options.uri)?;
    let arguments = MigrateArguments {
        uri: options.uri.clone(),
        options: options.options.clone(),
        switchover: options.switchover.clone(),
    };
    let mut client = options.target.connect()?;
    client.call(Verb::Migrate, json!(arguments)).map_err(|error| error.failure("refused"))?;
    let goes_on =
        |state| !options.detach && matches!(state, MigrationState::Active | MigrationState::PreSwitchover);
    let report = follow(&mut client, goes_on, options.target.json, interrupt, OnInterrupt::Cancel)?;
    if options.target.json {
        print_json(&report)?;
    } else {
        print(text(&report))?;
    }
    Ok(match report.migration.status {
        MigrationState::Completed | MigrationState::Active | MigrationState::PreSwitchover => Exit::Done,
        MigrationState::Unresolved => Exit::Unresolved,
        _ if report.migration.incompatible => Exit::Incompatible,
        _ => Exit::Failed,
    })
}
