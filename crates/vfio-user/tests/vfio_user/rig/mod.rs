//! A small device with everything in it, and a server that runs it in a thread.
#![expect(unreachable_pub, reason = "only the files of this program reach it")]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use vfio_user_peer::{
    Backend, Client, ClientOptions, DeviceInfo, DmaChannel, DmaHandler, DmaMapping, DropReason, Errno,
    Extension, IoFd, IoFdKind, IovaRange, IrqAction, IrqInfo, IrqRequest, IrqRequestData, MigrationFlags,
    MigrationState, MmapArea, OnConnect, PrecopyInfo, RegionInfo, Server, ServerEvent, ServerOptions,
    StopHandle, irq_index, region_index,
};

pub const CONFIG_SIZE: u64 = 256;
pub const BAR0_SIZE: u64 = 4 << 20;
/// BAR0 offset whose write makes the device copy 4 KiB by DMA inside the command: the value is the IOVA.
pub const INLINE_DMA: u64 = 0x100;

#[derive(Debug)]
pub struct State {
    pub memory: Vec<u8>,
    pub mig: MigrationState,
    pub to_read: Vec<u8>,
    pub written: Vec<u8>,
    pub maps: BTreeMap<u64, DmaMapping>,
    pub irqs: BTreeMap<(u32, u32), OwnedFd>,
    pub requests: Vec<String>,
    pub arcs: Vec<MigrationState>,
    pub logging: Option<u64>,
    pub logged: Vec<(u64, u64)>,
    pub dma: Option<DmaChannel>,
    pub clients: u32,
    pub gone: u32,
    pub drops: Vec<DropReason>,
    /// The last client that was dropped was not gone when it was told of.
    pub dropped_before_gone: bool,
    pub fail_arc: Option<MigrationState>,
    /// Half of the eventfds are connected, and the request fails.
    pub fail_irqs: bool,
}

pub struct Device {
    pub state: Mutex<State>,
    pub changed: Condvar,
    pub mailbox: Arc<OwnedFd>,
    pub doorbell: Arc<OwnedFd>,
    pub flags: Option<MigrationFlags>,
    pub extension: Extension,
    pub vectors: u32,
}

