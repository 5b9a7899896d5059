//! A machine small enough to read: RAM, a thread that writes it, and devices that do DMA.
#![allow(
    unused_imports,
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "shared by several test programs, each of which uses a part"
)]

pub mod pki;
pub mod proxy;
pub mod secure;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_migration::{
    Arrived, Completed, Destination, DestinationOptions, IncomingError, IncomingOffer, LockError, Machine,
    MachineError, MigratableDevice, MigrateError, NotBuilt, Paused, Section, Source, SourceOptions, Uri,
};
use vfio_migration_compat::{MachineManifest, RamRegion};
use vfio_migration_device::{Device, IrqRouter};
use vfio_migration_memory::{DirtySource, GuestRam, RamSpec, WriteLog};
use vfio_migration_types::{Gpa, PAGE_SIZE, Phase, RamOffset, VmId};

pub use self::secure::{HOST, plain_destination, plain_source, tls_destination, tls_proxy, tls_source};
pub use vfio_migration_device::testing::{FakeDevice, FakeDeviceKind, FakeFault, FakeFunction};

pub const VM: VmId = VmId([0x42; 16]);

/// What a toy is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    pub pages: u64,
    /// Pages that the guest keeps writing: the first ones.
    pub hot: u64,
    pub devices: Vec<FakeDeviceKind>,
    /// The devices are handed over with their PCI functions.
    pub functions: bool,
    pub ram: ToyRam,
}

/// What a toy's RAM is made of.
#[derive(Clone, Copy, Debug)]
pub enum ToyRam {
    /// Two regions that the library allocates.
    Two,
    /// Four of them.
    Four,
    /// Four that the toy lends: a file mapped shared, private anonymous memory, a file mapped private and shared anonymous
    /// memory, from that one of them on. The files are full of what is no guest's.
    Lent(usize),
}

impl ToyRam {
    fn make(self, pages: u64) -> Arc<GuestRam> {
        let regions: u64 = if matches!(self, Self::Two) { 2 } else { 4 };
        let each = pages / regions;
        let lens = (0..regions).map(|n| if n + 1 < regions { each } else { pages - n * each } * PAGE_SIZE);
        let specs: Vec<_> =
            (0..).zip(lens).map(|(n, len): (u64, _)| RamSpec { gpa: Gpa(n * (4 << 30)), len }).collect();
        let Self::Lent(first) = self else { return Arc::new(GuestRam::new("toy", &specs).unwrap()) };
        let lent = (first..).zip(&specs).map(|(kind, spec)| lent_region(kind % 4, spec)).collect();
        let memory = vm_memory::GuestMemoryMmap::from_regions(lent).unwrap();
        Arc::new(GuestRam::try_from(&memory).unwrap())
    }
}

fn lent_region(kind: usize, spec: &RamSpec) -> vm_memory::GuestRegionMmap {
    const READ_WRITE: i32 = 3;
    const SHARED: i32 = 1;
    const PRIVATE: i32 = 2;
    const ANONYMOUS: i32 = 0x20;
    let flags = [SHARED, PRIVATE | ANONYMOUS, PRIVATE, SHARED | ANONYMOUS][kind];
    let len = usize::try_from(spec.len).unwrap();
    let mut builder =
        vm_memory::mmap::MmapRegionBuilder::new(len).with_mmap_prot(READ_WRITE).with_mmap_flags(flags);
    if flags & ANONYMOUS == 0 {
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &vec![0xee; len + 4096]).unwrap();
        builder = builder.with_file_offset(vm_memory::FileOffset::new(file, PAGE_SIZE));
    }
    vm_memory::GuestRegionMmap::new(builder.build().unwrap(), vm_memory::GuestAddress(spec.gpa.0)).unwrap()
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            pages: 2048,
            hot: 64,
            devices: vec![FakeDeviceKind::default()],
            functions: true,
            ram: ToyRam::Two,
        }
    }
}

pub struct Toy {
    ram: Arc<GuestRam>,
    log: Arc<WriteLog>,
    /// Dirty sources in place of the vCPU's log.
    pub sources: Mutex<Option<Vec<Arc<dyn DirtySource>>>>,
    devices: Vec<Arc<FakeDevice>>,
    functions: bool,
    gate: Arc<Gate>,
    vcpu: Mutex<Option<JoinHandle<()>>>,
    /// What the guest has written so far: its own register.
    pub sequence: Arc<AtomicU64>,
    pub journal: Arc<Mutex<Vec<String>>>,
    pub locked: AtomicBool,
    pub lock_fault: AtomicBool,
    pub lock_tries: AtomicU64,
    pub save_panics: AtomicBool,
    /// Where reading the machine out writes RAM, as a paravirtual clock does.
    clock: RamOffset,
    /// How often letting the guest go on still fails.
    pub resume_faults: AtomicU64,
    /// What its VMM tells the other.
    pub configuration: Mutex<Vec<u8>>,
    /// Digest of RAM when everything had been loaded.
    pub loaded_digest: Mutex<Option<[u8; 32]>>,
    /// The hot pages when the machine was read out, and nothing wrote them any more.
    pub saved_hot: Mutex<Vec<u8>>,
}

