//! The device's migration, without a transport.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::support::{LIMIT, bit, busy, device, options, read_all, resume, until};
use rustix::io::Errno;
use vfio_migration_guest_driver::registers::offset;
use vfio_migration_sim::driver::{DriverConfig, Hardware, P2pTarget, RAM_SIZE, TestDriver};
use vfio_migration_sim::{Options, SampleDevice, StateRead};
use vfio_user_peer::MigrationFlags;
use vfio_user_peer::MigrationState::{
    self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};

/// The state of a device that was stopped at once.
fn snapshot(device: &SampleDevice) -> Vec<u8> {
    device.set_state(StopCopy).unwrap();
    let stream = read_all(device);
    device.set_state(Stop).unwrap();
    stream
}

#[test]
fn every_transition_of_every_kind_of_device_goes_as_the_table_says() {
    for flags in MigrationFlags::ALL {
        let options = Options { p2p: flags.p2p, precopy: flags.pre_copy, state_size: 0, ..options() };
        let donor = device(options.clone());
        let state = snapshot(&donor);
        for from in MigrationState::ALL {
            for to in MigrationState::ALL {
                if from == MigrationState::Error || !flags.has_state(from) {
                    continue;
                }
                let device = device(options.clone());
                assert_eq!(device.migration_flags(), flags);
                device.set_state(from).unwrap();
                if from == Resuming {
                    device.write_data(&state).unwrap();
                }
                match from.path_to(to, flags) {
                    Ok(_) => {
                        device.set_state(to).unwrap();
                        assert_eq!(device.state(), to, "{from} to {to} with {flags:?}");
                    }
                    Err(_) => {
                        let error = device.set_state(to).unwrap_err();
                        assert_eq!(error.errno(), Errno::INVAL, "{from} to {to} with {flags:?}");
                        assert_eq!(device.state(), from);
                    }
                }
                let readable = device.state().is_saving();
                assert_eq!(device.read_data(&mut [0; 16]).is_ok(), readable);
                assert_eq!(device.write_data(&[]).is_ok(), device.state() == Resuming);
                let precopy = matches!(device.state(), PreCopy | PreCopyP2p);
                assert_eq!(device.progress().is_ok(), precopy);
            }
        }
    }
}

/// Saves through `states` with the driver at work in between, and goes on on a second device.
fn migrate_live(states: &[MigrationState], options: Options) {
    let (source, mut driver) = busy(options.clone());
    driver.run(&source, 200, LIMIT).unwrap();
    source.region_write(2, 0x5000, b"a letter").unwrap();
    let mut stream = Vec::new();
    for state in states {
        source.set_state(*state).unwrap();
        if state.is_saving() {
            stream.extend(read_all(&source));
        }
        if *state == PreCopy {
            driver.run(&source, 200, LIMIT).unwrap();
            stream.extend(read_all(&source));
        }
        // What is rung after the last read is not in the stream: another test's matter.
        if *state != StopCopy && driver.post().unwrap() > 0 {
            driver.ring(&source).unwrap();
        }
    }
    assert_eq!(source.state(), StopCopy);
    assert_eq!(source.read_data(&mut [0; 9]), Ok(StateRead::End));
    source.set_state(Stop).unwrap();

    let destination = device(options);
    driver.connect(&destination).unwrap();
    resume(&destination, &stream);
    assert_eq!(destination.digest().unwrap(), source.digest().unwrap());
    let mut letter = [0; 8];
    destination.region_read(2, 0x5000, &mut letter).unwrap();
    assert_eq!(&letter, b"a letter");
    if destination.migration_flags().p2p {
        destination.set_state(RunningP2p).unwrap();
    }
    destination.set_state(Running).unwrap();
    driver.run(&destination, 300, LIMIT).unwrap();
    driver.drain(&destination, LIMIT).unwrap();
    driver.recheck().unwrap();
    until(|| destination.sweep_done());
    let found = driver.findings();
    assert_eq!((found.blocks_lost, found.interrupts_lost, found.integrity), (0, 0, 0));
    assert_eq!(destination.integrity(), 0);
    let mut blocks = [0; 8];
    Hardware::read(&destination, offset::BLOCKS0, &mut blocks).unwrap();
    assert_eq!(u64::from_le_bytes(blocks), found.blocks, "none lost, none doubled");
    assert_eq!(driver.done(0).unwrap(), found.blocks);
}

#[test]
fn a_working_device_moves_through_pre_copy() {
    let options = Options { state_dirty_rate: 4 << 20, ..options() };
    migrate_live(&[PreCopy, PreCopyP2p, StopCopy], options.clone());
    migrate_live(&[PreCopy, StopCopy], options);
}

