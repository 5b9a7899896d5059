//! The guest of this `vm` stays, and it is found out how it would move.

use std::sync::Arc;

use vfio_migration::{MigrateError, Rehearsal, Rehearse, Source};

use super::info;
use super::running::RunningVm;
use super::slot::{BeginError, Slot, Steering};
use crate::control::protocol::Event;
use crate::control::refused::Refused;
use crate::control::rehearsal::RehearseArguments;
use crate::exit::Failure;
use crate::words::uri;

/// Begins to rehearse; returns once the session has its thread.
pub(super) fn begin(vm: &Arc<RunningVm>, arguments: &RehearseArguments) -> Result<(), Refused> {
    let refuse = |text: String| Refused::new("GenericError", text);
    let refused = |failure: Failure| refuse(failure.text);
    let target = uri(&arguments.uri).map_err(refused)?;
    let Slot::Here { machine, epoch } = vm.state.slot() else {
        return Err(refuse("there is no guest here that could move".into()));
    };
    let mut options = arguments.options.clone().into_source_options().map_err(refused)?;
    options.state_dir = vm.options.state_dir.clone();
    options.policy = vm.policy.clone();
    options.epoch = epoch;
    let how = if arguments.pause { Rehearse::Standstill } else { Rehearse::Precopy };
    let source = Source::new(machine.clone(), options);
    let control = source.control();
    let steering = Steering::Outgoing(control.clone());
    let of_thread = vm.clone();
    let still_here =
        |slot: &Slot| matches!(slot, Slot::Here { machine: now, .. } if Arc::ptr_eq(now, &machine));
    let begun = vm.state.begin(steering, still_here, None, || {
        std::thread::Builder::new().name("rehearsal".into()).spawn(move || {
            let vm = of_thread;
            vm.publisher.publish(&Event::of_migration(&info::outgoing(&control.progress())));
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
    // A guest that could not go on is kept, as after any migration that was undone.
    let slot = match (&result, vm.state.slot()) {
        (Err(MigrateError::Aborted(aborted)), Slot::Here { machine, epoch })
            if !aborted.locks_lost.is_empty() =>
        {
            Some(Slot::Held { machine, epoch })
        }
        _ => None,
    };
    let ended = match result {
        Ok(found) => info::rehearsed(vm, found),
        Err(error) => info::not_rehearsed(vm, &error),
    };
    vm.end_session(ended, slot);
}
