//! Outgoing sessions: `migrate`, `rehearse`, and what they share with `save`.

use std::sync::Arc;

use vfio_migration::{Completed, MigrateError, Progress, Rehearsal, Rehearse, Source};
use vfio_migration_vmm::machine::ReferenceMachine;

use super::faults::inject_at_source;
use super::running::RunningVm;
use super::slot::{LeftGuest, Slot, Steering};
use super::{history, info};
use crate::address::Address;
use crate::control::event::ControlEvent;
use crate::control::protocol::MigrateArguments;
use crate::control::refused::Refused;
use crate::control::rehearsal::RehearseArguments;
use crate::exit::CliError;
use crate::tls_options::check_chosen;
use crate::undecided::{UndecidedGuest, journal_file};

/// Begins to migrate; returns once the session has its thread.
pub(super) fn migrate(vm: &Arc<RunningVm>, arguments: &MigrateArguments) -> Result<(), Refused> {
    let refused = |failure: CliError| Refused::generic(failure.text);
    let options = arguments.options.clone().into_source_options().map_err(refused)?;
    let mut options = arguments.switchover.clone().into_source_options(options).map_err(refused)?;
    let target: Address = arguments.uri.parse().map_err(refused)?;
    let security = arguments.options.security(vm.options.tls.security()).map_err(refused)?;
    let slot = vm.state.slot();
    let Slot::Here { machine, epoch } = slot else { return Err(vm.state.refusal(&slot, "move")) };
    if let Some(why) = machine.failure() {
        let text = format!("the guest has stopped by itself and cannot move: {why}");
        return Err(Refused::generic(text));
    }
    options.policy = vm.policy.clone();
    options.security = security;
    options.unix_peers = vm.unix_peers.clone();
    options.state_dir = vm.options.state_dir.clone();
    options.epoch = epoch;
    options.peer_name = Some(target.to_string());
    let claim = vm.passed.claim(&target)?;
    let endpoint = claim.endpoint();
    check_chosen(endpoint.uri(), options.security.as_ref()).map_err(|failure| failure.report().error)?;
    let faulty = inject_at_source(vm.options.sabotage, machine.clone()).map_err(Refused::generic)?;
    let source = Source::new(faulty, options);
    begin(vm, machine, source, "migration", move |vm, machine, source| {
        let result = source.migrate_to(endpoint.uri(), publish_changes(vm));
        finish(vm, machine, result, &target.to_string(), "the migration");
    })?;
    claim.spend();
    Ok(())
}

/// Begins to rehearse; returns once the session has its thread.
pub(super) fn rehearse(vm: &Arc<RunningVm>, arguments: &RehearseArguments) -> Result<(), Refused> {
    let refused = |failure: CliError| Refused::generic(failure.text);
    let mut options = arguments.options.clone().into_source_options().map_err(refused)?;
    let target: Address = arguments.uri.parse().map_err(refused)?;
    let security = arguments.options.security(vm.options.tls.security()).map_err(refused)?;
    let slot = vm.state.slot();
    let Slot::Here { machine, epoch } = slot else { return Err(vm.state.refusal(&slot, "move")) };
    options.policy = vm.policy.clone();
    options.security = security;
    options.unix_peers = vm.unix_peers.clone();
    options.state_dir = vm.options.state_dir.clone();
    options.epoch = epoch;
    options.peer_name = Some(target.to_string());
    let how = if arguments.pause { Rehearse::Switchover } else { Rehearse::Precopy };
    let claim = vm.passed.claim(&target)?;
    let endpoint = claim.endpoint();
    check_chosen(endpoint.uri(), options.security.as_ref()).map_err(|failure| failure.report().error)?;
    let source = Source::new(machine.clone(), options);
    begin(vm, machine, source, "rehearsal", move |vm, machine, source| {
        drop(machine);
        finish_rehearsal(vm, source.rehearse_to(endpoint.uri(), how, publish_changes(vm)));
    })?;
    claim.spend();
    Ok(())
}

