//! A device that is opened, over a real socket.

use std::os::fd::AsFd;
use std::time::Duration;

use vfio_migration_compat::Scalar;
use vfio_migration_device::{
    Chunk, Device, DmaAccess, PciHardware, Position, RegionIndex, Remedy, SavingSession, VfioUserDevice,
    VfioUserOptions,
};
use vfio_migration_guest_driver::registers::offset;
use vfio_migration_sim::Options;
use vfio_migration_types::{
    Bitmap, DeviceId, Gpa, Granule, Iova, MigrationState, PAGE_SIZE, RamOffset, Range, error_chain,
};

use super::support::{Served, dirty_pages, map, one_block, one_block_at, options, ram, read};

fn drain(session: &mut dyn SavingSession, chunk: usize) -> Vec<u8> {
    let (mut all, mut buf) = (Vec::new(), vec![0; chunk]);
    loop {
        match session.read(&mut buf).unwrap() {
            Chunk::Data(n) => all.extend_from_slice(&buf[..n]),
            Chunk::NothingNow | Chunk::End => return all,
        }
    }
}

#[test]
fn describes_itself() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    map(&device, &ram);
    let capabilities = device.capabilities().unwrap();
    assert!(capabilities.flags.p2p && capabilities.flags.pre_copy && capabilities.dirty_log);
    assert!(capabilities.precopy_info && capabilities.data_size);
    let manifest = device.manifest().unwrap();
    assert_eq!(manifest.model.as_deref(), Some("vfio-migrate.org/sample"));
    assert_eq!(manifest.model_version.as_deref(), Some("1.0.0"));
    let state_size = &manifest.parameters["state_size"];
    assert_eq!((&state_size.value, &state_size.off), (&Scalar::Int(256 << 10), &Some(Scalar::Int(0))));
    let chain: Vec<_> =
        manifest.capabilities.iter().flatten().map(|one| (one.id, one.offset, one.len)).collect();
    assert_eq!(chain, [(0x11, 0x40, Some(12)), (0x09, 0x50, Some(8))]);
    assert_eq!(manifest.dirty.unwrap().device_log, Some(true));
    assert!(manifest.state_size.unwrap() >= 256 << 10 && manifest.driver.is_none());
    assert_eq!(manifest.pci.unwrap().vendor, 0x5646);
    assert_eq!(manifest.irqs.unwrap().get(&2), Some(&2));
    assert_eq!(manifest.regions.as_ref().map(Vec::len), Some(3), "{:?}", manifest.regions);
    assert!(device.stop_copy_size().unwrap().unwrap() >= 256 << 10);
    assert_eq!(device.doorbells(RegionIndex::BAR0).unwrap().len(), 1);
}

#[test]
fn a_device_without_intx_takes_no_eventfd_to_unmask_it() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let refused = device.set_intx_resample(Some(event.as_fd())).unwrap_err();
    assert!(refused.to_string().contains("INTx") && refused.errno.is_some(), "{refused:?}");
}

#[test]
fn a_plain_server_has_no_extras_and_still_migrates() {
    let (served, ram) = (Served::new(Options { extension: false, ..options() }), ram());
    let device = served.open(&ram);
    map(&device, &ram);
    let capabilities = device.capabilities().unwrap();
    assert!(!capabilities.flags.p2p && !capabilities.precopy_info && !capabilities.data_size);
    assert_eq!(device.stop_copy_size().unwrap(), None);
    assert_eq!(device.manifest().unwrap().model, None);
    let mut session = device.begin_precopy().unwrap();
    assert_eq!(session.progress().unwrap(), None);
    let first = drain(&mut *session, 4096);
    assert!(session.go(Position::PreCopyP2p).is_err(), "it has no such state");
    session.go(Position::StopCopy).unwrap();
    let rest = drain(&mut *session, 4096);
    assert!(first.len() >= 256 << 10 && !rest.is_empty());
    assert_eq!(session.end().unwrap(), MigrationState::Stop);
}

