//! Against the published crate `vfio_user`: its client with our server, its server with our client.

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::rig::{Device, Served, event, memfd, quick, quick_server, signalled, untouched};
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};
use vfio_user_peer::{
    Client, ClientError, Errno, Feature, FeatureOp, IovaRange, MigrationState, Prot, Recovery, irq_index,
    region_index,
};

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
    // The question for migration costs the first connection.
    let (path, server) = their_server(dir.path(), 2);
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

/// Their server answers what it does not know with an error without an errno, and then takes its payload for a header.
#[test]
fn their_server_is_sent_only_what_it_knows() {
    for options in [quick(), untouched()] {
        let dir = tempfile::tempdir().unwrap();
        let (path, server) = their_server(dir.path(), 2);
        let client = Client::connect(&path, options).unwrap();
        assert_eq!(client.migration_flags().unwrap(), None);
        assert_eq!(client.state_at_connect(), None);
        let refused = |result: Result<(), ClientError>| {
            assert_eq!(result.unwrap_err().errno(), Some(Errno::NOTTY));
        };
        // Whatever is asked: none of it is sent, and the stream stays in step.
        refused(client.mig_state().map(drop));
        refused(client.set_mig_state(MigrationState::Stop));
        refused(client.mig_data_read(&mut [0; 8]).map(drop));
        refused(client.mig_data_write(&[0; 8]));
        refused(client.dma_logging_start(4096, &[]).map(drop));
        refused(client.dma_logging_stop());
        let page = IovaRange { iova: 0, len: 4096 };
        refused(client.dma_logging_report(page, 4096, &mut [0]));
        assert!(client.region_io_fds(0).unwrap().is_empty());
        assert!(!client.probe_feature(Feature::MIGRATION, FeatureOp::Get).unwrap());
        assert_eq!(client.recover().unwrap(), Recovery::NoMigration);
        client.reset_to_running().unwrap();
        assert_eq!(client.region_info(0).unwrap().size, 1 << 21);
        client.region_write(0, 8, &[7; 8]).unwrap();
        client.device_info().unwrap();
        assert!(client.is_alive());
        drop(client);
        server.join().unwrap();
    }
}

/// Over a stream there is no other connection to be had: it is lost, and says over what.
#[test]
fn a_server_that_loses_step_over_one_stream_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    for ask in [
        |client: &Client| client.migration_flags().map(drop),
        |client: &Client| client.region_io_fds(0).map(drop),
    ] {
        let (path, server) = their_server(&dir.path().join("."), 1);
        let stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let client = Client::from_stream(stream, untouched()).unwrap();
        let error = ask(&client).unwrap_err();
        assert!(matches!(error, ClientError::ConnectionLost { .. }), "{error}");
        assert!(error.to_string().contains("without an errno"), "{error}");
        drop(client);
        server.join().unwrap();
    }
}
