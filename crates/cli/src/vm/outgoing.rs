//! The guest of this `vm` moves away.

use std::sync::Arc;

use vfio_migration::{Completed, MigrateError, Sabotage, SabotageKind, Source};
use vfio_migration_types::RamOffset;
use vfio_migration_vmm::guest::Areas;
use vfio_migration_vmm::machine::ReferenceMachine;

use super::info;
use super::running::RunningVm;
use super::slot::{BeginError, Slot, Steering};
use crate::args::serve::Break;
use crate::control::protocol::{Event, MigrateArguments};
use crate::control::refused::Refused;
use crate::exit::Failure;
use crate::words::uri;

/// Begins to migrate; returns once the session has its thread.
pub(super) fn begin(vm: &Arc<RunningVm>, arguments: &MigrateArguments) -> Result<(), Refused> {
    let refuse = |text: String| Refused::new("GenericError", text);
    let refused = |failure: Failure| refuse(failure.text);
    let options = arguments.options.clone().into_source_options().map_err(refused)?;
    let mut options = arguments.switchover.clone().into_source_options(options).map_err(refused)?;
    let target = uri(&arguments.uri).map_err(refused)?;
    let Slot::Here { machine, epoch } = vm.state.slot() else {
        return Err(refuse("there is no guest here that could move".into()));
    };
    if let Some(why) = machine.failure() {
        return Err(refuse(format!("the guest has stopped by itself and cannot move: {why}")));
    }
    options.policy = vm.policy.clone();
    options.state_dir = vm.options.state_dir.clone();
    options.epoch = epoch;
    options.sabotage = sabotage(vm.options.sabotage, &machine, !options.verify).map_err(refuse)?;
    let source = Source::new(machine.clone(), options);
    let control = source.control();
    let steering = Steering::Outgoing(control.clone());
    let of_thread = vm.clone();
    let expected = machine.clone();
    let still_here =
        |slot: &Slot| matches!(slot, Slot::Here { machine, .. } if Arc::ptr_eq(machine, &expected));
    let begun = vm.state.begin(steering, still_here, None, || {
        std::thread::Builder::new().name("migration".into()).spawn(move || {
            let vm = of_thread;
            vm.publisher.publish(&Event::of_migration(&info::outgoing(&control.progress())));
            let mut last = (0, false);
            let result = source.migrate_to(&target, |progress| {
                let info = info::outgoing(progress);
                if progress.iteration != last.0 {
                    vm.publisher.publish(&Event::of_pass(&info));
                }
                if progress.waiting != last.1 {
                    vm.publisher.publish(&Event::of_migration(&info));
                }
                last = (progress.iteration, progress.waiting);
            });
            finish(&vm, machine, result);
        })
    });
    begun.map_err(|error| match error {
        BeginError::UnderWay => Refused::new("MigrationActive", "a migration is already under way"),
        BeginError::Changed => refuse("the guest is no longer here".into()),
        BeginError::Thread(error) => refuse(format!("cannot make a thread: {error}")),
    })
}

/// Ends a session that was to send the guest away.
pub(super) fn finish(
    vm: &RunningVm,
    machine: Arc<ReferenceMachine>,
    result: Result<Completed, MigrateError>,
) {
    let epoch = vm.state.slot().epoch();
    match result {
        Ok(completed) => {
            // Before the end can be seen: who then looks finds the guest gone and the devices free.
            drop(vm.state.put_if(|_| true, Slot::Leaving { epoch }));
            drop(machine);
            vm.presence.end();
            vm.end_session(info::completed(&completed), Some(Slot::Left));
        }
        Err(error) => {
            let ended = info::not_completed(vm, &error);
            let slot = match &error {
                MigrateError::Unresolved { .. } => Some(Slot::Unresolved { machine, epoch }),
                // Its storage may be in use elsewhere: `cont` tries again to lock it.
                MigrateError::Aborted(aborted) if !aborted.locks_lost.is_empty() => {
                    Some(Slot::Held { machine, epoch })
                }
                _ => {
                    machine.let_go();
                    None
                }
            };
            vm.end_session(ended, slot);
        }
    }
}

/// What the demo breaks on this side.
fn sabotage(
    what: Option<Break>,
    machine: &ReferenceMachine,
    blind: bool,
) -> Result<Option<Sabotage>, String> {
    let kind = match what {
        Some(Break::DirtyLog) => SabotageKind::DropDirtyBit,
        Some(Break::PageOrder) => SabotageKind::StaleAfterLast,
        Some(Break::P2pOrder) => SabotageKind::P2pOrder,
        _ => return Ok(None),
    };
    // The victim is a page that the guest numbers: others it might not notice.
    let ram = vfio_migration::Machine::ram(machine);
    let areas = Areas::of(&ram).map_err(|error| error.to_string())?;
    let first = ram
        .offset_of(vfio_migration_types::Gpa(areas.low_start), 4096)
        .ok_or("the guest's pages are not in its RAM")?;
    // From there on nothing but numbered pages, below the hole and above it.
    let pages = Some(first..RamOffset(ram.size()));
    Ok(Some(Sabotage { kind, pages, verify_blind: blind }))
}
