//! A device in this process: some state, and a thread that does DMA.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use vfio_migration_compat::{DeviceManifest, DirtyTracking, Parameter};
use vfio_migration_device::{
    Capabilities, Chunk, ConfigRules, Device, DeviceError, DirtyLog, IrqRouter, NotMigratable, PciError,
    PciFunction, PciState, Position, PrecopyProgress, ResumingSession, SavingSession, TransitionError,
    VectorState,
};
use vfio_migration_memory::{DirtySource, GuestRam, MemoryError, WriteLog};
use vfio_migration_types::{
    Bitmap, DeviceId, Granule, MigrationFlags, MigrationState as State, PAGE_SIZE, RamOffset,
};

const PIECE: usize = 512;

/// What a toy device is like.
#[derive(Clone, Debug)]
pub struct ToyKind {
    pub flags: MigrationFlags,
    pub precopy_info: bool,
    pub dirty_log: bool,
    pub pieces: usize,
    /// How long the last piece of state takes to read.
    pub slow_stop: Duration,
    /// Its name, where it is not `toyN`.
    pub name: Option<String>,
    /// Vectors that it says it has.
    pub vectors: u32,
}

impl Default for ToyKind {
    fn default() -> Self {
        let flags = MigrationFlags { p2p: true, pre_copy: true };
        Self {
            flags,
            precopy_info: true,
            dirty_log: true,
            pieces: 300,
            slow_stop: Duration::ZERO,
            name: None,
            vectors: 1,
        }
    }
}

/// Where a toy device fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    BeginPrecopy,
    ReadPrecopy,
    GoP2p,
    GoStopCopy,
    ReadStopCopy,
    BeginResuming,
    Write,
    Finish,
    SetRunning,
    BackToRunning,
}

pub struct ToyDevice {
    id: DeviceId,
    kind: ToyKind,
    inner: Arc<Inner>,
    dma: Mutex<Option<JoinHandle<()>>>,
    journal: Arc<Mutex<Vec<String>>>,
    pub fault: Mutex<Option<Fault>>,
    pub reinit: AtomicBool,
    pub reset_fault: AtomicBool,
}

struct Inner {
    state: Mutex<Guts>,
    log: ToyLog,
    quit: AtomicBool,
    on: AtomicBool,
    blocks: AtomicU64,
    /// It says that it is of another model.
    another: AtomicBool,
}

struct Guts {
    at: State,
    pieces: Vec<[u8; PIECE]>,
    changed: Vec<bool>,
    /// Of the last end of a stream: what was frozen, or loaded.
    last: Vec<u8>,
}

impl ToyDevice {
    pub fn new(
        index: u64,
        kind: ToyKind,
        ram: &Arc<GuestRam>,
        journal: &Arc<Mutex<Vec<String>>>,
    ) -> Arc<Self> {
        let guts = Guts {
            at: State::Running,
            pieces: vec![[0; PIECE]; kind.pieces],
            changed: vec![false; kind.pieces],
            last: Vec::new(),
        };
        let inner = Arc::new(Inner {
            state: Mutex::new(guts),
            log: ToyLog { log: WriteLog::new(format!("toy{index}"), ram.size()) },
            quit: AtomicBool::new(false),
            on: AtomicBool::new(false),
            blocks: AtomicU64::new(0),
            another: AtomicBool::new(false),
        });
        let dma = {
            let (inner, ram) = (inner.clone(), ram.clone());
            // Each device has eight pages of its own, behind the guest's.
            let first = ram.size() / PAGE_SIZE - 8 * (index + 1);
            std::thread::spawn(move || {
                while !inner.quit.load(Ordering::Relaxed) {
                    inner.tick(&ram, first);
                    std::thread::sleep(Duration::from_micros(100));
                }
            })
        };
        Arc::new(Self {
            id: DeviceId::new(kind.name.clone().unwrap_or(format!("toy{index}"))).unwrap(),
            kind,
            inner,
            dma: Mutex::new(Some(dma)),
            journal: journal.clone(),
            fault: Mutex::new(None),
            reinit: AtomicBool::new(false),
            reset_fault: AtomicBool::new(false),
        })
    }

    pub fn power_on(&self) {
        let mut guts = self.inner.state.lock().unwrap();
        for (index, piece) in guts.pieces.iter_mut().enumerate() {
            piece.fill(u8::try_from(index % 251).unwrap());
        }
        self.inner.on.store(true, Ordering::Relaxed);
    }

    pub fn frozen(&self) -> Vec<u8> {
        let guts = self.inner.state.lock().unwrap();
        guts.pieces.iter().flatten().copied().collect()
    }

