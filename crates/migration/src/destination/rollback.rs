//! The way out, before the guest is ours: locks and devices are released, every device after a reset.

use std::time::Duration;

use rustix::io::Errno;
use vfio_migration_device::{Device, is_late};
use vfio_migration_types::{Failure, Phase, Side};

use crate::device_state::tracked::ask_pci;
use crate::session::awaited::{AwaitedAnswer, AwaitedAnswers};
use crate::session::fail::InPhase;
use crate::session::lock::lock;
use crate::session::parallel::for_each_device_parallel;
use crate::session::work_error::WorkError;

use crate::destination::attempt::ArrivingDevice;
use crate::destination::worker::Worker;

/// Time after which a device that says at once that it is late is asked again.
const SLICE: Duration = Duration::from_millis(20);

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
    let ArrivingDevice { moved, session, .. } = incoming;
    let (moved, device) = (&*moved, &*moved.device);
    let undo = || match &moved.pci {
        Some(pci) => {
            let undone = ask_pci(answers, moved, || pci.undo());
            undone.map_err(|error| error.in_phase(Side::Destination, Phase::Clean))
        }
        None => Ok(()),
    };
    let undone = patiently(device, answers, undo);
    let reset = if matches!(undone, Err(NotUndone::Late(_))) {
        undone
    } else {
        let reset = patiently(device, answers, || {
            let reset = match session.take() {
                Some(session) => session.abort(),
                None => device.reset(),
            };
            reset.map_err(|error| error.in_phase(Side::Destination, Phase::Clean))
        });
        reset.and(undone)
    };
    reset.map_err(|why| match why {
        NotUndone::Failed(failure) => failure,
        NotUndone::Late(failure) => {
            // It is asked for nothing more. What is the VMM's own is given up all the same.
            let _nothing_more = device.limit_question(Duration::ZERO);
            drop(undo());
            *session = None;
            answers.give_up_late_of(device.id());
            failure
        }
    })
}

/// Why something of a device could not be undone.
enum NotUndone {
    Failed(Failure),
    /// The device has not answered for as long as it is waited for.
    Late(Failure),
}

/// Does `step`. A `device` that is late is waited for first, as long as whoever looks is told and no longer; if it is late with the step
/// itself, that is taken once more when it has answered.
fn patiently(
    device: &dyn Device,
    answers: &AwaitedAnswers,
    mut step: impl FnMut() -> Result<(), Failure>,
) -> Result<(), NotUndone> {
    await_answer(device, answers)?;
    let done = step();
    if answers.late_of(device.id()).is_none() {
        return done.map_err(NotUndone::Failed);
    }
    await_answer(device, answers)?;
    step().map_err(NotUndone::Failed)
}

/// Waits until `device`, if it is late, answers anything or is lost, for as long as is told.
fn await_answer(device: &dyn Device, answers: &AwaitedAnswers) -> Result<(), NotUndone> {
    while let Some(late) = answers.late_of(device.id()) {
        let left = late.limit.map(|limit| limit.saturating_sub(late.waited));
        if left == Some(Duration::ZERO) {
            answers.give_up_late_of(device.id());
            return Err(NotUndone::Late(not_reset(&late)));
        }
        let _limit = left.and_then(|left| device.limit_question(left));
        if device.state().is_err_and(|error| is_late(&error)) {
            // A device may say so at once.
            std::thread::sleep(SLICE);
        }
    }
    Ok(())
}

/// The device of a `late` answer is given up as it is.
fn not_reset(late: &AwaitedAnswer) -> Failure {
    let text = format!("{late}, and was not reset");
    let failure = Failure::new(Side::Destination, Phase::Clean, text);
    let errno = Some(Errno::TIMEDOUT.raw_os_error().unsigned_abs());
    Failure { device: late.device.as_ref().map(ToString::to_string), errno, ..failure }
}
