//! A device made of some state and a thread that does DMA, which fails where it is asked to. Its sessions are those of
//! every back end ([`crate::session`]); the calls under them are made up here.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use vfio_migration_compat::{DeviceManifest, DirtyTracking, Parameter, PciIdentity};
use vfio_migration_memory::{DirtySource, GuestRam, WriteLog};
use vfio_migration_types::{
    Bitmap, DeviceId, Granule, MigrationFlags, MigrationState as State, PAGE_SIZE, RamOffset,
};

use crate::contract::{
    Capabilities, CapabilitiesError, Device, DirtyLog, PrecopyProgress, ResumingSession, SavingSession,
};
use crate::error::{DeviceError, TransitionError};
use crate::pci::{ConfigRules, ConfigState, PciError, PciFunction, PciState, VectorState};
use crate::session::port::{Port, PortError, PortStream};
use crate::session::state_machine::StateMachine;

/// Bytes of a piece of state.
const PIECE: usize = 512;

/// Time in which DMA must show.
const PATIENCE: Duration = Duration::from_secs(60);

/// Properties of a fake device.
#[derive(Clone, Debug)]
pub struct FakeDeviceKind {
    /// The optional states that it has.
    pub flags: MigrationFlags,
    /// Whether it estimates what is left in pre-copy.
    pub precopy_info: bool,
    /// Whether it logs its DMA.
    pub dirty_log: bool,
    /// Pieces of state, of 512 bytes.
    pub pieces: usize,
    /// Pages at the end of RAM that it writes by DMA.
    pub dma_pages: u64,
    /// Time that the last piece of state takes to read.
    pub slow_stop: Duration,
    /// The device's name, where it is not `toyN`.
    pub name: Option<String>,
    /// Number of vectors that it declares.
    pub vectors: u32,
}

impl Default for FakeDeviceKind {
    fn default() -> Self {
        Self {
            flags: MigrationFlags { p2p: true, pre_copy: true },
            precopy_info: true,
            dirty_log: true,
            pieces: 300,
            dma_pages: 8,
            slow_stop: Duration::ZERO,
            name: None,
            vectors: 1,
        }
    }
}

/// The place at which a fake device fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FakeFault {
    /// The arc into PRE_COPY.
    BeginPrecopy,
    /// A read of state in PRE_COPY or PRE_COPY_P2P.
    ReadPrecopy,
    /// The arc PRE_COPY to PRE_COPY_P2P.
    GoP2p,
    /// The arc into STOP_COPY.
    GoStopCopy,
    /// A read of state in STOP_COPY.
    ReadStopCopy,
    /// The arc into RESUMING.
    BeginResuming,
    /// A write of state.
    Write,
    /// The arc RESUMING to STOP.
    Finish,
    /// RUNNING to RUNNING_P2P, and back.
    SetRunning,
    /// STOP to RUNNING_P2P or RUNNING.
    BackToRunning,
    /// The arc by which a saving session ends.
    EndSaving,
    /// The questions how much is left. In PRE_COPY it also fails.
    Progress,
}

impl FakeFault {
    fn of_arc(from: State, to: State) -> Option<Self> {
        match (from, to) {
            (State::PreCopy, State::PreCopyP2p) => Some(Self::GoP2p),
            (_, State::PreCopy | State::PreCopyP2p) if !from.is_saving() => Some(Self::BeginPrecopy),
            (_, State::Stop | State::Running | State::RunningP2p) if from.is_saving() => {
                Some(Self::EndSaving)
            }
            (_, State::StopCopy) => Some(Self::GoStopCopy),
            (_, State::Resuming) => Some(Self::BeginResuming),
            (State::Resuming, State::Stop) => Some(Self::Finish),
            (State::Stop, State::Running | State::RunningP2p) => Some(Self::BackToRunning),
            (State::Running | State::RunningP2p, State::Running | State::RunningP2p) => {
                Some(Self::SetRunning)
            }
            _ => None,
        }
    }
}

/// A device in this process.
pub struct FakeDevice {
    core: Arc<Core>,
    machine: Arc<StateMachine>,
    dma: Option<JoinHandle<()>>,
}