    pub fn loaded(&self) -> Vec<u8> {
        self.inner.state.lock().unwrap().last.clone()
    }

    pub fn at(&self) -> State {
        self.inner.state.lock().unwrap().at
    }

    pub fn prove_running(&self) {
        assert!(self.at().is_active());
        let before = self.inner.blocks.load(Ordering::Relaxed);
        super::wait_for("DMA", || self.inner.blocks.load(Ordering::Relaxed) > before + 2);
    }

    /// From now on it says that it is of another model.
    pub fn become_another(&self) {
        self.inner.another.store(true, Ordering::Relaxed);
    }

    pub fn log_is_off(&self) -> bool {
        let mut bits = Bitmap::new(1 << 20, Granule::PAGE);
        self.inner.log.log.report(&mut bits).is_err()
    }

    fn fails(&self, fault: Fault) -> bool {
        *self.fault.lock().unwrap() == Some(fault)
    }

    fn error(&self, doing: &str) -> DeviceError {
        DeviceError::new(self.id.clone(), doing, Some(Errno::IO), "a scripted fault")
    }

    fn go(&self, to: State, fault: Option<Fault>) -> Result<(), TransitionError> {
        let mut guts = self.inner.state.lock().unwrap();
        let from = guts.at;
        let refuse =
            |why: &str| TransitionError::new(self.id.clone(), from, to, Some(from), Some(Errno::INVAL), why);
        if fault.is_some_and(|fault| self.fails(fault)) {
            return Err(refuse("a scripted fault"));
        }
        vfio_migration_types::path(from, to, self.kind.flags).map_err(|error| refuse(&error.to_string()))?;
        self.journal.lock().unwrap().push(format!("{} {to}", self.id));
        guts.at = to;
        Ok(())
    }
}

impl Inner {
    /// A piece of state changes, and a page is written by DMA: together or not at all.
    fn tick(&self, ram: &GuestRam, first: u64) {
        let mut guts = self.state.lock().unwrap();
        if !guts.at.is_active() || !self.on.load(Ordering::Relaxed) {
            return;
        }
        let n = self.blocks.fetch_add(1, Ordering::Relaxed) + 1;
        let at = usize::try_from(n * 13).unwrap() % guts.pieces.len();
        guts.pieces[at][..8].copy_from_slice(&n.to_le_bytes());
        guts.changed[at] = true;
        let at = RamOffset((first + n % 8) * PAGE_SIZE + (n % 512) * 8);
        ram.write_u64(at, n).unwrap();
        self.log.log.mark(at, 8);
    }
}

impl Drop for ToyDevice {
    fn drop(&mut self) {
        // Only the handle that has the thread ends it: sessions have handles of their own.
        if let Some(dma) = self.dma.lock().unwrap().take() {
            self.inner.quit.store(true, Ordering::Relaxed);
            dma.join().unwrap();
        }
    }
}

impl std::fmt::Debug for ToyDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ToyDevice({})", self.id)
    }
}

struct ToyLog {
    log: WriteLog,
}

impl std::fmt::Debug for ToyLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ToyLog")
    }
}

impl DirtySource for ToyLog {
    fn name(&self) -> String {
        self.log.name()
    }
    fn start(&self) -> Result<(), MemoryError> {
        self.log.start()
    }
    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        self.log.report(into)
    }
    fn stop(&self) -> Result<(), MemoryError> {
        self.log.stop()
    }
}

impl DirtyLog for ToyLog {
    fn granule(&self) -> Granule {
        Granule::PAGE
    }
}

impl Device for ToyDevice {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn manifest(&self) -> Result<DeviceManifest, DeviceError> {
        let another = self.inner.another.load(Ordering::Relaxed);
        Ok(DeviceManifest {
            model: Some(if another { "vfio-migrate.org/other" } else { "vfio-migrate.org/toy" }.into()),
            model_version: Some("1.0".into()),
            backend: "vfio-user".into(),
            flags: Some(self.kind.flags),
            regions: Some(vec![]),
            state_size: Some((self.kind.pieces * PIECE) as u64),
            irqs: Some(BTreeMap::from([(2, self.kind.vectors)])),
            dirty: Some(DirtyTracking { device_log: Some(self.kind.dirty_log), ..DirtyTracking::default() }),
            parameters: BTreeMap::from([("pieces".into(), Parameter::new(self.kind.pieces.to_string()))]),
            ..DeviceManifest::new(self.id.clone())
        })
    }

