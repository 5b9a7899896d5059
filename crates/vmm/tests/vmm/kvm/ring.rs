//! What the tests on real KVM share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Gpa, RamOffset};
use vfio_migration_vmm::bus::{EmptyBus, IoBus};
use vfio_migration_vmm::guest::{self, BootInfo, Report, Stage};
use vfio_migration_vmm::kvm::KvmVm;
use vfio_migration_vmm::layout;
use vfio_migration_vmm::platform::PlatformBus;

/// Long enough for a machine that shares its processors with a whole build.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Whether there is KVM here. Says so loudly when there is none.
pub(crate) fn kvm_answers() -> bool {
    match KvmVm::open() {
        Ok(_) => true,
        Err(error) => {
            eprintln!("SKIPPED RING: kvm ({error})");
            false
        }
    }
}

/// A machine with the guest program in it.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) vm: Arc<KvmVm>,
    pub(crate) platform: Arc<PlatformBus>,
}

impl Rig {
    /// A machine on which nothing runs yet.
    pub(crate) fn new(mib: u64) -> Self {
        Self::with_bus(mib, |_, _| Arc::new(EmptyBus))
    }

    pub(crate) fn ram(mib: u64) -> Arc<GuestRam> {
        Arc::new(GuestRam::new("test", &layout::ram_regions(mib << 20).unwrap()).unwrap())
    }

    pub(crate) fn with_bus(
        mib: u64,
        bus: impl FnOnce(&Arc<GuestRam>, &Arc<KvmVm>) -> Arc<dyn IoBus>,
    ) -> Self {
        let ram = Self::ram(mib);
        let vm = KvmVm::new(Arc::clone(&ram), 1).unwrap();
        let platform = Arc::new(PlatformBus::new(bus(&ram, &vm)));
        let bus: Arc<dyn IoBus> = platform.clone();
        vm.start(&bus).unwrap();
        Self { ram, vm, platform }
    }

    /// Loads the program and lets it run.
    pub(crate) fn boot(&self, bytes_per_second: u64, devices: u64, p2p: bool) {
        let info = BootInfo::new(&guest::parts(&self.ram), bytes_per_second, devices, p2p).unwrap();
        guest::load(&self.vm, &info).unwrap();
        self.vm.resume().unwrap();
    }

    pub(crate) fn report(&self) -> Report {
        guest::read_report(&self.ram).unwrap()
    }

    /// Waits until the guest's report satisfies `wanted`.
    pub(crate) fn wait(&self, what: &str, wanted: impl Fn(&Report) -> bool) -> Report {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.report();
            assert_eq!(self.vm.stop_reason(), None, "{report:?}");
            assert_ne!(report.stage, Stage::Failed, "{report:?}");
            if wanted(&report) {
                return report;
            }
            assert!(Instant::now() < deadline, "waited in vain for {what}: {report:?}");
            std::thread::yield_now();
            std::thread::park_timeout(Duration::from_millis(1));
        }
    }

    pub(crate) fn pause(&self) {
        self.vm.pause(PATIENCE).unwrap();
    }

    pub(crate) fn offset(&self, gpa: u64, len: u64) -> RamOffset {
        self.ram.offset_of(Gpa(gpa), len).unwrap()
    }

    /// A fresh machine with a copy of this one's RAM and state; this one must be paused.
    pub(crate) fn moved(&self) -> Self {
        let to = Self::new(self.ram.size() >> 20);
        self.copy_into(&to);
        to
    }

    pub(crate) fn copy_into(&self, to: &Self) {
        let mut chunk = vec![0; 1 << 20];
        for offset in (0..self.ram.size()).step_by(1 << 20) {
            self.ram.read(RamOffset(offset), &mut chunk).unwrap();
            to.ram.write(RamOffset(offset), &chunk).unwrap();
        }
        to.platform.clock().load(&self.platform.clock().save()).unwrap();
        to.vm.load_state(&self.vm.save_state().unwrap()).unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.vm.shutdown();
    }
}
