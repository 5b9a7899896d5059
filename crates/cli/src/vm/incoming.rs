//! An incoming migration: waiting for a guest, receiving it, and what is left when none came.

use std::sync::Arc;
use std::time::Duration;

use vfio_migration::{Arrived, Destination, DestinationOptions, IncomingError, IncomingOffer, Machine, Uri};
use vfio_migration_compat::Reason;
use vfio_migration_types::error_chain;
use vfio_migration_vmm::machine::ReferenceMachine;

use super::faults::inject_at_destination;
use super::info;
use super::running::RunningVm;
use super::slot::{Slot, Steering};
use crate::control::refused::Refused;
use crate::words::uri;

/// Time for which the destination still answers a source that lost the answer to its COMMIT.
const ANSWER_FOR: Duration = Duration::from_secs(60);

/// Waits for a guest again, with a machine built anew. The guest that was here must have left.
pub(super) fn again(vm: &Arc<RunningVm>, text: &str) -> Result<(), Refused> {
    let uri = uri(text).map_err(|failure| Refused::generic(failure.text))?;
    let before = reserve(vm)?;
    let begun = ReferenceMachine::build(vm.config.clone())
        .map_err(|error| Refused::generic(error_chain(&error)))
        .and_then(|machine| listen(vm, &uri, machine));
    if begun.is_err() {
        // Only what we reserved ourselves is given back.
        drop(vm.state.put_if(|slot| matches!(slot, Slot::Preparing), before));
    }
    begun
}

/// Reserves the slot for a guest, unless one is here or awaited, and returns what was in it. [`listen`] may follow.
pub(super) fn reserve(vm: &RunningVm) -> Result<Slot, Refused> {
    let (under_way, waits) =
        vm.state.read(|slot, steering, _| (steering.is_some(), matches!(slot, Slot::Awaited { .. })));
    if under_way {
        let text = if waits { "it already waits for a guest" } else { "a migration is under way" };
        return Err(Refused::new("MigrationActive", text));
    }
    let free = |slot: &Slot| matches!(slot, Slot::Left | Slot::Failed);
    vm.state.put_if(free, Slot::Preparing).map_err(|slot| match slot {
        Slot::Preparing | Slot::Awaited { .. } => {
            Refused::new("MigrationActive", "it already waits for a guest")
        }
        _ => Refused::generic("there is a guest here"),
    })
}

/// Waits at `uri` for a guest that goes into `machine`; returns once the address is bound. The place must have been
/// [reserved](reserve).
pub(super) fn listen(vm: &Arc<RunningVm>, uri: &Uri, machine: Arc<ReferenceMachine>) -> Result<(), Refused> {
    let mut options = DestinationOptions::default();
    options.state_dir = vm.options.state_dir.clone();
    options.config_rules = vm.rules.clone();
    options.expect = vm.options.uuid;
    options.policy = vm.policy.clone();
    let mut destination =
        Destination::listen(uri, options).map_err(|error| Refused::generic(error_chain(&error)))?;
    let at = destination.local().clone();
    let steering = Steering::Incoming(destination.control());
    let awaited = Slot::Awaited { machine: machine.clone(), at };
    let reserved = |slot: &Slot| matches!(slot, Slot::Preparing);
    let of_thread = vm.clone();
    let begun = vm.state.begin(steering, reserved, Some(awaited), || {
        std::thread::Builder::new().name("migration".into()).spawn(move || {
            let (machine, result) = receive(&of_thread, &mut destination, machine);
            let owner = result.is_ok();
            finish(&of_thread, machine, result);
            drop(of_thread);
            if owner && let Err(error) = destination.answer_queries(ANSWER_FOR) {
                tracing::warn!(%error, "a source that lost our answer would find nobody to ask");
            }
        })
    });
    begun.map_err(|error| error.refused("there is a guest here"))
}

/// Receives a guest. After a rehearsal or a question the machine is built anew, and the address waited at on.
fn receive(
    vm: &RunningVm,
    destination: &mut Destination,
    mut machine: Arc<ReferenceMachine>,
) -> (Option<Arc<ReferenceMachine>>, Result<Arrived, IncomingError>) {
    loop {
        let error = match destination.accept(|offer| admit(vm, &machine, offer)) {
            Err(error @ IncomingError::Rehearsed(_)) => error,
            result => return (Some(machine), result),
        };
        tracing::info!("{}; waiting for the next", error_chain(&error));
        let at = destination.local().clone();
        let used = vm.state.put_if(|slot| matches!(slot, Slot::Awaited { .. }), Slot::Preparing);
        drop((used, machine));
        vm.presence.end();
        machine = match ReferenceMachine::build(vm.config.clone()) {
            Ok(machine) => machine,
            Err(build) => {
                tracing::error!("the machine cannot be built again: {}", error_chain(&build));
                return (None, Err(error));
            }
        };
        let awaited = Slot::Awaited { machine: machine.clone(), at };
        drop(vm.state.put_if(|slot| matches!(slot, Slot::Preparing), awaited));
    }
}

/// Accepts the guest on offer; a VM that was given no identity takes the guest's.
fn admit(
    vm: &RunningVm,
    machine: &Arc<ReferenceMachine>,
    offer: &IncomingOffer,
) -> Result<Arc<dyn Machine>, Box<Reason>> {
    if vm.options.uuid.is_none() {
        machine.adopt(offer.vm);
    }
    if let Some(dir) = &vm.options.state_dir {
        vm.presence.receive(dir, offer.vm).map_err(|text| Reason::new("state-dir", text))?;
    }
    inject_at_destination(vm.options.sabotage, machine.clone())
        .map_err(|text| Box::new(Reason::new("machine", text)))
}

fn finish(vm: &RunningVm, machine: Option<Arc<ReferenceMachine>>, result: Result<Arrived, IncomingError>) {
    match (result, machine) {
        (Ok(arrived), Some(machine)) => {
            machine.release();
            let slot = Slot::Here { machine, epoch: arrived.epoch };
            vm.end_session(info::arrived(vm, &arrived), Some(slot));
        }
        (Ok(_), None) => {}
        (Err(error), machine) => {
            let ended = info::not_arrived(vm, &error);
            let slot = match (&error, machine) {
                (IncomingError::OwnedNotStarted(held), Some(machine)) => {
                    Slot::OwnedNotStarted { machine, epoch: held.epoch }
                }
                (_, machine) => {
                    // Before the end is published: a client that reacts to it must find the devices free.
                    drop(vm.state.put_if(|_| true, Slot::Preparing));
                    drop(machine);
                    vm.presence.end();
                    Slot::Failed
                }
            };
            vm.end_session(ended, Some(slot));
        }
    }
}