#[test]
fn state_moves_from_one_server_to_another() {
    let (source, destination, ram) = (Served::new(options()), Served::new(options()), ram());
    let (from, to) = (source.open(&ram), destination.open(&ram));
    map(&from, &ram);
    map(&to, &ram);
    one_block(&from, &ram, 0x8000);
    let mut saving = from.begin_precopy().unwrap();
    let mut resuming = to.begin_resuming().unwrap();
    assert!(saving.progress().unwrap().unwrap().initial_bytes > 0);
    for position in [Position::PreCopy, Position::PreCopyP2p, Position::StopCopy] {
        saving.go(position).unwrap();
        let bytes = drain(&mut *saving, 10_000);
        bytes.chunks(3333).for_each(|piece| resuming.write(piece).unwrap());
    }
    resuming.finish().unwrap();
    assert_eq!(to.state().unwrap(), MigrationState::Stop);
    saving.end().unwrap();
    to.set_state(MigrationState::RunningP2p).unwrap();
    to.set_state(MigrationState::Running).unwrap();
    one_block(&to, &ram, 0x9000);
    assert_eq!(read(&to, offset::BLOCKS0), 2, "it counts on where the other stopped");
}

#[test]
fn the_log_is_exact_for_what_the_server_maps() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    map(&device, &ram);
    one_block(&device, &ram, 0x8000);
    device.dirty_log().unwrap().start().unwrap();
    assert!(device.dirty_log().unwrap().start().is_err(), "it runs already");
    assert!(dirty_pages(&device, &ram).is_empty());
    one_block(&device, &ram, (1 << 32) + 0x5000);
    // The block above the hole, and the count of completed blocks.
    assert_eq!(dirty_pages(&device, &ram), [3, 256 + 5]);
    assert!(dirty_pages(&device, &ram).is_empty(), "a report forgets");
    device.dirty_log().unwrap().stop().unwrap();
    device.dirty_log().unwrap().stop().unwrap();
    let mut map = Bitmap::new(ram.size(), Granule::PAGE);
    assert!(device.dirty_log().unwrap().report(&mut map).is_err(), "it does not run");
}

/// Memory that is mapped where the guest does not have it: the log knows it by what is behind it.
#[test]
fn the_log_is_exact_whatever_the_address() {
    const SHIFT: u64 = 1 << 40;
    for message_dma in [false, true] {
        let (served, ram) = (Served::new(options()), ram());
        let device = served.open_with(&ram, &VfioUserOptions { message_dma, ..VfioUserOptions::default() });
        for region in ram.regions() {
            let range = Range::new(Iova(region.gpa.0 + SHIFT), region.len).unwrap();
            let file = ram.shared_file(region.offset, region.len);
            device.dma_map(range, DmaAccess::BOTH, file).unwrap();
        }
        device.dirty_log().unwrap().start().unwrap();
        one_block_at(&device, &ram, 0x8000, SHIFT);
        assert_eq!(dirty_pages(&device, &ram), [3, 8]);
    }
}

#[test]
fn a_log_that_knows_no_mapping_of_ram_refuses_to_start() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    let refused = device.dirty_log().unwrap().start().unwrap_err();
    let text = error_chain(&refused);
    assert!(text.contains("dev0") && text.contains("no mapping of guest RAM"), "{text}");
    let page = Range::new(Iova(0), PAGE_SIZE).unwrap();
    let file = ram.shared_file(ram.regions()[0].offset, PAGE_SIZE);
    device.dma_map(page, DmaAccess { read: true, write: false }, file).unwrap();
    let log = device.dirty_log().unwrap();
    log.start().unwrap();
    assert!(dirty_pages(&device, &ram).is_empty(), "one that may write no RAM dirties nothing");
    log.stop().unwrap();
}

/// What changes hands while the log runs is dirty, all of it: the server's log is of what was mapped as it started.
#[test]
fn what_is_mapped_or_unmapped_while_the_log_runs_is_dirty() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    let piece = |first: u64, pages: u64| Range::new(Iova(first * PAGE_SIZE), pages * PAGE_SIZE).unwrap();
    let map = |first: u64, pages: u64| {
        let at = RamOffset(first * PAGE_SIZE);
        let file = ram.shared_file(at, pages * PAGE_SIZE);
        device.dma_map(piece(first, pages), DmaAccess::BOTH, file).unwrap();
    };
    map(0, 16);
    map(16, 2);
    let log = device.dirty_log().unwrap();
    log.start().unwrap();
    map(20, 2);
    device.dma_unmap(piece(16, 2)).unwrap();
    assert_eq!(dirty_pages(&device, &ram), [16, 17, 20, 21]);
    one_block(&device, &ram, 0x8000);
    one_block(&device, &ram, 20 * PAGE_SIZE);
    assert_eq!(dirty_pages(&device, &ram), [3, 8, 16, 17, 20, 21]);
    log.stop().unwrap();
    log.start().unwrap();
    one_block(&device, &ram, 20 * PAGE_SIZE);
    assert_eq!(dirty_pages(&device, &ram), [3, 20]);
}

