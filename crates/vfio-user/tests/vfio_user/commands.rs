//! Every command, client against server, over real sockets.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use crate::rig::{Device, Served, event, memfd, quick, quick_server, signalled};
use vfio_user_peer::{
    ClientError, ClientOptions, Errno, Extension, Feature, FeatureOp, IoFdKind, IovaRange, IrqAction,
    IrqData, MigrationFlags, MigrationState, Prot, RegionWrite, ServerOptions, irq_index, region_index,
};

#[test]
fn describes_the_device() {
    let served = Served::start();
    let client = served.client(quick());
    let info = client.device_info().unwrap();
    assert!(info.resettable && info.pci);
    assert_eq!((info.num_regions, info.num_irqs), (9, 5));

    let bar = client.region_info(2).unwrap();
    assert_eq!((bar.size, bar.mmap, bar.areas.len()), (1 << 20, true, 2));
    let file = std::fs::File::from(bar.fd.unwrap().try_clone().unwrap());
    file.write_all_at(b"through the mapping", 0x2000).unwrap();
    let mut seen = [0; 19];
    client.region_read(2, 0x2000, &mut seen).unwrap();
    assert_eq!(&seen, b"through the mapping");

    let absent = client.region_info(1).unwrap();
    assert!(absent.size == 0 && absent.fd.is_none());
    assert_eq!(client.region_info(9).unwrap_err().errno(), Some(Errno::INVAL));

    let irq = client.irq_info(irq_index::MSIX).unwrap();
    assert_eq!((irq.count, irq.eventfd, irq.maskable, irq.noresize), (200, true, true, false));

    let fds = client.region_io_fds(0).unwrap();
    assert_eq!(fds.iter().map(|fd| fd.offset).collect::<Vec<_>>(), [0x1000, 0x1004]);
    assert_eq!(fds[1].kind, IoFdKind::Eventfd { flags: 1, datamatch: 77 });
    rustix::io::write(&*fds[1].fd, &1u64.to_ne_bytes()).unwrap();
    assert!(signalled(&served.device.doorbell));
    assert!(client.region_io_fds(2).unwrap().is_empty());
}

#[test]
fn reads_and_writes_regions_in_pieces() {
    let options = ServerOptions { max_data_xfer_size: 1000, ..quick_server() };
    let served = Served::new(Device::new(), options);
    let client = served.client(quick());
    assert_eq!(client.negotiated().max_data_xfer_size, 1000);
    let data: Vec<u8> = (0..10_001u32).map(|n| n.to_le_bytes()[0]).collect();
    client.region_write(0, 0x200, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(0, 0x200, &mut back).unwrap();
    assert_eq!(back, data);
    // Across the end of the region.
    let error = client.region_write(region_index::CONFIG, 250, &[1; 8]).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::INVAL));
    assert!(client.is_alive());
}

#[test]
fn coalesces_writes() {
    let served = Served::start();
    let client = served.client(quick());
    let write = |offset: u64, count: u32| RegionWrite { offset, region: 0, count, data: [9; 8] };
    let writes: Vec<_> = (0..500).map(|n| write(0x200 + n * 8, 4)).collect();
    client.region_write_multi(&writes).unwrap();
    let mut back = [0; 8];
    client.region_read(0, 0x200 + 499 * 8, &mut back).unwrap();
    assert_eq!(back, [9, 9, 9, 9, 0, 0, 0, 0]);
    assert_eq!(client.region_write_multi(&[write(0, 9)]).unwrap_err().errno(), Some(Errno::INVAL));
    client.region_write_multi(&[]).unwrap();
}

#[test]
fn connects_interrupts_in_batches() {
    let served = Served::new(Device::new(), ServerOptions { max_msg_fds: 8, ..quick_server() });
    let client = served.client(quick());
    let events: Vec<_> = (0..20).map(|_| event()).collect();
    let fds: Vec<_> = events.iter().map(|fd| fd.as_fd()).collect();
    client.irq_connect(irq_index::MSIX, 3, &fds).unwrap();
    client.irq_trigger(irq_index::MSIX, 22, 1).unwrap();
    assert!(signalled(&events[19]) && !signalled(&events[18]));
    client.irq_mask(irq_index::MSIX, 0, 2).unwrap();
    client.irq_unmask(irq_index::MSIX, 0, 2).unwrap();
    client.set_irqs(irq_index::MSIX, 4, IrqAction::Mask, IrqData::Bool(&[true, false])).unwrap();
    client.irq_disconnect(irq_index::MSIX, 3, 1).unwrap();
    client.irq_disable(irq_index::MSIX).unwrap();
    assert!(served.device.state.lock().unwrap().irqs.is_empty());
    let requests = served.device.state.lock().unwrap().requests.clone();
    assert_eq!(
        requests,
        [
            "Trigger 2 3+8 8 fds",
            "Trigger 2 11+8 8 fds",
            "Trigger 2 19+4 4 fds",
            "Trigger 2 22+1 none",
            "Mask 2 0+2 none",
            "Unmask 2 0+2 none",
            "Mask 2 4+2 [true, false]",
            "Trigger 2 3+1 disconnect",
            "Trigger 2 0+0 none",
        ]
    );
    assert_eq!(client.irq_trigger(irq_index::MSIX, 200, 1).unwrap_err().errno(), Some(Errno::INVAL));
    assert_eq!(client.irq_trigger(irq_index::MSIX, u32::MAX, 2).unwrap_err().errno(), Some(Errno::INVAL));
    assert_eq!(client.irq_mask(irq_index::MSIX, 0, 0).unwrap_err().errno(), Some(Errno::INVAL));
}

