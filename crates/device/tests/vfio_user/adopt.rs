//! A device that the VMM runs itself: a connection of its own, on which it has mapped its guest's memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use vfio_migration_device::{
    Chunk, Device, DeviceError, DmaAccess, DmaRange, DmaView, DmaViewError, PciHardware, Position,
    ResetCallback, ResetError, VfioUserDevice, VmmConnection,
};
use vfio_migration_memory::{GuestRam, RamRegionInfo};
use vfio_migration_sim::Options;
use vfio_migration_types::{Gpa, Iova, MigrationState, PAGE_SIZE, RamOffset, Range, error_chain};
use vfio_user_peer::{Client, ClientOptions, DmaHandler, Errno, Prot};

use super::support::{Served, dirty_pages, map, one_block, one_block_at, options, ram};

/// The bus addresses of RAM are so much higher than the guest's.
const SHIFT: u64 = 1 << 40;
const BOTH: Prot = Prot { read: true, write: true };

/// A VMM's connection, on which it has mapped all of its RAM, and its view of that.
fn run(served: &Served, ram: &GuestRam) -> (Arc<Client>, DmaView) {
    let client = Client::connect(&served.socket, ClientOptions::default()).unwrap();
    let ranges = ram.regions().iter().map(|region| {
        let (iova, file) = (region.gpa.0 + SHIFT, ram.shared_file(region.offset, region.len));
        client.dma_map(iova, region.len, BOTH, file).unwrap();
        DmaRange::new(Range::new(Iova(iova), region.len).unwrap(), region.offset)
    });
    let view = DmaView::new(ranges);
    (Arc::new(client), view)
}

fn adopt(device: VmmConnection, ram: &Arc<GuestRam>) -> Result<VfioUserDevice, DeviceError> {
    VfioUserDevice::adopt("net0".parse().unwrap(), device, ram.clone())
}

/// A reset as a VMM makes it, and how often it was made.
fn reset_of(client: &Arc<Client>) -> (ResetCallback, Arc<AtomicU32>) {
    let (client, resets) = (client.clone(), Arc::new(AtomicU32::new(0)));
    let made = resets.clone();
    let reset = ResetCallback::new(move || {
        made.fetch_add(1, Ordering::Relaxed);
        Ok(client.reset_to_running()?)
    });
    (reset, resets)
}

#[test]
fn it_keeps_its_mappings_and_its_log_is_exact() {
    let (served, ram) = (Served::new(options()), ram());
    let (client, view) = run(&served, &ram);
    let (reset, resets) = reset_of(&client);
    let before = client.requests_sent();
    let device = adopt(VmmConnection::new(client.clone(), view.clone(), reset.clone()), &ram).unwrap();
    assert!(client.requests_sent() > before, "it was asked what it is");
    one_block_at(&device, &ram, 0x8000, SHIFT);
    let log = device.dirty_log().unwrap();
    log.start().unwrap();
    one_block_at(&device, &ram, (1 << 32) + 0x5000, SHIFT);
    assert_eq!(dirty_pages(&device, &ram), [3, 256 + 5]);
    assert!(log.covers(RamOffset(0)) && log.covers(RamOffset(ram.size() - PAGE_SIZE)));
    drop(device);
    assert_eq!(resets.load(Ordering::Relaxed), 0);
    // The VMM has its device still, with its mappings, and without a log that runs for nobody.
    let again = adopt(VmmConnection::new(client, view, reset), &ram).unwrap();
    one_block_at(&again, &ram, 0x9000, SHIFT);
    again.dirty_log().unwrap().start().unwrap();
    assert!(dirty_pages(&again, &ram).is_empty());
}

