//! The IOMMU before a device that the VMM attached itself, as far as its dirty tracking goes.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_uapi::{self as uapi, Type1};

use super::error::KernelError;
use super::log_users::LogUsers;

/// An address space that the VMM made, and maps memory in. It serves for its dirty tracking alone, which is the library's while
/// a migration runs: nothing is attached, mapped or unmapped.
///
/// Devices that share one container, or one page table, are given clones of one of these: each starts the tracking by itself
/// otherwise, and loses what another has logged.
#[derive(Clone, Debug)]
pub struct VmmIommu {
    pub(super) kind: VmmIommuKind,
    pub(super) users: Arc<LogUsers>,
}

#[derive(Clone, Debug)]
pub(super) enum VmmIommuKind {
    Type1(Arc<Type1>),
    PageTable { iommufd: Arc<OwnedFd>, table: u32 },
    AddressSpace,
}

impl VmmIommu {
    /// A type1 container, by a duplicate of its descriptor (an open `/dev/vfio/vfio`).
    ///
    /// # Errors
    /// [`KernelError::NotContainer`].
    pub fn type1(container: OwnedFd) -> Result<Self, KernelError> {
        let container = Type1::new(container).map_err(KernelError::NotContainer)?;
        Ok(Self::of(VmmIommuKind::Type1(Arc::new(container))))
    }

    /// The page table (HWPT) of an iommufd that the device is attached to, by a duplicate of the descriptor (an open
    /// `/dev/iommu`). It logs if it was made with `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`.
    ///
    /// # Errors
    /// [`KernelError::NotIommufd`].
    pub fn page_table(iommufd: OwnedFd, hwpt: u32) -> Result<Self, KernelError> {
        check_iommufd(&iommufd)?;
        Ok(Self::of(VmmIommuKind::PageTable { iommufd: Arc::new(iommufd), table: hwpt }))
    }

    /// An address space (IOAS) of an iommufd. The page tables that the kernel makes for one log nothing, and an emulated
    /// device has none.
    ///
    /// # Errors
    /// [`KernelError::NotIommufd`].
    pub fn address_space(iommufd: &OwnedFd) -> Result<Self, KernelError> {
        check_iommufd(iommufd)?;
        Ok(Self::of(VmmIommuKind::AddressSpace))
    }

    fn of(kind: VmmIommuKind) -> Self {
        Self { kind, users: Arc::default() }
    }
}

/// Asks for an object that is never there: an iommufd knows the question.
fn check_iommufd(iommufd: &OwnedFd) -> Result<(), KernelError> {
    match uapi::hw_info(iommufd.as_fd(), 0) {
        Err(error) if error.errno() != Some(Errno::NOENT) => Err(KernelError::NotIommufd(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(matches!(VmmIommu::type1(null()), Err(KernelError::NotContainer(_))));
        assert!(matches!(VmmIommu::page_table(null(), 1), Err(KernelError::NotIommufd(_))));
        assert!(matches!(VmmIommu::address_space(&null()), Err(KernelError::NotIommufd(_))));
    }
}
