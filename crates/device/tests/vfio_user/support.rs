//! A served sample device, and what its guest's driver does.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vfio_migration_device::{Device, DmaAccess, PciHardware, RegionIndex, VfioUserDevice, VfioUserOptions};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_sim::{Options, StopHandle, regs};
use vfio_migration_types::{Bitmap, DeviceId, Gpa, Granule, Iova, Range};

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

/// Writes a u64 register.
fn write(device: &VfioUserDevice, at: u64, value: u64) {
    device.region_write(RegionIndex::BAR0, at, &value.to_le_bytes()).unwrap();
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
    let at = |gpa: u64| ram.offset_of(Gpa(gpa), 8).unwrap();
    let posted = ram.read_u64(at(0x3000)).unwrap();
    let entry = 0x2000 + posted % 4 * 32;
    for (index, word) in [shift + 0x1000, shift + dst, 128, posted + 1].into_iter().enumerate() {
        ram.write_u64(at(entry + index as u64 * 8), word).unwrap();
    }
    if posted == 0 {
        write(device, regs::offset::RING_BASE, shift + 0x2000);
        device.region_write(RegionIndex::BAR0, regs::offset::RING_SIZE, &4u32.to_le_bytes()).unwrap();
        write(device, regs::offset::TAIL_ADDR, shift + 0x3000);
        write(device, regs::offset::DONE_ADDR, shift + 0x3008);
        device.region_write(RegionIndex::BAR0, regs::offset::CONTROL, &1u32.to_le_bytes()).unwrap();
    }
    ram.write_u64(at(0x3000), posted + 1).unwrap();
    device.region_write(RegionIndex::BAR0, regs::offset::DOORBELL, &1u32.to_le_bytes()).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while ram.read_u64(at(0x3008)).unwrap() <= posted {
        assert!(std::time::Instant::now() < deadline, "the device does nothing");
        std::thread::yield_now();
    }
}

/// The pages that its log reports.
pub(super) fn dirty_pages(device: &VfioUserDevice, ram: &GuestRam) -> Vec<u64> {
    let mut map = Bitmap::new(ram.size(), Granule::PAGE);
    device.dirty_log().unwrap().report(&mut map).unwrap();
    map.runs().flat_map(|run| run.first..run.first + run.count).collect()
}