#[test]
fn the_log_is_exact_for_what_is_written_for_the_server() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open_with(&ram, &VfioUserOptions { message_dma: true, ..VfioUserOptions::default() });
    map(&device, &ram);
    assert!(device.capabilities().unwrap().dirty_log);
    device.dirty_log().unwrap().start().unwrap();
    one_block(&device, &ram, 0x8000);
    assert_eq!(dirty_pages(&device, &ram), [3, 8]);
    let word = ram.read_u64(ram.offset_of(Gpa(0x8008), 8).unwrap()).unwrap();
    assert_eq!(word, 1, "the block came by message: number 1");
}

#[test]
fn a_server_without_a_log_is_found_out() {
    let (served, ram) = (Served::new(Options { dirty_log: false, ..options() }), ram());
    let device = served.open(&ram);
    map(&device, &ram);
    assert!(!device.capabilities().unwrap().dirty_log);
    assert!(device.dirty_log().is_none());
}

#[test]
fn a_failed_arc_says_where_the_device_really_is() {
    let fault = "fail-arc:STOP:STOP_COPY:EIO:1".parse().unwrap();
    let (served, ram) = (Served::new(Options { faults: vec![fault], precopy: false, ..options() }), ram());
    let device = served.open(&ram);
    let error = device.begin_stop_copy().unwrap_err();
    assert_eq!((error.from, error.to), (Some(MigrationState::Running), MigrationState::StopCopy));
    assert_eq!(error.now, Some(MigrationState::Stop), "it got half the way");
    assert_eq!(error.errno.map(|errno| errno.raw_os_error()), Some(5));
    assert_eq!(error.remedy, Remedy::TryAnotherState);
    device.set_state(MigrationState::Running).unwrap();
}

#[test]
fn nothing_is_set_on_a_device_in_error_but_a_reset_helps() {
    let fault = "error-arc:RUNNING:PRE_COPY".parse().unwrap();
    let (served, ram) = (Served::new(Options { faults: vec![fault], ..options() }), ram());
    let device = served.open(&ram);
    let error = device.begin_precopy().unwrap_err();
    assert_eq!((error.now, error.remedy), (Some(MigrationState::Error), Remedy::Reset));
    assert_eq!(device.set_state(MigrationState::Stop).unwrap_err().remedy, Remedy::Reset);
    device.reset().unwrap();
    assert_eq!(device.state().unwrap(), MigrationState::Running);
}

#[test]
fn a_server_that_hangs_is_late_and_its_device_stays() {
    let fault = "hang-arc:RUNNING:PRE_COPY:2000".parse().unwrap();
    let (served, ram) = (Served::new(Options { faults: vec![fault], ..options() }), ram());
    let device = served.open_with(
        &ram,
        &VfioUserOptions {
            timeout: Duration::from_millis(200),
            transition_timeout: Duration::from_millis(200),
            ..VfioUserOptions::default()
        },
    );
    let error = device.begin_precopy().unwrap_err();
    assert_eq!((error.to, error.now), (MigrationState::PreCopy, None));
    assert_eq!(error.errno.map(|errno| errno.raw_os_error()), Some(110));
    assert!(device.is_alive());
    // Each question waits for the late answer as long as it may.
    let state = (0..60).find_map(|_| device.state().ok());
    assert_eq!(state, Some(MigrationState::PreCopy));
    device.reset().unwrap();
    assert_eq!(device.state().unwrap(), MigrationState::Running);
}

#[test]
fn foreign_state_is_refused_at_once_and_a_truncated_one_at_the_end() {
    let other = Served::new(Options { version: (2, 0), ..options() });
    let (source, destination, ram) = (Served::new(options()), Served::new(options()), ram());
    let (from, stranger, to) = (source.open(&ram), other.open(&ram), destination.open(&ram));
    let mut saving = from.begin_precopy().unwrap();
    let bytes = drain(&mut *saving, 4096);
    let mut resuming = stranger.begin_resuming().unwrap();
    let error = resuming.write(&bytes).unwrap_err();
    assert_eq!(error.errno.map(|errno| errno.raw_os_error()), Some(22));
    resuming.abort().unwrap();
    assert_eq!(stranger.state().unwrap(), MigrationState::Running);
    let mut resuming = to.begin_resuming().unwrap();
    resuming.write(&bytes).unwrap();
    assert!(resuming.finish().is_err(), "the end is missing");
    assert_eq!(to.state().unwrap(), MigrationState::Resuming, "it is not reset before its caller knows");
    to.reset().unwrap();
    assert_eq!(to.state().unwrap(), MigrationState::Running);
}