#[test]
fn a_working_device_moves_without_pre_copy_and_without_p2p() {
    let options = Options { precopy: false, state_dirty_rate: 4 << 20, ..options() };
    migrate_live(&[RunningP2p, Stop, StopCopy], options.clone());
    migrate_live(&[StopCopy], Options { p2p: false, ..options.clone() });
    migrate_live(&[PreCopy, StopCopy], Options { p2p: false, precopy: true, ..options });
}

#[test]
fn a_device_without_bulk_state_moves() {
    migrate_live(&[PreCopy, StopCopy], Options { state_size: 0, ..options() });
}

#[test]
fn it_moves_there_and_back_with_an_interrupt_in_flight() {
    let (mut here, mut driver) = busy(options());
    for _ in 0..10 {
        driver.run(&here, 20, LIMIT).unwrap();
        driver.post().unwrap();
        driver.ring(&here).unwrap();
        // Whatever was raised and not yet handled is in the driver's eventfd, which is the VMM's to carry.
        let stream = snapshot(&here);
        let there = device(options());
        driver.connect(&there).unwrap();
        resume(&there, &stream);
        there.set_state(Running).unwrap();
        here = there;
    }
    driver.drain(&here, LIMIT).unwrap();
    driver.recheck().unwrap();
    let found = driver.findings();
    assert_eq!((found.blocks_lost, found.interrupts_lost), (0, 0));
}

#[test]
fn two_peers_move_together() {
    peers_move(options());
}

#[test]
fn two_peers_move_together_however_late_their_last_writes_are() {
    peers_move(Options { faults: vec!["hold-dma:2".parse().unwrap()], ..options() });
}

fn peers_move(source: Options) {
    let sources = [device(source.clone()), device(source)];
    let config = DriverConfig::default();
    let target = |peer: &SampleDevice| P2pTarget::of(peer, 0x4000_0000).unwrap();
    let mut drivers = [0, 1].map(|n: usize| TestDriver::new(config, Some(target(&sources[1 - n]))).unwrap());
    for (driver, device) in drivers.iter_mut().zip(&sources) {
        driver.connect(device).unwrap();
        driver.start(device).unwrap();
        driver.run(device, 100, LIMIT).unwrap();
    }
    for state in [PreCopy, PreCopyP2p, StopCopy] {
        for (driver, device) in drivers.iter_mut().zip(&sources) {
            driver.post().unwrap();
            driver.ring(device).unwrap();
            device.set_state(state).unwrap();
        }
    }
    let streams = sources.each_ref().map(read_all);
    let destinations = [device(options()), device(options())];
    for (n, driver) in drivers.iter_mut().enumerate() {
        driver.set_peer(target(&destinations[1 - n])).unwrap();
        driver.connect(&destinations[n]).unwrap();
        resume(&destinations[n], &streams[n]);
    }
    for state in [RunningP2p, Running] {
        destinations.iter().for_each(|device| device.set_state(state).unwrap());
    }
    for (driver, device) in drivers.iter_mut().zip(&destinations) {
        driver.run(device, 100, LIMIT).unwrap();
    }
    for (driver, device) in drivers.iter_mut().zip(&destinations) {
        driver.drain(device, LIMIT).unwrap();
        driver.recheck().unwrap();
        let found = driver.findings();
        assert!(found.p2p_blocks > 0);
        assert_eq!((found.blocks_lost, found.interrupts_lost), (0, 0));
    }
}

#[test]
fn a_device_stopped_before_its_peer_is_quiet_loses_blocks() {
    // The negative control of the P2P order.
    let (writer, reader) = (device(options()), device(options()));
    let mut driver =
        TestDriver::new(DriverConfig::default(), Some(P2pTarget::of(&reader, 0x4000_0000).unwrap())).unwrap();
    driver.connect(&writer).unwrap();
    driver.start(&writer).unwrap();
    driver.run(&writer, 100, LIMIT).unwrap();
    reader.set_state(StopCopy).unwrap();
    let stream = read_all(&reader);
    driver.run(&writer, 100, LIMIT).unwrap();
    driver.drain(&writer, LIMIT).unwrap();
    driver.recheck().unwrap();
    assert_eq!(driver.findings().blocks_lost, 0);
    let moved = device(options());
    resume(&moved, &stream);
    driver.set_peer(P2pTarget::of(&moved, 0x4000_0000).unwrap()).unwrap();
    driver.recheck().unwrap();
    assert!(driver.findings().blocks_lost > 0);
}

