//! The kernel back end: a device that a VFIO driver of the host serves.
//!
//! The device is opened by its own file and an iommufd where the kernel has both, by its group and a type1 container
//! otherwise. A device that the VMM runs itself is taken in as it is (`adopt`). Those
//! that are opened here share an address space where they are given one (`space`), and else each has one of its own.
//! Bus addresses are what the VMM maps; a vIOMMU is not supported.

pub(crate) mod adopt;
#[cfg(feature = "bare-space")]
pub(crate) mod bare;
pub(crate) mod device;
mod dirty;
pub(crate) mod error;
mod hardware;
mod iommu;
mod log_users;
mod migrate;
pub(crate) mod open;
pub(crate) mod path;
mod port;
mod ranges;
mod regions;
pub(crate) mod space;
mod sysfs;
pub(crate) mod tracker;
pub(crate) mod vmm_iommu;
mod windows;
