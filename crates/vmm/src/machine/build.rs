//! Building a machine, and booting a guest in it.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vfio_migration_device::DmaSpace;
use vfio_migration_memory::{GuestRam, OwnedRegion};
use vfio_migration_types::{DeviceId, Gpa};

use super::open::{OpenedDevice, open_and_reset};
use super::opening::OpeningStep;
use super::processor::{KvmProcessor, Processor, SoftwareProcessor};
use super::reset_device::NotedDevice;
use super::slots::assign_places;
use super::{
    Accelerator, Attached, DeviceConfig, DevicePath, MachineConfig, ReferenceMachine, Run, Workload,
};
use crate::bus::IoBus;
use crate::error::VmmError;
use crate::guest::{Areas, BootInfo, SAMPLE_DEVICE, parts};
use crate::kvm::KvmBackend;
use crate::kvm::KvmVm;
use crate::layout;
use crate::platform::PlatformBus;
use crate::software::SoftwareVm;
use vfio_migration_pci::{
    BarMapper, Irqfds, MsiRouteTable, MsiRouter, PciBus, PciHost, VfioPciFunction, map_guest_ram,
};

impl ReferenceMachine {
    /// Builds a machine with everything that could be lacking: RAM, processor, and its devices, connected, reset, with
    /// guest RAM mapped for their DMA. Nothing runs. Then either [`boot`](Self::boot) it, or let a guest come in.
    ///
    /// # Errors
    /// Something is lacking; the text says what.
    pub fn build(config: MachineConfig) -> Result<Arc<Self>, VmmError> {
        Self::build_watched(config, |_, _, _| ())
    }

    /// The same; `opening` hears of each step of opening a device, with the longest time that it may take (`None`: any), and what it
    /// returns is dropped with the step's end.
    ///
    /// # Errors
    /// As [`build`](Self::build).
    pub fn build_watched<T>(
        config: MachineConfig,
        opening: impl Fn(&DeviceId, OpeningStep, Option<Duration>) -> T,
    ) -> Result<Arc<Self>, VmmError> {
        let places = assign_places(&config.devices)?;
        // A kernel device has all of RAM pinned: no page of it may be given back.
        let kernel = |device: &DeviceConfig| matches!(device.path, DevicePath::Kernel(_));
        let punch_holes = !config.devices.iter().any(kernel);
        let regions = layout::ram_regions(config.memory)?;
        let regions: Vec<_> =
            regions.into_iter().map(|spec| OwnedRegion { punch_holes, ..spec.into() }).collect();
        let ram = Arc::new(GuestRam::owned("guest", &regions)?);
        let Parts { processor, irq, routes, mapper } = Parts::make(&config, &ram)?;
        let router = Arc::new(MsiRouter::new(routes, layout::MESSAGES));
        let host = PciHost::new(irq, mapper, router, layout::bar_windows());
        let pci = Arc::new(PciBus::new(host.clone(), Gpa(layout::ECAM_BASE)));
        let platform = Arc::new(PlatformBus::new(pci.clone()));
        let (space, mut devices) = (DmaSpace::default(), Vec::new());
        for (devfn, device) in places.into_iter().zip(&config.devices) {
            let opened =
                open_and_reset(device, &ram, &space, |step, limit| opening(&device.id, step, limit))?;
            let OpenedDevice { device, hardware, link, vfio_file, .. } = opened;
            let vfio_file = match vfio_file {
                Some(file) => processor.add_vfio_file(file.as_fd())?.then_some(file),
                None => None,
            };
            map_guest_ram(&*hardware, &ram).map_err(VmmError::device)?;
            let function = VfioPciFunction::new(devfn, hardware, host.clone()).map_err(VmmError::device)?;
            let function = Arc::new(function);
            pci.add(function.clone());
            let noted = Arc::new(NotedDevice::new(device.clone()));
            devices.push(Attached { device, noted, function, link, vfio_file });
        }
        host.gate().close();
        processor.start(&(platform.clone() as Arc<dyn IoBus>))?;
        Ok(Arc::new(Self {
            id: Mutex::new(config.id),
            config,
            ram,
            processor,
            platform,
            pci,
            host,
            devices,
            run: Mutex::new(Run::default()),
        }))
    }

    /// Loads the guest program. [`cont`](Self::cont) lets it run.
    ///
    /// # Errors
    /// The RAM is too small for it, or KVM refuses.
    pub fn boot(&self, workload: &Workload) -> Result<(), VmmError> {
        self.forget_resets();
        self.pci.place_bars().map_err(VmmError::device)?;
        let devices = self.sample_devices();
        let mut info = BootInfo::new(&parts(&self.ram), workload.dirty_rate, devices, devices > 1)?;
        info.block_len = workload.block_len.into();
        info.in_flight = workload.in_flight.into();
        info.tick_us = workload.tick_us.into();
        self.processor.boot(&info)
    }

    /// The pages that the guest program numbers here, or would.
    ///
    /// # Errors
    /// The RAM is too small for it.
    pub fn numbered_areas(&self) -> Result<Areas, VmmError> {
        Ok(Areas::of(&parts(&self.ram), self.sample_devices())?)
    }

    /// What is no sample device is for the guest to leave alone.
    fn sample_devices(&self) -> u64 {
        let samples = self.devices.iter().filter(|attached| attached.function.identity() == SAMPLE_DEVICE);
        samples.count() as u64
    }
}

/// The parts that depend on the accelerator.
struct Parts {
    processor: Box<dyn Processor>,
    irq: Arc<dyn Irqfds>,
    routes: Arc<dyn MsiRouteTable>,
    mapper: Arc<dyn BarMapper>,
}

impl Parts {
    fn make(config: &MachineConfig, ram: &Arc<GuestRam>) -> Result<Self, VmmError> {
        match config.accelerator {
            Accelerator::Kvm => {
                let vm = KvmVm::new(ram.clone(), config.vcpus)?;
                let backend = Arc::new(KvmBackend::new(vm.clone()));
                let processor = Box::new(KvmProcessor::new(vm)?);
                Ok(Self { processor, irq: backend.clone(), routes: backend.clone(), mapper: backend })
            }
            Accelerator::Software if config.vcpus == 1 => {
                let vm = SoftwareVm::new(ram.clone())?;
                let backend = Arc::clone(vm.backend());
                let processor = Box::new(SoftwareProcessor(vm));
                Ok(Self { processor, irq: backend.clone(), routes: backend.clone(), mapper: backend })
            }
            Accelerator::Software => Err(VmmError::Refused(format!(
                "the software guest has one vCPU, and {} are wanted",
                config.vcpus
            ))),
        }
    }
}