struct Core {
    id: DeviceId,
    kind: FakeDeviceKind,
    guts: Mutex<Guts>,
    log: WriteLog,
    quit: AtomicBool,
    on: AtomicBool,
    blocks: AtomicU64,
    /// Whether its manifest names another model.
    another: AtomicBool,
    journal: Arc<Mutex<Vec<String>>>,
    fault: Mutex<Option<FakeFault>>,
    hang: Mutex<Hang>,
    let_go: Condvar,
    reinit: AtomicBool,
    reset_fault: AtomicBool,
}

/// Calls that do not return before they are let go.
#[derive(Default)]
struct Hang {
    at: Option<FakeFault>,
    hanging: usize,
}

struct Guts {
    at: State,
    pieces: Vec<[u8; PIECE]>,
    changed: Vec<bool>,
    /// Of a saving session: bytes on their way, pieces left of the initial data, and whether its end was queued.
    queue: Vec<u8>,
    initial: usize,
    ended: bool,
    /// Of a resuming session: what was written.
    incoming: Vec<u8>,
    /// The state that was loaded last.
    loaded: Vec<u8>,
}

impl FakeDevice {
    /// Device `index` of a machine with `ram`, which has it do DMA to its last pages. It notes in `journal` where it
    /// goes.
    pub fn new(
        index: u64,
        kind: FakeDeviceKind,
        ram: &Arc<GuestRam>,
        journal: &Arc<Mutex<Vec<String>>>,
    ) -> Arc<Self> {
        let guts = Guts {
            at: State::Running,
            pieces: vec![[0; PIECE]; kind.pieces],
            changed: vec![false; kind.pieces],
            queue: Vec::new(),
            initial: 0,
            ended: false,
            incoming: Vec::new(),
            loaded: Vec::new(),
        };
        let core = Arc::new(Core {
            id: DeviceId::new(kind.name.clone().unwrap_or(format!("toy{index}"))).unwrap(),
            guts: Mutex::new(guts),
            log: WriteLog::new(format!("toy{index}"), ram.size()),
            quit: AtomicBool::new(false),
            on: AtomicBool::new(false),
            blocks: AtomicU64::new(0),
            another: AtomicBool::new(false),
            journal: journal.clone(),
            fault: Mutex::new(None),
            hang: Mutex::default(),
            let_go: Condvar::new(),
            reinit: AtomicBool::new(false),
            reset_fault: AtomicBool::new(false),
            kind,
        });
        let dma = {
            let (core, ram) = (core.clone(), ram.clone());
            // Behind the guest's.
            let pages = core.kind.dma_pages;
            let first = ram.size() / PAGE_SIZE - pages * (index + 1);
            std::thread::spawn(move || {
                while !core.quit.load(Ordering::Relaxed) {
                    core.tick(&ram, first, pages);
                    std::thread::sleep(Duration::from_micros(100));
                }
            })
        };
        let machine =
            StateMachine::new(core.id.clone(), Box::new(FakePort(core.clone())), Some(core.kind.flags));
        Arc::new(Self { core, machine: Arc::new(machine), dma: Some(dma) })
    }

    /// Fills its state, and begins to do DMA.
    pub fn power_on(&self) {
        let mut guts = self.core.guts.lock().unwrap();
        for (index, piece) in guts.pieces.iter_mut().enumerate() {
            piece.fill((index % 251) as u8);
        }
        self.core.on.store(true, Ordering::Relaxed);
    }

    /// Makes it fail at `fault` from now on.
    pub fn fail_at(&self, fault: FakeFault) {
        *self.core.fault.lock().unwrap() = Some(fault);
    }

    /// Makes what could fail at `fault` not return from now on.
    pub fn hang_at(&self, fault: FakeFault) {
        self.core.hang.lock().unwrap().at = Some(fault);
    }

    /// Whether a call does not return.
    pub fn hangs(&self) -> bool {
        self.core.hang.lock().unwrap().hanging > 0
    }