    fn capabilities(&self) -> Result<Capabilities, NotMigratable> {
        Ok(Capabilities {
            flags: self.kind.flags,
            precopy_info: self.kind.precopy_info && self.kind.flags.pre_copy,
            data_size: true,
            dirty_log: self.kind.dirty_log,
            chunk: 8192,
        })
    }

    fn state(&self) -> Result<State, DeviceError> {
        Ok(self.at())
    }

    fn set_state(&self, to: State) -> Result<(), TransitionError> {
        if self.at() == to {
            return Ok(());
        }
        let fault = if self.at() == State::Stop { Fault::BackToRunning } else { Fault::SetRunning };
        self.go(to, matches!(to, State::Running | State::RunningP2p).then_some(fault))
    }

    fn begin_precopy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.go(State::PreCopy, Some(Fault::BeginPrecopy))?;
        let mut guts = self.inner.state.lock().unwrap();
        guts.changed.fill(true);
        Ok(Box::new(self.saving()))
    }

    fn begin_stop_copy(&self) -> Result<Box<dyn SavingSession>, TransitionError> {
        self.go(State::StopCopy, Some(Fault::GoStopCopy))?;
        self.inner.state.lock().unwrap().changed.fill(true);
        Ok(Box::new(self.saving()))
    }

    fn begin_resuming(&self) -> Result<Box<dyn ResumingSession>, TransitionError> {
        self.go(State::Resuming, Some(Fault::BeginResuming))?;
        Ok(Box::new(Loading { device: self.share(), bytes: Vec::new() }))
    }

    fn stop_copy_size(&self) -> Result<Option<u64>, DeviceError> {
        let guts = self.inner.state.lock().unwrap();
        let left = guts.changed.iter().filter(|changed| **changed).count();
        Ok(Some(((left + 1) * (PIECE + 8)) as u64))
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        self.kind.dirty_log.then_some(&self.inner.log)
    }

    fn reset(&self) -> Result<(), DeviceError> {
        if self.reset_fault.load(Ordering::Relaxed) {
            return Err(self.error("resetting"));
        }
        let mut guts = self.inner.state.lock().unwrap();
        self.journal.lock().unwrap().push(format!("{} reset", self.id));
        guts.at = State::Running;
        Ok(())
    }
}

impl ToyDevice {
    /// A second handle on the same device, for a session that outlives the borrow.
    fn share(&self) -> Arc<ToyDevice> {
        Arc::new(Self {
            id: self.id.clone(),
            kind: self.kind.clone(),
            inner: self.inner.clone(),
            dma: Mutex::new(None),
            journal: self.journal.clone(),
            fault: Mutex::new(*self.fault.lock().unwrap()),
            reinit: AtomicBool::new(self.reinit.swap(false, Ordering::Relaxed)),
            reset_fault: AtomicBool::new(self.reset_fault.load(Ordering::Relaxed)),
        })
    }

    fn saving(&self) -> Saving {
        Saving {
            device: self.share(),
            queue: Vec::new(),
            initial: self.kind.pieces,
            ended: false,
            position: None,
        }
    }
}

struct Saving {
    device: Arc<ToyDevice>,
    queue: Vec<u8>,
    initial: usize,
    ended: bool,
    position: Option<Position>,
}

impl std::fmt::Debug for Saving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Saving({})", self.device.id)
    }
}

