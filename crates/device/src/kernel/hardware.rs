//! The PCI hardware of a kernel device.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::io::Errno;
use vfio_migration_memory::Mapping;
use vfio_migration_types::{DeviceId, Gpa, Iova, RamOffset, Range};
use vfio_migration_uapi::{self as uapi, Dma, UapiError};

use super::device::{KernelDevice, OpenDevice};
use super::error::KernelError;
use super::iommu::Iommu;
use super::space::{Backing, Overlaps};
use crate::dma_view::DmaViewError;
use crate::error::DeviceError;
use crate::hardware::{DmaAccess, Doorbell, IrqIndex, PciHardware, PciRegion, RegionFile, RegionIndex};

impl OpenDevice {
    /// The place of `len` bytes at `offset` of a region in the device's file.
    fn locate(&self, index: RegionIndex, offset: u64, len: usize, doing: &str) -> Result<u64, DeviceError> {
        let at = self.regions.infos.iter().position(|region| region.index == index);
        let size = at.map_or(0, |at| self.regions.infos[at].size);
        let base = at.and_then(|at| self.regions.offsets.get(at)).copied();
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= size);
        base.filter(|_| inside).and_then(|base| base.checked_add(offset)).ok_or_else(|| {
            let error = KernelError::OutsideRegion { region: index.0, offset, len: len as u64, size };
            DeviceError::new(self.id.clone(), doing, None, error)
        })
    }

    /// Moves all bytes of a region's access in pieces as the device takes them.
    fn whole(
        &self,
        doing: &str,
        len: usize,
        mut piece: impl FnMut(usize) -> Result<usize, Errno>,
    ) -> Result<(), DeviceError> {
        let mut moved = 0;
        while moved < len {
            match piece(moved) {
                Ok(n) if n > 0 && n <= len - moved => moved += n,
                Ok(_) => {
                    let error = KernelError::ShortAccess { moved, wanted: len };
                    return Err(DeviceError::new(self.id.clone(), doing, None, error));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(DeviceError::new(self.id.clone(), doing, Some(errno), errno)),
            }
        }
        Ok(())
    }

    fn refused(&self, doing: impl Into<String>) -> impl FnOnce(UapiError) -> DeviceError {
        let (id, doing) = (self.id.clone(), doing.into());
        move |error| DeviceError::new(id, doing, error.errno(), error)
    }

    /// Guest RAM at that address which has no file that could be named: it is mapped where this process has it.
    fn unshared_ram(&self, iova: Range<Iova>) -> Option<RamOffset> {
        let offset = self.ram.offset_of(Gpa(iova.start().0), iova.len())?;
        self.ram.shared_file(offset, iova.len()).is_none().then_some(offset)
    }

    fn device_fd(&self) -> BorrowedFd<'_> {
        (*self.device).as_fd()
    }

    fn connected(&self, index: IrqIndex) -> Option<&std::sync::atomic::AtomicBool> {
        self.connected.get(index.number() as usize)
    }
}

impl PciHardware for KernelDevice {
    fn id(&self) -> &DeviceId {
        &self.inner.id
    }

    fn regions(&self) -> &[PciRegion] {
        &self.inner.regions.infos
    }