#[test]
fn dropping_a_saving_session_leaves_it() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    drop(device.begin_precopy().unwrap());
    assert_eq!(device.state().unwrap(), MigrationState::Running);
    let mut session = device.begin_precopy().unwrap();
    session.go(Position::StopCopy).unwrap();
    drop(session);
    assert_eq!(device.state().unwrap(), MigrationState::Stop);
}

#[test]
fn a_session_that_a_reset_took_away_does_not_go_on() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    let mut saving = device.begin_precopy().unwrap();
    device.reset().unwrap();
    let error = saving.go(Position::StopCopy).unwrap_err();
    assert_eq!((error.from, error.now), (Some(MigrationState::Running), Some(MigrationState::Running)));
    assert!(error.source.to_string().contains("session was lost"), "{}", error.source);
    assert_eq!(device.state().unwrap(), MigrationState::Running, "no second session was opened");
    assert_eq!(saving.end().unwrap(), MigrationState::Running);

    let mut saving = device.begin_precopy().unwrap();
    saving.go(Position::StopCopy).unwrap();
    device.reset().unwrap();
    assert_eq!(saving.end().unwrap(), MigrationState::Stop);
    assert_eq!(device.state().unwrap(), MigrationState::Stop, "where it promised to leave it");

    let resuming = device.begin_resuming().unwrap();
    device.reset().unwrap();
    let error = resuming.finish().unwrap_err();
    assert!(error.source.to_string().contains("session was lost"), "{}", error.source);
    assert_eq!(device.state().unwrap(), MigrationState::Running);
}

#[test]
fn a_session_that_is_open_is_not_opened_again() {
    let (source, destination, ram) = (Served::new(options()), Served::new(options()), ram());
    let (from, to) = (source.open(&ram), destination.open(&ram));
    let mut saving = from.begin_precopy().unwrap();
    let half = drain(&mut *saving, 4096);
    for again in [from.begin_precopy(), from.begin_stop_copy()] {
        assert!(again.unwrap_err().source.to_string().contains("a session is open"));
    }
    saving.go(Position::StopCopy).unwrap();
    let rest = drain(&mut *saving, 4096);
    // What a session was given that was not finished is no beginning of what the next one is given.
    let mut first = to.begin_resuming().unwrap();
    first.write(&half).unwrap();
    let mut second = to.begin_resuming().unwrap();
    second.write(&half).unwrap();
    second.write(&rest).unwrap();
    second.finish().unwrap();
    assert_eq!(to.state().unwrap(), MigrationState::Stop);
}

#[test]
fn states_of_sessions_are_not_set_from_outside() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    for state in [MigrationState::PreCopy, MigrationState::StopCopy, MigrationState::Resuming] {
        let refused = device.set_state(state).unwrap_err();
        assert!(refused.source.to_string().contains("belongs to a session"), "{}", refused.source);
    }
    let mut resuming = device.begin_resuming().unwrap();
    resuming.write(b"half").unwrap();
    assert!(device.set_state(MigrationState::Stop).is_err(), "that would make half a state the device's");
    assert_eq!(device.state().unwrap(), MigrationState::Resuming);
    resuming.abort().unwrap();
}

#[test]
fn a_session_whose_device_is_in_error_sets_nothing() {
    let fault = "error-arc:PRE_COPY_P2P:STOP_COPY".parse().unwrap();
    let (served, ram) = (Served::new(Options { faults: vec![fault], ..options() }), ram());
    let device = served.open(&ram);
    let mut saving = device.begin_precopy().unwrap();
    let error = saving.go(Position::StopCopy).unwrap_err();
    assert_eq!(error.now, Some(MigrationState::Error));
    assert_eq!(saving.go(Position::StopCopy).unwrap_err().remedy, Remedy::Reset);
    assert_eq!(saving.end().unwrap_err().remedy, Remedy::Reset);
}

#[test]
fn a_server_that_ends_is_noticed_unasked() {
    let (served, ram) = (Served::new(options()), ram());
    let device = served.open(&ram);
    assert!(device.is_alive());
    drop(served);
    assert!(!device.is_alive());
}

#[test]
fn no_server_is_an_error_that_names_the_socket() {
    let error = VfioUserDevice::open(
        DeviceId::new("dev0").unwrap(),
        "/nonexistent/device.sock",
        ram(),
        &VfioUserOptions { connect_timeout: Duration::from_millis(50), ..VfioUserOptions::default() },
    )
    .unwrap_err();
    assert!(error.to_string().contains("/nonexistent/device.sock"), "{error}");
}