#[test]
fn pre_copy_tells_how_far_it_is_and_reinit_begins_anew() {
    let device = device(Options { state_dirty_rate: 0, ..options() });
    device.set_state(PreCopy).unwrap();
    let start = device.progress().unwrap();
    assert!(start.initial_bytes >= 1 << 20);
    assert_eq!((start.dirty_bytes, start.reinit), (0, false));
    let mut piece = vec![0; 300_000];
    assert_eq!(device.read_data(&mut piece), Ok(StateRead::Data(300_000)));
    assert_eq!(device.progress().unwrap().initial_bytes, start.initial_bytes - 300_000);
    let first = read_all(&device);
    assert_eq!(first.len() as u64 + 300_000, start.initial_bytes);
    assert_eq!(device.progress().unwrap().initial_bytes, 0);
    assert_eq!(device.read_data(&mut piece), Ok(StateRead::NothingNow));

    device.region_write(0, offset::REINIT, &1u32.to_le_bytes()).unwrap();
    let again = device.progress().unwrap();
    assert!(again.reinit && again.initial_bytes >= 1 << 20);
    assert!(!device.progress().unwrap().reinit, "said once");
    let second = read_all(&device);
    assert_eq!(second.len() as u64, again.initial_bytes);
    device.set_state(StopCopy).unwrap();
    assert_eq!(device.stop_copy_size(), read_all(&device).len() as u64);
}

#[test]
fn a_stream_with_reinit_in_the_middle_of_a_record_loads() {
    let source = device(Options { state_dirty_rate: 8 << 20, ..options() });
    source.set_state(PreCopy).unwrap();
    let mut stream = vec![0; 100_001];
    assert_eq!(source.read_data(&mut stream), Ok(StateRead::Data(100_001)));
    source.region_write(0, offset::REINIT, &1u32.to_le_bytes()).unwrap();
    source.set_state(StopCopy).unwrap();
    stream.extend(read_all(&source));
    source.set_state(Stop).unwrap();
    let destination = device(options());
    resume(&destination, &stream);
    assert_eq!(destination.digest().unwrap(), source.digest().unwrap());
}

#[test]
fn changes_show_as_dirty_bytes_and_are_sent() {
    let source = device(Options { state_dirty_rate: 64 << 20, ..options() });
    source.set_state(PreCopy).unwrap();
    let mut stream = read_all(&source);
    // Nearly all of it: runs of dirty pages are then longer than a record.
    until(|| source.progress().unwrap().dirty_bytes > 900_000);
    stream.extend(read_all(&source));
    until(|| source.progress().unwrap().dirty_bytes > 900_000);
    source.set_state(StopCopy).unwrap();
    let before = source.digest().unwrap();
    stream.extend(read_all(&source));
    assert_eq!(source.digest().unwrap(), before, "nothing changes in STOP_COPY");
    let destination = device(options());
    resume(&destination, &stream);
    assert_eq!(destination.digest().unwrap(), before);
}

#[test]
fn the_size_estimate_before_it_stops_is_the_whole_state() {
    let device = device(options());
    device.region_write(2, 0x8000, &[1]).unwrap();
    let estimate = device.stop_copy_size();
    assert_eq!(snapshot(&device).len() as u64, estimate);
}

#[test]
fn state_of_another_device_is_refused_at_once() {
    let of = |version| Options { version, ..options() };
    let whole = snapshot(&device(of((1, 1))));
    for options in [
        of((1, 0)),
        of((0, 9)),
        of((2, 1)),
        Options { state_size: 2 << 20, ..of((1, 1)) },
        Options { state_size: 0, ..of((1, 1)) },
    ] {
        let device = device(options);
        device.set_state(Resuming).unwrap();
        // The header alone is enough to be refused, even cut in two.
        device.write_data(&whole[..20]).unwrap();
        assert_eq!(device.write_data(&whole[20..48]).unwrap_err().errno(), Errno::INVAL);
        assert_eq!(device.write_data(&whole[48..]).unwrap_err().errno(), Errno::INVAL);
        assert_eq!(device.set_state(Stop).unwrap_err().errno(), Errno::INVAL);
        assert_eq!(device.state(), Resuming);
        device.reset().unwrap();
        assert_eq!(device.state(), Running);
    }
    let newer = device(of((1, 2)));
    newer.set_state(Resuming).unwrap();
    newer.write_data(&whole).unwrap();
    newer.set_state(Stop).unwrap();
    let device = device(options());
    device.set_state(Resuming).unwrap();
    assert_eq!(device.write_data(&[0x55; 100]).unwrap_err().errno(), Errno::INVAL);
}

