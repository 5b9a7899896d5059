//! The glue: everything here that knows of the migration library.
//!
//! A source lends it the running machine. A destination begins with RAM and an open device, and is made into a machine of what has
//! arrived.

use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use vfio_migration::compat::{MachineManifest, RamRegion};
use vfio_migration::device::{
    ConfigRules, ConfigState, DmaRange, DmaView, IrqRouter, MsiMessage, PciError, PciFunction, PciState,
    ResetCallback, VectorState, VfioUserDevice, VmmConnection,
};
use vfio_migration::memory::{AtomicBitmapLog, Coverage, DirtySource, GuestRam, MemoryError, RamKind};
use vfio_migration::types::{Bitmap, DeviceId, Epoch, Gpa, Granule, Iova, Range, VmId};
use vfio_migration::{
    Destination, DestinationOptions, IncomingDevice, IncomingFunction, IncomingMachine, LockError, Machine,
    MachineError, MachineState, MigratableDevice, NotBuilt, Paused, Section, Source, SourceOptions,
};

use crate::error::Error;
use crate::memory::PARTS;
use crate::pci::{Function, Vector};
use crate::vm::{Parts, Vm, VmState};

/// The guest that all of this is about.
const GUEST: VmId = VmId(*b"foreign-vmm-test");
/// The one section: the vCPU and the ports, as JSON.
const SECTION: (&str, u32) = ("foreign.vm", 1);
/// Longest pause of the guest: this is a test on machines that are shared.
const DOWNTIME_LIMIT: Duration = Duration::from_secs(10);

/// What the library needs of RAM and device, at both ends.
pub(crate) struct Lent {
    ram: Arc<GuestRam>,
    writes: Arc<AtomicBitmapLog>,
    device: Arc<VfioUserDevice>,
    id: DeviceId,
}

impl Lent {
    /// Lends what `parts` are. The device keeps its connection and its DMA mappings, which are told here.
    pub(crate) fn new(parts: &Parts) -> Result<Self, Error> {
        let ram = GuestRam::try_from(&parts.memory).map_err(Error::other("lending RAM"))?;
        let ram = Arc::new(ram);
        let writes =
            AtomicBitmapLog::new("vmm", &parts.memory).map_err(Error::other("lending the write log"))?;
        let id: DeviceId = "dev0".parse().map_err(Error::other("naming the device"))?;
        let client = Arc::clone(&parts.device);
        let reset = ResetCallback::new(move || Ok(client.reset()?));
        let connection = VmmConnection::new(Arc::clone(&parts.device), dma_view(&ram)?, reset);
        let device = VfioUserDevice::adopt(id.clone(), connection, Arc::clone(&ram));
        let device = Arc::new(device.map_err(Error::other("lending the device"))?);
        Ok(Self { ram, writes: Arc::new(writes), device, id })
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        let device = vfio_migration::device::Device::manifest(&*self.device);
        Ok(MachineManifest {
            machine: "foreign/1".into(),
            accelerator: "kvm".into(),
            vcpus: 1,
            ram: PARTS.map(|part| RamRegion { gpa: Gpa(part.gpa), len: part.len }).to_vec(),
            sections: [(SECTION.0.to_owned(), SECTION.1)].into(),
            devices: vec![device.map_err(failed("describing the device"))?],
            ..MachineManifest::default()
        })
    }
}

/// The device's DMA mappings, as `hardware` made them.
fn dma_view(ram: &GuestRam) -> Result<DmaView, Error> {
    let ranges = ram.regions().iter().map(|region| {
        let iova = Range::new(Iova(region.gpa.0), region.len).map_err(Error::other("lending the device"))?;
        let range = DmaRange::new(iova, region.offset);
        Ok(if region.kind == RamKind::SharedFile { range } else { range.served_by_message() })
    });
    Ok(DmaView::new(ranges.collect::<Result<Vec<_>, Error>>()?))
}

/// A machine that may leave.
pub(crate) struct Running {
    /// The machine.
    pub(crate) vm: Vm,
    lent: Arc<Lent>,
    /// Sabotage: the log of the vCPU's writes to anonymous memory is left out.
    forgets_anonymous: bool,
    /// The epoch under which this process owns the guest.
    epoch: AtomicU64,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("device", &self.lent.id).finish_non_exhaustive()
    }
}

/// A machine, for the library and whoever else holds it.
#[derive(Clone)]
pub(crate) struct Shared(pub(crate) Arc<Running>);

