//! The way out, before the guest is ours: locks and devices are released, every device after a reset.

use vfio_migration_types::{Failure, Phase, Side};

use crate::device_state::tracked::ask_pci;
use crate::session::awaited::AwaitedAnswers;
use crate::session::fail::InPhase;
use crate::session::lock::lock;
use crate::session::parallel::for_each_device_parallel;
use crate::session::work_error::WorkError;

use crate::destination::attempt::ArrivingDevice;
use crate::destination::worker::Worker;

impl Worker<'_, '_, '_> {
    /// Undoes what was done, all of it, whatever fails on the way; the first failure is the answer.
    pub(super) fn release(&mut self) -> Result<(), WorkError> {
        // The action under way has ended: this one is not to be interrupted.
        self.shared.interrupt.clear();
        // First: a reset takes time, and the source may be waiting for its locks. Nothing here writes any storage.
        let unlocked = self.shared.locks.release();
        let unlocked = unlocked.map_err(|error| error.in_phase(Side::Destination, Phase::Clean));
        if let Some(sink) = self.shared.sink.get() {
            for (incoming, queue) in self.devices.iter_mut().zip(&sink.devices) {
                // A session that was taken back from its thread is in its place already.
                if incoming.touched && incoming.session.is_none() {
                    incoming.session = queue.take_session();
                }
            }
        }
        let answers = &self.shared.answers;
        let touched = self.devices.iter_mut().filter(|incoming| incoming.touched);
        let mut failures = for_each_device_parallel(touched, |incoming| reset(incoming, answers));
        failures.push(unlocked);
        self.devices.clear();
        self.machine = None;
        *lock(&self.shared.finished) = None;
        failures.into_iter().find_map(Result::err).map_or(Ok(()), |failure| Err(failure.into()))
    }
}

/// The VMM's side first, so that nothing of the VMM reaches for a device that is being reset.
fn reset(incoming: &mut ArrivingDevice, answers: &AwaitedAnswers) -> Result<(), Failure> {
    incoming.touched = false;
    let undone = match &incoming.moved.pci {
        Some(pci) => {
            let undone = ask_pci(answers, &incoming.moved, || pci.undo());
            undone.map_err(|error| error.in_phase(Side::Destination, Phase::Clean))
        }
        None => Ok(()),
    };
    let reset = match incoming.session.take() {
        Some(session) => session.abort().map_err(|error| error.in_phase(Side::Destination, Phase::Clean)),
        None => {
            incoming.moved.device.reset().map_err(|error| error.in_phase(Side::Destination, Phase::Clean))
        }
    };
    reset.and(undone)
}
