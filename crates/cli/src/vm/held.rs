//! `cont` of a guest that a session left paused: it could not be started here, or not be let go on.

use std::sync::{Arc, PoisonError};
use std::time::{Instant, SystemTime};

use serde_json::Value;
use vfio_migration::{AttemptInfo, AttemptKind, Failure, PendingRollback, Side, start_held};
use vfio_migration_types::{MigrationState, rfc3339};
use vfio_migration_vmm::machine::ReferenceMachine;

use super::history;
use super::running::RunningVm;
use super::slot::{Slot, Steering, still_undone};
use crate::control::event::ControlEvent;
use crate::control::failure::FailureInfo;
use crate::control::protocol::{ArrivedGuest, MigrationInfo, MigrationStatus};
use crate::control::refused::Refused;
use crate::history::SessionKind;
use crate::units::milliseconds;

/// Tries again to start the guest: storage locks, devices, interrupts, vCPUs. Both ends of the try are written down.
pub(super) fn start(vm: &RunningVm) -> Result<(), Refused> {
    let _alone = vm.starting.lock().unwrap_or_else(PoisonError::into_inner);
    let Slot::OwnedNotStarted { machine, epoch } = vm.state.slot() else {
        // Another client was first.
        return Ok(());
    };
    // Its device is late: it is taken back, and the guest goes on, when that answers.
    if let PendingRollback::UnderWay(awaited) = vm.state.pending_rollback() {
        return Err(still_undone(&awaited));
    }
    let incoming = matches!(vm.state.last_steering(), Some(Steering::Incoming(_)));
    let side = if incoming { Side::Destination } else { Side::Source };
    let begun = Instant::now();
    let attempt = attempt(vm, &machine);
    let started = start_held(&*machine, side);
    let tried = MigrationInfo {
        direction: Some(if incoming { "incoming" } else { "outgoing" }.into()),
        attempt: attempt.as_ref().map(|attempt| attempt.attempt.to_string()),
        total_ms: milliseconds(begun.elapsed()),
        ..MigrationInfo::new(MigrationStatus::Completed)
    };
    let write_down = |info: MigrationInfo| {
        if let Some(attempt) = &attempt {
            history::record(vm.options.state_dir.as_deref(), attempt, SessionKind::Start, info);
        }
    };
    match started {
        Ok(()) => {
            let same = |slot: &Slot| matches!(slot, Slot::OwnedNotStarted { machine: now, .. } if Arc::ptr_eq(now, &machine));
            drop(vm.state.put_if(same, Slot::Here { machine: machine.clone(), epoch }));
            vm.state.set_started(rfc3339(SystemTime::now()));
            write_down(MigrationInfo { guest: Some(ArrivedGuest::Running), ..tried });
            vm.publisher.publish(&ControlEvent::new("RESUME", Value::Null));
            Ok(())
        }
        Err(failure) => {
            let text = not_started(vm, &failure);
            write_down(MigrationInfo {
                status: MigrationStatus::Failed,
                error: Some(text.clone()),
                failure: Some(FailureInfo::from(&failure)),
                ..tried
            });
            Err(Refused::generic(text))
        }
    }
}

/// What the try is written down as: a thing of its own, with the names of the session that left the guest so.
fn attempt(vm: &RunningVm, machine: &ReferenceMachine) -> Option<AttemptInfo> {
    let last = vm.state.last_steering()?.progress()?.attempt?;
    Some(AttemptInfo::beginning(machine.id(), last.attempt, last.epoch, AttemptKind::Migration, last.peer))
}

/// Why the guest is paused still. A device in ERROR says no more itself: how it came there, the session has told.
fn not_started(vm: &RunningVm, failure: &Failure) -> String {
    let mut text = format!("the guest cannot be started and stays paused: {}", failure.text);
    let in_error = failure.arc.is_some_and(|(from, _)| from == MigrationState::Error);
    let before = vm.state.read(|_, _, last| last.and_then(|last| last.failure.clone()));
    if let Some(before) = before.filter(|before| in_error && before.device == failure.device) {
        text.push_str(&format!("; before that: {}", before.text));
    }
    if !failure.remedy.is_empty() {
        text.push_str(&format!("; {}", failure.remedy));
    }
    // Neither `migrate` nor `save` takes it, and they send to `cont`.
    text.push_str("; if its device is gone for good, `quit --force` ends the guest with its process");
    text
}