pub fn memfd(len: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    fd
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Whether an eventfd was signalled; takes the signal.
pub fn signalled(fd: &OwnedFd) -> bool {
    rustix::io::read(fd, &mut [0u8; 8]).is_ok()
}

impl Device {
    pub fn new() -> Self {
        let state = State {
            memory: vec![0; usize::try_from(BAR0_SIZE).unwrap()],
            mig: MigrationState::Running,
            to_read: Vec::new(),
            written: Vec::new(),
            maps: BTreeMap::new(),
            irqs: BTreeMap::new(),
            requests: Vec::new(),
            arcs: Vec::new(),
            logging: None,
            logged: Vec::new(),
            dma: None,
            clients: 0,
            gone: 0,
            drops: Vec::new(),
            dropped_before_gone: false,
            fail_arc: None,
            fail_irqs: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            mailbox: Arc::new(memfd(1 << 20)),
            doorbell: Arc::new(event()),
            flags: Some(MigrationFlags::new(true, true)),
            extension: Extension::ALL,
            vectors: 200,
        }
    }

    /// Waits until the state is as wanted; fails after ten seconds.
    pub fn wait(&self, what: &str, wanted: impl Fn(&State) -> bool) {
        let guard = self.state.lock().unwrap();
        let (_guard, timeout) =
            self.changed.wait_timeout_while(guard, Duration::from_secs(10), |state| !wanted(state)).unwrap();
        assert!(!timeout.timed_out(), "waited in vain for {what}");
    }

    pub fn channel(&self) -> DmaChannel {
        self.wait("a client", |state| state.dma.is_some());
        self.state.lock().unwrap().dma.clone().unwrap()
    }
}

impl Backend for Device {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo {
            resettable: true,
            pci: true,
            num_regions: region_index::COUNT,
            num_irqs: irq_index::COUNT,
        }
    }

    fn region_info(&self, index: u32) -> Result<RegionInfo, Errno> {
        Ok(match index {
            0 => RegionInfo { size: BAR0_SIZE, read: true, write: true, ..RegionInfo::default() },
            2 => RegionInfo {
                size: 1 << 20,
                read: true,
                write: true,
                mmap: true,
                areas: vec![MmapArea { offset: 0, size: 0x1000 }, MmapArea { offset: 0x2000, size: 0x3000 }],
                offset: 0,
                fd: Some(Arc::clone(&self.mailbox)),
            },
            region_index::CONFIG => {
                RegionInfo { size: CONFIG_SIZE, read: true, write: true, ..RegionInfo::default() }
            }
            _ => RegionInfo::default(),
        })
    }

    fn irq_info(&self, index: u32) -> Result<IrqInfo, Errno> {
        let count = if index == irq_index::MSIX { self.vectors } else { 0 };
        Ok(IrqInfo { count, eventfd: true, maskable: true, automasked: false, noresize: false })
    }

    fn region_read(&self, index: u32, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(offset).unwrap();
        match index {
            2 => File::from(self.mailbox.try_clone().unwrap())
                .read_exact_at(into, offset)
                .map_err(|_| Errno::IO),
            _ => {
                into.copy_from_slice(&self.state.lock().unwrap().memory[at..at + into.len()]);
                Ok(())
            }
        }
    }

    fn region_write(&self, index: u32, offset: u64, from: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(offset).unwrap();
        if index == 0 && offset == INLINE_DMA {
            let iova = u64::from_ne_bytes(from.try_into().map_err(|_| Errno::INVAL)?);
            let dma = self.channel();
            let mut page = vec![0; 4096];
            dma.read(iova, &mut page)?;
            page.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
            return dma.write(iova + 4096, &page);
        }
        if from == b"refused!" {
            return Err(Errno::PERM);
        }
        let mut state = self.state.lock().unwrap();
        state.memory[at..at + from.len()].copy_from_slice(from);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn region_io_fds(&self, index: u32) -> Result<Vec<IoFd>, Errno> {
        let kind = IoFdKind::Eventfd { flags: 1, datamatch: 77 };
        let entry = |offset| IoFd { offset, size: 4, kind, fd: Arc::clone(&self.doorbell) };
        Ok(if index == 0 { vec![entry(0x1000), entry(0x1004)] } else { Vec::new() })
    }

    fn set_irqs(&self, request: IrqRequest) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap();
        let IrqRequest { index, start, count, action, data, .. } = request;
        state.requests.push(format!(
            "{action:?} {index} {start}+{count} {}",
            match &data {
                IrqRequestData::None => "none".to_owned(),
                IrqRequestData::Bool(wanted) => format!("{wanted:?}"),
                IrqRequestData::Eventfd(fds) => format!("{} fds", fds.len()),
                IrqRequestData::Disconnect => "disconnect".into(),
            }
        ));
        match (action, data) {
            (IrqAction::Trigger, IrqRequestData::Eventfd(fds)) => {
                let taken = if state.fail_irqs { fds.len() / 2 } else { fds.len() };
                for (vector, fd) in (start..).zip(fds.into_iter().take(taken)) {
                    state.irqs.insert((index, vector), fd);
                }
                if state.fail_irqs {
                    return Err(Errno::NOSPC);
                }
            }
            (IrqAction::Trigger, IrqRequestData::None) if count == 0 => {
                state.irqs.retain(|(at, _), _| *at != index);
            }
            (IrqAction::Trigger, IrqRequestData::None) => {
                for vector in start..start + count {
                    if let Some(fd) = state.irqs.get(&(index, vector)) {
                        rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
                    }
                }
            }
            (IrqAction::Trigger, IrqRequestData::Disconnect) => {
                state.irqs.retain(|(at, vector), _| *at != index || !(start..start + count).contains(vector));
            }
            _ => {}
        }
        Ok(())
    }

    fn dma_map(&self, mapping: DmaMapping) -> Result<(), Errno> {
        self.state.lock().unwrap().maps.insert(mapping.iova, mapping);
        Ok(())
    }

    fn dma_unmap(&self, iova: u64, _len: u64) -> Result<(), Errno> {
        self.state.lock().unwrap().maps.remove(&iova).map(drop).ok_or(Errno::NOENT)
    }

    fn reset(&self) -> Result<(), Errno> {
        self.state.lock().unwrap().mig = MigrationState::Running;
        Ok(())
    }

    fn extension(&self) -> Extension {
        self.extension
    }

    fn migration_flags(&self) -> Result<MigrationFlags, Errno> {
        self.flags.ok_or(Errno::NOTTY)
    }

    fn mig_state(&self) -> Result<MigrationState, Errno> {
        self.flags.ok_or(Errno::NOTTY)?;
        Ok(self.state.lock().unwrap().mig)
    }

    fn set_mig_state(&self, to: MigrationState) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap();
        if state.fail_arc == Some(to) {
            return Err(Errno::BUSY);
        }
        state.mig = to;
        state.arcs.push(to);
        Ok(())
    }

    fn mig_data_read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let mut state = self.state.lock().unwrap();
        let got = into.len().min(state.to_read.len());
        into[..got].copy_from_slice(&state.to_read[..got]);
        state.to_read.drain(..got);
        Ok(got)
    }

    fn mig_data_write(&self, from: &[u8]) -> Result<(), Errno> {
        self.state.lock().unwrap().written.extend_from_slice(from);
        Ok(())
    }

    fn dma_logging_supported(&self) -> bool {
        true
    }

    fn dma_logging_start(&self, page_size: u64, _ranges: &[IovaRange]) -> Result<u64, Errno> {
        let chosen = page_size.max(4096);
        self.state.lock().unwrap().logging = Some(chosen);
        Ok(chosen)
    }

    fn dma_logging_stop(&self) -> Result<(), Errno> {
        self.state.lock().unwrap().logging = None;
        Ok(())
    }

    fn dma_logging_report(&self, range: IovaRange, page_size: u64, bitmap: &mut [u64]) -> Result<(), Errno> {
        let mut state = self.state.lock().unwrap();
        for (iova, len) in std::mem::take(&mut state.logged) {
            for page in iova / page_size..=(iova + len - 1) / page_size {
                let bit = usize::try_from(page - range.iova / page_size).unwrap();
                bitmap[bit / 64] |= 1 << (bit % 64);
            }
        }
        // A careless device: the server has to clear what lies outside.
        *bitmap.last_mut().unwrap() |= 1 << 63;
        Ok(())
    }

    fn precopy_info(&self) -> Result<PrecopyInfo, Errno> {
        Ok(PrecopyInfo { initial_bytes: 1 << 40, dirty_bytes: 7, reinit: true })
    }

    fn mig_data_size(&self) -> Result<u64, Errno> {
        Ok(1 << 33)
    }

    fn manifest(&self) -> Result<Vec<u8>, Errno> {
        Ok(br#"{"model":"test"}"#.to_vec())
    }

    fn client_connected(&self, dma: DmaChannel) {
        let mut state = self.state.lock().unwrap();
        state.dma = Some(dma);
        state.clients += 1;
        drop(state);
        self.changed.notify_all();
    }

    fn client_gone(&self) {
        let mut state = self.state.lock().unwrap();
        state.dma = None;
        state.gone += 1;
        drop(state);
        self.changed.notify_all();
    }

    fn server_event(&self, event: &ServerEvent) {
        let ServerEvent::ClientDropped(why) = event else { return };
        let mut state = self.state.lock().unwrap();
        state.drops.push(why.clone());
        state.dropped_before_gone = state.gone < state.clients;
        drop(state);
        self.changed.notify_all();
    }
}

