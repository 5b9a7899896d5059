//! The machine of a `vm` that waits for a guest: built anew after a session that had it, and kept ready.

use std::sync::{Arc, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use vfio_migration::{NotBuilt, NotReady};
use vfio_migration_vmm::machine::ReferenceMachine;

use super::running::{RunningVm, build_for_offer};
use super::slot::{Slot, Steering};
use crate::output::eprintln_line;

const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Longest wait for a machine that somebody else builds, of a session and of the end of a wait.
pub(super) const BUILT_WITHIN: Duration = Duration::from_secs(1);
/// Pause between two tries to build the machine of a `vm` that waits.
const BUILD_EVERY: Duration = Duration::from_secs(1);

/// What a `vm` says of itself that waits, and has no machine just now.
pub(super) const REBUILDS: &str = "its machine is being built anew";

/// Builds the machine of a `vm` that waits anew, on a thread of its own: a device may keep whoever opens it waiting, and sources that come
/// are answered all the same. What keeps it from being built is in the status, and it is tried again.
pub(super) fn rebuild_aside(vm: &Arc<RunningVm>, not_ready: NotReady) {
    let of_thread = vm.clone();
    let rebuilding = std::thread::Builder::new().name("rebuild".into()).spawn(move || {
        let vm = of_thread;
        let _building = vm.building.lock().unwrap_or_else(PoisonError::into_inner);
        close_retired(&vm);
        if matches!(vm.state.slot(), Slot::Awaited { machine: None, .. }) {
            drop(rebuild(&vm, None));
        }
        drop(not_ready);
    });
    if let Err(error) = rebuilding {
        tracing::warn!(%error, "no thread to build the machine anew; it is tried again");
    }
}

/// Closes the devices of machines that were given up.
pub(super) fn close_retired(vm: &RunningVm) {
    let retired = std::mem::take(&mut *vm.retired.lock().unwrap_or_else(PoisonError::into_inner));
    // Not under the lock: a device may take its time.
    drop(retired);
}

/// Waits until nobody builds the machine, for so long.
pub(super) fn lock_building(vm: &RunningVm, limit: Duration) -> Option<MutexGuard<'_, ()>> {
    let begun = Instant::now();
    loop {
        match vm.building.try_lock() {
            Ok(building) => return Some(building),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if begun.elapsed() >= limit => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

/// Takes the machine of a `vm` that waits away, if it is one of `these`. It is dropped before another is built.
pub(super) fn retire(vm: &RunningVm, these: impl FnOnce(&Arc<ReferenceMachine>) -> bool) {
    if let Slot::Awaited { at, not_ready, .. } = vm.state.slot() {
        // What kept it from being built the last time is what is known until it is tried again.
        let not_ready = not_ready.or_else(|| Some(REBUILDS.into()));
        let waits =
            |slot: &Slot| matches!(slot, Slot::Awaited { machine: Some(machine), .. } if these(machine));
        if let Ok(old) = vm.state.put_if(waits, Slot::Awaited { machine: None, at, not_ready }) {
            vm.retired.lock().unwrap_or_else(PoisonError::into_inner).push(old);
        }
    }
}

/// Builds the machine of a `vm` that waits anew, of so much `memory` where its operator did not say how much. What keeps it
/// from being built is in the status until it can be. Whoever calls it holds `building`.
pub(super) fn rebuild(vm: &RunningVm, memory: Option<u64>) -> Result<Arc<ReferenceMachine>, NotBuilt> {
    // The old one first: a device takes one client at a time.
    retire(vm, |_| true);
    close_retired(vm);
    let built = build_for_offer(vm, memory);
    let Slot::Awaited { at, .. } = vm.state.slot() else {
        return Err(NotBuilt::Failed("it no longer waits for a guest".into()));
    };
    let (machine, not_ready) = (built.as_ref().ok().cloned(), built.as_ref().err().map(NotBuilt::to_string));
    let waits = |slot: &Slot| matches!(slot, Slot::Awaited { .. });
    drop(vm.state.put_if(waits, Slot::Awaited { machine, at, not_ready }));
    built
}

/// Keeps the machine of a `vm` that waits ready: one whose device was lost, or that could not be built, is built again.
#[derive(Debug, Default)]
pub(super) struct ReadinessWatch {
    tried: Option<Instant>,
    not_ready: bool,
}

impl ReadinessWatch {
    /// Looks once. Does nothing while a session has the machine.
    pub(super) fn tend(&mut self, vm: &RunningVm) {
        let Ok(_building) = vm.building.try_lock() else { return };
        let broken = vm.state.read(|slot, steering, _| {
            let session =
                matches!(steering, Some(Steering::Incoming(control)) if control.progress().is_some());
            match slot {
                Slot::Awaited { machine, .. } if !session => {
                    machine.as_ref().is_none_or(|machine| !machine.lost_devices().is_empty())
                }
                _ => false,
            }
        });
        let due = self.tried.is_none_or(|tried| tried.elapsed() >= BUILD_EVERY);
        if !broken || !due {
            return;
        }
        self.tried = Some(Instant::now());
        let _not_ready = match (vm.state.steering(), vm.state.slot()) {
            (Some(Steering::Incoming(control)), Slot::Awaited { not_ready: Some(why), .. })
                if why != REBUILDS =>
            {
                Some(control.not_ready(format!("{REBUILDS}, which failed before: {why}")))
            }
            (Some(Steering::Incoming(control)), _) => Some(control.not_ready(REBUILDS)),
            _ => None,
        };
        match rebuild(vm, None) {
            Ok(_) if std::mem::take(&mut self.not_ready) => {
                eprintln_line("vfio-migrate: the VM is ready for a guest again");
            }
            Ok(_) => {}
            Err(why) if !std::mem::replace(&mut self.not_ready, true) => {
                eprintln_line(format_args!(
                    "vfio-migrate: no guest can arrive now: {why}; it is tried again every second"
                ));
            }
            Err(_) => {}
        }
    }
}

/// Closes the devices of a wait that is over, also of a machine that is half built, if that is soon.
pub(super) fn give_up_machine(vm: &RunningVm, machine: Option<Arc<ReferenceMachine>>) {
    drop(machine);
    let _building = lock_building(vm, BUILT_WITHIN);
    close_retired(vm);
}
