//! Interrupts that a device did not take when its guest unmasked them: it is asked again, until it does.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::Duration;

use super::running::{LOOK_EVERY, RunningVm};
use super::slot::Slot;
use crate::exit::CliError;
use crate::output::eprintln_line;

/// The longest pause between two tries with a device that refuses.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);

/// Tends the interrupts of the guest of `vm`, on a thread of its own, until the sender is dropped: a device that is late keeps
/// whoever asks it waiting.
pub(super) fn tend(vm: &Arc<RunningVm>) -> Result<Sender<()>, CliError> {
    let (tending, ended) = mpsc::channel();
    let vm = vm.clone();
    let thread = std::thread::Builder::new().name("interrupts".into()).spawn(move || {
        let mut told = BTreeSet::new();
        let mut pause = LOOK_EVERY;
        while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
            let Slot::Here { machine, .. } = vm.state.slot() else { continue };
            let unsettled: BTreeSet<_> = machine.unsettled_devices().into_iter().collect();
            for device in unsettled.difference(&told) {
                eprintln_line(format_args!(
                    "vfio-migrate: device {device} has not taken all the interrupts that the guest has unmasked, and is asked again until it has"
                ));
            }
            for device in told.difference(&unsettled) {
                eprintln_line(format_args!("vfio-migrate: device {device} has the guest's interrupts"));
            }
            let settled = unsettled.iter().all(|device| machine.settle_interrupts(device));
            pause = if settled { LOOK_EVERY } else { pause.saturating_mul(2).min(LONGEST_PAUSE) };
            told = unsettled;
        }
    });
    thread.map_err(|error| CliError::caused("cannot make a thread that tends interrupts", &error))?;
    Ok(tending)
}
