//! VFIO migration ioctls over borrowed descriptors.
//!
//! Each function is one system call, typed: what it is asked and what the kernel answered, errno kept. Nothing here
//! remembers a device or decides what to do next; a device's state machine, its time limits and what to make of an
//! error belong to those above.
//!
//! Facts are from `include/uapi/linux/vfio.h` and, where the header is silent, from `drivers/vfio/vfio_main.c` and the
//! drivers, as of Linux 7.3. What a device cannot do shows as ENOTTY: see [`UapiError::is_unsupported`].
//!
//! A descriptor that is no VFIO device gives an error as well, mostly ENOTTY. It never corrupts anything here, but a
//! container's descriptor shares its ioctl number with a device's (`VFIO_IOMMU_DIRTY_PAGES` is
//! `VFIO_DEVICE_FEATURE`), so do not guess.

mod dma_logging;
mod error;
mod feature;
mod migration;

pub use dma_logging::{report_dma_logging, start_dma_logging, stop_dma_logging};
pub use error::UapiError;
pub use feature::{Access, Feature, probe};
pub use migration::{
    PrecopyInfo, device_state, migration_flags, opt_in_precopy_info_v2, precopy_info, reset,
    set_device_state, stop_copy_size,
};
