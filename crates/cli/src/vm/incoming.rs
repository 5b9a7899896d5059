//! An incoming migration: a `vm` that waits until a guest has arrived, however many sessions end otherwise before that.

use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vfio_migration::{
    Arrived, AttemptKind, CancelCause, Destination, DestinationOptions, IncomingControl, IncomingError,
    IncomingOffer, Machine, NotBuilt,
};
use vfio_migration_compat::{Reason, SessionCode};
use vfio_migration_types::error_chain;
use vfio_migration_vmm::machine::ReferenceMachine;

use super::faults::inject_at_destination;
use super::questions::is_question;
use super::readiness::{
    BUILT_WITHIN, REBUILDS, close_retired, give_up_machine, lock_building, rebuild, rebuild_aside, retire,
};
use super::running::{RunningVm, build};
use super::slot::{Slot, Steering};
use super::wait::WaitSettings;
use super::{history, info};
use crate::address::Address;
use crate::control::event::ControlEvent;
use crate::control::protocol::IncomingArguments;
use crate::control::refused::Refused;
use crate::exit::CliError;
use crate::output::eprintln_line;

/// Time for which the destination still answers a source that lost the answer to its COMMIT.
const ANSWER_FOR: Duration = Duration::from_secs(60);
/// Longest wait for the end of a wait that was cancelled, and how often it is looked for.
const CANCELLED: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Waits for a guest again, with a machine built anew. The guest that was here must have left.
pub(super) fn again(vm: &Arc<RunningVm>, asked: &IncomingArguments) -> Result<(), Refused> {
    let address: Address = asked.uri.parse().map_err(|failure: CliError| Refused::generic(failure.text))?;
    let settings = vm.of_every_wait.with(&asked.options, vm.options.uuid);
    let settings = Arc::new(settings.map_err(|failure| failure.report().error)?);
    // What is passed under a name is known once it is claimed.
    if let Address::Uri(uri) = &address {
        settings.check(uri).map_err(|failure| failure.report().error)?;
    }
    let before = reserve(vm)?;
    let begun = lock_building(vm, CANCELLED)
        .ok_or_else(|| Refused::new("MigrationActive", REBUILDS))
        .and_then(|_building| {
            close_retired(vm);
            build(vm).map_err(|failure| Refused::generic(failure.text))
        })
        .and_then(|machine| listen(vm, &address, machine, &settings));
    if begun.is_err() {
        // Only what we reserved ourselves is given back.
        drop(vm.state.put_if(|slot| matches!(slot, Slot::Preparing), before));
    }
    begun
}