/// Begins a session that sends the guest in `machine`, on a thread of its own: unless one is under way, or the guest is no
/// longer here.
pub(super) fn begin(
    vm: &Arc<RunningVm>,
    machine: Arc<ReferenceMachine>,
    source: Source,
    thread: &str,
    session: impl FnOnce(&RunningVm, Arc<ReferenceMachine>, Source) + Send + 'static,
) -> Result<(), Refused> {
    let control = source.control();
    let steering = Steering::Outgoing(control.clone());
    let expected = machine.clone();
    let still_here =
        |slot: &Slot| matches!(slot, Slot::Here { machine, .. } if Arc::ptr_eq(machine, &expected));
    let of_thread = vm.clone();
    let begun = vm.state.begin(steering, still_here, None, || {
        std::thread::Builder::new().name(thread.into()).spawn(move || {
            of_thread.publisher.publish(&ControlEvent::of_migration(&info::outgoing(&control.progress())));
            session(&of_thread, machine, source);
        })
    });
    begun.map_err(|error| error.refused("the guest is no longer here"))
}

/// The observer of an outgoing session: publishes each iteration, and the beginning and end of a wait before the switchover.
pub(super) fn publish_changes(vm: &RunningVm) -> impl FnMut(&Progress) {
    let mut last = (0, false);
    let mut told = Vec::new();
    let (mut began, mut connected) = (false, false);
    move |progress| {
        if let Some(attempt) = &progress.attempt {
            if !std::mem::replace(&mut began, true) {
                history::session_began(attempt, "outgoing");
            }
            if attempt.security.is_some() && !std::mem::replace(&mut connected, true) {
                history::session_connected(attempt, "outgoing");
            }
        }
        let info = info::outgoing(progress);
        if progress.iteration != last.0 {
            vm.publisher.publish(&ControlEvent::of_pass(&info));
        }
        // While it is undone: each answer that it waits for is told once.
        let waits = (progress.cancelling || progress.failing.is_some()).then(|| {
            let answers = progress.awaited.iter();
            answers.map(|answer| (answer.device.clone(), answer.request)).collect::<Vec<_>>()
        });
        let news = waits.as_ref().is_some_and(|waits| waits.iter().any(|answer| !told.contains(answer)));
        told.extend(waits.into_iter().flatten());
        if progress.waiting != last.1 || news {
            vm.publisher.publish(&ControlEvent::of_migration(&info));
        }
        last = (progress.iteration, progress.waiting);
    }
}

/// Ends a session that was to send the guest away, `to` another `vm` or a file: `what` it is called.
pub(super) fn finish(
    vm: &RunningVm,
    machine: Arc<ReferenceMachine>,
    result: Result<Completed, MigrateError>,
    to: &str,
    what: &str,
) {
    let epoch = vm.state.slot().epoch();
    match result {
        Ok(completed) => {
            // Before the end is published: a client that reacts to it must find the devices free.
            let left = LeftGuest { vm: completed.vm, memory: machine.memory(), epoch: completed.epoch };
            drop(vm.state.put_if(|_| true, Slot::Leaving(left)));
            drop(machine);
            vm.presence.end();
            let slot = Slot::Left { left, to: to.to_owned() };
            vm.end_session(info::completed(&completed), Some(slot));
        }
        Err(error) => {
            let mut ended = info::not_completed(vm, &error, what);
            let slot = match &error {
                MigrateError::Unresolved(unresolved) => {
                    let journal = vm.options.state_dir.as_ref().map(|dir| journal_file(dir, machine.id()));
                    let text = UndecidedGuest {
                        why: &unresolved.why,
                        peer: to,
                        journal,
                        is_here: !vm.is_ending(),
                        can_ask: unresolved.is_pending() && !vm.is_ending(),
                    }
                    .to_string();
                    ended.error = Some(text.clone());
                    Some(Slot::Unresolved { machine, epoch, text, unresolved: unresolved.clone() })
                }
                // A device is not what it was, or the storage may be in use elsewhere: `cont` tries again.
                MigrateError::Aborted(aborted) if !aborted.restored => {
                    Some(Slot::OwnedNotStarted { machine, epoch })
                }
                _ => {
                    machine.release();
                    None
                }
            };
            vm.end_session(ended, slot);
        }
    }
}

fn finish_rehearsal(vm: &RunningVm, result: Result<Rehearsal, MigrateError>) {
    // A guest that could not be let go on stays paused, as after any migration that was undone.
    let slot = match (&result, vm.state.slot()) {
        (Err(MigrateError::Aborted(aborted)), Slot::Here { machine, epoch }) if !aborted.restored => {
            Some(Slot::OwnedNotStarted { machine, epoch })
        }
        _ => None,
    };
    let ended = match result {
        Ok(found) => info::rehearsed(vm, found),
        Err(error) => info::not_rehearsed(vm, &error),
    };
    vm.end_session(ended, slot);
}