#[test]
fn its_state_moves_to_a_device_that_is_opened_and_back() {
    let (source, destination, ram) = (Served::new(options()), Served::new(options()), ram());
    let (client, view) = run(&source, &ram);
    let (reset, _) = reset_of(&client);
    let adopted = adopt(VmmConnection::new(client, view, reset), &ram).unwrap();
    let opened = destination.open(&ram);
    map(&opened, &ram);
    let moves = |from: &VfioUserDevice, to: &VfioUserDevice| {
        let (mut saving, mut resuming) = (from.begin_precopy().unwrap(), to.begin_resuming().unwrap());
        for position in [Position::PreCopy, Position::PreCopyP2p, Position::StopCopy] {
            saving.go(position).unwrap();
            let mut bytes = vec![0; 4096];
            while let Chunk::Data(len) = saving.read(&mut bytes).unwrap() {
                resuming.write(&bytes[..len]).unwrap();
            }
        }
        resuming.finish().unwrap();
        saving.end().unwrap();
        to.set_state(MigrationState::Running).unwrap();
    };
    moves(&adopted, &opened);
    one_block(&opened, &ram, 0x8000);
    moves(&opened, &adopted);
}

#[test]
fn it_maps_nothing_and_the_vmm_tells_what_it_maps() {
    let (served, ram) = (Served::new(options()), ram());
    let (client, view) = run(&served, &ram);
    let (reset, _) = reset_of(&client);
    let device = adopt(VmmConnection::new(client.clone(), view, reset), &ram).unwrap();
    let (low, page) = (Range::new(Iova(SHIFT), 1 << 20).unwrap(), Range::new(Iova(0), PAGE_SIZE).unwrap());
    let file = ram.shared_file(RamOffset(0), PAGE_SIZE);
    assert_eq!(fault(device.dma_map(page, DmaAccess::BOTH, file)), DmaViewError::MappedByVmm);
    assert_eq!(fault(device.dma_unmap(low)), DmaViewError::MappedByVmm);
    let overlaps = DmaRange::new(Range::new(Iova(SHIFT), PAGE_SIZE).unwrap(), RamOffset(0));
    assert!(matches!(fault(device.dma_mapped(overlaps)), DmaViewError::Overlap { .. }));
    assert_eq!(fault(device.dma_unmapped(page)), DmaViewError::Unknown(Iova(0), PAGE_SIZE));
    let log = device.dirty_log().unwrap();
    log.start().unwrap();
    device.dma_mapped(DmaRange::new(page, RamOffset(PAGE_SIZE))).unwrap();
    client.dma_map(0, PAGE_SIZE, BOTH, ram.shared_file(RamOffset(PAGE_SIZE), PAGE_SIZE)).unwrap();
    assert_eq!(dirty_pages(&device, &ram), [1]);
    device.dma_unmapped(low).unwrap();
    client.dma_unmap(SHIFT, 1 << 20).unwrap();
    assert_eq!(dirty_pages(&device, &ram), (0..256).collect::<Vec<_>>());
    log.stop().unwrap();
    // A device that was opened here is told nothing.
    drop((device, client));
    let opened = served.open(&ram);
    assert_eq!(fault(opened.dma_unmapped(page)), DmaViewError::MappedByDevice);
}

/// The fault that a refusal is for.
fn fault(refused: Result<(), DeviceError>) -> DmaViewError {
    *refused.unwrap_err().source.downcast_ref::<DmaViewError>().unwrap()
}

#[test]
fn a_view_that_knows_no_ram_starts_no_log_and_one_that_cannot_be_is_refused() {
    let (served, ram) = (Served::new(options()), ram());
    let (client, _) = run(&served, &ram);
    let (reset, _) = reset_of(&client);
    let connection = |view| VmmConnection::new(client.clone(), view, reset.clone());
    let device = adopt(connection(DmaView::default()), &ram).unwrap();
    let refused = error_chain(&device.dirty_log().unwrap().start().unwrap_err());
    assert!(refused.contains("net0") && refused.contains("DmaView"), "{refused}");
    let beyond = DmaRange::new(Range::new(Iova(0), PAGE_SIZE).unwrap(), RamOffset(ram.size()));
    let refused = adopt(connection(DmaView::new([beyond])), &ram).unwrap_err();
    let text = error_chain(&refused);
    assert!(text.contains("net0") && text.contains("0x0+0x1000 (RAM offset 0x200000)"), "{text}");
}

