//! The guest of this `vm` stays, and it is found out how it would move.

use std::sync::Arc;
use std::time::Duration;

use vfio_migration::{MigrateError, Rehearsal, Rehearse, Source, SourceOptions};

use super::info::info;
use super::running::RunningVm;
use super::slot::{BeginError, Slot, Steering};
use crate::control::protocol::{MigrationInfo, MigrationState};
use crate::control::refused::Refused;
use crate::control::rehearsal::{RehearsalInfo, RehearseArguments};
use crate::exit::chain;
use crate::words::{device_map, uri};

/// Begins to rehearse; returns once the session has its thread.
pub(super) fn begin(vm: &Arc<RunningVm>, arguments: &RehearseArguments) -> Result<(), Refused> {
    let refuse = |text: String| Refused::new("GenericError", text);
    let target = uri(&arguments.uri).map_err(|failure| refuse(failure.text))?;
    let Slot::Here { machine, epoch } = vm.state.slot() else {
        return Err(refuse("there is no guest here that could move".into()));
    };
    let mut options = SourceOptions::default();
    if let Some(limit) = arguments.downtime_limit {
        options.downtime_limit = Duration::from_millis(limit);
    }
    options.bandwidth = arguments.max_bandwidth.filter(|cap| *cap > 0);
    options.give_up_after = arguments.give_up_after.map(Duration::from_millis);
    options.allow_all_dirty = arguments.allow_all_dirty;
    options.state_dir = vm.options.state_dir.clone();
    options.policy = vm.policy.clone();
    let pairs: Vec<_> = arguments.device_map.clone().into_iter().collect();
    options.device_map = device_map(&pairs).map_err(|failure| refuse(failure.text))?;
    options.epoch = epoch;
    let how = if arguments.pause { Rehearse::Standstill } else { Rehearse::Precopy };
    let source = Source::new(machine.clone(), options);
    let steering = Steering::Outgoing(source.control());
    let of_thread = vm.clone();
    let still_here =
        |slot: &Slot| matches!(slot, Slot::Here { machine: now, .. } if Arc::ptr_eq(now, &machine));
    let begun = vm.state.begin(steering, still_here, None, || {
        std::thread::Builder::new().name("rehearsal".into()).spawn(move || {
            let vm = of_thread;
            vm.announce(MigrationState::Active);
            finish(&vm, source.rehearse_to(&target, how, |_| {}));
        })
    });
    begun.map_err(|error| match error {
        BeginError::UnderWay => Refused::new("MigrationActive", "a migration is already under way"),
        BeginError::Changed => refuse("the guest is no longer here".into()),
        BeginError::Thread(error) => refuse(format!("cannot make a thread: {error}")),
    })
}

fn finish(vm: &RunningVm, result: Result<Rehearsal, MigrateError>) {
    let before = vm.state.snapshot();
    let steered = match before.steering {
        Some(Steering::Outgoing(control)) => info(&control.progress(), "outgoing"),
        _ => MigrationInfo::none(),
    };
    // A guest that could not go on is held, as after any migration that was undone.
    let held = match &result {
        Err(MigrateError::Aborted(aborted)) if !aborted.locks_lost.is_empty() => match before.slot {
            Slot::Here { machine, epoch } => Some(Slot::Held { machine, epoch }),
            _ => None,
        },
        _ => None,
    };
    let ended = MigrationInfo { remaining: 0, rate: 0, expected_downtime_ms: None, ..steered };
    let ended = match result {
        Ok(found) => MigrationInfo {
            status: MigrationState::Rehearsed,
            total_ms: found.total.as_secs_f64() * 1e3,
            error: found.left_undone.as_ref().map(ToString::to_string),
            rehearsal: Some(RehearsalInfo::of(found)),
            ..ended
        },
        Err(error) => {
            let cancelled = matches!(&error, MigrateError::Aborted(aborted) if aborted.cancelled);
            let rehearsal = RehearsalInfo::of_error(&error).filter(|_| !cancelled);
            MigrationInfo {
                status: match (&rehearsal, cancelled) {
                    (Some(_), _) => MigrationState::Rehearsed,
                    (None, true) => MigrationState::Cancelled,
                    (None, false) => MigrationState::Failed,
                },
                incompatible: rehearsal.is_some(),
                error: Some(chain(&error)),
                rehearsal,
                ..ended
            }
        }
    };
    let status = ended.status;
    vm.state.end(ended, held);
    vm.announce(status);
}
