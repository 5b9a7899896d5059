//! Errors of devices, with what an operator can do about each.

use std::error::Error;

use rustix::io::Errno;
use vfio_migration_types::{DeviceId, MigrationState};
use vfio_migration_uapi::UapiError;
use vfio_user_peer::ClientError;
use vfio_user_peer::codec::Command;

use crate::kernel::error::KernelError;

/// Whether a refusal by `errno` is for a lack that may pass: whoever asks again later may get another answer.
pub(crate) fn is_passing(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::AGAIN
            | Errno::BUSY
            | Errno::INTR
            | Errno::NOMEM
            | Errno::MFILE
            | Errno::NFILE
            | Errno::NOBUFS
            | Errno::TIMEDOUT
    )
}

/// Whether `error`, or one of its causes, is that the connection to a vfio-user server is gone.
pub fn is_server_gone(error: &(dyn Error + 'static)) -> bool {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(ClientError::ConnectionLost { .. }) = error.downcast_ref() {
            return true;
        }
        at = error.source();
    }
    false
}

/// An operation on a device failed.
#[derive(Debug, thiserror::Error)]
#[error("device {device}: {doing} failed")]
#[non_exhaustive]
pub struct DeviceError {
    /// The device that failed.
    pub device: DeviceId,
    /// The failed step, as a noun phrase: `"reading pre-copy data"`.
    pub doing: String,
    /// The errno the driver or server gave, where one is known.
    pub errno: Option<Errno>,
    /// The cause of the failure.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl DeviceError {
    /// A failure of `doing` on `device`, by `source`.
    pub fn new(
        device: DeviceId,
        doing: impl Into<String>,
        errno: Option<Errno>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { device, doing: doing.into(), errno, source: source.into() }
    }

    /// Whether a device could not be opened because somebody, or another device of its IOMMU group here, holds it.
    pub fn is_in_use(&self) -> bool {
        match self.source.downcast_ref() {
            Some(KernelError::Open { .. }) => self.errno == Some(Errno::BUSY),
            // A device's own file can be opened again; it is refused to bind it again (vfio_main.c, vfio_df_open).
            Some(KernelError::Refused { .. }) => matches!(self.errno, Some(Errno::BUSY | Errno::INVAL)),
            _ => false,
        }
    }

    /// The number of interrupts that the host has, where it has fewer than
    /// [`set_irq_eventfds`](crate::PciHardware::set_irq_eventfds) asked for: none is connected, and so many may be asked
    /// for instead. At least 1, counted from the first of the kind.
    pub fn fewer_interrupts(&self) -> Option<u32> {
        match self.source.downcast_ref() {
            Some(UapiError::FewerInterrupts { possible, .. }) => Some(*possible),
            _ => None,
        }
    }

    /// The errno of a vfio-user server's socket at which nobody listens, or that is not there: it may be in a moment.
    pub fn nobody_listens(&self) -> Option<Errno> {
        let errno = match self.source.downcast_ref() {
            Some(ClientError::Io { source, .. }) => Errno::from_io_error(source),
            _ => None,
        };
        errno.filter(|errno| [Errno::CONNREFUSED, Errno::NOENT].contains(errno))
    }

    /// Whether a vfio-user server answered, be it that it refused what it was asked for.
    pub fn is_answer_of_server(&self) -> bool {
        matches!(self.source.downcast_ref(), Some(ClientError::Refused { .. }))
    }

    /// Whether [`dma_map`](crate::PciHardware::dma_map) failed because the device cannot reach memory of that kind,
    /// another device's BAR, at all: a VMM may go on without peer-to-peer DMA to it.
    pub fn is_no_peer_dma(&self) -> bool {
        matches!(self.source.downcast_ref(), Some(KernelError::NoPeerDma(_)))
    }
}

/// Whether `error`, or a cause of it, is that a device has not answered in time. It is connected, and may yet: it is *late*,
/// which is no answer. An errno says less, since a driver or a server may answer with ETIMEDOUT.
pub fn is_late(error: &(dyn Error + 'static)) -> bool {
    is_timeout(error, |_, _| true)
}

/// Whether `error`, of a [reset](crate::Device::reset), came before the device was asked to: it is late with the answer to an
/// earlier request, and was not reset.
pub fn is_unsent_reset(error: &DeviceError) -> bool {
    is_timeout(error, |command, sent| command == Command::DEVICE_RESET && !sent)
}

fn is_timeout(error: &(dyn Error + 'static), is_it: impl Fn(Command, bool) -> bool) -> bool {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(ClientError::Timeout { command, sent, .. }) = error.downcast_ref() {
            return is_it(*command, *sent);
        }
        at = error.source();
    }
    false
}