/// What the VMM serves by messages is the VMM's to log; the server's log is asked for nothing of it.
#[test]
fn what_the_vmm_serves_is_not_the_servers_to_log() {
    struct Handler(Arc<GuestRam>);
    impl DmaHandler for Handler {
        fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
            let at = self.0.offset_of(Gpa(iova), into.len() as u64).ok_or(Errno::FAULT)?;
            self.0.read(at, into).map_err(|_| Errno::FAULT)
        }
        fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
            let at = self.0.offset_of(Gpa(iova), from.len() as u64).ok_or(Errno::FAULT)?;
            self.0.write(at, from).map_err(|_| Errno::FAULT)
        }
    }
    let (served, ram) = (Served::new(options()), ram());
    let handler = Arc::new(Handler(ram.clone()));
    let client_options = ClientOptions { dma: Some(handler), ..ClientOptions::default() };
    let client = Arc::new(Client::connect(&served.socket, client_options).unwrap());
    let (low, high) = (ram.regions()[0], ram.regions()[1]);
    client.dma_map(low.gpa.0, low.len, BOTH, None).unwrap();
    client.dma_map(high.gpa.0, high.len, BOTH, ram.shared_file(high.offset, high.len)).unwrap();
    let range = |region: RamRegionInfo| {
        DmaRange::new(Range::new(Iova(region.gpa.0), region.len).unwrap(), region.offset)
    };
    let view = DmaView::new([range(low).served_by_message(), range(high)]);
    let (reset, _) = reset_of(&client);
    let device = adopt(VmmConnection::new(client, view, reset), &ram).unwrap();
    device.dirty_log().unwrap().start().unwrap();
    one_block(&device, &ram, (1 << 32) + 0x5000);
    assert_eq!(dirty_pages(&device, &ram), [256 + 5], "not the count at 0x3008, which the VMM wrote");
}

#[test]
fn a_reset_is_the_vmms_and_one_that_fails_names_the_device() {
    let fault = || "error-arc:RUNNING:PRE_COPY".parse().unwrap();
    let (served, ram) = (Served::new(Options { faults: vec![fault()], ..options() }), ram());
    let (client, view) = run(&served, &ram);
    let connection = |reset| VmmConnection::new(client.clone(), view.clone(), reset);
    let (go, wait) = channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let hangs = ResetCallback::new(move || Ok(wait.lock().unwrap().recv()?));
    let bad: [(ResetCallback, &str); 4] = [
        (ResetCallback::new(|| Err(Errno::IO.into())), "the VMM's reset of its device failed"),
        (ResetCallback::new(|| panic!("no vector")), "panicked (no vector)"),
        (hangs.within(Duration::from_millis(50)), "has not returned within 50ms"),
        // It is in ERROR still.
        (ResetCallback::new(|| Ok(())), "it is in ERROR even after a reset"),
    ];
    adopt(connection(bad[0].0.clone()), &ram).unwrap().begin_precopy().unwrap_err();
    for (reset, says) in bad {
        let device = adopt(connection(reset), &ram).unwrap();
        let error = device.reset().unwrap_err();
        let text = error_chain(&error);
        assert!(text.contains("device net0: resetting failed") && text.contains(says), "{text}");
        if matches!(error.source.downcast_ref(), Some(ResetError::Failed(_))) {
            assert_eq!(error.errno, Some(Errno::IO), "{text}");
        }
        assert_eq!(device.state().unwrap(), MigrationState::Error, "no other reset was made");
    }
    go.send(()).unwrap();
    let (reset, resets) = reset_of(&client);
    let device = adopt(connection(reset), &ram).unwrap();
    device.reset().unwrap();
    assert_eq!((device.state().unwrap(), resets.load(Ordering::Relaxed)), (MigrationState::Running, 1));
    // A session that is given up as well.
    device.begin_resuming().unwrap().abort().unwrap();
    drop(device.begin_resuming().unwrap());
    assert_eq!((device.state().unwrap(), resets.load(Ordering::Relaxed)), (MigrationState::Running, 3));
}
