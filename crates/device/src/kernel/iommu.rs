//! The IOMMU between a kernel device and memory: a type1 container, or an address space of an iommufd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use vfio_migration_types::{Granule, Iova, Range, error_chain};
use vfio_migration_uapi::{self as uapi, Type1, UapiError};

use super::dirty::LogPort;
use super::log_users::LogUsers;
use super::space::{AddressSpace, PageTable, SpaceMember};
use super::vmm_iommu::{VmmIommu, VmmIommuKind};

/// The reason for no log of an IOMMU that the VMM does not tell of.
const UNTOLD: &str = "the VMM, which runs the device itself, names no IOMMU before it";

/// Ranges that DMA logging takes on a host with pages of 4 KiB (`vfio_main.c`: a page of descriptions).
const DEVICE_RANGES: usize = 256;

/// The address space of a device.
#[derive(Debug)]
pub(super) enum Iommu {
    /// Made here, and mapped in here.
    Own(SpaceMember),
    /// The VMM's own, as far as it is known.
    Vmm(Option<VmmIommu>),
}

impl Iommu {
    /// Takes the device out of an address space that was made here.
    pub(super) fn release(&self, device: BorrowedFd<'_>) {
        if let Self::Own(member) = self {
            member.leave(device);
        }
    }

    /// The IOMMU's log, or why there is none.
    pub(super) fn hardware_log(&self) -> Result<TableLog, String> {
        match self {
            Self::Own(member) => match &member.space {
                AddressSpace::Type1(_) => {
                    Err("the device was opened by its group, which has no IOMMU log".into())
                }
                AddressSpace::Iommufd { table, .. } => Ok(TableLog::of(table.clone()?)),
            },
            Self::Vmm(None) => Err(UNTOLD.into()),
            Self::Vmm(Some(VmmIommu { kind, users })) => match kind {
                VmmIommuKind::Type1(_) => Err("a container has none".into()),
                VmmIommuKind::AddressSpace => Err("the VMM attached the device to an address space, whose page table the \
                     kernel makes without dirty tracking; attach it to one made with IOMMU_HWPT_ALLOC_DIRTY_TRACKING"
                    .into()),
                VmmIommuKind::PageTable { iommufd, table } => {
                    let (iommufd, users) = (iommufd.clone(), users.clone());
                    Ok(TableLog { iommufd, table: *table, users, _table: None })
                }
            },
        }
    }

    /// The container's log, or why there is none.
    pub(super) fn container_log(&self) -> Result<ContainerLog, String> {
        let (container, users) = match self {
            Self::Own(SpaceMember { space: AddressSpace::Type1(container), .. }) => {
                (&container.type1, &container.users)
            }
            Self::Vmm(Some(VmmIommu { kind: VmmIommuKind::Type1(container), users })) => (container, users),
            Self::Own(_) | Self::Vmm(Some(_)) => {
                return Err("an iommufd has none".into());
            }
            Self::Vmm(None) => return Err(UNTOLD.into()),
        };
        let info = container.info().map_err(|error| error_chain(&error))?;
        let dirty = info.dirty_pages.ok_or("the kernel offers none")?;
        // Only the smallest is ever taken.
        let smallest = 1u64.checked_shl(dirty.page_sizes.trailing_zeros()).unwrap_or(0);
        let granule = Granule::new(smallest).map_err(|error| error.to_string())?;
        Ok(ContainerLog { container: container.clone(), granule, users: users.clone() })
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
    iommufd: Arc<OwnedFd>,
    table: u32,
    users: Arc<LogUsers>,
    /// A table that was made here lasts as long.
    _table: Option<Arc<PageTable>>,
}

impl TableLog {
    fn of(table: Arc<PageTable>) -> Self {
        let (iommufd, users) = (table.iommufd.clone(), table.users.clone());
        Self { iommufd, table: table.id, users, _table: Some(table) }
    }
}

impl LogPort for TableLog {
    fn start(&self, _: &[Range<Iova>]) -> Result<Granule, UapiError> {
        // It logs the whole table; once, since each time forgets what was logged.
        self.users.join(|| uapi::set_dirty_tracking((*self.iommufd).as_fd(), self.table, true))?;
        Ok(Granule::PAGE)
    }

    fn report(&self, range: Range<Iova>, granule: Granule, words: &mut [u64]) -> Result<(), UapiError> {
        uapi::iommu_dirty((*self.iommufd).as_fd(), self.table, range, granule, words, false)
    }

    fn stop(&self) -> Result<(), UapiError> {
        self.users.leave(|| uapi::set_dirty_tracking((*self.iommufd).as_fd(), self.table, false))
    }

    fn most_ranges(&self) -> usize {
        // Each mapping by itself: the kernel stops at a hole and calls it a success.
        usize::MAX
    }

    fn goes_with_mapping(&self) -> bool {
        true
    }

    fn users(&self) -> Option<&LogUsers> {
        Some(&self.users)
    }
}

/// The log that the type1 container keeps.
#[derive(Debug)]
pub(super) struct ContainerLog {
    container: Arc<Type1>,
    granule: Granule,
    users: Arc<LogUsers>,
}

impl LogPort for ContainerLog {
    fn start(&self, _: &[Range<Iova>]) -> Result<Granule, UapiError> {
        self.users.join(|| self.container.start_dirty())?;
        Ok(self.granule)
    }

    fn report(&self, range: Range<Iova>, granule: Granule, words: &mut [u64]) -> Result<(), UapiError> {
        // What is mapped is made of whole pages of the container's, so this is its own granule.
        self.container.report_dirty(range, granule, words)
    }

    fn stop(&self) -> Result<(), UapiError> {
        self.users.leave(|| self.container.stop_dirty())
    }

    fn most_ranges(&self) -> usize {
        // A range that bisects a mapping is refused; one mapping does not.
        usize::MAX
    }

    fn goes_with_mapping(&self) -> bool {
        true
    }

    fn users(&self) -> Option<&LogUsers> {
        Some(&self.users)
    }
}
