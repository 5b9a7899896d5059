//! The PCI hardware of a vfio-user device.

use std::os::fd::{AsFd, BorrowedFd};

use vfio_migration_memory::Mapping;
use vfio_migration_types::{DeviceId, Gpa, Iova, Range};
use vfio_user_peer::{IoFdKind, IrqAction, IrqData, Prot};

use super::device::VfioUserDevice;
use crate::dma_view::DmaViewError;
use crate::error::DeviceError;
use crate::hardware::{DmaAccess, Doorbell, IrqIndex, PciHardware, PciRegion, RegionFile, RegionIndex};

/// `KVM_IOEVENTFD_FLAG_DATAMATCH`, `include/uapi/linux/kvm.h`.
const DATAMATCH: u32 = 1 << 0;

impl PciHardware for VfioUserDevice {
    fn id(&self) -> &DeviceId {
        &self.inner.id
    }

    fn regions(&self) -> &[PciRegion] {
        &self.inner.regions
    }

    fn region_file(&self, index: RegionIndex) -> Option<RegionFile<'_>> {
        let at = self.inner.regions.iter().position(|region| region.index == index)?;
        let (fd, offset) = self.inner.files.get(at)?.as_ref()?;
        Some(RegionFile { fd: fd.as_fd(), offset: *offset })
    }

    fn region_read(&self, index: RegionIndex, offset: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        let doing = || format!("reading region {} at {offset:#x}", index.0);
        self.inner
            .client
            .region_read(index.0, offset, into)
            .map_err(|error| self.inner.failed(doing(), error))
    }

    fn region_write(&self, index: RegionIndex, offset: u64, from: &[u8]) -> Result<(), DeviceError> {
        let doing = || format!("writing region {} at {offset:#x}", index.0);
        self.inner
            .client
            .region_write(index.0, offset, from)
            .map_err(|error| self.inner.failed(doing(), error))
    }

    fn doorbells(&self, index: RegionIndex) -> Result<Vec<Doorbell>, DeviceError> {
        let entries = match self.inner.client.region_io_fds(index.0) {
            Ok(entries) => entries,
            // Most servers do not know the command.
            Err(vfio_user_peer::ClientError::Refused { .. }) => return Ok(Vec::new()),
            Err(error) => {
                return Err(self.inner.failed(format!("asking for doorbells of region {}", index.0), error));
            }
        };
        let mut doorbells = Vec::new();
        for entry in entries {
            // Other mechanisms are offers too: what is not taken up is reached by messages.
            if let IoFdKind::Eventfd { flags, datamatch } = entry.kind {
                let fd = entry.fd.try_clone().map_err(|error| {
                    let errno = rustix::io::Errno::from_io_error(&error);
                    DeviceError::new(self.inner.id.clone(), "keeping a doorbell's descriptor", errno, error)
                })?;
                let datamatch = (flags & DATAMATCH != 0).then_some(datamatch);
                doorbells.push(Doorbell { offset: entry.offset, size: entry.size, datamatch, fd });
            }
        }
        Ok(doorbells)
    }

    fn irq_count(&self, index: IrqIndex) -> u32 {
        self.inner.irqs.get(index.number() as usize).copied().unwrap_or(0)
    }

    fn irq_noresize(&self, index: IrqIndex) -> bool {
        self.inner.noresize.get(index.number() as usize).copied().unwrap_or(false)
    }

    fn set_irq_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), DeviceError> {
        let failed = |error| self.inner.failed(format!("connecting {index} interrupts"), error);
        let mut at = start;
        // One message per run of connected, or of disconnected, interrupts: as a rule, one.
        for run in eventfds.chunk_by(|a, b| a.is_some() == b.is_some()) {
            let fds: Vec<BorrowedFd<'_>> = run.iter().copied().flatten().collect();
            let count = u32::try_from(run.len()).unwrap_or(u32::MAX);
            if fds.is_empty() {
                self.inner.client.irq_disconnect(index.number(), at, count).map_err(failed)?;
            } else {
                self.inner.client.irq_connect(index.number(), at, &fds).map_err(failed)?;
            }
            at = at.saturating_add(count);
        }
        Ok(())
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), DeviceError> {
        let failed = |error| self.inner.failed(format!("disabling {index} interrupts"), error);
        self.inner.client.irq_disable(index.number()).map_err(failed)
    }

    fn trigger_irq(&self, index: IrqIndex, vector: u32) -> Result<(), DeviceError> {
        let failed = |error| self.inner.failed(format!("raising {index} interrupt {vector}"), error);
        self.inner.client.irq_trigger(index.number(), vector, 1).map_err(failed)
    }

    fn mask_irq(&self, index: IrqIndex, vector: u32, masked: bool) -> Result<(), DeviceError> {
        let client = &self.inner.client;
        let done = if masked {
            client.irq_mask(index.number(), vector, 1)
        } else {
            client.irq_unmask(index.number(), vector, 1)
        };
        done.map_err(|error| self.inner.failed(format!("masking {index} interrupt {vector}"), error))
    }

    fn set_intx_resample(&self, eventfd: Option<BorrowedFd<'_>>) -> Result<(), DeviceError> {
        let (fds, data);
        match eventfd {
            Some(fd) => {
                fds = [fd];
                data = IrqData::Eventfd(&fds);
            }
            None => data = IrqData::Disconnect(1),
        }
        let failed = |error| self.inner.failed("connecting the eventfd that unmasks INTx", error);
        let intx = IrqIndex::Intx.number();
        self.inner.client.set_irqs(intx, 0, IrqAction::Unmask, data).map_err(failed)
    }

    fn dma_map(
        &self,
        iova: Range<Iova>,
        access: DmaAccess,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), DeviceError> {
        let inner = &self.inner;
        let doing = || format!("mapping {:#x}+{:#x} for DMA", iova.start().0, iova.len());
        if inner.run_by_vmm {
            return Err(DeviceError::new(inner.id.clone(), doing(), None, DmaViewError::MappedByVmm));
        }
        let ram = match file {
            // A part of RAM, or a file that is not what the guest sees, would be written behind the back of every log.
            Some((fd, offset)) => {
                inner.dma.ram().offset_in_file(fd, offset, iova.len()).map_err(|error| {
                    let errno = error.errno();
                    DeviceError::new(inner.id.clone(), doing(), errno, error)
                })?
            }
            None => inner.dma.ram().offset_of(Gpa(iova.start().0), iova.len()),
        };
        let shared = if inner.message_dma { None } else { file };
        // What is not guest RAM and not the server's to map must be reachable from here.
        let served = match (shared, file) {
            (None, Some((fd, offset))) if ram.is_none() => Some(
                Mapping::new(fd, offset, iova.len(), access.write)
                    .map_err(|error| DeviceError::new(inner.id.clone(), doing(), None, error))?,
            ),
            _ => None,
        };
        let prot = Prot { read: access.read, write: access.write };
        // Known before the server may ask for it.
        match ram {
            Some(ram) => inner.dma.map_ram(iova, access, shared.is_some(), ram),
            None => inner.dma.map_other(iova, access, shared.is_some(), served),
        }
        inner.client.dma_map(iova.start().0, iova.len(), prot, shared).map_err(|error| {
            inner.dma.unmap(iova);
            inner.failed(doing(), error)
        })
    }

    fn dma_unmap(&self, iova: Range<Iova>) -> Result<(), DeviceError> {
        let doing = || format!("unmapping {:#x}+{:#x} for DMA", iova.start().0, iova.len());
        if self.inner.run_by_vmm {
            let error = DmaViewError::MappedByVmm;
            return Err(DeviceError::new(self.inner.id.clone(), doing(), None, error));
        }
        let done = self.inner.client.dma_unmap(iova.start().0, iova.len());
        self.inner.dma.unmap(iova);
        done.map_err(|error| self.inner.failed(doing(), error))
    }
}