/// A served device; ends with the value.
pub struct Served {
    pub device: Arc<Device>,
    pub path: PathBuf,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Served {
    pub fn new(device: Device, options: ServerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("device.sock");
        let server = Server::bind_with(&path, options).unwrap();
        let (device, stop) = (Arc::new(device), StopHandle::new().unwrap());
        let thread = std::thread::spawn({
            let (device, stop) = (Arc::clone(&device), stop.clone());
            move || server.serve(&*device, &stop).unwrap()
        });
        Self { device, path, stop, thread: Some(thread), _dir: dir }
    }

    pub fn start() -> Self {
        Self::new(Device::new(), quick_server())
    }

    pub fn client(&self, options: ClientOptions) -> Client {
        Client::connect(&self.path, options).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap();
        assert!(!self.path.exists(), "the socket file was left behind");
    }
}

pub fn quick_server() -> ServerOptions {
    ServerOptions { message_timeout: Duration::from_secs(5), ..ServerOptions::default() }
}

pub fn quick() -> ClientOptions {
    ClientOptions {
        timeout: Duration::from_secs(5),
        connect_timeout: Duration::from_secs(5),
        ..ClientOptions::default()
    }
}

pub fn untouched() -> ClientOptions {
    ClientOptions { on_connect: OnConnect::Leave, ..quick() }
}

/// Client memory from IOVA 0.
pub struct Memory(pub Mutex<Vec<u8>>);

impl Memory {
    pub fn new(len: usize) -> Arc<Self> {
        Arc::new(Self(Mutex::new(vec![0; len])))
    }
}

impl DmaHandler for Memory {
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(iova).map_err(|_| Errno::FAULT)?;
        let memory = self.0.lock().unwrap();
        into.copy_from_slice(memory.get(at..at + into.len()).ok_or(Errno::FAULT)?);
        Ok(())
    }

    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(iova).map_err(|_| Errno::FAULT)?;
        let mut memory = self.0.lock().unwrap();
        memory.get_mut(at..at + from.len()).ok_or(Errno::FAULT)?.copy_from_slice(from);
        Ok(())
    }
}

/// Waits until something can be read, or the peer is gone.
pub fn readable(fd: impl AsFd) -> bool {
    let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() == 1
}
