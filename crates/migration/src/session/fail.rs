//! Turning errors of every kind into the one that both sides return: phase, device, arc, errno, sentence, remedy.

use std::any::Any;
use std::error::Error;

use rustix::io::Errno;
use vfio_migration_device::{DeviceError, PciError, Remedy, TransitionError};
use vfio_migration_memory::MemoryError;
use vfio_migration_types::{DeviceId, Phase};
use vfio_migration_wire::PeerError;

use crate::channel::error::ChannelError;
use crate::machine::{LockError, MachineError};
use crate::ownership::journal::JournalError;

/// A failure of `phase` that is nobody's in particular.
pub(crate) fn plain(phase: Phase, text: impl Into<String>) -> PeerError {
    PeerError { phase, device: None, arc: None, errno: None, text: text.into(), remedy: String::new() }
}

/// The same, with what to do about it.
pub(crate) fn with_remedy(phase: Phase, text: impl Into<String>, remedy: impl Into<String>) -> PeerError {
    PeerError { remedy: remedy.into(), ..plain(phase, text) }
}

/// The same of `device`, whatever failed of it.
pub(crate) fn with_device(device: &DeviceId, failure: PeerError) -> PeerError {
    PeerError { device: Some(device.to_string()), ..failure }
}

/// A failure that is a device's.
pub(crate) fn of_device(phase: Phase, device: &DeviceId, text: impl Into<String>) -> PeerError {
    PeerError { device: Some(device.to_string()), ..plain(phase, text) }
}

/// What a panic of the embedder's code, or of a device's, is told as.
pub(crate) fn panicked(phase: Phase, panic: &(dyn Any + Send)) -> PeerError {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no text");
    let remedy = "report it to whoever maintains the VMM or the device";
    with_remedy(phase, format!("a panic in the VMM or a device: {text}"), remedy)
}

/// An error, with its causes, as one sentence.
pub(crate) fn sentence(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some wrappers repeat their source; a person need not read it twice.
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// An error of some kind, as it arose in a phase.
pub(crate) trait InPhase {
    /// Gives it its phase.
    fn in_phase(&self, phase: Phase) -> PeerError;
}

impl InPhase for DeviceError {
    fn in_phase(&self, phase: Phase) -> PeerError {
        PeerError {
            errno: number(self.errno),
            remedy: "look at the device server's or the driver's log".into(),
            ..of_device(phase, &self.device, sentence(self))
        }
    }
}

impl InPhase for TransitionError {
    fn in_phase(&self, phase: Phase) -> PeerError {
        let remedy = match self.remedy {
            Remedy::TryAnotherState => "the device is in a sound state; its driver's log says why it refused",
            Remedy::Reset => "the device needs a reset",
            _ => "the device does not answer: restart its server, or reset the host's function",
        };
        PeerError {
            arc: Some((self.from, self.to)),
            errno: number(self.errno),
            remedy: remedy.into(),
            ..of_device(phase, &self.device, sentence(self))
        }
    }
}

impl InPhase for PciError {
    fn in_phase(&self, phase: Phase) -> PeerError {
        let text = sentence(self);
        match self {
            Self::ConfigMismatch { device, .. }
            | Self::Unfit { device, .. }
            | Self::Failed { device, .. } => of_device(phase, device, text),
            _ => plain(phase, text),
        }
    }
}

impl InPhase for MemoryError {
    fn in_phase(&self, phase: Phase) -> PeerError {
        let remedy = match self {
            Self::DirtyLog { .. } | Self::AlreadyLogging { .. } | Self::NotLogging { .. } => {
                "see that nobody else logs the same writes, and look at the device server's or the driver's log"
            }
            _ => "",
        };
        PeerError { errno: number(errno_within(self)), ..with_remedy(phase, sentence(self), remedy) }
    }
}

/// The errno at the bottom of an error, where there is one.
fn errno_within(error: &(dyn Error + 'static)) -> Option<Errno> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(errno) = error.downcast_ref::<Errno>() {
            return Some(*errno);
        }
        at = error.source();
    }
    None
}

impl InPhase for ChannelError {
    fn in_phase(&self, phase: Phase) -> PeerError {
        PeerError { errno: number(errno_within(self)), ..plain(phase, sentence(self)) }
    }
}

impl InPhase for MachineError {
    fn in_phase(&self, phase: Phase) -> PeerError {
        PeerError { errno: number(self.errno), ..plain(phase, sentence(self)) }
    }
}

impl InPhase for LockError {
    fn in_phase(&self, phase: Phase) -> PeerError {
        with_remedy(phase, sentence(self), "find out who holds the lock")
    }
}

impl InPhase for JournalError {
    fn in_phase(&self, phase: Phase) -> PeerError {
        with_remedy(phase, sentence(self), "look at the state directory")
    }
}

fn number(errno: Option<Errno>) -> Option<u32> {
    errno.and_then(|errno| u32::try_from(errno.raw_os_error()).ok())
}
