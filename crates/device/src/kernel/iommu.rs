//! The IOMMU between a kernel device and memory: a type1 container, or an address space of an iommufd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_migration_types::{Granule, Iova, Range, error_chain};
use vfio_migration_uapi::{self as uapi, Dma, HostMemory, Ioas, Type1, UapiError};

use super::dirty::LogPort;

/// Ranges that DMA logging takes on a host with pages of 4 KiB (`vfio_main.c`: a page of descriptions).
const DEVICE_RANGES: usize = 256;

/// The address space of one device.
#[derive(Debug)]
pub(super) enum Iommu {
    Type1(Arc<Type1>),
    Iommufd {
        space: Arc<Ioas>,
        /// The page table that can track dirty pages, if the IOMMU can.
        table: Result<u32, String>,
    },
}

impl Iommu {
    pub(super) fn map(&self, iova: Range<Iova>, memory: &HostMemory, dma: Dma) -> Result<(), UapiError> {
        match self {
            Self::Type1(container) => container.map(iova, memory, dma),
            Self::Iommufd { space, .. } => space.map(iova, memory, dma),
        }
    }

    pub(super) fn unmap(&self, iova: Range<Iova>) -> Result<(), UapiError> {
        match self {
            Self::Type1(container) => container.unmap(iova),
            Self::Iommufd { space, .. } => space.unmap(iova),
        }
    }

    /// Takes the device out, before it is closed: an iommufd that was handed over lives on.
    pub(super) fn release(&self, device: BorrowedFd<'_>) {
        let Self::Iommufd { space, table } = self else { return };
        let detached = uapi::detach(device);
        let destroyed = match table {
            Ok(table) => uapi::destroy(space.fd(), *table),
            Err(_) => Ok(()),
        };
        if let Err(error) = detached.and(destroyed) {
            tracing::debug!(error = %error_chain(&error), "a device was not taken out of its iommufd");
        }
    }

    /// The IOMMU's log, or why there is none.
    pub(super) fn hardware_log(&self) -> Result<TableLog, String> {
        match self {
            Self::Type1(_) => Err("the device was opened by its group, which has no IOMMU log".into()),
            Self::Iommufd { space, table } => {
                let table = table.clone()?;
                Ok(TableLog { space: space.clone(), table })
            }
        }
    }

    /// The container's log, or why there is none.
    pub(super) fn container_log(&self) -> Result<ContainerLog, String> {
        match self {
            Self::Iommufd { .. } => Err("an iommufd has none".into()),
            Self::Type1(container) => {
                let info = container.info().map_err(|error| error_chain(&error))?;
                let dirty = info.dirty_pages.ok_or("the kernel offers none")?;
                // Only the smallest is ever taken.
                let smallest = 1u64.checked_shl(dirty.page_sizes.trailing_zeros()).unwrap_or(0);
                let granule = Granule::new(smallest).map_err(|error| error.to_string())?;
                Ok(ContainerLog { container: container.clone(), granule })
            }
        }
    }
}

/// The device's own log.
#[derive(Debug)]
pub(super) struct DeviceLog(pub(super) Arc<OwnedFd>);

impl LogPort for DeviceLog {
    fn start(&self, ranges: &[Range<Iova>]) -> Result<Granule, UapiError> {
        uapi::start_dma_logging((*self.0).as_fd(), Granule::PAGE, ranges)
    }

    fn report(&self, range: Range<Iova>, granule: Granule, words: &mut [u64]) -> Result<(), UapiError> {
        uapi::report_dma_logging((*self.0).as_fd(), range, granule, words)
    }

    fn stop(&self) -> Result<(), UapiError> {
        uapi::stop_dma_logging((*self.0).as_fd())
    }

    fn most_ranges(&self) -> usize {
        DEVICE_RANGES
    }

    fn goes_with_mapping(&self) -> bool {
        false
    }
}

/// The IOMMU's log of one page table.
#[derive(Debug)]
pub(super) struct TableLog {
    space: Arc<Ioas>,
    table: u32,
}

impl LogPort for TableLog {
    fn start(&self, _: &[Range<Iova>]) -> Result<Granule, UapiError> {
        // It logs the whole table; once, since each time forgets what was logged.
        uapi::set_dirty_tracking(self.space.fd(), self.table, true)?;
        Ok(Granule::PAGE)
    }

    fn report(&self, range: Range<Iova>, granule: Granule, words: &mut [u64]) -> Result<(), UapiError> {
        uapi::iommu_dirty(self.space.fd(), self.table, range, granule, words, false)
    }

    fn stop(&self) -> Result<(), UapiError> {
        uapi::set_dirty_tracking(self.space.fd(), self.table, false)
    }

    fn most_ranges(&self) -> usize {
        // Each mapping by itself: the kernel stops at a hole and calls it a success.
        usize::MAX
    }

    fn goes_with_mapping(&self) -> bool {
        true
    }
}

/// The log that the type1 container keeps.
#[derive(Debug)]
pub(super) struct ContainerLog {
    container: Arc<Type1>,
    granule: Granule,
}

impl LogPort for ContainerLog {
    fn start(&self, _: &[Range<Iova>]) -> Result<Granule, UapiError> {
        self.container.start_dirty()?;
        Ok(self.granule)
    }

    fn report(&self, range: Range<Iova>, granule: Granule, words: &mut [u64]) -> Result<(), UapiError> {
        // What is mapped is made of whole pages of the container's, so this is its own granule.
        self.container.report_dirty(range, granule, words)
    }

    fn stop(&self) -> Result<(), UapiError> {
        self.container.stop_dirty()
    }

    fn most_ranges(&self) -> usize {
        // A range that bisects a mapping is refused; one mapping does not.
        usize::MAX
    }

    fn goes_with_mapping(&self) -> bool {
        true
    }
}