    /// Lets go what does not return, now and later.
    pub fn let_go(&self) {
        self.core.hang.lock().unwrap().at = None;
        self.core.let_go.notify_all();
    }

    /// Makes its resets fail from now on.
    pub fn fail_resets(&self) {
        self.core.reset_fault.store(true, Ordering::Relaxed);
    }

    /// Once its initial data was read, it has new initial data, once.
    pub fn begin_anew(&self) {
        self.core.reinit.store(true, Ordering::Relaxed);
    }

    /// A copy of its state now.
    pub fn frozen(&self) -> Vec<u8> {
        self.core.guts.lock().unwrap().pieces.iter().flatten().copied().collect()
    }

    /// The state that it was loaded with last.
    pub fn loaded(&self) -> Vec<u8> {
        self.core.guts.lock().unwrap().loaded.clone()
    }

    /// The state of its migration.
    pub fn at(&self) -> State {
        self.core.at()
    }

    /// Waits for proof that it runs: it does DMA.
    pub fn prove_running(&self) {
        assert!(self.at().is_active());
        let blocks = || self.core.blocks.load(Ordering::Relaxed);
        let (before, begun) = (blocks(), Instant::now());
        while blocks() <= before + 2 {
            assert!(begun.elapsed() < PATIENCE, "waited in vain for DMA");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Makes its manifest name another model from now on.
    pub fn become_another(&self) {
        self.core.another.store(true, Ordering::Relaxed);
    }

    /// Whether its DMA log is not on.
    pub fn log_is_off(&self) -> bool {
        let mut bits = Bitmap::new(1 << 20, Granule::PAGE);
        self.core.log.report(&mut bits).is_err()
    }
}

impl Core {
    fn at(&self) -> State {
        self.guts.lock().unwrap().at
    }

    fn check(&self, fault: Option<FakeFault>, errno: Errno) -> Result<(), PortError> {
        let mut hang = self.hang.lock().unwrap();
        while fault.is_some() && hang.at == fault {
            hang.hanging += 1;
            hang = self.let_go.wait(hang).unwrap();
            hang.hanging -= 1;
        }
        drop(hang);
        if fault.is_some() && *self.fault.lock().unwrap() == fault {
            return Err(scripted(errno));
        }
        Ok(())
    }

    fn note(&self, what: &str) {
        self.journal.lock().unwrap().push(format!("{} {what}", self.id));
    }

    /// A piece of state changes, and a page is written by DMA: together or not at all.
    fn tick(&self, ram: &GuestRam, first: u64, pages: u64) {
        let mut guts = self.guts.lock().unwrap();
        if !guts.at.is_active() || !self.on.load(Ordering::Relaxed) {
            return;
        }
        let n = self.blocks.fetch_add(1, Ordering::Relaxed) + 1;
        let at = n as usize * 13 % guts.pieces.len();
        guts.pieces[at][..8].copy_from_slice(&n.to_le_bytes());
        guts.changed[at] = true;
        let at = RamOffset((first + n % pages) * PAGE_SIZE + (n % 512) * 8);
        ram.write_u64(at, n).unwrap();
        self.log.mark(at, 8);
    }

    /// Takes what was written as the state.
    fn load(&self, guts: &mut Guts) {
        let incoming = std::mem::take(&mut guts.incoming);
        let mut rest = incoming.as_slice();
        let mut whole = false;
        while let Some((index, tail)) = rest.split_first_chunk::<8>() {
            let index = u64::from_le_bytes(*index);
            if index == u64::MAX {
                let (blocks, tail) = tail.split_first_chunk::<8>().expect("a whole trailer");
                self.blocks.store(u64::from_le_bytes(*blocks), Ordering::Relaxed);
                whole = true;
                rest = tail;
            } else {
                let (piece, tail) = tail.split_first_chunk::<PIECE>().expect("a whole piece");
                guts.pieces[index as usize] = *piece;
                rest = tail;
            }
        }
        assert!(whole && rest.is_empty(), "a truncated stream was finished");
        guts.loaded = guts.pieces.iter().flatten().copied().collect();
        self.on.store(true, Ordering::Relaxed);
    }
}

fn scripted(errno: Errno) -> PortError {
    PortError { errno: Some(errno), source: "a scripted fault".into() }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        self.core.quit.store(true, Ordering::Relaxed);
        if let Some(dma) = self.dma.take() {
            dma.join().unwrap();
        }
    }
}

impl fmt::Debug for FakeDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FakeDevice({})", self.core.id)
    }
}