/// Where the toy's vCPU stops.
#[derive(Default)]
struct Gate {
    state: Mutex<(bool, bool)>,
    changed: Condvar,
    quit: AtomicBool,
}

impl Toy {
    pub fn new(plan: &Plan) -> Arc<Self> {
        let ram = plan.ram.make(plan.pages);
        let log = Arc::new(WriteLog::new("vcpu", ram.size()));
        let journal = Arc::new(Mutex::new(Vec::new()));
        let devices: Vec<_> = (0..)
            .zip(&plan.devices)
            .map(|(index, kind)| FakeDevice::new(index, kind.clone(), &ram, &journal))
            .collect();
        let gate = Arc::new(Gate::default());
        let sequence = Arc::new(AtomicU64::new(0));
        let vcpu = {
            let (ram, log, gate, sequence) = (ram.clone(), log.clone(), gate.clone(), sequence.clone());
            let hot = plan.hot;
            std::thread::spawn(move || {
                while gate.pass() {
                    let n = sequence.fetch_add(1, Ordering::Relaxed) + 1;
                    let at = RamOffset((n * 7 % hot) * PAGE_SIZE + (n % 500) * 8);
                    ram.write_u64(at, n).unwrap();
                    log.mark(at, 8);
                    std::thread::sleep(Duration::from_micros(50));
                }
            })
        };
        Arc::new(Self {
            ram,
            log,
            sources: Mutex::default(),
            devices,
            functions: plan.functions,
            gate,
            vcpu: Mutex::new(Some(vcpu)),
            sequence,
            journal,
            locked: AtomicBool::new(false),
            lock_fault: AtomicBool::new(false),
            lock_tries: AtomicU64::new(0),
            save_panics: AtomicBool::new(false),
            clock: RamOffset(plan.hot * PAGE_SIZE + 16),
            resume_faults: AtomicU64::new(0),
            loaded_digest: Mutex::new(None),
            configuration: Mutex::default(),
            saved_hot: Mutex::new(vec![0; usize::try_from(plan.hot * PAGE_SIZE).unwrap()]),
        })
    }

    /// A toy that has been booted: RAM partly filled, devices and vCPU running.
    pub fn booted(plan: &Plan) -> Arc<Self> {
        let toy = Self::new(plan);
        for page in (0..plan.pages).filter(|page| page % 3 != 1) {
            toy.ram.write_u64(RamOffset(page * PAGE_SIZE + 8), page + 1).unwrap();
        }
        for device in &toy.devices {
            device.power_on();
        }
        toy.locked.store(true, Ordering::Relaxed);
        toy.run();
        toy
    }

    /// Fills RAM with what cannot be told from noise.
    pub fn fill(&self, seed: u64) {
        let mut state = seed;
        for word in 0..self.ram.size() / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            self.ram.write_u64(RamOffset(word * 8), state).unwrap();
        }
    }

    /// Writes `bytes` where nobody else writes.
    pub fn plant(&self, bytes: &[u8]) {
        let at = self.clock.0 + 8 * PAGE_SIZE;
        for (index, word) in (0..).zip(bytes.chunks(8)) {
            let mut whole = [0; 8];
            whole[..word.len()].copy_from_slice(word);
            self.ram.write_u64(RamOffset(at + index * 8), u64::from_le_bytes(whole)).unwrap();
        }
    }

    /// The state of its first device.
    pub fn device_state(&self) -> Vec<u8> {
        self.devices.first().map(|device| device.frozen()).unwrap_or_default()
    }

    /// The log of what its vCPU writes.
    pub fn vcpu_log(&self) -> Arc<WriteLog> {
        self.log.clone()
    }

    pub fn run(&self) {
        self.gate.set(true);
    }

    pub fn runs(&self) -> bool {
        self.gate.state.lock().unwrap().0
    }

    /// Waits for proof that the guest runs: its register moves.
    pub fn prove_running(&self) {
        let before = self.sequence.load(Ordering::Relaxed);
        wait_for("the guest to run", || self.sequence.load(Ordering::Relaxed) > before + 5);
        for device in &self.devices {
            device.prove_running();
        }
    }

    pub fn prove_standing(&self) {
        assert!(!self.runs());
        let before = self.sequence.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(self.sequence.load(Ordering::Relaxed), before, "the guest runs");
    }

    /// What the machine's clock page says: what was written when it was read out.
    pub fn clock(&self) -> u64 {
        self.ram.read_u64(self.clock).unwrap()
    }

    pub fn device(&self, index: usize) -> &FakeDevice {
        &self.devices[index]
    }

    /// What must be true of a source that got its guest back.
    pub fn prove_restored(&self) {
        self.prove_running();
        assert!(self.locked.load(Ordering::Relaxed), "the storage lock was not taken back");
        let mut bits =
            vfio_migration_types::Bitmap::new(self.ram.size(), vfio_migration_types::Granule::PAGE);
        assert!(self.log.report(&mut bits).is_err(), "dirty logging goes on");
        for device in &self.devices {
            assert_eq!(device.at(), vfio_migration_types::MigrationState::Running);
            assert!(device.log_is_off(), "a device's dirty logging goes on");
        }
    }

    fn note(&self, what: impl Into<String>) {
        self.journal.lock().unwrap().push(what.into());
    }
}

