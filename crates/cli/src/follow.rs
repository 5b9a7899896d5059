//! Follows what a running `vm` was asked for to its end, and reports how it stands then.

use std::time::Duration;

use serde_json::Value;

use crate::control::client::Client;
use crate::control::protocol::{MigrationInfo, MigrationState, StatusInfo, StatusReport, Verb};
use crate::exit::Failure;
use crate::interrupt::Interrupt;
use crate::output::say;
use crate::progress::Progress;
use crate::units::show_size;

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
    let mut report = ask(client)?;
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
        report = ask(client)?;
    }
    Ok(report)
}

/// Asks for both halves of the report. They are two answers: the first is asked for again until it is the same before
/// and after the second, so that the halves do not contradict each other.
pub(crate) fn ask(client: &mut Client) -> Result<StatusReport, Failure> {
    let mut vm: StatusInfo = query(client, Verb::QueryStatus)?;
    let mut attempts = 0;
    loop {
        let migration: MigrationInfo = query(client, Verb::QueryMigrate)?;
        let after: StatusInfo = query(client, Verb::QueryStatus)?;
        attempts += 1;
        if after == vm || attempts == 8 {
            return Ok(StatusReport { vm: after, migration });
        }
        vm = after;
    }
}

fn query<T: serde::de::DeserializeOwned>(client: &mut Client, verb: Verb) -> Result<T, Failure> {
    let value = client.call(verb, Value::Null).map_err(|error| error.failure("no answer"))?;
    serde_json::from_value(value).map_err(|error| Failure::caused("the answer makes no sense", &error))
}

/// The report for people.
pub(crate) fn text(report: &StatusReport) -> String {
    let StatusReport { vm, migration } = report;
    let mut text = format!(
        "VM {} (pid {}): {}, {} guest, {} RAM, epoch {}\n",
        vm.uuid,
        vm.pid,
        vm.status,
        vm.guest,
        show_size(vm.memory),
        vm.epoch
    );
    if !vm.devices.is_empty() {
        text.push_str(&format!("devices: {}\n", vm.devices.join(", ")));
    }
    if !vm.lost_devices.is_empty() {
        let lost = vm.lost_devices.join(", ");
        text.push_str(&format!(
            "lost: {lost} (their servers are gone; the guest cannot be moved any more)\n"
        ));
    }
    if let Some(incoming) = &vm.incoming {
        text.push_str(&format!("waits for a guest at {incoming}\n"));
    }
    if migration.status == MigrationState::None {
        return text;
    }
    let moved = migration.transferred;
    text.push_str(&format!(
        "migration: {:?}{}, {:.0} ms, {} iterations, {} RAM, {} device state live, {} stopped, {} left\n",
        migration.status,
        migration.phase.as_ref().map_or(String::new(), |phase| format!(" in {phase}")),
        migration.total_ms,
        migration.iterations,
        show_size(moved.ram),
        show_size(moved.device_precopy),
        show_size(moved.device_stopcopy),
        show_size(migration.remaining)
    ));
    if let Some(ms) = migration.downtime_ms {
        text.push_str(&format!("downtime: {ms:.1} ms\n"));
    } else if let Some(ms) = migration.expected_downtime_ms {
        text.push_str(&format!("expected downtime: {ms:.1} ms\n"));
    }
    if let Some(error) = &migration.error {
        text.push_str(&format!("error: {error}\n"));
    }
    text
}
