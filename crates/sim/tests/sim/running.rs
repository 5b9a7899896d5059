//! The device at work: blocks, interrupts, doorbells, peers.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{self, LIMIT, busy, device, options, until};
use rustix::io::Errno;
use vfio_migration_guest_driver::registers::{RING_ERROR, offset};
use vfio_migration_memory::Mapping;
use vfio_migration_sim::driver::{BlockFindings, DriverConfig, Hardware, P2pTarget, RAM_SIZE, TestDriver};
use vfio_migration_sim::{DmaTarget, MessageDma, SampleDevice};
use vfio_user_peer::MigrationState::{Running, RunningP2p, Stop, StopCopy};

fn read64(device: &SampleDevice, at: u64) -> u64 {
    let mut bytes = [0; 8];
    Hardware::read(device, at, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

fn status(device: &SampleDevice) -> u32 {
    let mut bytes = [0; 4];
    Hardware::read(device, offset::STATUS, &mut bytes).unwrap();
    u32::from_le_bytes(bytes)
}

#[test]
fn blocks_are_numbered_summed_and_announced() {
    let (device, mut driver) = busy(options());
    driver.run(&device, 300, LIMIT).unwrap();
    driver.drain(&device, LIMIT).unwrap();
    driver.recheck().unwrap();
    let found = driver.findings();
    assert!(found.blocks >= 300 && found.interrupts > 0);
    assert_eq!((found.blocks_lost, found.interrupts_lost, found.p2p_blocks, found.integrity), (0, 0, 0, 0));
    assert_eq!(read64(&device, offset::BLOCKS0), found.blocks);
    assert_eq!(read64(&device, offset::HEAD), found.blocks);
}

#[test]
fn a_doorbell_may_ring_by_eventfd() {
    let device = device(options());
    let config = DriverConfig { doorbell_eventfd: true, ..DriverConfig::default() };
    let mut driver = TestDriver::new(config, None).unwrap();
    driver.connect(&device).unwrap();
    driver.start(&device).unwrap();
    driver.run(&device, 100, LIMIT).unwrap();
    assert_eq!(driver.findings().blocks_lost, 0);
}

#[test]
fn a_vector_is_not_raised_again_before_it_is_acknowledged() {
    let (device, mut driver) = busy(options());
    driver.post().unwrap();
    driver.ring(&device).unwrap();
    until(|| driver.done(0).unwrap() == 16);
    until(|| read64(&device, offset::HEAD) == 16);
    // Sixteen blocks, nothing acknowledged: one interrupt tells of all of them.
    assert_eq!(driver.service(&device).unwrap(), 16);
    assert_eq!(driver.findings().interrupts, 1);
    assert_eq!(driver.service(&device).unwrap(), 0);
    assert_eq!(driver.findings(), BlockFindings { blocks: 16, interrupts: 1, ..BlockFindings::default() });
    // An acknowledgement of less than is done raises at once.
    Hardware::write(&device, offset::ACK0, &3u64.to_le_bytes()).unwrap();
    driver.service(&device).unwrap();
    assert_eq!(driver.findings().spurious, 1);
}

#[test]
fn a_raise_without_an_eventfd_is_kept_like_a_pending_bit() {
    let device = device(options());
    let mut driver = TestDriver::new(DriverConfig::default(), None).unwrap();
    driver.map(&device).unwrap();
    driver.start(&device).unwrap();
    driver.post().unwrap();
    driver.ring(&device).unwrap();
    until(|| read64(&device, offset::HEAD) == 16);
    assert_eq!(driver.service(&device).unwrap(), 0);
    driver.connect_vectors(&device).unwrap();
    assert_eq!(driver.service(&device).unwrap(), 16);
}

#[test]
fn two_devices_write_into_each_others_mailbox() {
    let devices = [device(options()), device(options())];
    let mut drivers = [0, 1].map(|n: usize| {
        let peer = P2pTarget::of(&devices[1 - n], 0x4000_0000).unwrap();
        TestDriver::new(DriverConfig::default(), Some(peer)).unwrap()
    });
    for (driver, device) in drivers.iter_mut().zip(&devices) {
        driver.connect(device).unwrap();
        driver.start(device).unwrap();
    }
    for _ in 0..5 {
        for (driver, device) in drivers.iter_mut().zip(&devices) {
            driver.run(device, 100, LIMIT).unwrap();
        }
    }
    for (driver, device) in drivers.iter_mut().zip(&devices) {
        driver.drain(device, LIMIT).unwrap();
        driver.recheck().unwrap();
        let found = driver.findings();
        assert!(found.p2p_blocks > 100);
        assert_eq!((found.blocks_lost, found.interrupts_lost), (0, 0));
    }
}

#[test]
fn in_running_p2p_the_ring_stalls_at_a_peer_to_peer_descriptor() {
    let (source, peer) = (device(options()), device(options()));
    let target = P2pTarget::of(&peer, 0x4000_0000).unwrap();
    let mut driver = TestDriver::new(DriverConfig::default(), Some(target)).unwrap();
    driver.connect(&source).unwrap();
    driver.start(&source).unwrap();
    source.set_state(RunningP2p).unwrap();
    // Sixteen of flow 0 come first in the ring, then sixteen for the peer.
    assert_eq!(driver.post().unwrap(), 32);
    driver.ring(&source).unwrap();
    until(|| read64(&source, offset::HEAD) == 16);
    // Watched for two thousand times as long as a descriptor takes.
    let end = Instant::now() + Duration::from_millis(100);
    while Instant::now() < end {
        assert_eq!(read64(&source, offset::HEAD), 16);
    }
    let mut mailbox = [0; 4096];
    source.set_state(Stop).unwrap();
    peer.region_read(2, 0, &mut mailbox).unwrap();
    assert_eq!((driver.done(0).unwrap(), driver.done(1).unwrap(), mailbox), (16, 0, [0; 4096]));
    source.set_state(Running).unwrap();
    driver.drain(&source, LIMIT).unwrap();
    assert_eq!(driver.findings().blocks_lost, 0);
    assert_eq!(driver.findings().p2p_blocks, 16);
}

#[test]
fn a_stopped_device_does_nothing_and_hears_the_doorbell_later() {
    for eventfd in [false, true] {
        let device = device(options());
        let config = DriverConfig { doorbell_eventfd: eventfd, ..DriverConfig::default() };
        let mut driver = TestDriver::new(config, None).unwrap();
        driver.connect(&device).unwrap();
        driver.start(&device).unwrap();
        driver.run(&device, 50, LIMIT).unwrap();
        device.set_state(Stop).unwrap();
        // What was raised before it stopped is handled first, and acknowledged.
        driver.service(&device).unwrap();
        let done = driver.done(0).unwrap();
        driver.post().unwrap();
        let before = device.digest().unwrap();
        driver.ring(&device).unwrap();
        // The engine is given every chance to hear it: an arc makes it look at its orders, and reads take a while.
        device.set_state(StopCopy).unwrap();
        support::read_all(&device);
        device.set_state(Stop).unwrap();
        assert_eq!(driver.done(0).unwrap(), done);
        assert!(!eventfd || device.digest().unwrap() == before, "what rang is kept in the eventfd");
        assert_eq!(driver.service(&device).unwrap(), 0, "no interrupt");
        device.set_state(Running).unwrap();
        driver.drain(&device, LIMIT).unwrap();
        assert_eq!((driver.findings().blocks_lost, driver.findings().interrupts_lost), (0, 0));
    }
}

#[test]
fn a_malformed_ring_stops_it_until_it_is_enabled_again() {
    let (device, mut driver) = busy(options());
    driver.run(&device, 20, LIMIT).unwrap();
    driver.drain(&device, LIMIT).unwrap();
    let (fd, base) = driver.ram();
    let memory = Mapping::new(fd, 0, RAM_SIZE, true).unwrap();
    let tail = memory.read_u64(4096).unwrap();
    memory.write_u64(4096, tail + 4097).unwrap();
    driver.ring(&device).unwrap();
    until(|| status(&device) & RING_ERROR != 0);
    memory.write_u64(4096, tail).unwrap();
    Hardware::write(&device, offset::CONTROL, &0u32.to_le_bytes()).unwrap();
    Hardware::write(&device, offset::CONTROL, &1u32.to_le_bytes()).unwrap();
    assert_eq!(status(&device), 1);
    driver.run(&device, 20, LIMIT).unwrap();
    // Memory that goes away is an error too, not a crash.
    device.dma_unmap(base, RAM_SIZE).unwrap();
    driver.ring(&device).unwrap();
    until(|| status(&device) & RING_ERROR != 0);
}

#[test]
fn a_reset_leaves_nothing_enabled() {
    let (device, mut driver) = busy(options());
    driver.run(&device, 50, LIMIT).unwrap();
    device.region_write(2, 100, &[1, 2, 3]).unwrap();
    device.region_write(7, 4, &[6, 0]).unwrap();
    device.reset().unwrap();
    assert_eq!(device.state(), Running);
    assert_eq!((status(&device), read64(&device, offset::HEAD)), (0, 0));
    let mut bytes = [9; 3];
    device.region_read(2, 100, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 3]);
    device.region_read(7, 4, &mut bytes).unwrap();
    assert_eq!(bytes[..2], [0, 0]);
    // A fresh driver finds its mappings and eventfds still there, as after VFIO_DEVICE_RESET.
    let done = driver.done(0).unwrap();
    driver.ring(&device).unwrap();
    assert_eq!(driver.done(0).unwrap(), done);
}

#[derive(Debug)]
struct Remote(Mutex<Vec<u8>>);

impl MessageDma for Remote {
    fn read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        let at = usize::try_from(iova - 0x10_0000).map_err(|_| Errno::FAULT)?;
        let memory = self.0.lock().map_err(|_| Errno::IO)?;
        into.copy_from_slice(memory.get(at..at + into.len()).ok_or(Errno::FAULT)?);
        Ok(())
    }

    fn write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        let at = usize::try_from(iova - 0x10_0000).map_err(|_| Errno::FAULT)?;
        let mut memory = self.0.lock().map_err(|_| Errno::IO)?;
        memory.get_mut(at..at + from.len()).ok_or(Errno::FAULT)?.copy_from_slice(from);
        Ok(())
    }
}

#[test]
fn memory_may_be_reached_by_messages_alone() {
    let device = device(options());
    let mut driver = TestDriver::new(DriverConfig::default(), None).unwrap();
    driver.connect_vectors(&device).unwrap();
    driver.post().unwrap();
    // The driver's memory as it is now, behind messages.
    let (fd, base) = driver.ram();
    let mut bytes = vec![0; usize::try_from(RAM_SIZE).unwrap()];
    Mapping::new(fd.as_fd(), 0, RAM_SIZE, false).unwrap().read(0, &mut bytes).unwrap();
    let remote = Arc::new(Remote(Mutex::new(bytes)));
    device.dma_map(base, RAM_SIZE, true, DmaTarget::Messages(remote.clone())).unwrap();
    driver.start(&device).unwrap();
    driver.ring(&device).unwrap();
    until(|| read64(&device, offset::HEAD) == 16);
    let after = remote.0.lock().unwrap().clone();
    Mapping::new(fd, 0, RAM_SIZE, true).unwrap().write(0, &after).unwrap();
    assert_eq!(driver.service(&device).unwrap(), 16);
    assert_eq!(driver.findings().blocks_lost, 0);
}
