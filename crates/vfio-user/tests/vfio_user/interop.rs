//! Against the published crate `vfio_user`: its client with our server, its server with our client.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::rig::{Device, Served, event, memfd, quick, quick_server, signalled, untouched};
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};
use vfio_user_peer::{Client, ClientError, Prot, irq_index, region_index};

#[test]
fn their_client_drives_our_server() {
    let mut device = Device::new();
    device.vectors = 4;
    let served = Served::new(device, quick_server());
    let mut client = vfio_user::Client::new(&served.path).unwrap();
    let bar = client.region(2).unwrap();
    assert_eq!((bar.size, bar.sparse_areas.len()), (1 << 20, 2));
    assert!(bar.file_offset.is_some());
    client.region_write(0, 0x500, b"from another crate").unwrap();
    let mut back = [0; 18];
    client.region_read(0, 0x500, &mut back).unwrap();
    assert_eq!(&back, b"from another crate");
    let ram = memfd(1 << 16);
    client.dma_map(0, 0x10_0000, 1 << 16, ram.as_raw_fd()).unwrap();
    assert!(served.device.state.lock().unwrap().maps[&0x10_0000].fd.is_some());
    client.dma_unmap(0x10_0000, 1 << 16).unwrap();
    let info = client.get_irq_info(irq_index::MSIX).unwrap();
    assert_eq!(info.count, 4);
    let events = [event(), event()];
    let fds = [events[0].as_raw_fd(), events[1].as_raw_fd()];
    client.set_irqs(irq_index::MSIX, 0b100_100, 1, 2, &fds).unwrap();
    client.set_irqs(irq_index::MSIX, 0b100_001, 2, 1, &[]).unwrap();
    assert!(signalled(&events[1]) && !signalled(&events[0]));
    client.reset().unwrap();
    client.shutdown().unwrap();
}

#[derive(Default)]
struct Theirs {
    memory: Vec<u8>,
    maps: Vec<(u64, u64, bool)>,
    irqs: Vec<(u32, u32, u32, usize)>,
    resets: u32,
}

impl ServerBackend for Theirs {
    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), std::io::Error> {
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.memory[at..at + data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        let at = usize::try_from(offset).unwrap();
        self.memory[at..at + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        _offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> Result<(), std::io::Error> {
        self.maps.push((address, size, fd.is_some()));
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, address: u64, _size: u64) -> Result<(), std::io::Error> {
        self.maps.retain(|map| map.0 != address);
        Ok(())
    }

    fn reset(&mut self) -> Result<(), std::io::Error> {
        self.resets += 1;
        Ok(())
    }

    fn set_irqs(
        &mut self,
        index: u32,
        _flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> Result<(), std::io::Error> {
        self.irqs.push((index, start, count, fds.len()));
        Ok(())
    }
}

/// Their server, which serves one connection per `run`, over and over.
fn their_server(dir: &std::path::Path, runs: u32) -> (std::path::PathBuf, std::thread::JoinHandle<Theirs>) {
    let path = dir.join("theirs.sock");
    let region = |index: u32| ServerRegion {
        region_info: vfio_region_info {
            argsz: 32,
            flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
            index,
            size: if index == 0 { 1 << 21 } else { 0 },
            ..Default::default()
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let irqs = (0..irq_index::COUNT).map(|index| IrqInfo { index, flags: 1, count: 2 }).collect();
    let regions = (0..region_index::COUNT).map(region).collect();
    let server = vfio_user::Server::new(&path, true, irqs, regions).unwrap();
    let thread = std::thread::spawn(move || {
        let mut theirs = Theirs { memory: vec![0; 1 << 21], ..Theirs::default() };
        // A connection that lost step may end in an error of theirs; the next is served all the same.
        (0..runs).for_each(|_| drop(server.run(&mut theirs)));
        theirs
    });
    (path, thread)
}

#[test]
fn our_client_drives_their_server() {
    let dir = tempfile::tempdir().unwrap();
    let (path, server) = their_server(dir.path(), 1);
    let client = Client::connect(&path, untouched()).unwrap();
    let info = client.device_info().unwrap();
    assert!(info.resettable && info.num_regions == 9);
    assert_eq!(client.region_info(0).unwrap().size, 1 << 21);
    let data = vec![7; (1 << 20) + 77];
    client.region_write(0, 0, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(0, 0, &mut back).unwrap();
    assert_eq!(back, data);
    let ram = memfd(1 << 16);
    client.dma_map(0, 1 << 16, Prot::READ_WRITE, Some((std::os::fd::AsFd::as_fd(&ram), 0))).unwrap();
    client.dma_unmap(0, 1 << 16).unwrap();
    assert_eq!(client.irq_info(irq_index::MSIX).unwrap().count, 2);
    let events = [event(), event()];
    let fds = [std::os::fd::AsFd::as_fd(&events[0]), std::os::fd::AsFd::as_fd(&events[1])];
    client.irq_connect(irq_index::MSIX, 0, &fds).unwrap();
    client.reset().unwrap();
    drop(client);
    let theirs = server.join().unwrap();
    // It announces room for one descriptor a message, so they went one by one.
    assert_eq!(theirs.irqs, [(2, 0, 1, 1), (2, 1, 1, 1)]);
    assert!(theirs.maps.is_empty() && theirs.resets == 1);
}

/// Their server answers DEVICE_FEATURE with an error without an errno and then takes its payload for a header.
#[test]
fn asking_their_server_for_migration_costs_the_connection_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let (path, server) = their_server(dir.path(), 2);
    let client = Client::connect(&path, quick()).unwrap();
    assert_eq!(client.migration_flags().unwrap(), None);
    assert_eq!(client.state_at_connect(), None);
    assert_eq!(client.mig_state().unwrap_err().errno(), Some(vfio_user_peer::Errno::NOTTY));
    client.device_info().unwrap();
    client.reset().unwrap();
    drop(client);
    server.join().unwrap();

    let (path, server) = their_server(&dir.path().join("."), 1);
    let client = Client::connect(&path, untouched()).unwrap();
    let error = client.migration_flags().unwrap_err();
    assert!(matches!(error, ClientError::ConnectionLost { .. }), "{error}");
    drop(client);
    server.join().unwrap();
}
