//! What can fail in the reference VMM.

use std::fmt;

use rustix::io::Errno;
use vfio_migration_device::DeviceError;
use vfio_migration_guest_image::GuestImageError;
use vfio_migration_memory::MemoryError;
use vfio_migration_types::DEVICES_MAX;
use vmm_sys_util::errno;

/// An error of the reference VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// `/dev/kvm` does not answer, so no guest can run on it here.
    #[error("KVM is not to be had here: {reason}")]
    NoKvm {
        /// Reason, in words for people.
        reason: String,
        /// errno, when a system call said so.
        #[source]
        source: Option<errno::Error>,
    },
    /// A KVM call failed.
    #[error("KVM failed to {doing}")]
    Kvm {
        /// Call that was attempted, after "failed to".
        doing: String,
        /// Errno of the call, when a system call refused.
        #[source]
        source: errno::Error,
    },
    /// A thread could not be made or reached.
    #[error("{doing} failed")]
    Io {
        /// Work that failed, as a noun phrase.
        doing: String,
        /// Error of the system.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory could not be made, read or written.
    #[error("guest memory failed")]
    Memory(#[from] MemoryError),
    /// The guest program cannot run in this machine.
    #[error(transparent)]
    Guest(#[from] GuestImageError),
    /// A request that this machine cannot grant; the text says why.
    #[error("{0}")]
    Refused(String),
    /// More devices than a machine takes.
    #[error("{0} devices are too many: a machine takes up to {DEVICES_MAX}")]
    TooManyDevices(usize),
    /// A section of machine state cannot be loaded.
    #[error("the machine state `{section}` cannot be loaded: {reason}")]
    Section {
        /// Name of the section.
        section: String,
        /// Reason, in words for people.
        reason: String,
    },
    /// A device cannot be had, or cannot be put before the guest.
    #[error(transparent)]
    Device(Box<dyn std::error::Error + Send + Sync>),
    /// The machine stopped by itself.
    #[error("the machine stopped: {0}")]
    Stopped(StopReason),
}

impl VmmError {
    pub(crate) fn kvm(doing: impl Into<String>) -> impl FnOnce(errno::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Kvm { doing, source }
    }

    pub(crate) fn device(error: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Device(Box::new(error))
    }

    /// What a device did, where it is that which failed.
    pub fn of_device(&self) -> Option<&DeviceError> {
        match self {
            Self::Device(error) => error.downcast_ref(),
            _ => None,
        }
    }

    pub(crate) fn nobody_listens(&self) -> Option<Errno> {
        self.of_device().and_then(DeviceError::nobody_listens)
    }

    pub(crate) fn section(section: &str, reason: impl Into<String>) -> Self {
        Self::Section { section: section.to_owned(), reason: reason.into() }
    }
}

/// The errno at the bottom of an error, where a system call refused.
pub(crate) fn errno_within(error: &(dyn std::error::Error + 'static)) -> Option<Errno> {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(refused) = error.downcast_ref::<errno::Error>() {
            return Some(Errno::from_raw_os_error(refused.errno()));
        }
        if let Some(refused) = error.downcast_ref::<std::io::Error>() {
            return Errno::from_io_error(refused);
        }
        at = error.source();
    }
    None
}

/// The reason for which a machine stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StopReason {
    /// The guest faulted thrice, or asked for a shutdown.
    Shutdown {
        /// Index of the vCPU.
        vcpu: usize,
        /// Instruction pointer of the vCPU, when it could be read.
        rip: Option<u64>,
    },
    /// KVM gave the vCPU up.
    InternalError {
        /// Index of the vCPU.
        vcpu: usize,
        /// KVM's suberror (`KVM_INTERNAL_ERROR_*`), and the instruction pointer when it could be read.
        suberror: u32,
        /// Instruction pointer of the vCPU, when it could be read.
        rip: Option<u64>,
    },
    /// KVM came back with something that this machine does not know.
    Unknown {
        /// Index of the vCPU.
        vcpu: usize,
        /// Exit in words: the errno, or the number of `KVM_EXIT_*`.
        exit: String,
    },
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |f: &mut fmt::Formatter<'_>, rip: &Option<u64>| match rip {
            Some(rip) => write!(f, " at {rip:#x}"),
            None => Ok(()),
        };
        match self {
            Self::Shutdown { vcpu, rip } => {
                write!(f, "vCPU {vcpu} faulted thrice or shut down")?;
                at(f, rip)
            }
            Self::InternalError { vcpu, suberror, rip } => {
                write!(f, "KVM gave vCPU {vcpu} up with internal error {suberror}")?;
                at(f, rip)
            }
            Self::Unknown { vcpu, exit } => write!(f, "vCPU {vcpu} came out of KVM with {exit}"),
        }
    }
}