/// Whether `error`, or a cause of it, is that a vfio-user server has answered, but not all that there was one time for
/// ([`limit_all`](crate::VfioUserDevice::limit_all), [`VfioUserOptions::open_timeout`](crate::VfioUserOptions::open_timeout)).
pub fn is_out_of_time(error: &(dyn Error + 'static)) -> bool {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(ClientError::OutOfTime { .. }) = error.downcast_ref() {
            return true;
        }
        at = error.source();
    }
    false
}

/// A log has no range to be of.
#[derive(Debug, thiserror::Error)]
#[error(
    "no mapping of guest RAM for the device's DMA is known; map it by the device (dma_map), or tell of it (DmaView), before \
     its log starts"
)]
pub(crate) struct UnknownRam;

/// The way on with a device after a failed transition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// The device is in a sound state: another transition may be tried.
    TryAnotherState,
    /// Only a reset helps: it is in ERROR, or its state is unknown.
    Reset,
    /// The device has not answered in time, and may yet: its state is known when it does.
    Wait,
    /// The device does not answer, and will not: the connection to it is lost.
    Lost,
}

/// A transition failed. Names the state that the device really is in, as asked after the failure; the cause has the
/// errno, and `remedy` the way on.
#[derive(Debug, thiserror::Error)]
#[error(
    "device {device}: {} failed; it is in {}",
    from.map_or_else(|| format!("the change of its state to {to}"), |from| format!("{from} to {to}")),
    now.map_or("an unknown state".into(), |state| state.to_string())
)]
#[non_exhaustive]
pub struct TransitionError {
    /// The device that failed.
    pub device: DeviceId,
    /// The state that it was in; `None` where it did not say.
    pub from: Option<MigrationState>,
    /// The state that it was asked to go to.
    pub to: MigrationState,
    /// The state that it is in now; `None` where it does not say.
    pub now: Option<MigrationState>,
    /// The errno of the failed transition, where one is known.
    pub errno: Option<Errno>,
    /// The way on with the device.
    pub remedy: Remedy,
    /// The cause of the failure.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl TransitionError {
    /// A failed `from` → `to` after which the device was found in `now`.
    pub fn new(
        device: DeviceId,
        from: impl Into<Option<MigrationState>>,
        to: MigrationState,
        now: Option<MigrationState>,
        errno: Option<Errno>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        let source = source.into();
        let remedy = match now {
            Some(MigrationState::Error) => Remedy::Reset,
            Some(_) => Remedy::TryAnotherState,
            None if is_late(&*source) => Remedy::Wait,
            None => Remedy::Lost,
        };
        Self { device, from: from.into(), to, now, errno, remedy, source }
    }
}

impl TransitionError {
    /// Whether what is late is the change of state itself, which has a limit of its own, and not a question on the way to it.
    pub fn is_late_change(&self) -> bool {
        // Where the device was is asked first; without an answer it is not known.
        let asked = self.from.is_some_and(|from| from != MigrationState::Error);
        asked && self.remedy == Remedy::Wait && is_timeout(&*self.source, |_, sent| sent)
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration_memory::MemoryError;

    use super::*;

    #[test]
    fn a_device_that_does_not_say_where_it_is_was_in_no_state_that_is_named() {
        let id: DeviceId = "net0".parse().unwrap();
        let to = MigrationState::Running;
        let unknown = TransitionError::new(id.clone(), None, to, None, None, "its server is gone");
        assert_eq!(
            unknown.to_string(),
            "device net0: the change of its state to RUNNING failed; it is in an unknown state"
        );
        let known = TransitionError::new(id, MigrationState::Stop, to, None, None, "its server is gone");
        assert!(known.to_string().starts_with("device net0: STOP to RUNNING failed"), "{known}");
    }

    #[test]
    fn a_server_that_is_gone_is_known_behind_every_error() {
        let gone = || ClientError::ConnectionLost { why: "the peer closed it".into() };
        let log = |source: ClientError| MemoryError::DirtyLog {
            source_name: "device net0".into(),
            doing: "reporting".into(),
            source: source.into(),
        };
        let device = |source: ClientError| DeviceError::new("net0".parse().unwrap(), "reading", None, source);
        assert!(is_server_gone(&log(gone())) && is_server_gone(&device(gone())));
        let refused = || ClientError::Refused {
            command: vfio_user_peer::codec::Command::DEVICE_RESET,
            errno: Some(Errno::IO),
        };
        assert!(!is_server_gone(&log(refused())) && !is_server_gone(&device(refused())));
        assert!(device(refused()).is_answer_of_server() && !device(gone()).is_answer_of_server());
    }
}