/// The calls of a fake device.
struct FakePort(Arc<Core>);

impl fmt::Debug for FakePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FakePort({})", self.0.id)
    }
}

impl Port for FakePort {
    fn state(&self) -> Result<State, PortError> {
        Ok(self.0.at())
    }

    fn set_state(&self, from: State, to: State) -> Result<Option<Box<dyn PortStream>>, PortError> {
        let core = &self.0;
        core.check(FakeFault::of_arc(from, to), Errno::INVAL)?;
        let mut guts = core.guts.lock().unwrap();
        if (from, to) == (State::Resuming, State::Stop) {
            core.load(&mut guts);
        }
        core.note(&to.to_string());
        guts.at = to;
        if to.is_saving() && !from.is_saving() {
            guts.changed.fill(true);
            guts.queue.clear();
            (guts.initial, guts.ended) = (core.kind.pieces, false);
        } else if to == State::Resuming {
            guts.incoming.clear();
        } else {
            return Ok(None);
        }
        Ok(Some(Box::new(Self(core.clone()))))
    }

    fn reset(&self) -> Result<(), PortError> {
        if self.0.reset_fault.load(Ordering::Relaxed) {
            return Err(scripted(Errno::IO));
        }
        self.0.note("reset");
        self.0.guts.lock().unwrap().at = State::Running;
        Ok(())
    }
}

