//! A machine with a software guest, put together from the crate's public parts, and moved by copying its memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration_memory::{DirtySource, GuestRam};
use vfio_migration_pci::{MsiRouter, PciHost};
use vfio_migration_sim::Options;
use vfio_migration_types::{Bitmap, Gpa, Granule, PAGE_SIZE, RamOffset};
use vfio_migration_vmm::bus::IoBus;
use vfio_migration_vmm::guest::{BootInfo, Report, parts, read_report};
use vfio_migration_vmm::layout;
use vfio_migration_vmm::platform::PlatformBus;
use vfio_migration_vmm::software::SoftwareVm;

use crate::sample::SampleBus;

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Machine {
    pub(crate) vm: SoftwareVm,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) sample: SampleBus,
    memory: u64,
    options: Options,
}

impl Machine {
    pub(crate) fn new(memory: u64, devices: usize, options: &Options) -> Self {
        let ram = Arc::new(GuestRam::new("software", &layout::ram_regions(memory).unwrap()).unwrap());
        let vm = SoftwareVm::new(ram.clone()).unwrap();
        let (irq, mapper) = (vm.backend().clone(), vm.backend().clone());
        let router = Arc::new(MsiRouter::new(vm.backend().clone(), layout::MESSAGES));
        let host = PciHost::new(irq, mapper, router, layout::bar_windows());
        let sample = SampleBus::new(&ram, host, devices, options);
        let platform: Arc<dyn IoBus> = Arc::new(PlatformBus::new(sample.bus.clone()));
        vm.start(&platform).unwrap();
        Self { vm, ram, sample, memory, options: options.clone() }
    }

    /// Booted and running, with `rate` pages numbered a second.
    pub(crate) fn boot(memory: u64, devices: usize, rate: u64, options: &Options) -> Self {
        let machine = Self::new(memory, devices, options);
        machine.sample.bus.place_bars().unwrap();
        let info =
            BootInfo::new(&parts(&machine.ram), rate * PAGE_SIZE, devices as u64, devices > 1).unwrap();
        machine.vm.boot(&info).unwrap();
        machine.vm.resume().unwrap();
        machine
    }

    pub(crate) fn report(&self) -> Report {
        read_report(&self.ram).unwrap()
    }

    pub(crate) fn wait(&self, what: &str, condition: impl Fn(&Report) -> bool) -> Report {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.report();
            if condition(&report) {
                return report;
            }
            assert!(!self.vm.failed(), "{what}: the guest gave up: {report:?}");
            assert!(Instant::now() < deadline, "{what}: {report:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until every page and every slot was compared since now.
    pub(crate) fn wait_for_all_checks(&self) -> Report {
        let then = self.report();
        self.wait("comparing everything", |now| {
            now.page_passes >= then.page_passes + 2
                && (self.sample.hardware.is_empty() || now.block_passes >= then.block_passes + 2)
        })
    }

    pub(crate) fn at(&self, gpa: u64, len: u64) -> RamOffset {
        self.ram.offset_of(Gpa(gpa), len).unwrap()
    }

    pub(crate) fn word(&self, gpa: u64) -> u64 {
        self.ram.read_u64(self.at(gpa, 8)).unwrap()
    }

    pub(crate) fn page(&self, number: u64) -> [u8; 4096] {
        let mut bytes = [0; 4096];
        self.ram.read(RamOffset(number * PAGE_SIZE), &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn pages(&self) -> u64 {
        self.memory / PAGE_SIZE
    }

    fn copy(&self, number: u64, to: &GuestRam) {
        to.write(RamOffset(number * PAGE_SIZE), &self.page(number)).unwrap();
    }

    fn report_dirty(&self, log: &dyn DirtySource, into: &mut Bitmap) {
        log.report(into).unwrap();
        for hardware in &self.sample.hardware {
            for region in self.ram.regions() {
                let mut words = vec![0; usize::try_from((region.len / PAGE_SIZE).div_ceil(64)).unwrap()];
                hardware.device.report_dma_log(region.gpa.0, region.len, PAGE_SIZE, &mut words).unwrap();
                into.or_scaled(region.offset.0, &words, Granule::PAGE);
            }
        }
    }

    /// Moves guest and devices to a machine built anew; memory goes over while the guest runs, then once more what
    /// the logs name.
    pub(crate) fn migrate(self) -> Self {
        let next = Self::new(self.memory, self.sample.hardware.len(), &self.options);
        let log = self.vm.dirty_source();
        log.start().unwrap();
        self.sample.hardware.iter().for_each(|hardware| {
            hardware.device.start_dma_log(PAGE_SIZE, &[]).unwrap();
        });
        (0..self.pages()).for_each(|page| self.copy(page, &next.ram));
        for _ in 0..3 {
            let before = self.report().loops;
            self.wait("going on", |report| report.loops > before + 5);
            let mut dirty = Bitmap::new(self.memory, Granule::PAGE);
            self.report_dirty(&*log, &mut dirty);
            (0..self.pages()).filter(|page| dirty.test(*page)).for_each(|page| self.copy(page, &next.ram));
        }

        self.vm.pause(PATIENCE).unwrap();
        let states = self.sample.stop();
        let mut dirty = Bitmap::new(self.memory, Granule::PAGE);
        self.report_dirty(&*log, &mut dirty);
        (0..self.pages()).filter(|page| dirty.test(*page)).for_each(|page| self.copy(page, &next.ram));
        assert_eq!(
            self.ram.digest().unwrap(),
            next.ram.digest().unwrap(),
            "the logs did not name everything"
        );

        self.sample.move_devices(&next.sample);
        next.vm.load(&self.vm.save().unwrap()).unwrap();
        next.sample.start(&self.sample, &states);
        next.vm.resume().unwrap();
        assert_eq!(self.sample.host.gate().violations(), 0, "a paused guest reached for its devices");
        next
    }
}