    fn region_file(&self, index: RegionIndex) -> Option<RegionFile<'_>> {
        let at = self.inner.regions.infos.iter().position(|region| region.index == index)?;
        if self.inner.regions.infos[at].mappable.is_empty() {
            return None;
        }
        Some(RegionFile { fd: self.inner.device_fd(), offset: *self.inner.regions.offsets.get(at)? })
    }

    fn region_read(&self, index: RegionIndex, offset: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        let doing = format!("reading region {} at {offset:#x}", index.0);
        let base = self.inner.locate(index, offset, into.len(), &doing)?;
        self.inner.whole(&doing, into.len(), |moved| {
            rustix::io::pread(&*self.inner.device, &mut into[moved..], base + moved as u64)
        })
    }

    fn region_write(&self, index: RegionIndex, offset: u64, from: &[u8]) -> Result<(), DeviceError> {
        let doing = format!("writing region {} at {offset:#x}", index.0);
        let base = self.inner.locate(index, offset, from.len(), &doing)?;
        self.inner.whole(&doing, from.len(), |moved| {
            rustix::io::pwrite(&*self.inner.device, &from[moved..], base + moved as u64)
        })
    }

    /// None: the kernel has `VFIO_DEVICE_IOEVENTFD`, which a VMM does not need where a BAR is mapped.
    fn doorbells(&self, _: RegionIndex) -> Result<Vec<Doorbell>, DeviceError> {
        Ok(Vec::new())
    }

    fn irq_count(&self, index: IrqIndex) -> u32 {
        self.inner.irqs.get(index.number() as usize).copied().unwrap_or(0)
    }

    fn irq_noresize(&self, index: IrqIndex) -> bool {
        self.inner.noresize.get(index.number() as usize).copied().unwrap_or(false)
    }

    fn enable_irqs(&self, index: IrqIndex) -> Result<(), DeviceError> {
        self.set_irq_eventfds(index, 0, &[None])
    }

    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), DeviceError> {
        if eventfds.is_empty() {
            // An empty list would disable the kind.
            return Ok(());
        }
        uapi::set_irq_eventfds(self.inner.device_fd(), index.number(), start, eventfds)
            .map_err(self.inner.refused(format!("connecting {index} interrupts")))?;
        if let Some(connected) = self.inner.connected(index) {
            connected.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), DeviceError> {
        let connected = self.inner.connected(index);
        let was = connected.is_some_and(|connected| connected.load(Ordering::Acquire));
        match uapi::disable_irqs(self.inner.device_fd(), index.number()) {
            // vfio-pci's answer for a kind that is not enabled.
            Err(error) if was || error.errno() != Some(Errno::INVAL) => {
                return Err(self.inner.refused(format!("disabling {index} interrupts"))(error));
            }
            _ => {}
        }
        if let Some(connected) = connected {
            connected.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn trigger_irq(&self, index: IrqIndex, vector: u32) -> Result<(), DeviceError> {
        uapi::trigger_irq(self.inner.device_fd(), index.number(), vector)
            .map_err(self.inner.refused(format!("raising {index} interrupt {vector}")))
    }

    fn mask_irq(&self, index: IrqIndex, vector: u32, masked: bool) -> Result<(), DeviceError> {
        uapi::mask_irq(self.inner.device_fd(), index.number(), vector, masked)
            .map_err(self.inner.refused(format!("masking {index} interrupt {vector}")))
    }

    fn set_intx_resample(&self, eventfd: Option<BorrowedFd<'_>>) -> Result<(), DeviceError> {
        uapi::set_irq_unmask_eventfd(self.inner.device_fd(), IrqIndex::Intx.number(), 0, eventfd)
            .map_err(self.inner.refused("connecting the eventfd that unmasks INTx"))
    }

    fn dma_map(
        &self,
        iova: Range<Iova>,
        access: DmaAccess,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), DeviceError> {
        let inner = &self.inner;
        let doing = format!("mapping {:#x}+{:#x} for DMA", iova.start().0, iova.len());
        let failed =
            |errno, error: KernelError| DeviceError::new(inner.id.clone(), doing.clone(), errno, error);
        let window = |what| KernelError::Window { start: iova.start().0, len: iova.len(), what };
        let Iommu::Own(member) = &inner.iommu else {
            return Err(DeviceError::new(inner.id.clone(), doing, None, DmaViewError::MappedByVmm));
        };
        let backing = match file {
            Some((fd, offset)) => match inner.ram.offset_in_file(fd, offset, iova.len()) {
                Ok(Some(ram)) => Backing::Ram(ram),
                Ok(None) => Backing::file(fd, offset),
                Err(error) => {
                    let errno = error.errno();
                    return Err(DeviceError::new(inner.id.clone(), doing, errno, error));
                }
            },
            None => match inner.unshared_ram(iova) {
                Some(ram) => Backing::Ram(ram),
                None => return Err(failed(None, KernelError::NoFile)),
            },
        };
        let dma = Dma { read: access.read, write: access.write };
        let mapped = match (backing, file) {
            (Backing::File(..), Some((fd, offset))) => {
                let make = || match Mapping::new(fd, offset, iova.len(), access.write) {
                    Ok(mapping) => Ok(Arc::new(mapping).host_memory()),
                    Err(error) => Err(failed(None, KernelError::NoPeerDma(error.into()))),
                };
                member.map(iova, backing, dma, make, |error| {
                    let errno = error.errno();
                    failed(errno, KernelError::NoPeerDma(error.into()))
                })
            }
            (Backing::File(..), None) => return Err(failed(None, KernelError::NoFile)),
            (Backing::Ram(ram), _) => {
                let make = || {
                    let memory = inner.ram.host_memory(ram, iova.len());
                    memory.map_err(|error| DeviceError::new(inner.id.clone(), doing.clone(), None, error))
                };
                member.map(iova, backing, dma, make, inner.refused(doing.clone()))
            }
        };
        mapped.unwrap_or_else(|_: Overlaps| Err(failed(None, window("overlaps one that is mapped"))))
    }

    fn dma_unmap(&self, iova: Range<Iova>) -> Result<(), DeviceError> {
        let inner = &self.inner;
        let doing = format!("unmapping {:#x}+{:#x} for DMA", iova.start().0, iova.len());
        let Iommu::Own(member) = &inner.iommu else {
            return Err(DeviceError::new(inner.id.clone(), doing, None, DmaViewError::MappedByVmm));
        };
        match member.unmap(iova) {
            Some(unmapped) => unmapped.map_err(inner.refused(doing)),
            None => {
                let error =
                    KernelError::Window { start: iova.start().0, len: iova.len(), what: "is not mapped" };
                Err(DeviceError::new(inner.id.clone(), doing, None, error))
            }
        }
    }
}