impl Shared {
    /// A machine in the state after a reset.
    pub(crate) fn new(parts: Parts, forgets_anonymous: bool) -> Result<Self, Error> {
        let lent = Arc::new(Lent::new(&parts)?);
        let vm = Vm::new(parts, None)?;
        Ok(Self(Arc::new(Running { vm, lent, forgets_anonymous, epoch: AtomicU64::new(0) })))
    }
}

impl Machine for Shared {
    fn id(&self) -> VmId {
        GUEST
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        self.0.lent.manifest()
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.0.lent.ram)
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        vec![Arc::new(VcpuLog(Arc::clone(&self.0))), self.0.lent.writes.clone()]
    }

    fn devices(&self) -> Vec<MigratableDevice> {
        let function = Arc::new(OnBus(self.0.lent.id.clone(), self.0.vm.function.clone()));
        vec![MigratableDevice { device: self.0.lent.device.clone(), pci: Some(function) }]
    }

    fn irq_router(&self) -> Arc<dyn IrqRouter> {
        Arc::new(Router(Arc::clone(&self.0)))
    }

    fn pause(&self) -> Result<bool, MachineError> {
        self.0.vm.vcpu.pause().map_err(failed("pausing the guest"))
    }

    fn resume(&self, run: bool) -> Result<(), MachineError> {
        if !run {
            return Ok(());
        }
        self.0.vm.function.rearm().map_err(failed("connecting interrupts"))?;
        self.0.vm.vcpu.resume().map_err(failed("resuming the guest"))
    }

    fn save(&self, _: &Paused) -> Result<Vec<Section>, MachineError> {
        let state = self.0.vm.save().map_err(failed("saving the machine"))?;
        let bytes = serde_json::to_vec(&state).map_err(failed("saving the machine"))?;
        Ok(vec![Section { name: SECTION.0.into(), version: SECTION.1, bytes }])
    }

    fn load(&self, _: Vec<Section>) -> Result<(), MachineError> {
        Err(MachineError::new("loading the machine", "it is made of its state: see Arriving"))
    }

    fn release_locks(&self) -> Result<(), LockError> {
        Ok(())
    }

    fn take_locks(&self) -> Result<(), LockError> {
        Ok(())
    }
}

/// RAM and a device, on their way to being a machine.
struct Arriving {
    parts: Parts,
    lent: Arc<Lent>,
    /// The machine, for whoever goes on with it.
    made: Arc<OnceLock<Shared>>,
}

impl IncomingMachine for Arriving {
    fn id(&self) -> VmId {
        GUEST
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        self.lent.manifest()
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.lent.ram)
    }

    fn incoming_devices(&self) -> Vec<IncomingDevice> {
        vec![IncomingDevice { device: self.lent.device.clone(), pci: IncomingFunction::Later }]
    }

    fn finish(&self, state: MachineState) -> Result<Arc<dyn Machine>, MachineError> {
        let wrong = || MachineError::new("making the machine", "the sections are not those of this VMM");
        let [section] = state.sections.as_slice() else { return Err(wrong()) };
        if (section.name.as_str(), section.version) != SECTION {
            return Err(wrong());
        }
        let state: VmState = serde_json::from_slice(&section.bytes).map_err(failed("reading the machine"))?;
        let vm = Vm::new(self.parts.clone(), Some(&state)).map_err(failed("making the machine"))?;
        let running =
            Running { vm, lent: self.lent.clone(), forgets_anonymous: false, epoch: AtomicU64::new(0) };
        let made = self.made.get_or_init(|| Shared(Arc::new(running)));
        Ok(Arc::new(made.clone()))
    }

    fn release_locks(&self) -> Result<(), LockError> {
        Ok(())
    }

    fn take_locks(&self) -> Result<(), LockError> {
        Ok(())
    }
}

/// KVM's log of the vCPU's writes.
#[derive(Debug)]
struct VcpuLog(Arc<Running>);

impl DirtySource for VcpuLog {
    fn name(&self) -> String {
        "kvm".into()
    }

    fn coverage(&self) -> Coverage {
        Coverage::All
    }

    fn start(&self) -> Result<(), MemoryError> {
        self.0.vm.log_writes(true).map_err(|error| self.failed("starting it", error))
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        let regions = self.0.vm.written().map_err(|error| self.failed("reading it", error))?;
        let mut offset = 0;
        for (region, (words, part)) in regions.iter().zip(PARTS).enumerate() {
            if region > 0 || !self.0.forgets_anonymous {
                into.or_scaled(offset, words, Granule::PAGE);
            }
            offset += part.len;
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), MemoryError> {
        self.0.vm.log_writes(false).map_err(|error| self.failed("stopping it", error))
    }
}

impl VcpuLog {
    fn failed(&self, doing: &str, error: Error) -> MemoryError {
        MemoryError::DirtyLog { source_name: self.name(), doing: doing.into(), source: error.into() }
    }
}

/// The function on this VMM's bus.
#[derive(Debug)]
struct OnBus(DeviceId, Arc<Function>);

impl PciFunction for OnBus {
    fn id(&self) -> &DeviceId {
        &self.0
    }