impl Gate {
    fn set(&self, run: bool) {
        let mut state = self.state.lock().unwrap();
        state.0 = run;
        self.changed.notify_all();
        // The vCPU says when it stands.
        while !run && state.1 {
            state = self.changed.wait(state).unwrap();
        }
    }

    fn pass(&self) -> bool {
        let mut state = self.state.lock().unwrap();
        loop {
            if self.quit.load(Ordering::Relaxed) {
                state.1 = false;
                self.changed.notify_all();
                return false;
            }
            state.1 = state.0;
            if state.0 {
                return true;
            }
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap();
        }
    }
}

impl Drop for Toy {
    fn drop(&mut self) {
        self.gate.quit.store(true, Ordering::Relaxed);
        self.gate.changed.notify_all();
        let vcpu = self.vcpu.lock().unwrap().take();
        vcpu.map(JoinHandle::join);
    }
}

impl Machine for Toy {
    fn id(&self) -> VmId {
        VM
    }

    fn manifest(&self) -> Result<MachineManifest, MachineError> {
        let devices = self.devices.iter().map(|device| device.manifest().unwrap()).collect();
        let ram =
            self.ram.regions().iter().map(|region| RamRegion { gpa: region.gpa, len: region.len }).collect();
        Ok(MachineManifest {
            machine: "toy/1".into(),
            accelerator: "software".into(),
            vcpus: 1,
            ram,
            cpu: vec![],
            sections: BTreeMap::from([("toy.vcpu".into(), 1)]),
            devices,
            ..MachineManifest::default()
        })
    }

    fn configuration(&self) -> Result<Vec<u8>, MachineError> {
        Ok(self.configuration.lock().unwrap().clone())
    }

    fn ram(&self) -> Arc<GuestRam> {
        self.ram.clone()
    }

    fn dirty_sources(&self) -> Vec<Arc<dyn DirtySource>> {
        self.sources.lock().unwrap().clone().unwrap_or_else(|| vec![self.log.clone()])
    }

    fn devices(&self) -> Vec<MigratableDevice> {
        let pci = |device: &Arc<FakeDevice>| Arc::new(FakeFunction(device.clone())) as Arc<_>;
        self.devices
            .iter()
            .map(|device| MigratableDevice {
                device: device.clone(),
                pci: self.functions.then(|| pci(device)),
            })
            .collect()
    }

    fn irq_router(&self) -> Arc<dyn IrqRouter> {
        Arc::new(Router(self.journal.clone()))
    }

    fn pause(&self) -> Result<bool, MachineError> {
        let ran = self.runs();
        self.gate.set(false);
        self.note("pause");
        Ok(ran)
    }

    fn resume(&self, run: bool) -> Result<(), MachineError> {
        if self
            .resume_faults
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            .is_ok()
        {
            return Err(MachineError::new("resuming", "a vCPU does not run"));
        }
        self.note(if run { "resume" } else { "stand" });
        self.gate.set(run);
        Ok(())
    }

    fn save(&self, _: &Paused) -> Result<Vec<Section>, MachineError> {
        assert!(!self.save_panics.load(Ordering::Relaxed), "as intended");
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.ram.write_u64(self.clock, sequence).unwrap();
        self.log.mark(self.clock, 8);
        self.ram.read(RamOffset(0), &mut self.saved_hot.lock().unwrap()).unwrap();
        let bytes = sequence.to_le_bytes().to_vec();
        Ok(vec![Section { name: "toy.vcpu".into(), version: 1, bytes }])
    }

