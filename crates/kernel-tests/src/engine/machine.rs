//! The smallest machine that owns kernel devices: some RAM, a guest on a thread, no vCPUs.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use vfio_migration::{LockError, Machine, MachineError, MigratableDevice, Paused, Section};
use vfio_migration_compat::{MachineManifest, RamRegion};
use vfio_migration_device::{
    Device, DmaAccess, DmaSpace, IrqRouter, KernelDevice, KernelOptions, PciHardware,
};
use vfio_migration_memory::{DirtySource, GuestRam, RamSpec, WriteLog};
use vfio_migration_types::{DeviceId, Gpa, Iova, RamOffset, Range, VmId};

use super::program::{LEN, Program};
use crate::check::Outcome;
use crate::instance::Instance;

const SECTION: &str = "toy.guest";

/// A machine. Its guest's thread ends with it.
#[derive(Debug)]
pub(crate) struct Toy {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) guest: Arc<Program>,
    /// The devices themselves, whatever a migration is shown.
    pub(crate) cards: Vec<KernelDevice>,
    shown: Vec<Arc<dyn Device>>,
    writes: Arc<WriteLog>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Memory for one.
pub(crate) fn ram() -> Outcome<Arc<GuestRam>> {
    Ok(Arc::new(GuestRam::new("toy", &[RamSpec { gpa: Gpa(0), len: LEN }])?))
}

/// Opens an instance as device number `n` of a guest whose devices share `space`, and lets it reach all of `ram`.
pub(crate) fn card(
    n: usize,
    instance: &Instance,
    ram: &Arc<GuestRam>,
    space: &DmaSpace,
) -> Outcome<KernelDevice> {
    let id = DeviceId::new(format!("card{n}"))?;
    let options = KernelOptions { space: Some(space.clone()), ..KernelOptions::default() };
    let device = KernelDevice::open(id, &instance.uuid().parse()?, Arc::clone(ram), &options)?;
    map(&device, ram)?;
    Ok(device)
}

/// Lets a device reach all of `ram`.
pub(crate) fn map(device: &KernelDevice, ram: &GuestRam) -> Outcome {
    Ok(device.dma_map(Range::new(Iova(0), LEN)?, DmaAccess::BOTH, ram.shared_file(RamOffset(0), LEN))?)
}

impl Toy {
    /// A machine with these instances.
    pub(crate) fn new(instances: &[Instance]) -> Outcome<Arc<Self>> {
        Self::shown_as(instances, |device| Arc::new(device))
    }

    /// The same, with devices that a migration sees as `show` makes them.
    pub(crate) fn shown_as(
        instances: &[Instance],
        show: impl FnMut(KernelDevice) -> Arc<dyn Device>,
    ) -> Outcome<Arc<Self>> {
        let (ram, space) = (ram()?, DmaSpace::default());
        let open = |(n, instance)| card(n, instance, &ram, &space);
        let cards = instances.iter().enumerate().map(open).collect::<Outcome<Vec<_>>>()?;
        Self::of(ram, cards, show)
    }

    /// A machine of devices that are open. Those of migdev are driven by the guest.
    pub(crate) fn of(
        ram: Arc<GuestRam>,
        cards: Vec<KernelDevice>,
        show: impl FnMut(KernelDevice) -> Arc<dyn Device>,
    ) -> Outcome<Arc<Self>> {
        let writes = Arc::new(WriteLog::new("the guest's writes", LEN));
        let driven: Vec<_> = cards.iter().filter(|card| card.driver() != Some("mtty")).cloned().collect();
        let guest = Arc::new(Program::new(Arc::clone(&ram), Arc::clone(&writes), driven));
        let program = Arc::clone(&guest);
        let thread = std::thread::Builder::new().name("guest".into()).spawn(move || program.run())?;
        let shown = cards.iter().cloned().map(show).collect();
        Ok(Arc::new(Self { ram, guest, cards, shown, writes, thread: Mutex::new(Some(thread)) }))
    }

    /// Lets a guest run that has never run.
    pub(crate) fn boot(&self) -> Outcome {
        self.guest.boot()?;
        self.guest.go();
        self.guest.goes_on()
    }

    /// Everything that logs writes: its own log, and those of the devices.
    pub(crate) fn logs(&self) -> Vec<&dyn DirtySource> {
        let devices = self.shown.iter().filter_map(|device| device.dirty_log());
        let mut logs: Vec<&dyn DirtySource> = vec![&*self.writes];
        logs.extend(devices.map(|log| log as &dyn DirtySource));
        logs
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.guest.end();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            eprintln!("the guest's thread panicked");
        }
    }
}

impl Machine for Toy {
    fn id(&self) -> VmId {
        VmId([7; 16])
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        let describe = |device: &Arc<dyn Device>| {
            device.manifest().map_err(|error| MachineError::new("describing a device", error))
        };
        Ok(MachineManifest {
            machine: "toy/1".into(),
            accelerator: "software".into(),
            vcpus: 1,
            ram: vec![RamRegion { gpa: Gpa(0), len: LEN }],
            cpu: vec![],
            sections: BTreeMap::from([(SECTION.into(), 1)]),
            devices: self.shown.iter().map(describe).collect::<Result<_, _>>()?,
            ..MachineManifest::default()
        })
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        vec![self.writes.clone()]
    }

    fn devices(&self) -> Vec<MigratableDevice> {
        self.shown.iter().map(|device| MigratableDevice { device: device.clone(), pci: None }).collect()
    }

    fn irq_router(&self) -> Arc<dyn IrqRouter> {
        Arc::new(NoInterrupts)
    }

    fn pause(&self) -> Result<bool, MachineError> {
        Ok(self.guest.stop())
    }

    fn resume(&self, run: bool) -> Result<(), MachineError> {
        if run {
            self.guest.go();
        }
        Ok(())
    }

    fn save(&self, _: &Paused) -> Result<Vec<Section>, MachineError> {
        let bytes = self.guest.register().to_le_bytes().to_vec();
        Ok(vec![Section { name: SECTION.into(), version: 1, bytes }])
    }

    fn load(&self, sections: Vec<Section>) -> Result<(), MachineError> {
        let refuse = || MachineError::new("loading the machine", "the sections are not those of a toy");
        let [section] = sections.as_slice() else { return Err(refuse()) };
        let bytes = section.bytes.as_slice().try_into().map_err(|_| refuse())?;
        self.guest.set_register(u64::from_le_bytes(bytes));
        Ok(())
    }

    fn release_locks(&self) -> Result<(), LockError> {
        Ok(())
    }

    fn take_locks(&self) -> Result<(), LockError> {
        Ok(())
    }
}

/// Its guest asks its devices, and takes no interrupts.
struct NoInterrupts;

impl IrqRouter for NoInterrupts {
    fn commit(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(())
    }
}

impl fmt::Debug for NoInterrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NoInterrupts")
    }
}
