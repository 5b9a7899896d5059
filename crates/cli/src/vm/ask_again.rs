//! `cont` of a guest of which nobody here knows whose it is: its destination is asked again.

use std::sync::{Arc, PoisonError};

use serde_json::Value;
use vfio_migration::{GuestOutcome, Resolution};

use super::history;
use super::info;
use super::running::RunningVm;
use super::slot::{LeftGuest, Slot};
use crate::control::event::ControlEvent;
use crate::control::failure::FailureInfo;
use crate::control::protocol::{MigrationInfo, MigrationStatus};
use crate::control::refused::Refused;

/// Asks where the guest went. It goes on here if it is this side's; if it is the destination's, the migration is told as what it was,
/// and the refusal says where the guest is.
pub(super) fn ask(vm: &RunningVm) -> Result<(), Refused> {
    let _alone = vm.starting.lock().unwrap_or_else(PoisonError::into_inner);
    let slot = vm.state.slot();
    let Slot::Unresolved { machine, epoch, unresolved, .. } = slot.clone() else {
        // Another client was first.
        return Ok(());
    };
    if !unresolved.is_pending() {
        return Err(slot.refusal("run"));
    }
    let resolution = unresolved.ask(None, || vm.is_ending()).map_err(|failure| {
        let told = slot.refusal("run");
        Refused { desc: format!("asked again: {failure}; {}", told.desc), ..told }
    })?;
    let last = vm.state.read(|_, _, last| last.cloned());
    let last = last.unwrap_or_else(|| MigrationInfo::new(MigrationStatus::Unresolved));
    let last = MigrationInfo { failure: None, error: None, ..last };
    match resolution {
        Resolution::Moved { guest, left_undone } => {
            let guest = guest.unwrap_or(GuestOutcome::Unknown);
            let left_undone = left_undone.iter().map(FailureInfo::from).collect();
            let ended = MigrationInfo { left_undone, ..info::of_outcome(&guest, last) };
            let left = LeftGuest { vm: unresolved.vm, memory: machine.memory(), epoch: unresolved.epoch };
            let to = unresolved.peer.clone();
            let text = format!("the guest has moved to {to}: {}", ended.status);
            vm.presence.end();
            // Before the end is published: a client that reacts to it must find the devices free.
            drop((slot, machine, unresolved));
            end(vm, ended, Slot::Left { left, to });
            Err(Refused::generic(text))
        }
        Resolution::Undone { cause, restored, not_undone } => {
            let ended = MigrationInfo {
                status: MigrationStatus::Failed,
                error: Some(cause.to_string()),
                failure: Some(FailureInfo::from(&cause)),
                left_undone: not_undone.iter().map(FailureInfo::from).collect(),
                ..last
            };
            if !restored {
                end(vm, ended, Slot::OwnedNotStarted { machine, epoch });
                return Err(vm.state.slot().refusal("run"));
            }
            machine.release();
            let runs = machine.is_running();
            end(vm, ended, Slot::Here { machine: Arc::clone(&machine), epoch });
            if runs {
                vm.publisher.publish(&ControlEvent::new("RESUME", Value::Null));
            }
            Ok(())
        }
    }
}

/// The session's end is known now: whoever asks, listens or reads the history is told.
fn end(vm: &RunningVm, ended: MigrationInfo, slot: Slot) {
    let attempt = vm.state.last_steering().and_then(|steering| steering.progress()?.attempt);
    vm.state.end(ended.clone(), Some(slot));
    if let Some(attempt) = attempt {
        history::record(
            vm.options.state_dir.as_deref(),
            &attempt,
            history::kind(attempt.kind),
            ended.clone(),
        );
    }
    vm.publisher.publish(&ControlEvent::of_migration(&ended));
}
