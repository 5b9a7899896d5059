//! A served sample device, and what its guest's driver does.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vfio_migration_device::{
    Device, DeviceError, DmaAccess, PciHardware, RegionIndex, VfioUserDevice, VfioUserOptions,
};
use vfio_migration_guest_driver::{Descriptor, DeviceRegisters, Ring, SharedMemory};
use vfio_migration_memory::{GuestRam, MemoryError, RamSpec};
use vfio_migration_sim::{Options, StopHandle};
use vfio_migration_types::{Bitmap, DeviceId, Gpa, Granule, Iova, RamOffset, Range};

/// A served device, and the end of its server with it.
pub(super) struct Served {
    pub(super) socket: std::path::PathBuf,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Served {
    pub(super) fn new(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("device.sock");
        let stop = StopHandle::new().unwrap();
        let thread = std::thread::spawn({
            let (socket, stop) = (socket.clone(), stop.clone());
            move || vfio_migration_sim::serve(&socket, options, &stop).unwrap()
        });
        Self { socket, stop, thread: Some(thread), _dir: dir }
    }

    pub(super) fn open(&self, ram: &Arc<GuestRam>) -> VfioUserDevice {
        self.open_with(
            ram,
            &VfioUserOptions { timeout: Duration::from_secs(5), ..VfioUserOptions::default() },
        )
    }

    pub(super) fn open_with(&self, ram: &Arc<GuestRam>, options: &VfioUserOptions) -> VfioUserDevice {
        let id = DeviceId::new("dev0").unwrap();
        VfioUserDevice::open(id, &self.socket, ram.clone(), options).unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(super) fn options() -> Options {
    Options { state_size: 256 << 10, dma_interval: Duration::ZERO, ..Options::default() }
}

pub(super) fn ram() -> Arc<GuestRam> {
    let specs = [RamSpec { gpa: Gpa(0), len: 1 << 20 }, RamSpec { gpa: Gpa(1 << 32), len: 1 << 20 }];
    Arc::new(GuestRam::new("test", &specs).unwrap())
}

pub(super) fn map(device: &VfioUserDevice, ram: &GuestRam) {
    for region in ram.regions() {
        let range = Range::new(Iova(region.gpa.0), region.len).unwrap();
        device.dma_map(range, DmaAccess::BOTH, ram.shared_file(region.offset, region.len)).unwrap();
    }
}

pub(super) fn read(device: &VfioUserDevice, at: u64) -> u64 {
    let mut bytes = [0; 8];
    device.region_read(RegionIndex::BAR0, at, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// Has the device copy one block from 0x1000 to `dst`, through a ring at 0x2000, and waits for it.
pub(super) fn one_block(device: &VfioUserDevice, ram: &GuestRam, dst: u64) {
    one_block_at(device, ram, dst, 0);
}

/// The same of a device that has all of RAM `shift` bytes further on than the guest.
pub(super) fn one_block_at(device: &VfioUserDevice, ram: &GuestRam, dst: u64, shift: u64) {
    let memory = &mut Shifted { ram, shift };
    let ring = Ring { base: shift + 0x2000, entries: 4, tail: shift + 0x3000, done: shift + 0x3008 };
    let posted = memory.load(ring.tail).unwrap();
    let descriptor =
        Descriptor { source: shift + 0x1000, target: shift + dst, len: 128, flags: 0, cookie: posted + 1 };
    ring.put(memory, posted, &descriptor).unwrap();
    if posted == 0 {
        ring.start(&mut Bar0(device)).unwrap();
    }
    ring.post(memory, posted + 1).unwrap();
    Ring::ring(&mut Bar0(device)).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while ring.done(memory, 0).unwrap() <= posted {
        assert!(std::time::Instant::now() < deadline, "the device does nothing");
        std::thread::yield_now();
    }
}

/// RAM that the device has `shift` bytes further on than the guest.
struct Shifted<'a> {
    ram: &'a GuestRam,
    shift: u64,
}

impl Shifted<'_> {
    fn at(&self, address: u64) -> RamOffset {
        self.ram.offset_of(Gpa(address - self.shift), 8).unwrap()
    }
}

impl SharedMemory for Shifted<'_> {
    type Error = MemoryError;

    fn load(&mut self, address: u64) -> Result<u64, MemoryError> {
        self.ram.read_u64(self.at(address))
    }

    fn store(&mut self, address: u64, value: u64) -> Result<(), MemoryError> {
        self.ram.write_u64(self.at(address), value)
    }
}

struct Bar0<'a>(&'a VfioUserDevice);

impl DeviceRegisters for Bar0<'_> {
    type Error = DeviceError;

    fn write32(&mut self, register: u64, value: u32) -> Result<(), DeviceError> {
        self.0.region_write(RegionIndex::BAR0, register, &value.to_le_bytes())
    }

    fn write64(&mut self, register: u64, value: u64) -> Result<(), DeviceError> {
        self.0.region_write(RegionIndex::BAR0, register, &value.to_le_bytes())
    }
}

/// The pages that its log reports.
pub(super) fn dirty_pages(device: &VfioUserDevice, ram: &GuestRam) -> Vec<u64> {
    let mut map = Bitmap::new(ram.size(), Granule::PAGE);
    device.dirty_log().unwrap().report(&mut map).unwrap();
    map.runs().flat_map(|run| run.first..run.first + run.count).collect()
}
