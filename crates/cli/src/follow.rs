//! Follows a migration, rehearsal or save of a running `vm` to its end, and reports how it ended.

use std::time::Duration;

use serde_json::Value;
use vfio_migration_types::error_chain_of;

use crate::control::awaited::sentence;
use crate::control::client::{ControlClient, ControlError};
use crate::control::protocol::{
    ControlVerb, FollowedReport, MigrationInfo, MigrationStatus, StatusInfo, StatusReport, VmStatus,
};
use crate::control::security::SecurityInfo;
use crate::exit::CliError;
use crate::interrupt::UserInterrupt;
use crate::progress_display::ProgressDisplay;
use crate::units::format_size;
use crate::verdict;

/// Time after which Ctrl-C is looked for while nothing happens.
const PATIENCE: Duration = Duration::from_millis(200);

/// Effect of Ctrl-C on the migration that is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnInterrupt {
    /// The migration is cancelled, and followed to its end.
    Cancel,
    /// The migration goes on, and the command ends.
    Leave,
}

/// Waits while the migration `goes_on`, and returns the VM and its migration as they are then. Progress is shown unless
/// `json` is to be printed.
pub(crate) fn follow(
    client: &mut ControlClient,
    goes_on: impl Fn(MigrationStatus) -> bool,
    json: bool,
    interrupt: &UserInterrupt,
    on_interrupt: OnInterrupt,
) -> Result<StatusReport, CliError> {
    let mut progress = ProgressDisplay::new(!json);
    let mut cancelled = false;
    if on_interrupt == OnInterrupt::Cancel {
        interrupt.leaves("whether it is cancelled, and how it ends, `status` tells");
    }
    let asked = query(client, &mut progress, on_interrupt, &mut cancelled)?;
    let mut report = asked.map_err(|error| no_answer(&error, cancelled))?;
    while let Some(migration) = report.migration.as_ref().filter(|migration| goes_on(migration.status)) {
        progress.update(migration);
        let news = match client.next_migration(PATIENCE) {
            Err(ControlError::Interrupted(_)) => None,
            Err(error) => {
                return ended_with_vm(client, &report, None, &error).ok_or_else(|| lost(&error, cancelled));
            }
            Ok(news) => news,
        };
        if on_interrupt == OnInterrupt::Leave {
            interrupt.check()?;
        } else if interrupt.requested() && !cancelled {
            cancelled = true;
            cancel(client, &mut progress)?;
        }
        match news {
            Some(migration) if goes_on(migration.status) => report.migration = Some(migration),
            // The event says how it ended, but not where the guest is now. Nor need this migration have ended: an event that
            // comes late can be of the one before.
            Some(told) => match query(client, &mut progress, on_interrupt, &mut cancelled)? {
                Ok(asked) => report = asked,
                Err(error) => {
                    return ended_with_vm(client, &report, Some(told), &error)
                        .ok_or_else(|| no_answer(&error, cancelled));
                }
            },
            None => {}
        }
    }
    Ok(report)
}

/// Asks how the VM and its migration are. Where an interrupt that keeps the answer away is to cancel the migration, it does.
fn query(
    client: &mut ControlClient,
    progress: &mut ProgressDisplay,
    on_interrupt: OnInterrupt,
    cancelled: &mut bool,
) -> Result<Result<StatusReport, ControlError>, CliError> {
    let mut answer = client.query();
    if matches!(answer, Err(ControlError::Interrupted(_))) && on_interrupt == OnInterrupt::Cancel {
        *cancelled = true;
        cancel(client, progress)?;
        answer = client.query();
    }
    Ok(answer)
}

/// How what was followed has ended, where its `vm` ended with it, for this `error`, before it could be asked: by the event that told it,
/// which is `told` or came since. Not by one of the session before it, which `report` has.
fn ended_with_vm(
    client: &mut ControlClient,
    report: &StatusReport,
    told: Option<MigrationInfo>,
    error: &ControlError,
) -> Option<StatusReport> {
    if !matches!(error, ControlError::Closed | ControlError::Io(_)) {
        return None;
    }
    let before = report.last.as_ref().and_then(|last| last.attempt.as_ref());
    let of_this = |info: &MigrationInfo| {
        !info.status.is_under_way() && info.attempt.is_some() && info.attempt.as_ref() != before
    };
    let last = told.into_iter().chain(client.told()).rfind(of_this)?;
    let vm = StatusInfo { status: VmStatus::Shutdown, ..report.vm.clone() };
    Some(StatusReport { vm, migration: None, last: Some(last) })
}

/// The failure of a question.
fn no_answer(error: &ControlError, cancelled: bool) -> CliError {
    match (error, cancelled) {
        (ControlError::Refused(_), _) | (_, false) => error.failure("no answer"),
        (_, true) => lost(error, true),
    }
}

/// The end of a `vm` that is followed, or its silence; and what is known of what it was told.
fn lost(error: &ControlError, cancelled: bool) -> CliError {
    let lost = error_chain_of("lost the vm", error);
    CliError::failed(if cancelled {
        format!("{lost}; it was told to cancel, and has taken that: how it ends, `status` tells")
    } else {
        lost
    })
}

/// Cancels the migration. From here on it is waited for as long as its `vm` answers, whatever else the user asks for: a second signal
/// ends the process.
fn cancel(client: &mut ControlClient, progress: &mut ProgressDisplay) -> Result<(), CliError> {
    client.disregard_interrupt();
    match client.call(ControlVerb::MigrateCancel, Value::Null) {
        Ok(_) => Ok(()),
        // Too late to cancel is not a failure: the migration is followed to its end.
        Err(error @ ControlError::Refused(_)) => {
            progress.message(format_args!("vfio-migrate: {error}"));
            Ok(())
        }
        Err(error) => Err(CliError::failed(format!(
            "{}; it was told to cancel, and has not answered: whether it does, and how it ends, `status` tells",
            error_chain_of("lost the vm", &error)
        ))),
    }
}