#[test]
fn maps_and_unmaps_memory() {
    let served = Served::new(Device::new(), ServerOptions { max_dma_maps: 3, ..quick_server() });
    let client = served.client(quick());
    let ram = memfd(1 << 20);
    client.dma_map(0x10000, 0x10000, Prot::READ_WRITE, Some((ram.as_fd(), 0x3000))).unwrap();
    client.dma_map(0x40000, 0x1000, Prot::READ, None).unwrap();
    {
        let state = served.device.state.lock().unwrap();
        let map = &state.maps[&0x10000];
        assert!(map.fd.is_some() && map.offset == 0x3000 && map.prot == Prot::READ_WRITE);
        assert!(state.maps[&0x40000].fd.is_none() && !state.maps[&0x40000].prot.write);
    }
    let errno = |result: Result<(), ClientError>| result.unwrap_err().errno().unwrap();
    assert_eq!(errno(client.dma_map(0x1f000, 0x2000, Prot::READ, None)), Errno::EXIST);
    assert_eq!(errno(client.dma_map(0xf000, 0x2000, Prot::READ, None)), Errno::EXIST);
    assert_eq!(errno(client.dma_map(0x1000, 0, Prot::READ, None)), Errno::INVAL);
    assert!(matches!(client.dma_map(0x1000, 12, Prot::READ, None), Err(ClientError::Limit { .. })));
    assert_eq!(errno(client.dma_map(u64::MAX - 0xfff, 0x2000, Prot::READ, None)), Errno::OVERFLOW);
    client.dma_map(u64::MAX - 0xfff, 0x1000, Prot::READ, None).unwrap();
    let full = client.dma_map(0x80000, 0x1000, Prot::READ, None).unwrap_err();
    assert!(matches!(full, ClientError::Limit { value: 4, limit: 3, .. }));
    assert_eq!(errno(client.dma_unmap(0x10000, 0x1000)), Errno::NOENT);
    client.dma_unmap(0x10000, 0x10000).unwrap();
    client.dma_unmap_all().unwrap();
    (0..3).for_each(|n| client.dma_map(n << 12, 0x1000, Prot::READ, None).unwrap());
    client.dma_unmap_all().unwrap();
    assert!(served.device.state.lock().unwrap().maps.is_empty());
}

