//! What can fail in the reference VMM.

use vfio_migration_memory::MemoryError;
use vmm_sys_util::errno;

use crate::kvm::StopReason;

/// An error of the reference VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// `/dev/kvm` does not answer, so no guest can run on it here.
    #[error("KVM is not to be had here: {reason}")]
    NoKvm {
        /// Why, for people.
        reason: String,
        /// errno, when a system call said so.
        #[source]
        source: Option<errno::Error>,
    },
    /// A KVM call failed.
    #[error("KVM failed to {doing}")]
    Kvm {
        /// What was attempted, after "failed to".
        doing: String,
        /// errno.
        #[source]
        source: errno::Error,
    },
    /// A thread could not be made or reached.
    #[error("{doing} failed")]
    Io {
        /// What was attempted, as a noun phrase.
        doing: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory failed.
    #[error("guest memory failed")]
    Memory(#[from] MemoryError),
    /// What was asked for cannot be; the text says why.
    #[error("{0}")]
    Refused(String),
    /// A section of machine state cannot be loaded.
    #[error("the machine state `{section}` cannot be loaded: {reason}")]
    Section {
        /// Its name.
        section: String,
        /// Why.
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

    pub(crate) fn section(section: &str, reason: impl Into<String>) -> Self {
        Self::Section { section: section.to_owned(), reason: reason.into() }
    }
}