/// The VM, its migration and the last one for people.
pub(crate) fn text(report: &StatusReport) -> String {
    let StatusReport { vm, migration, last } = report;
    let mut text = vm_text(vm);
    if let Some(migration) = migration {
        text.push_str(&migration_text("migration", migration));
    }
    if let Some(last) = last {
        text.push_str(&migration_text("last", last));
        for line in verdict::why(last).iter().flat_map(|why| why.lines()) {
            text.push_str(&format!("  {line}\n"));
        }
        for failure in &last.left_undone {
            text.push_str(&format!("  left undone: {}\n", failure.text));
        }
        if let Some(at) = &last.started {
            text.push_str(&format!("  `cont` started the guest at {at}\n"));
        }
    }
    text
}

/// The VM and what was followed to its end for people. Why it failed is said elsewhere.
pub(crate) fn followed_text(report: &FollowedReport) -> String {
    let FollowedReport { vm, migration } = report;
    vm_text(vm) + &migration_text("migration", migration)
}

fn vm_text(vm: &StatusInfo) -> String {
    let mut text = format!(
        "VM {} (pid {}): {}, {} guest, {}, epoch {}\n",
        vm.uuid,
        vm.pid,
        vm.status,
        vm.guest,
        vm.memory.map_or("RAM as its guest has".into(), |memory| format!("{} RAM", format_size(memory))),
        vm.epoch
    );
    if !vm.devices.is_empty() {
        text.push_str(&format!("devices: {}\n", vm.devices.join(", ")));
    }
    if !vm.lost_devices.is_empty() {
        let lost = vm.lost_devices.join(", ");
        text.push_str(&format!(
            "lost: {lost} (no connection to their servers; the guest cannot be moved any more)\n"
        ));
    }
    if !vm.reset_devices.is_empty() {
        let reset = vm.reset_devices.join(", ");
        text.push_str(&format!(
            "reset: {reset} (by a session that was undone; what the guest had in it is lost, until it sets it up anew)\n"
        ));
    }
    if !vm.unconnected_interrupts.is_empty() {
        let devices = vm.unconnected_interrupts.join(", ");
        text.push_str(&format!(
            "interrupts not connected: {devices} (refused, or late; asked again until the guest has all that it has unmasked)\n"
        ));
    }
    if let Some(awaited) = &vm.pending_rollback {
        let awaited = sentence(awaited);
        text.push_str(&format!("still being undone: {awaited}; no session can begin before that\n"));
    }
    if let Some(incoming) = &vm.incoming {
        let how = if vm.incoming_plaintext { ", in plain text" } else { "" };
        text.push_str(&format!("waits for a guest at {incoming}{how}\n"));
    }
    if let Some(expected) = &vm.expected {
        text.push_str(&format!("{expected}\n"));
    }
    if let Some(refused) = vm.refused.as_ref().filter(|refused| refused.count > 0) {
        text.push_str(&format!("{refused}\n"));
    }
    if let Some(why) = &vm.failure {
        text.push_str(&format!("its guest stopped by itself: {why}\n"));
    }
    if let Some(why) = &vm.not_ready {
        text.push_str(&format!("not ready for one: {why}\n"));
    }
    if let Some(to) = &vm.moved_to {
        text.push_str(&format!("its guest has left for {to}\n"));
    }
    text
}

fn migration_text(name: &str, migration: &MigrationInfo) -> String {
    let moved = migration.transferred;
    // Of one that completed the last phase says nothing, and where one fails its failure says it.
    let silent = [MigrationStatus::Completed, MigrationStatus::Failing];
    let phase = migration.phase_name.as_ref().filter(|_| !silent.contains(&migration.status));
    let mut text = format!(
        "{name}: {}{}{}, {} ms, iteration {}, {} RAM, {} device state live, {} stopped",
        migration.direction.as_ref().map_or(String::new(), |direction| format!("{direction}, ")),
        migration.status_text(),
        phase.map_or(String::new(), |phase| format!(" in {phase}")),
        migration.total_ms,
        migration.iterations,
        format_size(moved.ram),
        format_size(moved.device_precopy),
        format_size(moved.device_stopcopy),
    );
    if migration.status.is_under_way() {
        let left = migration.remaining.map(|left| format!(", {} left", format_size(left)));
        text.push_str(&left.unwrap_or_default());
    }
    text.push('\n');
    if let Some(why) = migration.error.as_ref().filter(|_| migration.status == MigrationStatus::Failing) {
        text.push_str(&format!("why: {why}\n"));
    }
    for awaited in migration.waits_for.iter().filter(|_| migration.status.is_under_way()) {
        text.push_str(&format!("waits: {awaited}\n"));
    }
    if let Some(how) = migration.security.as_ref().and_then(SecurityInfo::sentence) {
        text.push_str(&format!("connection: {how}\n"));
    }
    if let Some(ms) = migration.downtime_ms {
        text.push_str(&format!("downtime: {ms} ms\n"));
    } else if let Some(ms) = migration.expected_downtime_ms.filter(|_| migration.status.is_under_way()) {
        let limit = migration.downtime_limit_ms.map_or(String::new(), |limit| format!(", limit {limit} ms"));
        text.push_str(&format!("expected downtime: {ms} ms{limit}\n"));
    }
    text
}
