//! A vfio-user server that is late, or refuses for now, with what is asked about its DMA log: nothing is concluded from that, and
//! no log is left running.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_migration_device::{
    CapabilitiesError, Device, DeviceError, DmaAccess, PciHardware, VfioUserDevice, VfioUserOptions, is_late,
};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{Bitmap, Gpa, Granule, Iova, PAGE_SIZE, Range};
use vfio_user_peer::{
    Backend, DeviceInfo, DmaMapping, Errno, IovaRange, IrqInfo, IrqRequest, MigrationFlags, MigrationState,
    RegionInfo, Server, StopHandle,
};

/// What the server has for an answer.
const LIMIT: Duration = Duration::from_secs(2);

/// A device with a log, which does not answer what it is told to hold, and refuses what it is told to refuse.
#[derive(Default)]
struct Gated {
    asked: Mutex<Vec<&'static str>>,
    held: Mutex<Option<&'static str>>,
    let_go: Condvar,
    refused: Mutex<BTreeMap<&'static str, Errno>>,
}

impl Gated {
    /// Takes note of `what`, and answers when it may.
    fn ask(&self, what: &'static str) -> Result<(), Errno> {
        self.asked.lock().unwrap().push(what);
        let mut held = self.held.lock().unwrap();
        while *held == Some(what) {
            held = self.let_go.wait(held).unwrap();
        }
        self.refused.lock().unwrap().remove(what).map_or(Ok(()), Err)
    }

    fn hold(&self, what: &'static str) {
        *self.held.lock().unwrap() = Some(what);
    }

    fn let_go(&self) {
        *self.held.lock().unwrap() = None;
        self.let_go.notify_all();
    }

    fn refuse_once(&self, what: &'static str, errno: Errno) {
        self.refused.lock().unwrap().insert(what, errno);
    }

    /// The STARTs and STOPs so far.
    fn log(&self) -> Vec<&'static str> {
        let asked = self.asked.lock().unwrap();
        asked.iter().copied().filter(|what| ["start", "stop"].contains(what)).collect()
    }
}

impl Backend for Gated {
    fn device_info(&self) -> DeviceInfo {
        DeviceInfo { resettable: true, pci: true, num_regions: 0, num_irqs: 0 }
    }

    fn region_info(&self, _index: u32) -> Result<RegionInfo, Errno> {
        Err(Errno::INVAL)
    }

    fn irq_info(&self, _index: u32) -> Result<IrqInfo, Errno> {
        Err(Errno::INVAL)
    }

