//! A device that the VMM runs itself: it has opened, bound and attached it, and maps memory for it.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, Iova, Range};
use vfio_migration_uapi as uapi;

use super::device::KernelDevice;
use super::error::KernelError;
use super::iommu::Iommu;
use super::open::{AttachedDevice, KernelOptions, described};
use super::path::KernelPath;
use super::vmm_iommu::VmmIommu;
use super::windows::DmaWindow;
use crate::dma_view::{DmaRange, DmaView, DmaViewError};
use crate::error::DeviceError;
use crate::reset_callback::ResetCallback;

/// A kernel device that the VMM runs itself, as it hands it to [`KernelDevice::adopt`].
#[derive(Debug)]
#[non_exhaustive]
pub struct VmmDevice {
    /// A duplicate of the device's descriptor: of what VFIO_GROUP_GET_DEVICE_FD gave, or of its own file, bound.
    pub file: OwnedFd,
    /// What the VMM has mapped of guest RAM for it.
    pub dma: DmaView,
    /// The VMM's reset of it.
    pub reset: ResetCallback,
    /// The IOMMU before it, for the IOMMU's dirty tracking. None: a device without a log of its own has none.
    pub iommu: Option<VmmIommu>,
    /// Where sysfs has it: its driver and firmware are in its manifest then, and are compared. None.
    pub path: Option<KernelPath>,
}

impl VmmDevice {
    /// A device without an IOMMU that tracks, and of no known path.
    pub fn new(file: OwnedFd, dma: DmaView, reset: ResetCallback) -> Self {
        Self { file, dma, reset, iommu: None, path: None }
    }
}

impl KernelDevice {
    /// Takes a device in that the VMM runs, in the state that it is in. The VMM goes on using it: it keeps its attachment and
    /// its mappings, and loses nothing when this is dropped.
    ///
    /// Nothing is bound, attached, mapped or unmapped by it, and no reset made but the VMM's own.
    /// What goes to the device is VFIO_DEVICE_FEATURE, for migration and the DMA log, and the questions that its manifest is
    /// made of: DEVICE_GET_INFO, GET_REGION_INFO, GET_IRQ_INFO and reads of config space. [`PciHardware`](crate::PciHardware)
    /// may be used besides, all but [`dma_map`](crate::PciHardware::dma_map) and [`dma_unmap`](crate::PciHardware::dma_unmap).
    ///
    /// # Errors
    /// With a [`DmaViewError`] or a [`KernelError`] as the source: a DMA range that cannot be, by its addresses; a descriptor
    /// that is no VFIO device's; a path that sysfs does not know.
    pub fn adopt(
        id: DeviceId,
        device: VmmDevice,
        ram: Arc<GuestRam>,
        options: &KernelOptions,
    ) -> Result<Self, DeviceError> {
        const DOING: &str = "taking in a device that the VMM runs";
        let VmmDevice { file, dma, reset, iommu, path } = device;
        dma.check(&ram, false).map_err(|error| DeviceError::new(id.clone(), DOING, None, error))?;
        uapi::device_info(file.as_fd()).map_err(|error| {
            let errno = error.errno();
            let error: Box<dyn std::error::Error + Send + Sync> = match errno {
                // What other files say to it, and what a device's own file says that is bound to no iommufd.
                Some(Errno::NOTTY | Errno::INVAL | Errno::BADF) => KernelError::NotDevice(error).into(),
                _ => error.into(),
            };
            DeviceError::new(id.clone(), DOING, errno, error)
        })?;
        let sys = path.map(|path| described(&path, options)).transpose();
        let sys = sys.map_err(|error| DeviceError::new(id.clone(), DOING, None, error))?;
        let opened = AttachedDevice { device: Arc::new(file), group: None, iommu: Iommu::Vmm(iommu), sys };
        let device = Self::new(id, opened, ram, Some(reset), options)?;
        for range in dma.ranges() {
            device.inner.windows.add(window(range));
        }
        Ok(device)
    }

    /// Tells of guest RAM that the VMM is about to map for a device that it [runs itself](Self::adopt). While a log runs, all
    /// of it counts as dirty.
    ///
    /// # Errors
    /// With a [`DmaViewError`] as the source.
    pub fn dma_mapped(&self, range: DmaRange) -> Result<(), DeviceError> {
        let told = match &self.inner.iommu {
            Iommu::Own(_) => Err(DmaViewError::MappedByDevice),
            Iommu::Vmm(_) => range.check(&self.inner.ram, false).and_then(|()| {
                let there = self.inner.windows.overlapping(range.iova);
                match there.and_then(|there| Some(DmaRange::new(there.iova, there.ram?))) {
                    Some(other) => Err(DmaViewError::Overlap { range, other }),
                    None => Ok(()),
                }
            }),
        };
        told.map_err(|error| self.not_told("hearing of a DMA mapping", error))?;
        self.inner.windows.add(window(&range));
        Ok(())
    }

    /// Tells of guest RAM that the VMM is about to unmap again, as it was mapped. While a log runs, all of it counts as dirty.
    ///
    /// # Errors
    /// With a [`DmaViewError`] as the source.
    pub fn dma_unmapped(&self, iova: Range<Iova>) -> Result<(), DeviceError> {
        let known = match &self.inner.iommu {
            Iommu::Own(_) => Err(DmaViewError::MappedByDevice),
            Iommu::Vmm(_) => match self.inner.windows.remove(iova) {
                Some(_) => Ok(()),
                None => Err(DmaViewError::Unknown(iova.start(), iova.len())),
            },
        };
        known.map_err(|error| self.not_told("hearing that a DMA mapping goes", error))
    }

    fn not_told(&self, doing: &str, error: DmaViewError) -> DeviceError {
        DeviceError::new(self.inner.id.clone(), doing, None, error)
    }
}

fn window(range: &DmaRange) -> DmaWindow {
    DmaWindow { iova: range.iova, write: range.access.write, ram: Some(range.ram) }
}

#[cfg(test)]
mod tests {
    use vfio_migration_memory::RamSpec;
    use vfio_migration_types::{Gpa, RamOffset, error_chain};

    use super::*;

    fn adopt(file: OwnedFd, dma: DmaView) -> DeviceError {
        let ram = Arc::new(GuestRam::new("test", &[RamSpec { gpa: Gpa(0), len: 1 << 20 }]).unwrap());
        let device = VmmDevice::new(file, dma, ResetCallback::new(|| Ok(())));
        let id = DeviceId::new("net0").unwrap();
        KernelDevice::adopt(id, device, ram, &KernelOptions::default()).unwrap_err()
    }

    #[test]
    fn a_descriptor_that_is_no_devices_is_refused_by_name() {
        let file = |path: &str| OwnedFd::from(std::fs::File::open(path).unwrap());
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        let none = rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        for other in [file("/dev/null"), file("/proc/self/exe"), file("/"), socket.into(), event, none] {
            let error = adopt(other, DmaView::default());
            let text = error_chain(&error);
            assert!(text.contains("net0") && text.contains("no VFIO device's"), "{text}");
            assert!(error.errno.is_some(), "{text}");
        }
    }

    #[test]
    fn a_view_that_cannot_be_is_refused_by_range() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let range = DmaRange::new(Range::new(Iova(0x4000), 2 << 20).unwrap(), RamOffset(0));
        let error = adopt(null, DmaView::new([range]));
        let text = error_chain(&error);
        assert!(text.contains("net0") && text.contains("0x4000+0x200000"), "{text}");
        assert!(matches!(error.source.downcast_ref(), Some(DmaViewError::NotRam { .. })), "{text}");
    }
}
