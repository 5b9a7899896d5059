//! The sample device in this process, as the hardware behind a PCI function.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vfio_migration_device::{
    DeviceError, DmaAccess, Doorbell, IrqIndex, PciHardware, PciRegion, RegionFile, RegionIndex,
};
use vfio_migration_sim::{DmaTarget, Options, SampleDevice, SimError, pci};
use vfio_migration_types::{DeviceId, Iova, Range};

/// A sample device, and the eventfds that its vectors are connected to.
pub(crate) struct Hardware {
    id: DeviceId,
    regions: Vec<PciRegion>,
    vectors: Mutex<[Option<OwnedFd>; 2]>,
    pub(crate) device: SampleDevice,
}

impl Hardware {
    pub(crate) fn new(name: &str, options: Options) -> Arc<Self> {
        let region = |index, mappable: &[(u64, u64)]| PciRegion {
            index: RegionIndex(index),
            size: pci::region_size(index),
            readable: true,
            writable: true,
            mappable: mappable.iter().map(|(start, len)| Range::new(*start, *len).unwrap()).collect(),
        };
        let regions = vec![
            region(pci::region::BAR0, &[]),
            region(pci::region::BAR2, &[(0, pci::BAR2_SIZE)]),
            region(pci::region::CONFIG, &[]),
        ];
        let device = SampleDevice::new(options).unwrap();
        Arc::new(Self { id: DeviceId::new(name).unwrap(), regions, vectors: Mutex::default(), device })
    }

    /// Swallows exactly one raise of `vector`: returns when it has happened.
    pub(crate) fn swallow(&self, vector: usize) {
        let vectors = self.vectors.lock().unwrap();
        let nowhere = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        self.device.connect_vector(vector, Some(nowhere.try_clone().unwrap())).unwrap();
        let patience = Timespec { tv_sec: 30, tv_nsec: 0 };
        let raised = poll(&mut [PollFd::new(&nowhere, PollFlags::IN)], Some(&patience)).unwrap();
        assert_eq!(raised, 1, "the device raised nothing");
        // The driver has not acknowledged, so the device raises nothing more until it is connected again.
        let wire = vectors[vector].as_ref().map(|fd| fd.try_clone().unwrap());
        self.device.connect_vector(vector, wire).unwrap();
    }

    fn done<T>(&self, doing: &str, result: Result<T, SimError>) -> Result<T, DeviceError> {
        result.map_err(|error| DeviceError::new(self.id.clone(), doing, None, error))
    }
}

impl std::fmt::Debug for Hardware {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Hardware").field(&self.id).finish()
    }
}

impl PciHardware for Hardware {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn regions(&self) -> &[PciRegion] {
        &self.regions
    }

    fn region_file(&self, index: RegionIndex) -> Option<RegionFile<'_>> {
        (index.0 == pci::region::BAR2).then(|| RegionFile { fd: self.device.mailbox_fd(), offset: 0 })
    }

    fn region_read(&self, index: RegionIndex, offset: u64, into: &mut [u8]) -> Result<(), DeviceError> {
        self.done("reading a region", self.device.region_read(index.0, offset, into))
    }

    fn region_write(&self, index: RegionIndex, offset: u64, from: &[u8]) -> Result<(), DeviceError> {
        self.done("writing a region", self.device.region_write(index.0, offset, from))
    }

    fn doorbells(&self, index: RegionIndex) -> Result<Vec<Doorbell>, DeviceError> {
        let fd = self.device.doorbell_fd().try_clone_to_owned().unwrap();
        let doorbell = Doorbell { offset: 0x1000, size: 4, datamatch: None, fd };
        Ok(if index == RegionIndex::BAR0 { vec![doorbell] } else { Vec::new() })
    }

    fn irq_count(&self, index: IrqIndex) -> u32 {
        if index == IrqIndex::Msix { 2 } else { 0 }
    }

    fn set_irq_eventfds(
        &self,
        _index: IrqIndex,
        start: u32,
        eventfds: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), DeviceError> {
        let mut vectors = self.vectors.lock().unwrap();
        for (vector, fd) in (usize::try_from(start).unwrap()..).zip(eventfds) {
            let owned = || fd.map(|fd| fd.try_clone_to_owned().unwrap());
            self.done("connecting a vector", self.device.connect_vector(vector, owned()))?;
            vectors[vector] = owned();
        }
        Ok(())
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), DeviceError> {
        self.set_irq_eventfds(index, 0, &[None, None])
    }

    fn trigger_irq(&self, _index: IrqIndex, vector: u32) -> Result<(), DeviceError> {
        self.done("raising a vector", self.device.trigger_vector(usize::try_from(vector).unwrap()))
    }

    fn mask_irq(&self, _index: IrqIndex, _vector: u32, _masked: bool) -> Result<(), DeviceError> {
        Err(DeviceError::new(self.id.clone(), "masking", Some(rustix::io::Errno::INVAL), "not maskable"))
    }

    fn set_intx_resample(&self, _resample: Option<BorrowedFd<'_>>) -> Result<(), DeviceError> {
        Err(DeviceError::new(self.id.clone(), "resampling", Some(rustix::io::Errno::INVAL), "it has no pin"))
    }

    fn dma_map(
        &self,
        iova: Range<Iova>,
        access: DmaAccess,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), DeviceError> {
        let (fd, offset) = file.unwrap();
        let target = DmaTarget::File(fd.as_fd(), offset);
        self.done("mapping memory", self.device.dma_map(iova.start().0, iova.len(), access.write, target))
    }

    fn dma_unmap(&self, iova: Range<Iova>) -> Result<(), DeviceError> {
        self.done("unmapping memory", self.device.dma_unmap(iova.start().0, iova.len()))
    }
}
