//! Follows what a running `vm` was asked for to its end: progress is shown, Ctrl-C cancels it.

use std::time::Duration;

use serde_json::Value;

use crate::control::{Client, MigrationState, Verb};
use crate::exit::Failure;
use crate::interrupt::Interrupt;
use crate::output::say;
use crate::progress::Progress;
use crate::verbs::{StatusReport, status};

/// How long nothing happens before the `vm` is asked again.
const PATIENCE: Duration = Duration::from_millis(200);

/// Waits while the migration, rehearsal or save `goes_on`, and returns how things stand then. Progress is not shown where
/// `json` is to be printed.
pub(crate) fn follow(
    client: &mut Client,
    goes_on: impl Fn(MigrationState) -> bool,
    json: bool,
    interrupt: &Interrupt,
) -> Result<StatusReport, Failure> {
    let mut report = status::ask(client)?;
    let mut progress = Progress::new(!json);
    let mut cancelled = false;
    while goes_on(report.migration.status) {
        progress.show(&report.migration);
        client.next_event(PATIENCE).map_err(|error| Failure::caused("lost the vm", &error))?;
        if interrupt.requested() && !cancelled {
            cancelled = true;
            // Too late to cancel is not a failure: the loop then sees how it ended.
            if let Err(error) = client.call(Verb::MigrateCancel, Value::Null) {
                say(format_args!("vfio-migrate: {error}"));
            }
        }
        report = status::ask(client)?;
    }
    Ok(report)
}