    fn load(&self, sections: Vec<Section>) -> Result<(), MachineError> {
        let [section] = sections.as_slice() else {
            return Err(MachineError::new("loading", "not one section"));
        };
        if (section.name.as_str(), section.version) != ("toy.vcpu", 1) {
            return Err(MachineError::new("loading", "an unknown section"));
        }
        let bytes =
            section.bytes.as_slice().try_into().map_err(|_| MachineError::new("loading", "not 8 bytes"))?;
        self.sequence.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        *self.loaded_digest.lock().unwrap() = Some(self.ram.digest().unwrap());
        self.note("load");
        Ok(())
    }

    fn release_locks(&self) -> Result<(), LockError> {
        self.locked.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn take_locks(&self) -> Result<(), LockError> {
        self.lock_tries.fetch_add(1, Ordering::Relaxed);
        if self.lock_fault.load(Ordering::Relaxed) {
            return Err(LockError { lock: "/disk".into(), taking: true, source: "held by somebody".into() });
        }
        self.locked.store(true, Ordering::Relaxed);
        Ok(())
    }
}

#[derive(Debug)]
struct Router(Arc<Mutex<Vec<String>>>);

impl IrqRouter for Router {
    fn commit(&self) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.0.lock().unwrap().push("commit".into());
        Ok(())
    }
}

/// How both sides of one attempt ended.
pub struct Both {
    pub source: Result<Completed, MigrateError>,
    pub destination: Result<Arrived, IncomingError>,
    pub machine: Arc<Toy>,
}

impl Both {
    pub fn unwrap(self) -> (Completed, Arrived, Arc<Toy>) {
        match (self.source, self.destination) {
            (Ok(completed), Ok(arrived)) => (completed, arrived, self.machine),
            (source, destination) => panic!("source {source:?}\ndestination {destination:?}"),
        }
    }
}

/// Migrates `source` to a new toy of the same plan.
pub fn migrate(
    source: &Arc<Toy>,
    plan: &Plan,
    uri: &str,
    options: SourceOptions,
    incoming: DestinationOptions,
) -> Both {
    migrate_by(source, plan, uri, options, incoming, |_, to| to.clone(), |_| {})
}

/// The same; `route` says where the source connects to, `steer` gets the source's handle before it begins.
pub fn migrate_by(
    source: &Arc<Toy>,
    plan: &Plan,
    uri: &str,
    options: SourceOptions,
    incoming: DestinationOptions,
    route: impl FnOnce(&vfio_migration::IncomingControl, &Uri) -> Uri,
    steer: impl FnOnce(vfio_migration::Control),
) -> Both {
    migrate_into(source, Toy::new(plan), uri, options, incoming, route, steer)
}

/// The same, to a toy that was made before: one that fails, as a rule.
pub fn migrate_into(
    source: &Arc<Toy>,
    machine: Arc<Toy>,
    uri: &str,
    options: SourceOptions,
    incoming: DestinationOptions,
    route: impl FnOnce(&vfio_migration::IncomingControl, &Uri) -> Uri,
    steer: impl FnOnce(vfio_migration::Control),
) -> Both {
    let mut destination = Destination::listen(&uri.parse().unwrap(), incoming).unwrap();
    let to = route(&destination.control(), destination.local());
    let built = machine.clone();
    std::thread::scope(|scope| {
        let control = destination.control();
        let arriving = scope.spawn(move || {
            let arrived = destination.accept(|_: &IncomingOffer| Ok::<Arc<dyn Machine>, NotBuilt>(built));
            if arrived.is_ok() {
                destination.answer_queries(Duration::from_secs(30)).unwrap();
            }
            arrived
        });
        let session = Source::new(source.clone(), options);
        steer(session.control());
        let source = session.migrate_to(&to, |_| {});
        // Nobody comes any more, or asks any more. An abort or a refusal ends the destination without help, if it heard of the
        // attempt.
        let heard = control.progress().is_some_and(|progress| progress.phase > Phase::Plan);
        let ends = match &source {
            Err(MigrateError::Aborted(_) | MigrateError::Refused(_)) => heard,
            _ => false,
        };
        if !ends {
            control.cancel();
        }
        let destination = arriving.join().unwrap();
        Both { source, destination, machine }
    })
}

/// Checks that everything arrived: RAM, the guest's registers, the devices.
pub fn prove_moved(source: &Toy, destination: &Toy) {
    source.prove_standing();
    let here = source.ram.digest().unwrap();
    assert_eq!(Some(here), *destination.loaded_digest.lock().unwrap(), "RAM differs");
    for (from, to) in source.devices.iter().zip(&destination.devices) {
        assert_eq!(from.frozen(), to.loaded(), "the state of a device differs");
    }
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(20), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Descriptors and threads of this process.
pub fn resources() -> (usize, usize) {
    let count = |dir: &str| std::fs::read_dir(dir).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}
