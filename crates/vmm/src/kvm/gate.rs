//! The gate that vCPU threads pass before each stretch of running: how a machine is paused, resumed and ended.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{StopReason, VmmError};

/// The next step of a vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Run,
    Pause,
    Quit,
}

/// Shared by the vCPU threads and whoever commands them.
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    stop_event: OwnedFd,
}

#[derive(Debug)]
struct State {
    order: Order,
    /// Threads that are out of the guest and will stay out until the order changes.
    parked: usize,
    threads: usize,
    stopped: Option<StopReason>,
}

impl Gate {
    /// A closed gate for `threads` threads, all of which count as parked: they are not made yet.
    pub(super) fn new(threads: usize) -> Result<Self, VmmError> {
        let stop_event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|source| {
            VmmError::Io { doing: "making an eventfd".to_owned(), source: source.into() }
        })?;
        let state = State { order: Order::Pause, parked: threads, threads, stopped: None };
        Ok(Self { state: Mutex::new(state), changed: Condvar::new(), stop_event })
    }

    /// Waits while the order is to pause. The caller counts as parked, and holds no lock that a commander takes.
    pub(super) fn wait_for_order(&self) -> Order {
        let mut state = self.lock();
        while state.order == Order::Pause {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        state.order
    }

    /// The order in force.
    pub(super) fn order(&self) -> Order {
        self.lock().order
    }

    /// The caller is out of the guest, its instruction complete, its lock on the vCPU free.
    pub(super) fn park(&self) {
        self.lock().parked += 1;
        self.changed.notify_all();
    }

    /// The machine cannot go on.
    pub(super) fn stop(&self, reason: StopReason) {
        tracing::error!(%reason, "the machine stopped");
        let mut state = self.lock();
        state.order = if state.order == Order::Quit { Order::Quit } else { Order::Pause };
        state.stopped.get_or_insert(reason);
        drop(state);
        let _ = rustix::io::write(&self.stop_event, &1u64.to_ne_bytes());
        self.changed.notify_all();
    }

    pub(super) fn resume(&self) -> Result<(), VmmError> {
        let mut state = self.lock();
        if let Some(reason) = &state.stopped {
            return Err(VmmError::Stopped(reason.clone()));
        }
        if state.order == Order::Quit {
            return Err(VmmError::Refused("the machine has been shut down".to_owned()));
        }
        state.order = Order::Run;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn pause(&self, patience: Duration, kick: impl Fn()) -> Result<(), VmmError> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        let ran = state.order == Order::Run;
        if ran {
            state.order = Order::Pause;
        }
        while state.parked < state.threads {
            drop(state);
            kick();
            state = self.lock();
            // A kick that finds the vCPU in the guest or on its way there is never lost (see `kick`); one that ends in
            // the bus is needless, since the order is looked at afterwards. Kicking again costs nothing.
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() && state.parked < state.threads {
                let running = state.threads - state.parked;
                // A pause that failed leaves the machine as it was, or its guest would stop later behind everyone's back.
                if ran && state.order == Order::Pause && state.stopped.is_none() {
                    state.order = Order::Run;
                    self.changed.notify_all();
                }
                return Err(VmmError::Refused(format!("{running} vCPUs did not stop within {patience:?}")));
            }
            if state.parked < state.threads {
                let patience = left.min(Duration::from_millis(20));
                (state, _) =
                    self.changed.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner);
            }
        }
        Ok(())
    }

    pub(super) fn quit(&self, kick: impl Fn()) {
        self.lock().order = Order::Quit;
        self.changed.notify_all();
        kick();
    }

    pub(super) fn is_paused(&self) -> bool {
        let state = self.lock();
        state.order != Order::Run && state.parked == state.threads
    }

    pub(super) fn stop_reason(&self) -> Option<StopReason> {
        self.lock().stopped.clone()
    }

    pub(super) fn wait_for_stop(&self, patience: Duration) -> Option<StopReason> {
        let waiting = self.changed.wait_timeout_while(self.lock(), patience, |state| state.stopped.is_none());
        waiting.unwrap_or_else(PoisonError::into_inner).0.stopped.clone()
    }

    pub(super) fn stop_event(&self) -> BorrowedFd<'_> {
        self.stop_event.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.lock(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_that_failed_leaves_the_machine_running() {
        let gate = Gate::new(1).unwrap();
        gate.resume().unwrap();
        // The only thread goes into the guest, and does not come back.
        assert_eq!(gate.wait_for_order(), Order::Run);
        gate.pause(Duration::from_millis(5), || ()).unwrap_err();
        assert_eq!(gate.order(), Order::Run);
        gate.park();
        assert_eq!(gate.wait_for_order(), Order::Run, "it goes on");
        gate.park();
        gate.pause(Duration::from_millis(5), || ()).unwrap();
        assert!(gate.is_paused());
    }

    #[test]
    fn a_pause_that_failed_does_not_start_a_machine_that_stopped() {
        let gate = Gate::new(2).unwrap();
        gate.resume().unwrap();
        assert_eq!((gate.wait_for_order(), gate.wait_for_order()), (Order::Run, Order::Run));
        gate.pause(Duration::from_millis(5), || gate.stop(StopReason::Shutdown { vcpu: 0, rip: None }))
            .unwrap_err();
        assert_eq!(gate.order(), Order::Pause);
    }
}