impl PortStream for FakePort {
    fn read(&self, buf: &mut [u8]) -> Result<usize, PortError> {
        let core = &self.0;
        let stopped = core.at() == State::StopCopy;
        let fault = if stopped { FakeFault::ReadStopCopy } else { FakeFault::ReadPrecopy };
        core.check(Some(fault), Errno::IO)?;
        let mut lock = core.guts.lock().unwrap();
        let guts = &mut *lock;
        if guts.queue.is_empty() {
            if let Some(at) = guts.changed.iter().position(|changed| *changed) {
                guts.changed[at] = false;
                guts.queue.extend_from_slice(&(at as u64).to_le_bytes());
                guts.queue.extend_from_slice(&guts.pieces[at]);
                guts.initial = guts.initial.saturating_sub(1);
            } else if stopped && !guts.ended {
                guts.ended = true;
                guts.queue.extend_from_slice(&u64::MAX.to_le_bytes());
                guts.queue.extend_from_slice(&core.blocks.load(Ordering::Relaxed).to_le_bytes());
                drop(lock);
                std::thread::sleep(core.kind.slow_stop);
                return self.read(buf);
            }
        }
        let take = buf.len().min(guts.queue.len());
        buf[..take].copy_from_slice(&guts.queue[..take]);
        guts.queue.drain(..take);
        Ok(take)
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, PortError> {
        self.0.check(Some(FakeFault::Write), Errno::IO)?;
        self.0.guts.lock().unwrap().incoming.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn precopy_info(&self) -> Result<Option<PrecopyProgress>, PortError> {
        self.0.check(Some(FakeFault::Progress), Errno::IO)?;
        let mut lock = self.0.guts.lock().unwrap();
        let guts = &mut *lock;
        let reinit = guts.initial == 0 && self.0.reinit.swap(false, Ordering::Relaxed);
        if reinit {
            guts.initial = guts.changed.len();
            guts.changed.fill(true);
        }
        let left = guts.changed.iter().filter(|changed| **changed).count();
        guts.initial = guts.initial.min(left);
        let bytes = |pieces: usize| (pieces * (PIECE + 8)) as u64;
        let (initial_bytes, dirty_bytes) = (bytes(guts.initial), bytes(left - guts.initial));
        Ok(Some(PrecopyProgress { initial_bytes, dirty_bytes, reinit }))
    }
}

impl DirtyLog for WriteLog {
    fn granule(&self) -> Granule {
        Granule::PAGE
    }
}

impl Device for FakeDevice {
    fn id(&self) -> &DeviceId {
        &self.core.id
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        let another = self.core.another.load(Ordering::Relaxed);
        let kind = &self.core.kind;
        Ok(DeviceManifest {
            model: Some(if another { "vfio-migrate.org/other" } else { "vfio-migrate.org/toy" }.into()),
            model_version: Some("1.0".into()),
            backend: "vfio-user".into(),
            flags: Some(kind.flags),
            // One without interrupts is no PCI function.
            pci: (kind.vectors > 0).then(|| PciIdentity {
                vendor: 0x1234,
                device: 1,
                ..PciIdentity::default()
            }),
            regions: Some(vec![]),
            state_size: Some((kind.pieces * PIECE) as u64),
            irqs: Some(BTreeMap::from([(2, kind.vectors)])),
            dirty: Some(DirtyTracking { device_log: Some(kind.dirty_log), ..DirtyTracking::default() }),
            parameters: BTreeMap::from([("pieces".into(), Parameter::new(kind.pieces.to_string()))]),
            ..DeviceManifest::new(self.core.id.clone())
        })
    }

    fn capabilities(&self) -> Result<Capabilities, CapabilitiesError> {
        let kind = &self.core.kind;
        Ok(Capabilities {
            flags: kind.flags,
            precopy_info: kind.precopy_info && kind.flags.pre_copy,
            data_size: true,
            dirty_log: kind.dirty_log,
            chunk: 8192,
        })
    }

    fn state(&self) -> Result<State, DeviceError> {
        self.machine.state()
    }

    fn set_state(&self, to: State) -> Result<(), TransitionError> {
        self.machine.set_state(to)
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        Ok(Box::new(self.machine.begin_precopy()?))
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        Ok(Box::new(self.machine.begin_stop_copy()?))
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        Ok(Box::new(self.machine.begin_resuming()?))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        let _ = self.core.check(Some(FakeFault::Progress), Errno::IO);
        let guts = self.core.guts.lock().unwrap();
        let left = guts.changed.iter().filter(|changed| **changed).count();
        Ok(Some(((left + 1) * (PIECE + 8)) as u64))
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        self.core.kind.dirty_log.then_some(&self.core.log)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.machine.reset()
    }
}

/// A VMM's side of a fake device: it notes what is asked of it, in order.
#[derive(Debug)]
pub struct FakeFunction(pub Arc<FakeDevice>);

impl FakeFunction {
    fn note(&self, what: &str) {
        self.0.core.note(what);
    }
}

impl PciFunction for FakeFunction {
    fn id(&self) -> &DeviceId {
        &self.0.core.id
    }

    fn save_config(&self) -> Result<ConfigState, PciError> {
        let at = self.0.at();
        assert!(
            !matches!(at, State::Stop | State::StopCopy),
            "config space was read in {at}, where some devices refuse it"
        );
        Ok(ConfigState { bytes: vec![7; 256], bars: [0; 6] })
    }

    fn save_interrupts(&self, config: ConfigState) -> Result<PciState, PciError> {
        assert!(!self.0.at().is_active(), "interrupts were read while the device ran");
        let ConfigState { bytes: config, bars } = config;
        let vectors = vec![VectorState::default(); 2];
        Ok(PciState { config, bars, vectors, msix: true, msi_pending: 0, intx_pending: false })
    }

    fn restore_config(&self, _: &PciState, _: &ConfigRules) -> Result<(), PciError> {
        self.note("config");
        Ok(())
    }

    fn stage_interrupts(&self, _: &PciState) -> Result<(), PciError> {
        self.note("stage");
        Ok(())
    }

    fn connect_interrupts(&self, state: &PciState) -> Result<u32, PciError> {
        self.note("connect");
        Ok(u32::try_from(state.vectors.len()).unwrap())
    }

    fn undo(&self) -> Result<(), PciError> {
        self.note("undo");
        Ok(())
    }
}