#[test]
fn migrates() {
    let served = Served::start();
    let client = served.client(quick());
    assert_eq!(client.migration_flags().unwrap(), Some(MigrationFlags::new(true, true)));
    assert!(client.probe_feature(Feature::MIG_DEVICE_STATE, FeatureOp::GetSet).unwrap());
    assert!(!client.probe_feature(Feature::MIGRATION, FeatureOp::Set).unwrap());
    assert!(!client.probe_feature(Feature(12), FeatureOp::Set).unwrap());
    assert!(client.probe_feature(Feature::MIG_DATA_SIZE, FeatureOp::Get).unwrap());

    let mut buffer = vec![0; 3 << 20];
    assert_eq!(client.mig_data_read(&mut buffer).unwrap_err().errno(), Some(Errno::INVAL));
    assert_eq!(client.precopy_info().unwrap_err().errno(), Some(Errno::INVAL));
    client.set_mig_state(MigrationState::PreCopy).unwrap();
    let info = client.precopy_info().unwrap();
    assert_eq!((info.initial_bytes, info.dirty_bytes, info.reinit), (1 << 40, 7, true));
    assert_eq!(client.mig_data_size().unwrap(), 1 << 33);
    assert_eq!(client.mig_data_read(&mut buffer).unwrap(), 0);

    client.set_mig_state(MigrationState::StopCopy).unwrap();
    assert_eq!(
        served.device.state.lock().unwrap().arcs,
        [MigrationState::PreCopy, MigrationState::PreCopyP2p, MigrationState::StopCopy]
    );
    assert_eq!(client.mig_state().unwrap(), MigrationState::StopCopy);
    assert_eq!(client.set_mig_state(MigrationState::PreCopy).unwrap_err().errno(), Some(Errno::INVAL));
    assert_eq!(client.set_mig_state(MigrationState::Error).unwrap_err().errno(), Some(Errno::INVAL));

    let data: Vec<u8> = (0..(1 << 20) + 5000u32).map(|n| (n % 251) as u8).collect();
    served.device.state.lock().unwrap().to_read = data.clone();
    let mut got = Vec::new();
    loop {
        match client.mig_data_read(&mut buffer).unwrap() {
            0 => break,
            n => got.extend_from_slice(&buffer[..n]),
        }
    }
    assert_eq!(got, data);

    client.set_mig_state(MigrationState::Stop).unwrap();
    // A stopped device takes memory and interrupts; the destination needs that.
    client.dma_map(0, 0x1000, Prot::READ, None).unwrap();
    client.irq_connect(irq_index::MSIX, 0, &[event().as_fd()]).unwrap();
    assert_eq!(client.mig_data_write(&data).unwrap_err().errno(), Some(Errno::INVAL));
    client.set_mig_state(MigrationState::Resuming).unwrap();
    client.mig_data_write(&data).unwrap();
    assert_eq!(served.device.state.lock().unwrap().written, data);
    client.reset().unwrap();
    assert_eq!(client.mig_state().unwrap(), MigrationState::Running);
    assert_eq!(client.device_manifest().unwrap(), br#"{"model":"test"}"#);
}

#[test]
fn a_failed_arc_leaves_the_last_state_reached() {
    let served = Served::start();
    let client = served.client(quick());
    served.device.state.lock().unwrap().fail_arc = Some(MigrationState::StopCopy);
    let error = client.set_mig_state(MigrationState::StopCopy).unwrap_err();
    assert_eq!(error.errno(), Some(Errno::BUSY));
    assert_eq!(client.mig_state().unwrap(), MigrationState::Stop);
}

#[test]
fn logs_dma() {
    let served = Served::start();
    let client = served.client(quick());
    assert!(client.probe_feature(Feature::DMA_LOGGING_START, FeatureOp::Set).unwrap());
    let whole = IovaRange { iova: 0x10000, len: 70 * 4096 };
    let mut bitmap = [0u64; 2];
    assert_eq!(client.dma_logging_report(whole, 4096, &mut bitmap).unwrap_err().errno(), Some(Errno::INVAL));
    assert_eq!(client.dma_logging_start(4096, &[whole]).unwrap(), 4096);
    let part = IovaRange { iova: 0x11000, len: 4096 };
    assert_eq!(client.dma_logging_start(4096, &[part]).unwrap(), 4096);
    assert_eq!(client.dma_logging_start(8192, &[part]).unwrap_err().errno(), Some(Errno::INVAL));
    assert_eq!(client.dma_logging_start(4096, &[]).unwrap_err().errno(), Some(Errno::INVAL));
    served.device.state.lock().unwrap().logged = vec![(0x10000, 1), (0x10000 + 69 * 4096, 4096)];
    bitmap = [1 << 5, 0];
    client.dma_logging_report(whole, 4096, &mut bitmap).unwrap();
    assert_eq!(bitmap, [1 | 1 << 5, 1 << 5]);
    let mut short = [0u64; 1];
    assert!(matches!(client.dma_logging_report(whole, 4096, &mut short), Err(ClientError::Limit { .. })));
    assert!(matches!(client.dma_logging_report(whole, 5000, &mut bitmap), Err(ClientError::Limit { .. })));
    client.dma_logging_stop().unwrap();
    client.dma_logging_stop().unwrap();
    // No ranges: everything.
    client.dma_logging_start(4096, &[]).unwrap();
    assert!(client.dma_logging_start(3, &[]).is_err());
}

#[test]
fn everything_works_without_the_extension() {
    let served = Served::start();
    let options = ClientOptions { extension: Extension::NONE, ..quick() };
    let client = served.client(options);
    assert_eq!(client.migration_flags().unwrap(), Some(MigrationFlags::new(false, true)));
    assert!(matches!(client.precopy_info(), Err(ClientError::NotNegotiated(_))));
    assert!(matches!(client.mig_data_size(), Err(ClientError::NotNegotiated(_))));
    assert!(matches!(client.device_manifest(), Err(ClientError::NotNegotiated(_))));
    assert!(matches!(client.set_mig_state(MigrationState::RunningP2p), Err(ClientError::NotNegotiated(_))));
    assert!(!client.probe_feature(Feature::MIG_DATA_SIZE, FeatureOp::Get).unwrap());
    client.set_mig_state(MigrationState::StopCopy).unwrap();
    client.set_mig_state(MigrationState::Running).unwrap();
}

#[test]
fn a_device_without_migration_says_so() {
    let mut device = Device::new();
    device.flags = None;
    let served = Served::new(device, quick_server());
    let client = served.client(quick());
    assert_eq!(client.migration_flags().unwrap(), None);
    assert_eq!(client.state_at_connect(), None);
    assert_eq!(client.mig_state().unwrap_err().errno(), Some(Errno::NOTTY));
    client.reset().unwrap();
}
