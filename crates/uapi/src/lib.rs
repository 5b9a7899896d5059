//! VFIO and iommufd ioctls over borrowed descriptors, and who is at the other end of a unix socket.
//!
//! Each function is one system call, typed: what it is asked and what the kernel answered, errno kept. All take a
//! descriptor that the caller owns, however it came by it. Nothing here remembers a device (the two address spaces,
//! [`Type1`] and [`Ioas`], remember what is mapped in them, so that its memory lives as long) or decides what to do next; a device's state machine, its time limits and what to make of an
//! error belong to those above.
//!
//! Facts are from `include/uapi/linux/vfio.h` and, where the header is silent, from `drivers/vfio/vfio_main.c` and the
//! drivers, as of Linux 7.3. What a device cannot do shows as ENOTTY: see [`UapiError::is_unsupported`].
//!
//! A descriptor that is no VFIO device gives an error as well, mostly ENOTTY. It never corrupts anything here, but a
//! container's descriptor shares its ioctl number with a device's (`VFIO_IOMMU_DIRTY_PAGES` is
//! `VFIO_DEVICE_FEATURE`), so do not guess.

mod capability;
mod cdev;
mod device;
mod dma_logging;
mod error;
mod feature;
mod group;
mod host_memory;
mod iommufd;
mod irq;
mod mapped;
mod migration;
#[cfg(feature = "iommufd-mock")]
mod mock;
mod peer_credentials;
mod report;
mod type1;

pub use cdev::{attach, bind_iommufd, detach};
pub use device::{DeviceInfo, Region, device_info, region_info};
pub use dma_logging::{report_dma_logging, start_dma_logging, stop_dma_logging};
pub use error::UapiError;
pub use feature::{Access, Feature, probe};
pub use group::{GroupStatus, group_device, group_status, set_container, unset_container};
pub use host_memory::{Dma, HostMemory};
pub use iommufd::{HwInfo, Ioas, destroy, hw_info, iommu_dirty, set_dirty_tracking};
pub use irq::{
    Irqs, disable_irqs, irq_info, mask_irq, set_irq_eventfds, set_irq_unmask_eventfd, trigger_irq,
};
pub use migration::{
    PrecopyInfo, device_state, migration_flags, opt_in_precopy_info_v2, precopy_info, reset,
    set_device_state, stop_copy_size,
};
#[cfg(feature = "iommufd-mock")]
pub use mock::{
    MOCK_HUGE_PAGE, MOCK_KIND, MOCK_PAGE, MOCK_START, MockDevice, MockKind, attach_mock_device,
    dirty_mock_pages, make_mock_device,
};
pub use peer_credentials::{PeerCredentials, peer_credentials};
pub use type1::{Type1, Type1Dirty, Type1Info};