    fn region_read(&self, _index: u32, _offset: u64, _into: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn region_write(&self, _index: u32, _offset: u64, _from: &[u8]) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn set_irqs(&self, _request: IrqRequest) -> Result<(), Errno> {
        Ok(())
    }

    fn dma_map(&self, _mapping: DmaMapping) -> Result<(), Errno> {
        Ok(())
    }

    fn dma_unmap(&self, _iova: u64, _len: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn reset(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn migration_flags(&self) -> Result<MigrationFlags, Errno> {
        self.ask("flags")?;
        Ok(MigrationFlags::new(false, true))
    }

    fn mig_state(&self) -> Result<MigrationState, Errno> {
        Ok(MigrationState::Running)
    }

    fn dma_logging_supported(&self) -> bool {
        true
    }

    fn dma_logging_start(&self, page_size: u64, _ranges: &[IovaRange]) -> Result<u64, Errno> {
        self.ask("start").map(|()| page_size)
    }

    fn dma_logging_stop(&self) -> Result<(), Errno> {
        self.ask("stop")
    }

    fn dma_logging_report(&self, _range: IovaRange, _page: u64, _bitmap: &mut [u64]) -> Result<(), Errno> {
        self.ask("report")
    }
}

/// A served device, and the end of its server with it.
struct Served {
    gated: Arc<Gated>,
    socket: PathBuf,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Served {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("gated.sock");
        let server = Server::bind(&socket).unwrap();
        let (gated, stop) = (Arc::new(Gated::default()), StopHandle::new().unwrap());
        let thread = std::thread::spawn({
            let (gated, stop) = (gated.clone(), stop.clone());
            move || server.serve(&*gated, &stop).unwrap()
        });
        Self { gated, socket, stop, thread: Some(thread), _dir: dir }
    }

    /// Opens it, with guest RAM that it maps.
    fn open(&self) -> Result<VfioUserDevice, DeviceError> {
        let ram = Arc::new(GuestRam::new("late", &[RamSpec { gpa: Gpa(0), len: 16 * PAGE_SIZE }]).unwrap());
        let options = VfioUserOptions { timeout: LIMIT, keep_state: true, ..VfioUserOptions::default() };
        let device = VfioUserDevice::open("dev0".parse().unwrap(), &self.socket, ram.clone(), &options)?;
        let range = Range::new(Iova(0), 16 * PAGE_SIZE).unwrap();
        device.dma_map(range, DmaAccess::BOTH, ram.shared_file(ram.regions()[0].offset, ram.size()))?;
        Ok(device)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.gated.let_go();
        self.stop.stop();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

#[test]
fn an_answer_that_is_late_is_no_verdict_on_the_log_which_is_found_when_it_is_asked_for_again() {
    for late in ["start", "report", "stop"] {
        let served = Served::new();
        let device = served.open().unwrap();
        served.gated.hold(late);
        match device.capabilities() {
            Err(CapabilitiesError::Device(error)) => assert!(is_late(&error), "{late}: {error:?}"),
            other => panic!("{late}: {other:?}"),
        }
        let manifest = device.manifest().unwrap_err();
        assert!(is_late(&manifest), "{late}: {manifest:?}");
        served.gated.let_go();
        assert!(device.capabilities().unwrap().dirty_log, "{late}");
        assert_eq!(device.manifest().unwrap().dirty.unwrap().device_log, Some(true), "{late}");
        device.dirty_log().unwrap().start().unwrap();
        device.dirty_log().unwrap().stop().unwrap();
        let log = served.gated.log();
        assert!(log.chunks(2).all(|pair| pair == ["start", "stop"]), "{late}: {log:?}");
    }
}

#[test]
fn a_log_whose_start_or_stop_was_late_is_stopped_when_its_server_answers() {
    for late in ["start", "report", "stop"] {
        let served = Served::new();
        let device = served.open().unwrap();
        assert!(device.capabilities().unwrap().dirty_log);
        let log = device.dirty_log().unwrap();
        served.gated.hold(late);
        let failed = match late {
            "start" => log.start(),
            "stop" => log.start().and_then(|()| log.stop()),
            _ => log.start().and_then(|()| log.report(&mut Bitmap::new(16 * PAGE_SIZE, Granule::PAGE))),
        };
        assert!(is_late(&failed.unwrap_err()), "{late}");
        // As a session does that is undone: that it was late once is told once.
        assert_eq!(log.stop().is_err(), late == "report");
        log.stop().unwrap();
        served.gated.let_go();
        // The first pair is the trial's. Nobody asks for the other.
        until("the log to be stopped", || served.gated.log() == ["start", "stop", "start", "stop"]);
        log.start().unwrap();
        log.stop().unwrap();
        assert_eq!(served.gated.log().len(), 6, "{late}");
    }
}

#[test]
fn a_device_whose_server_is_late_with_its_migration_flags_is_not_taken_for_one_without() {
    let served = Served::new();
    served.gated.hold("flags");
    let late = served.open().unwrap_err();
    assert!(is_late(&late), "{late:?}");
    served.gated.let_go();
    assert!(served.open().unwrap().capabilities().unwrap().dirty_log);
}

#[test]
fn a_refusal_for_now_is_asked_about_again_and_any_other_is_kept() {
    for (errno, then) in [(Errno::BUSY, true), (Errno::NOMEM, true), (Errno::OPNOTSUPP, false)] {
        for refused in ["start", "report"] {
            let served = Served::new();
            let device = served.open().unwrap();
            served.gated.refuse_once(refused, errno);
            assert!(!device.capabilities().unwrap().dirty_log, "{refused}: {errno}");
            assert!(device.dirty_log().is_none(), "{refused}: {errno}");
            assert_eq!(device.capabilities().unwrap().dirty_log, then, "{refused}: {errno}");
            assert_eq!(device.dirty_log().is_some(), then, "{refused}: {errno}");
        }
    }
}
