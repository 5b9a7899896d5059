//! Progress of one thread's work on a device, and a way for another to cancel it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_migration_types::MigrationState;

use super::report::DeviceArc;
use crate::control::Control;
use crate::session::lock::lock;

/// Watches and stops, from any thread, what is done with one device. Clones are the same. Given to several
/// calls, it counts on.
#[derive(Clone, Debug, Default)]
pub struct DeviceControl(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    moved: AtomicU64,
    precopy: AtomicU64,
    left: AtomicU64,
    walk: Mutex<Walk>,
    /// The session under way, which ends when it is cancelled, whatever it is busy with.
    session: Mutex<Option<Control>>,
}

/// The way that the device went.
#[derive(Debug, Default)]
struct Walk {
    at: Option<MigrationState>,
    arcs: Vec<DeviceArc>,
}

impl DeviceControl {
    /// Gives it up. The device runs on as it did if it was being saved, and is reset if its state was half loaded. Too
    /// late once all is written; then nothing happens.
    pub fn cancel(&self) {
        let session = lock(&self.0.session);
        self.0.cancelled.store(true, Ordering::Release);
        if let Some(session) = &*session {
            session.cancel();
        }
    }

    /// Lets [`cancel`](Self::cancel), also an earlier one, end `session`.
    pub(super) fn attach(&self, session: Control) {
        let mut attached = lock(&self.0.session);
        if self.is_cancelled() {
            session.cancel();
        }
        *attached = Some(session);
    }

    /// Bytes of state moved so far, and what is left of them as far as is known.
    pub fn progress(&self) -> (u64, u64) {
        (self.0.moved.load(Ordering::Relaxed), self.0.left.load(Ordering::Relaxed))
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    pub(super) fn add_moved(&self, bytes: usize) {
        let bytes = bytes as u64;
        self.0.moved.fetch_add(bytes, Ordering::Relaxed);
        let less = |left: u64| Some(left.saturating_sub(bytes));
        // Always succeeds: there is always something to put.
        let _ = self.0.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    pub(super) fn add_precopy(&self, bytes: usize) {
        self.0.precopy.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that were read before the device was stopped.
    pub(super) fn precopy(&self) -> u64 {
        self.0.precopy.load(Ordering::Relaxed)
    }

    pub(super) fn set_left(&self, bytes: u64) {
        self.0.left.store(bytes, Ordering::Relaxed);
    }

    /// The device's state, as far as its transitions are known.
    pub(super) fn at(&self) -> MigrationState {
        lock(&self.0.walk).at.unwrap_or(MigrationState::Running)
    }

    /// Notes that it was found in `state`.
    pub(super) fn found(&self, state: MigrationState) {
        lock(&self.0.walk).at = Some(state);
    }

    /// Notes its transition to `to`.
    pub(super) fn went(&self, to: MigrationState, reset: bool, took: Duration) {
        let mut walk = lock(&self.0.walk);
        let from = walk.at.replace(to).unwrap_or(MigrationState::Running);
        if from != to || reset {
            walk.arcs.push(DeviceArc { from, to, reset, took });
        }
    }

    pub(super) fn arcs(&self) -> Vec<DeviceArc> {
        lock(&self.0.walk).arcs.clone()
    }

    pub(super) fn was_reset(&self) -> bool {
        lock(&self.0.walk).arcs.iter().any(|arc| arc.reset)
    }
}