impl SavingSession for Saving {
    fn position(&self) -> Position {
        self.position.unwrap_or(match self.device.at() {
            State::StopCopy => Position::StopCopy,
            State::PreCopyP2p => Position::PreCopyP2p,
            _ => Position::PreCopy,
        })
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<Chunk, DeviceError> {
        let standing = self.position() == Position::StopCopy;
        let fault = if standing { Fault::ReadStopCopy } else { Fault::ReadPrecopy };
        if self.device.fails(fault) {
            return Err(self.device.error("reading state"));
        }
        if self.queue.is_empty() {
            let mut guts = self.device.inner.state.lock().unwrap();
            match guts.changed.iter().position(|changed| *changed) {
                Some(at) => {
                    guts.changed[at] = false;
                    self.queue.extend_from_slice(&(at as u64).to_le_bytes());
                    self.queue.extend_from_slice(&guts.pieces[at]);
                    self.initial = self.initial.saturating_sub(1);
                }
                None if standing && !self.ended => {
                    self.ended = true;
                    self.queue.extend_from_slice(&u64::MAX.to_le_bytes());
                    let blocks = self.device.inner.blocks.load(Ordering::Relaxed);
                    self.queue.extend_from_slice(&blocks.to_le_bytes());
                    drop(guts);
                    std::thread::sleep(self.device.kind.slow_stop);
                }
                None if standing => return Ok(Chunk::End),
                None => return Ok(Chunk::NothingNow),
            }
        }
        let take = buf.len().min(self.queue.len());
        buf[..take].copy_from_slice(&self.queue[..take]);
        self.queue.drain(..take);
        Ok(Chunk::Data(take))
    }

    fn progress(&mut self) -> Result<Option<PrecopyProgress>, DeviceError> {
        let reinit = self.initial == 0 && self.device.reinit.swap(false, Ordering::Relaxed);
        let mut guts = self.device.inner.state.lock().unwrap();
        if reinit {
            self.initial = guts.changed.len();
            guts.changed.fill(true);
        }
        let left = guts.changed.iter().filter(|changed| **changed).count();
        let initial = self.initial.min(left);
        self.initial = initial;
        let bytes = |pieces: usize| (pieces * (PIECE + 8)) as u64;
        Ok(Some(PrecopyProgress {
            initial_bytes: bytes(initial),
            dirty_bytes: bytes(left - initial),
            reinit,
        }))
    }

    fn go(&mut self, to: Position) -> Result<(), TransitionError> {
        match to {
            Position::PreCopy => self.device.go(State::PreCopy, None),
            Position::PreCopyP2p => self.device.go(State::PreCopyP2p, Some(Fault::GoP2p)),
            Position::StopCopy => self.device.go(State::StopCopy, Some(Fault::GoStopCopy)),
        }
    }

    fn end(self: Box<Self>) -> Result<State, TransitionError> {
        let to = match self.device.at() {
            State::StopCopy => State::Stop,
            State::PreCopyP2p => State::RunningP2p,
            _ => State::Running,
        };
        self.device.go(to, None)?;
        Ok(to)
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        let at = self.device.at();
        if at.is_saving() {
            let _ = self.device.go(if at == State::StopCopy { State::Stop } else { State::Running }, None);
        }
    }
}

struct Loading {
    device: Arc<ToyDevice>,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for Loading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Loading({})", self.device.id)
    }
}

impl ResumingSession for Loading {
    fn write(&mut self, bytes: &[u8]) -> Result<(), DeviceError> {
        if self.device.fails(Fault::Write) {
            return Err(self.device.error("writing state"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), TransitionError> {
        let mut rest = self.bytes.as_slice();
        let mut whole = false;
        while let Some((index, tail)) = rest.split_first_chunk::<8>() {
            let mut guts = self.device.inner.state.lock().unwrap();
            match usize::try_from(u64::from_le_bytes(*index)).ok().filter(|index| *index < guts.pieces.len())
            {
                Some(index) => {
                    let (piece, tail) = tail.split_first_chunk::<PIECE>().expect("a whole piece");
                    guts.pieces[index] = *piece;
                    rest = tail;
                }
                None => {
                    let (blocks, tail) = tail.split_first_chunk::<8>().expect("a whole trailer");
                    self.device.inner.blocks.store(u64::from_le_bytes(*blocks), Ordering::Relaxed);
                    whole = true;
                    rest = tail;
                }
            }
        }
        assert!(whole && rest.is_empty(), "a truncated stream was finished");
        self.device.go(State::Stop, Some(Fault::Finish))?;
        let mut guts = self.device.inner.state.lock().unwrap();
        guts.last = guts.pieces.iter().flatten().copied().collect();
        self.device.inner.on.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn abort(self: Box<Self>) -> Result<(), DeviceError> {
        self.device.reset()
    }
}

/// The VMM's side of a toy device: it notes what is asked of it, in order.
#[derive(Debug)]
pub struct ToyFunction(pub Arc<ToyDevice>);

impl ToyFunction {
    fn note(&self, what: &str) {
        self.0.journal.lock().unwrap().push(format!("{} {what}", self.0.id));
    }
}

impl PciFunction for ToyFunction {
    fn id(&self) -> &DeviceId {
        &self.0.id
    }

    fn save(&self) -> Result<PciState, PciError> {
        assert!(!self.0.at().is_active(), "PCI state was read while the device ran");
        let vectors = vec![VectorState::default(); 2];
        Ok(PciState {
            config: vec![7; 256],
            bars: [0; 6],
            vectors,
            msix: true,
            msi_pending: 0,
            intx_pending: false,
        })
    }

    fn restore_config(&self, _: &PciState, _: &ConfigRules) -> Result<(), PciError> {
        self.note("config");
        Ok(())
    }

    fn stage_interrupts(&self, _: &PciState, _: &dyn IrqRouter) -> Result<(), PciError> {
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