    fn save_config(&self) -> Result<ConfigState, PciError> {
        let (bytes, bars) = self.1.config();
        Ok(ConfigState { bytes: bytes.to_vec(), bars })
    }

    fn save_interrupts(&self, config: ConfigState) -> Result<PciState, PciError> {
        let taken = self.1.take_vectors().map_err(|error| self.failed("saving interrupts", error))?;
        let vectors = taken.into_iter().map(|(vector, pending)| VectorState {
            message: MsiMessage { address: vector.address, data: vector.data },
            masked: vector.masked,
            pending,
        });
        let (config, bars) = (config.bytes, config.bars);
        Ok(PciState {
            config,
            bars,
            vectors: vectors.collect(),
            msix: true,
            msi_pending: 0,
            intx_pending: false,
        })
    }

    fn restore_config(&self, state: &PciState, _: &ConfigRules) -> Result<(), PciError> {
        if let Some((offset, source_byte, destination_byte)) = self.1.differs(&state.config) {
            let device = self.0.clone();
            return Err(PciError::ConfigMismatch {
                device,
                offset,
                source_byte,
                destination_byte,
                mask: 0xff,
            });
        }
        self.1.load_config(&state.config).map_err(|error| self.failed("loading config space", error))
    }

    fn stage_interrupts(&self, state: &PciState) -> Result<(), PciError> {
        let vectors = state.vectors.iter().map(|vector| Vector {
            address: vector.message.address,
            data: vector.message.data,
            masked: vector.masked,
        });
        let vectors: Vec<_> = vectors.collect();
        self.1.load_vectors(&vectors).map_err(|error| self.failed("loading the MSI-X table", error))
    }

    fn connect_interrupts(&self, state: &PciState) -> Result<u32, PciError> {
        let pending: Vec<_> = state.vectors.iter().map(|vector| vector.pending).collect();
        let connected =
            self.1.connect(&pending).map_err(|error| self.failed("connecting interrupts", error))?;
        Ok(u32::try_from(connected).unwrap_or(u32::MAX))
    }

    fn undo(&self) -> Result<(), PciError> {
        self.1.clear().map_err(|error| self.failed("clearing the function", error))
    }
}

impl OnBus {
    fn failed(&self, doing: &str, error: Error) -> PciError {
        PciError::Failed { device: self.0.clone(), doing: doing.into(), source: error.into() }
    }
}

/// The routes of all functions, which are one.
#[derive(Debug)]
struct Router(Arc<Running>);

impl IrqRouter for Router {
    fn commit(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(self.0.vm.routes.commit(&self.0.vm.fd)?)
    }
}

/// Moves the guest of `from` into RAM and the device of `into`. What it became there, and how long it stood.
pub(crate) fn move_guest(from: &Shared, into: Parts) -> Result<(Shared, Duration), Error> {
    let (one_end, other_end) = UnixStream::pair().map_err(Error::other("making a connection"))?;
    let (lent, made) = (Arc::new(Lent::new(&into)?), Arc::new(OnceLock::new()));
    let arrival = Arriving { parts: into, lent, made: made.clone() };
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            let mut destination = Destination::over(other_end.into(), DestinationOptions::default())?;
            destination.accept(|_| Ok::<_, NotBuilt>(arrival))
        });
        let mut options = SourceOptions::default();
        options.downtime_limit = DOWNTIME_LIMIT;
        options.epoch = Epoch(from.0.epoch.load(Ordering::Relaxed));
        let left = Source::new(Arc::new(from.clone()), options).migrate_over(one_end.into(), |_| ());
        let arrived = arriving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let left = left.map_err(Error::other("migrating"))?;
        let arrived = arrived.map_err(Error::other("receiving"))?;
        let (Some(there), Some(downtime)) = (made.get().cloned(), left.downtime) else {
            return Err(Error::Failed(
                "migrating",
                format!("the guest does not run there: {:?}", left.guest).into(),
            ));
        };
        there.0.epoch.store(arrived.epoch.0, Ordering::Relaxed);
        Ok((there, downtime))
    })
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    doing: &'static str,
) -> impl Fn(E) -> MachineError {
    move |error| MachineError::new(doing, error)
}