/// Waits until a wait that was cancelled is over, with a guest half way or without: its machine is being given up.
fn outlast_cancelled(vm: &RunningVm) {
    let begun = Instant::now();
    let ending = || match vm.state.steering() {
        Some(Steering::Incoming(control)) => control.cancelled().is_some(),
        Some(Steering::Outgoing(_)) | None => false,
    };
    while ending() && begun.elapsed() < CANCELLED {
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Reserves the slot for a guest, unless one is here or awaited, and returns what was in it. [`listen`] may follow.
pub(super) fn reserve(vm: &RunningVm) -> Result<Slot, Refused> {
    outlast_cancelled(vm);
    let waits = vm.state.read(|slot, _, _| matches!(slot, Slot::Awaited { .. }));
    let text = match vm.state.steering() {
        None => None,
        // It outlasts what was waited for above.
        Some(Steering::Incoming(control)) if control.cancelled().is_some() => {
            let awaited = control.progress().map(|progress| progress.awaited).unwrap_or_default();
            let awaited: Vec<_> = awaited.iter().map(|answer| format!(": {answer}")).collect();
            Some(format!("the wait that was cancelled is still being undone{}", awaited.concat()))
        }
        Some(_) if waits => Some("it already waits for a guest".into()),
        Some(_) => Some("a migration is under way".into()),
    };
    if let Some(text) = text {
        return Err(Refused::new("MigrationActive", text));
    }
    let free = |slot: &Slot| matches!(slot, Slot::Left { .. } | Slot::Empty | Slot::Failed);
    vm.state.put_if(free, Slot::Preparing).map_err(|slot| match slot {
        Slot::Preparing | Slot::Awaited { .. } => {
            Refused::new("MigrationActive", "it already waits for a guest")
        }
        _ => Refused::generic("there is a guest here"),
    })
}

/// Waits at `address` for a guest that goes into `machine`; returns once the address is bound. The place must have been [reserved](reserve).
pub(super) fn listen(
    vm: &Arc<RunningVm>,
    address: &Address,
    machine: Arc<ReferenceMachine>,
    settings: &Arc<WaitSettings>,
) -> Result<(), Refused> {
    let mut options = DestinationOptions::default();
    options.state_dir = vm.options.state_dir.clone();
    options.expect = settings.expect.clone();
    options.suspend = settings.paused;
    options.policy = vm.policy.clone();
    options.unix_peers = vm.unix_peers.clone();
    options.security = settings.security.clone();
    let claim = vm.passed.claim(address)?;
    settings.check(claim.endpoint().uri()).map_err(|failure| failure.report().error)?;
    vm.set_wait(settings.clone());
    let mut destination = Destination::listen(claim.endpoint().uri(), options)
        .map_err(|error| Refused::generic(error_chain(&error)))?;
    let at = match address {
        Address::Uri(_) => Address::Uri(destination.local().clone()),
        Address::Passed(_) => address.clone(),
    };
    let control = destination.control();
    let publisher = vm.publisher.clone();
    control.on_refused(move |refused| publisher.publish(&ControlEvent::of_refusal(&refused.into())));
    let awaited = Slot::Awaited { machine: Some(machine), at: at.clone(), not_ready: None };
    let reserved = |slot: &Slot| matches!(slot, Slot::Preparing);
    let (of_thread, once) = (vm.clone(), settings.once);
    let begun = vm.state.begin(Steering::Incoming(control.clone()), reserved, Some(awaited), || {
        std::thread::Builder::new().name("migration".into()).spawn(move || {
            let (result, came) = receive(&of_thread, &mut destination, &control, once);
            let owner = result.is_ok();
            finish(&of_thread, result, control.cancelled(), came);
            drop(of_thread);
            if owner && let Err(error) = destination.answer_queries(ANSWER_FOR) {
                tracing::warn!(%error, "a source that lost our answer would find nobody to ask");
            }
        })
    });
    begun.map_err(|error| error.refused("there is a guest here"))?;
    claim.spend();
    let who = vm.options.uuid.map_or_else(|| "a VM".into(), |id| format!("VM {id}"));
    eprintln_line(format_args!("vfio-migrate: {who} waits for a guest at {at}"));
    Ok(())
}

/// Receives a guest, and says whether it was a session that ended the wait. Two things do: a guest that has arrived, and the operator; where the wait is for one migration, `once`, also a session that
/// ended otherwise, but for a rehearsal, a source that brought nothing and made way for another, and one that has come again. After every other end the address is waited at on, with a machine built anew.
fn receive(
    vm: &Arc<RunningVm>,
    destination: &mut Destination,
    control: &IncomingControl,
    once: bool,
) -> (Result<Arrived, IncomingError>, bool) {
    let attempt =
        || control.last_progress().and_then(|progress| progress.attempt).map(|attempt| attempt.attempt);
    let only_one = destination.is_connected();
    loop {
        let lent = OnceLock::new();
        let before = attempt();
        let error = match destination.accept(|offer| admit(vm, offer, &lent)) {
            Ok(arrived) => return (Ok(arrived), true),
            Err(error @ IncomingError::OwnedNotStarted(_)) => return (Err(error), true),
            Err(error) => error,
        };
        let none = matches!(error, IncomingError::Rehearsed(_) | IncomingError::GaveWay(_));
        // A source whose connection broke comes again: it is the one migration that is waited for.
        let once = once && !none && !destination.has_source_again();
        if only_one || once || control.cancelled().is_some() {
            return (Err(error), attempt() != before);
        }
        let ended = info::not_arrived(vm, &error, false, info::kind_of_session(control));
        let Some(lent) = lent.into_inner() else {
            vm.end_attempt(ended);
            continue;
        };
        // Whoever is told of the end finds that another machine is made, and whoever comes meanwhile is told.
        let not_ready = control.not_ready(REBUILDS);
        vm.presence.end();
        retire(vm, |machine| Arc::ptr_eq(machine, &lent));
        drop(lent);
        vm.end_attempt(ended);
        rebuild_aside(vm, not_ready);
    }
}

/// Accepts the guest on offer; a VM that was given no identity takes the guest's, and one that was given no size of RAM takes
/// that too.
fn admit(
    vm: &RunningVm,
    offer: &IncomingOffer,
    lent: &OnceLock<Arc<ReferenceMachine>>,
) -> Result<Arc<dyn Machine>, NotBuilt> {
    // Whoever looks after the machine may have begun to build it a moment ago.
    let _building = lock_building(vm, BUILT_WITHIN).ok_or_else(|| NotBuilt::Failed(REBUILDS.into()))?;
    let mut asks = false;
    if let Some(Steering::Incoming(control)) = vm.state.steering()
        && let Some(progress) = control.progress()
    {
        vm.publisher.publish(&ControlEvent::of_migration(&info::incoming(&progress)));
        asks = progress.attempt.as_ref().is_some_and(is_question);
        if let Some(attempt) = progress.attempt.as_ref().filter(|attempt| vm.questions.begins(attempt)) {
            history::session_began(attempt, "incoming");
            history::session_connected(attempt, "incoming");
        }
    }
    let memory = vm.options.memory.is_none().then(|| offer.manifest.memory());
    let fits = |machine: &Arc<ReferenceMachine>| {
        memory.is_none_or(|memory| memory == machine.memory()) && machine.lost_devices().is_empty()
    };
    // Not held while another is built: a device takes one client at a time.
    let at_hand = vm.state.slot().machine().filter(|machine| fits(machine)).cloned();
    let machine = match at_hand {
        Some(machine) => machine,
        None => rebuild(vm, memory)?,
    };
    let machine = lent.get_or_init(|| machine).clone();
    *vm.lent.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&machine);
    let named = offer.vm.names_a_vm();
    if vm.options.uuid.is_none() && named {
        machine.adopt(offer.vm);
    }
    // No guest comes with a question, and no file of a VM that somebody names stays behind.
    if let Some(dir) = vm.options.state_dir.as_ref().filter(|_| named && !asks) {
        vm.presence.receive(dir, offer.vm).map_err(|text| Reason::new(SessionCode::StateDir, text))?;
    }
    inject_at_destination(vm.options.sabotage, machine).map_err(NotBuilt::Failed)
}

/// Ends the wait; `cancelled`: by what, if it was; `came`: its last session is what ended it.
fn finish(
    vm: &RunningVm,
    result: Result<Arrived, IncomingError>,
    cancelled: Option<&CancelCause>,
    came: bool,
) {
    let machine = vm.state.slot().machine().cloned();
    match (result, machine) {
        (Ok(arrived), Some(machine)) => {
            machine.release();
            let slot = Slot::Here { machine, epoch: arrived.epoch };
            vm.end_session(info::arrived(vm, &arrived.report), Some(slot));
        }
        (Ok(arrived), None) => {
            // The machine of a guest that has arrived is the slot's; without it nobody holds the guest.
            drop(arrived);
            tracing::error!("a guest has arrived in no machine: a defect of this program");
        }
        (Err(error), machine) => {
            if let IncomingError::Cancelled(_) = &error
                && !came
            {
                // Nobody had come: what the last session came to stays what it was.
                drop(vm.state.put_if(|_| true, Slot::Preparing));
                give_up_machine(vm, machine);
                vm.presence.end();
                tell_end_of_wait(vm, cancelled);
                return vm.state.end_wait(Slot::Empty);
            }
            let kind = match vm.state.last_steering() {
                Some(Steering::Incoming(control)) => info::kind_of_session(&control),
                Some(Steering::Outgoing(_)) | None => AttemptKind::Migration,
            };
            let ended = info::not_arrived(vm, &error, cancelled.is_some(), kind);
            let slot = match (&error, machine) {
                (IncomingError::OwnedNotStarted(held), Some(machine)) => {
                    Slot::OwnedNotStarted { machine, epoch: held.epoch }
                }
                (_, machine) => {
                    // Before the end is published: a client that reacts to it must find the devices free.
                    drop(vm.state.put_if(|_| true, Slot::Preparing));
                    give_up_machine(vm, machine);
                    vm.presence.end();
                    tell_end_of_wait(vm, cancelled);
                    if cancelled.is_some() { Slot::Empty } else { Slot::Failed }
                }
            };
            vm.end_session(ended, Some(slot));
        }
    }
}

/// Says on stderr that no guest is waited for any more, and none has come.
fn tell_end_of_wait(vm: &RunningVm, cancelled: Option<&CancelCause>) {
    const AGAIN: &str = "; `vfio-migrate incoming` lets it wait again";
    let (why, again) = match cancelled {
        Some(CancelCause::Operator) => ("its operator cancelled".into(), AGAIN),
        Some(CancelCause::ProcessEnds(by)) => (format!("its process ends by {by}"), ""),
        None => ("its one session has ended without a guest".into(), AGAIN),
    };
    let who = vm.options.uuid.map_or_else(|| "a VM".into(), |id| format!("VM {id}"));
    eprintln_line(format_args!("vfio-migrate: {who} waits for a guest no more: {why}{again}"));
}
