//! The way back: everything that the attempt did is undone, with the same barrier that led there.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration_device::{Device, is_late};
use vfio_migration_engine::SourceEvent;
use vfio_migration_types::{DeviceId, MigrationState, error_chain};

use crate::device_state::send::DeviceSender;
use crate::machine::{LockError, Paused};
use crate::session::host::monotonic_ns;
use crate::session::lock::lock;
use crate::session::parallel::for_each_device_parallel;

use crate::source::worker::Worker;

/// Time that the destination may take to release the storage locks, once it knows that it must.
const LOCKS_LIMIT: Duration = Duration::from_secs(5);
/// Pause between two tries.
const LOCKS_PAUSE: Duration = Duration::from_millis(5);

impl Worker {
    /// Undoes what was done, as far as it can be undone: what cannot is in the answer.
    pub(super) fn roll_back(&mut self) -> SourceEvent {
        // The action under way has ended: this one is not to be interrupted.
        self.shared.interrupt.clear();
        let mut locks_lost = Vec::new();
        if std::mem::take(&mut self.locks_free)
            && let Err(error) = self.take_locks_back()
        {
            tracing::error!(error = %error_chain(&error), "a storage lock could not be taken back");
            locks_lost.push(error.lock);
        }
        let (reset, not_reset) = self.devices_back();
        // A guest whose device neither went back nor was reset must not be resumed beside a device in no known state. One that
        // was never paused is left as it is: its device is lost to it already.
        let lost = !locks_lost.is_empty() || !not_reset.is_empty();
        let policy = self.plan.options.keep_paused_if_reset && !reset.is_empty();
        if policy && !lost && self.paused.is_none() {
            match Paused::pause(&self.machine) {
                Ok(paused) => self.paused = Some(paused),
                Err(error) => {
                    tracing::error!(error = %error_chain(&error), "a guest whose device was reset could not be paused");
                }
            }
        }
        // A machine that panicked while it was paused left no token: nobody knows whether its guest is paused.
        let mut restored = !self.pause_unknown;
        let ran = self.paused.as_ref().is_some_and(Paused::ran);
        match self.paused.take() {
            Some(mut paused) if lost || policy => {
                paused.keep_paused();
                restored = false;
            }
            Some(paused) => {
                if let Err(error) = paused.resume() {
                    // The token knew until now; with it gone, the answer must say that the guest is paused.
                    tracing::error!(error = %error_chain(&error), "the guest could not be resumed");
                    restored = false;
                }
            }
            None => {}
        }
        self.counters.pause_ended(monotonic_ns(), ran && restored);
        // One that stays paused is waited for to the end: whoever asks is told so.
        *lock(&self.shared.pausing) = !restored;
        // Last: it takes time, and the guest need not wait for it.
        for device in self.dirty.stop(&self.devices) {
            await_answer(&*device.device);
        }
        SourceEvent::RolledBack { reset, not_reset, locks_lost, restored }
    }

    /// The destination may still hold the locks, and releases them on its own way back.
    fn take_locks_back(&self) -> Result<(), LockError> {
        let begun = Instant::now();
        loop {
            match self.machine.take_locks() {
                Err(error) if begun.elapsed() < LOCKS_LIMIT => {
                    tracing::debug!(error = %error_chain(&error), "a storage lock is still held elsewhere");
                    std::thread::sleep(LOCKS_PAUSE);
                }
                taken => return taken,
            }
        }
    }

    /// All sessions ended, all devices that can at RUNNING_P2P, then all RUNNING. Returns those that were
    /// reset, and those that needed it and could not be. Only one that refuses is reset: one that is late holds its guest's state,
    /// and is waited for.
    fn devices_back(&mut self) -> (Vec<DeviceId>, Vec<DeviceId>) {
        let mut lost = vec![false; self.devices.len()];
        for step in [end_session, to_p2p, to_running] as [Step; 3] {
            let work = self.devices.iter_mut().zip(&mut lost).filter(|(_, lost)| !**lost);
            for_each_device_parallel(work, |(device, lost)| {
                let asked = Arc::clone(&device.device);
                if let Err(error) = patiently(&*asked, || step(device)) {
                    let error = error_chain(&*error);
                    tracing::error!(device = %device.id, error, "a device cannot go back by itself and is reset");
                    device.session = None;
                    *lost = true;
                }
            });
        }
        let resets =
            self.devices.iter().zip(&lost).filter(|(_, lost)| **lost).map(|(device, _)| &device.device);
        let results = for_each_device_parallel(resets, |device| {
            let done = patiently(&**device, || Ok(device.reset()?)).inspect_err(|error| {
                tracing::error!(device = %device.id(), error = %error_chain(&**error), "the reset failed too");
            });
            (device.id().clone(), done.is_ok())
        });
        let (reset, not_reset): (Vec<_>, Vec<_>) = results.into_iter().partition(|(_, done)| *done);
        let names = |devices: Vec<(DeviceId, bool)>| devices.into_iter().map(|(id, _)| id).collect();
        (names(reset), names(not_reset))
    }
}

/// One device's part of one step back. Where it fails for an answer that is late, it is taken again.
type Step = fn(&mut DeviceSender) -> Result<(), StepError>;

/// Why a device did not take a step back, in its words.
type StepError = Box<dyn Error + Send + Sync>;

/// Does `step`. A `device` that is late with its answer is waited for until it answers, and the step taken again. A session that
/// does not wait so long leaves this behind.
fn patiently(device: &dyn Device, mut step: impl FnMut() -> Result<(), StepError>) -> Result<(), StepError> {
    loop {
        let done = step();
        if !done.as_ref().is_err_and(|error| is_late(&**error)) {
            return done;
        }
        await_answer(device);
    }
}

/// Waits until a device that was late answers anything, or is lost.
fn await_answer(device: &dyn Device) {
    while device.state().is_err_and(|error| is_late(&error)) {
        tracing::debug!(device = %device.id(), "a device is still late");
    }
}

fn end_session(device: &mut DeviceSender) -> Result<(), StepError> {
    match device.session.take() {
        Some(session) => Ok(session.end().map(drop)?),
        None => Ok(()),
    }
}

/// A device that never left RUNNING need not go anywhere: it is asked first.
fn to_p2p(device: &mut DeviceSender) -> Result<(), StepError> {
    let state = device.device.state()?;
    if state == MigrationState::Running || !device.flags().p2p {
        return Ok(());
    }
    Ok(device.device.set_state(MigrationState::RunningP2p)?)
}

fn to_running(device: &mut DeviceSender) -> Result<(), StepError> {
    Ok(device.device.set_state(MigrationState::Running)?)
}
