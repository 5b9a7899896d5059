//! An address space without a VFIO device before it, and the IOMMU's log of it: for tests against the kernel's mock
//! IOMMU, whose devices are no VFIO devices. All but the opening and the attaching is what a [`KernelDevice`] does.
//!
//! [`KernelDevice`]: super::device::KernelDevice

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vfio_migration_types::{DeviceId, Iova, RamOffset, Range};
use vfio_migration_uapi::{Dma, HostMemory, Ioas, UapiError};

use super::iommu::Iommu;
use super::open::tracking_table;
use super::space::{AddressSpace, IommufdSpace, PageTable, SpaceMember};
use super::tracker::{TrackerChoice, Trial, Trials, choose, try_log};
use super::windows::{DmaWindow, DmaWindows};
use crate::contract::DirtyLog;

/// An address space of an iommufd, with a page table that tracks dirty pages if the IOMMU can.
#[derive(Debug)]
pub struct BareSpace {
    id: DeviceId,
    space: Arc<Ioas>,
    iommu: Option<Iommu>,
    windows: Arc<DmaWindows>,
}

impl BareSpace {
    /// An empty one of `iommufd`.
    pub fn new(id: DeviceId, iommufd: Arc<OwnedFd>) -> Result<Self, UapiError> {
        Ok(Self { id, space: Arc::new(Ioas::new(iommufd)?), iommu: None, windows: Arc::default() })
    }

    /// The address space's id, to attach a device to.
    pub fn id(&self) -> u32 {
        self.space.id()
    }

    /// Makes the page table for `device`, which the caller then attaches to it. Gives its id, or why there is none.
    pub fn make_table(&mut self, device: u32) -> Result<u32, String> {
        let table = tracking_table(&self.space, device);
        let made = table.clone().map(|id| Arc::new(PageTable::new(self.space.iommufd(), id)));
        let space = Arc::new(IommufdSpace::new(self.space.clone()));
        self.iommu = Some(Iommu::Own(SpaceMember::new(AddressSpace::Iommufd { space, table: made })));
        table
    }

    /// Maps memory that begins at `ram` of the guest's RAM.
    pub fn map(&self, iova: Range<Iova>, memory: &HostMemory, ram: RamOffset) -> Result<(), UapiError> {
        self.windows.add(DmaWindow { iova, write: true, ram: Some(ram) });
        self.space.map(iova, memory, Dma::BOTH).inspect_err(|_| {
            self.windows.remove(iova);
        })
    }

    /// Unmaps what was mapped.
    pub fn unmap(&self, iova: Range<Iova>) -> Result<(), UapiError> {
        self.windows.remove(iova);
        self.space.unmap(iova)
    }

    /// The tracker that a device would get that has no log of its own, and its log.
    pub fn tracker(&self) -> (TrackerChoice, Option<Box<dyn DirtyLog>>) {
        let none = || Trial::Fails("none here".into());
        let port = match &self.iommu {
            Some(iommu) => iommu.hardware_log(),
            None => Err("no page table was made".into()),
        };
        let port = port.map(|log| Box::new(log) as _);
        let (iommufd, log) = try_log(&self.id, &self.windows, port, &[], |_| None);
        let choice = choose(Trials { device: none(), iommufd, type1: none() });
        (choice, log.map(|log| Box::new(log) as _))
    }
}
