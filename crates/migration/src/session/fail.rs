//! Turning errors of every kind into the one that both sides return: phase, device, arc, errno, sentence, remedy.

use std::any::Any;
use std::error::Error;

use rustix::io::Errno;
use vfio_migration_device::{DeviceError, PciError, Remedy, TransitionError, is_late, is_server_gone};
use vfio_migration_memory::MemoryError;
use vfio_migration_types::{DeviceId, Failure, MigrationState, Phase, Side, error_chain};

use crate::channel::error::ChannelError;
use crate::machine::{LockError, MachineError};
use crate::ownership::journal::JournalError;

/// What to do about a device whose server has ended, or was cut off.
const SERVER_GONE: &str =
    "see why its server is gone, by the server's log: a guest that runs does not get the device back";
/// What to do about a device that failed.
const DEVICE_LOG: &str = "look at the device server's or the driver's log";
/// What to do about a journal that cannot be read or written.
pub(crate) const STATE_DIR: &str = "look at the state directory";

/// `failure`, as one of `device`, whatever failed of it.
pub(crate) fn with_device(device: &DeviceId, failure: Failure) -> Failure {
    failure.of_device(device)
}

/// The failure that a panic of the embedder's code, or of a device's, is reported as.
pub(crate) fn panicked(side: Side, phase: Phase, panic: &(dyn Any + Send)) -> Failure {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
    let remedy = "report it to whoever maintains the VMM or the device";
    Failure::new(side, phase, format!("a panic in the VMM or a device: {text}")).with_remedy(remedy)
}

/// An error of some kind, as it arose in a phase.
pub(crate) trait InPhase {
    /// The failure that it is of `phase` on `side`.
    fn in_phase(&self, side: Side, phase: Phase) -> Failure;
}

/// What to do about a device that is late. Never to end its server: what a guest has in it would be gone with it.
fn late_remedy(phase: Phase) -> &'static str {
    if phase == Phase::Run {
        "the guest's state is in the device: wait until it answers, then `cont`"
    } else {
        "wait until the device answers, then try again"
    }
}

/// The same where it is late with a change of its state: nothing else that it is asked has a limit that can be set.
fn late_change_remedy(phase: Phase) -> &'static str {
    if phase == Phase::Run {
        late_remedy(phase)
    } else {
        "wait until the device answers, then try again; a change of its state has as long as `timeout=` of its `--device` says"
    }
}

/// What to do about a device that did not do what it was asked.
fn device_remedy(error: &(dyn Error + 'static), phase: Phase) -> &'static str {
    if is_late(error) {
        late_remedy(phase)
    } else if is_server_gone(error) {
        SERVER_GONE
    } else {
        DEVICE_LOG
    }
}

impl InPhase for DeviceError {
    fn in_phase(&self, side: Side, phase: Phase) -> Failure {
        let remedy = match self.nobody_listens() {
            Some(_) => "start the device's server",
            None => device_remedy(self, phase),
        };
        Failure {
            errno: number(self.errno),
            remedy: remedy.into(),
            ..Failure::new(side, phase, error_chain(self)).of_device(&self.device)
        }
    }
}

impl InPhase for TransitionError {
    fn in_phase(&self, side: Side, phase: Phase) -> Failure {
        let remedy = match self.remedy {
            Remedy::TryAnotherState if self.to == MigrationState::PreCopy => {
                "the device is in a sound state; its driver's log says why it refused; one whose PRE_COPY is broken moves with `pre-copy=off` behind its `--device`"
            }
            Remedy::TryAnotherState => "the device is in a sound state; its driver's log says why it refused",
            Remedy::Wait if self.is_late_change() => late_change_remedy(phase),
            Remedy::Reset => "only a reset helps, which loses the device's state",
            _ => device_remedy(self, phase),
        };
        Failure {
            arc: self.from.map(|from| (from, self.to)),
            errno: number(self.errno),
            remedy: remedy.into(),
            ..Failure::new(side, phase, error_chain(self)).of_device(&self.device)
        }
    }
}

impl InPhase for PciError {
    fn in_phase(&self, side: Side, phase: Phase) -> Failure {
        let failure = Failure::new(side, phase, error_chain(self));
        match self {
            Self::ConfigMismatch { device, .. } | Self::Unfit { device, .. } => failure.of_device(device),
            Self::Failed { device, .. } => {
                let cause = within::<DeviceError>(self);
                let errno = cause.and_then(|cause| cause.errno).or_else(|| errno_within(self));
                let remedy = cause.map_or("", |cause| device_remedy(cause, phase));
                Failure { errno: number(errno), ..failure.of_device(device) }.with_remedy(remedy)
            }
            _ => failure,
        }
    }
}

impl InPhase for MemoryError {
    fn in_phase(&self, side: Side, phase: Phase) -> Failure {
        let remedy = match self {
            Self::DirtyLog { .. } => device_remedy(self, phase),
            Self::AlreadyLogging { .. } | Self::NotLogging { .. } => {
                "see that nobody else starts and stops the log of the same writes"
            }
            _ => "",
        };
        Failure {
            errno: number(errno_within(self)),
            ..Failure::new(side, phase, error_chain(self)).with_remedy(remedy)
        }
    }
}

/// The errno at the bottom of an error, where there is one.
fn errno_within(error: &(dyn Error + 'static)) -> Option<Errno> {
    let of_call = |error: &std::io::Error| Errno::from_io_error(error);
    within::<Errno>(error).copied().or_else(|| within(error).and_then(of_call))
}

/// The first error of a type among an error and its causes.
fn within<'e, E: Error + 'static>(error: &'e (dyn Error + 'static)) -> Option<&'e E> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        at = error.source();
    }
    None
}

impl InPhase for ChannelError {
    fn in_phase(&self, side: Side, phase: Phase) -> Failure {
        Failure { errno: number(errno_within(self)), ..Failure::new(side, phase, error_chain(self)) }
    }
}

impl InPhase for MachineError {
    fn in_phase(&self, side: Side, phase: Phase) -> Failure {
        let text = error_chain(self);
        // The VMM tells in its own words what a device did.
        let of_device = within::<DeviceError>(self).map(|error| error.in_phase(side, phase));
        let cause =
            of_device.or_else(|| within::<TransitionError>(self).map(|error| error.in_phase(side, phase)));
        let cause = cause.unwrap_or_else(|| Failure::new(side, phase, ""));
        let told = Failure::new(side, phase, text);
        Failure { errno: number(self.errno.or(errno_within(self))).or(cause.errno), text: told.text, ..cause }
    }
}

impl InPhase for LockError {
    fn in_phase(&self, side: Side, phase: Phase) -> Failure {
        Failure::new(side, phase, error_chain(self)).with_remedy("find out who holds the lock")
    }
}

impl InPhase for JournalError {
    fn in_phase(&self, side: Side, phase: Phase) -> Failure {
        let remedy = match self {
            Self::Busy { .. } => "wait for its end, or cancel it",
            Self::File { .. } | Self::NotRegular(_) | Self::Content { .. } => STATE_DIR,
        };
        Failure::new(side, phase, error_chain(self)).with_remedy(remedy)
    }
}

fn number(errno: Option<Errno>) -> Option<u32> {
    errno.and_then(|errno| u32::try_from(errno.raw_os_error()).ok())
}