#[test]
fn truncated_and_stretched_state_is_refused() {
    let whole = snapshot(&device(options()));
    for cut in [0, 47, 48, 5000, whole.len() - 100, whole.len() - 1] {
        let device = device(options());
        device.set_state(Resuming).unwrap();
        device.write_data(&whole[..cut]).unwrap();
        assert_eq!(device.set_state(Stop).unwrap_err().errno(), Errno::INVAL, "cut at {cut}");
        assert_eq!(device.state(), Resuming);
        // After a reset it takes the whole state.
        device.reset().unwrap();
        resume(&device, &whole);
    }
    let device = device(options());
    device.set_state(Resuming).unwrap();
    device.write_data(&whole).unwrap();
    assert_eq!(device.write_data(&[0]).unwrap_err().errno(), Errno::INVAL);
    assert_eq!(device.set_state(Stop).unwrap_err().errno(), Errno::INVAL);
}

#[test]
fn a_reset_in_the_middle_of_resuming_makes_the_state_whole_again() {
    let donor = device(Options { state_dirty_rate: 64 << 20, ..options() });
    donor.set_state(PreCopy).unwrap();
    read_all(&donor);
    until(|| donor.progress().unwrap().dirty_bytes > 100_000);
    let whole = {
        donor.set_state(Running).unwrap();
        snapshot(&donor)
    };
    let fresh = device(options()).digest().unwrap();
    let device = device(options());
    device.set_state(Resuming).unwrap();
    device.write_data(&whole[..whole.len() / 2]).unwrap();
    device.reset().unwrap();
    assert_eq!(device.digest().unwrap(), fresh);
}

#[test]
fn the_log_of_dma_writes_is_exact() {
    let (device, mut driver) = busy(options());
    let base = DriverConfig::default().ram_base;
    driver.run(&device, 100, LIMIT).unwrap();
    driver.drain(&device, LIMIT).unwrap();
    assert_eq!(device.start_dma_log(4096, &[(base, RAM_SIZE)]).unwrap(), 4096);
    let mut seen = driver.handled(0);
    for blocks in [1, 7, 64, 30] {
        driver.run(&device, blocks, LIMIT).unwrap();
        driver.drain(&device, LIMIT).unwrap();
        device.set_state(Stop).unwrap();
        let mut words = [0; 4];
        device.report_dma_log(base, RAM_SIZE, 4096, &mut words).unwrap();
        device.set_state(Running).unwrap();
        let logged: BTreeSet<u64> = (0..256).filter(|n| bit(&words, *n)).collect();
        let mut written: BTreeSet<u64> = (seen + 1..=driver.handled(0)).map(TestDriver::slot_page).collect();
        written.insert(TestDriver::done_page());
        assert_eq!(logged, written);
        seen = driver.handled(0);
    }
    device.stop_dma_log().unwrap();
    assert_eq!(device.report_dma_log(base, RAM_SIZE, 4096, &mut [0; 4]).unwrap_err().errno(), Errno::INVAL);
}

#[test]
fn no_write_escapes_the_log_while_the_device_runs() {
    // Everything that differs between a copy of memory and memory at the end must have been reported in between.
    let (device, mut driver) = busy(Options { dma_interval: Duration::ZERO, ..options() });
    let base = DriverConfig::default().ram_base;
    device.start_dma_log(4096, &[]).unwrap();
    let (fd, _) = driver.ram();
    let memory = vfio_migration_memory::Mapping::new(fd, 0, RAM_SIZE, false).unwrap();
    let copy = |page: u64| {
        let mut bytes = vec![0; 4096];
        memory.read(page * 4096, &mut bytes).unwrap();
        bytes
    };
    let device_pages: Vec<u64> =
        (1..=64).map(TestDriver::slot_page).chain([TestDriver::done_page()]).collect();
    let mut copies: Vec<Vec<u8>> = device_pages.iter().map(|page| copy(*page)).collect();
    for round in 0..40 {
        driver.run(&device, 50, LIMIT).unwrap();
        if round == 39 {
            device.set_state(Stop).unwrap();
        }
        let mut words = [0; 4];
        device.report_dma_log(base, RAM_SIZE, 4096, &mut words).unwrap();
        for (page, old) in device_pages.iter().zip(&mut copies) {
            if bit(&words, *page) {
                *old = copy(*page);
            }
        }
    }
    for (page, old) in device_pages.iter().zip(&copies) {
        assert_eq!(&copy(*page), old, "page {page}");
    }
}

#[test]
fn a_device_without_a_log_says_so() {
    let device = device(Options { dirty_log: false, ..options() });
    assert_eq!(device.start_dma_log(4096, &[]).unwrap_err().errno(), Errno::NOTTY);
    assert_eq!(device.stop_dma_log().unwrap_err().errno(), Errno::NOTTY);
}
