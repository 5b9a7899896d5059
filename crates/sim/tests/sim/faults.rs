//! Each scripted fault does what it says, and the checks see it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::support::{self, LIMIT, busy, device, options, read_all, resume, until};
use rustix::io::Errno;
use vfio_migration_sim::driver::{DriverConfig, P2pTarget, RAM_SIZE, TestDriver};
use vfio_migration_sim::{Options, SampleDevice, StateRead};
use vfio_user_peer::MigrationState::{
    Error, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy,
};

fn faulty(fault: &str) -> Options {
    Options { faults: vec![fault.parse().unwrap()], ..options() }
}

#[test]
fn an_arc_fails_and_the_device_stays_where_it_got_to() {
    let device = device(faulty("fail-arc:STOP:STOP_COPY:EIO:1"));
    assert_eq!(device.set_state(StopCopy).unwrap_err().errno(), Errno::IO);
    assert_eq!(device.state(), Stop, "the arcs before it were taken");
    device.set_state(StopCopy).unwrap();
}

#[test]
fn an_arc_fails_every_time_without_a_count() {
    let (device, mut driver) = busy(faulty("fail-arc:PRE_COPY_P2P:STOP_COPY:ENOMEM"));
    device.set_state(PreCopy).unwrap();
    for _ in 0..3 {
        assert_eq!(device.set_state(StopCopy).unwrap_err().errno(), Errno::NOMEM);
        assert_eq!(device.state(), PreCopyP2p);
    }
    device.set_state(Running).unwrap();
    driver.run(&device, 50, LIMIT).unwrap();
    assert_eq!(driver.findings().blocks_lost, 0);
}

#[test]
fn the_nth_arc_fails_once() {
    let device = device(faulty("fail-arc:2:EBUSY"));
    device.set_state(RunningP2p).unwrap();
    assert_eq!(device.set_state(Stop).unwrap_err().errno(), Errno::BUSY);
    device.set_state(Stop).unwrap();
}

#[test]
fn an_arc_ends_in_error_and_only_a_reset_leaves_it() {
    let (device, mut driver) = busy(faulty("error-arc:PRE_COPY:PRE_COPY_P2P"));
    driver.run(&device, 20, LIMIT).unwrap();
    device.set_state(PreCopy).unwrap();
    assert_eq!(device.set_state(StopCopy).unwrap_err().errno(), Errno::IO);
    assert_eq!(device.state(), Error);
    assert_eq!(device.set_state(Running).unwrap_err().errno(), Errno::INVAL);
    assert_eq!(device.read_data(&mut [0; 8]).unwrap_err().errno(), Errno::NODEV);
    device.reset().unwrap();
    assert_eq!(device.state(), Running);
}

#[test]
fn an_arc_hangs_for_a_time_or_until_the_device_ends() {
    let slow = device(faulty("hang-arc:RUNNING:RUNNING_P2P:50"));
    let start = Instant::now();
    slow.set_state(RunningP2p).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(50));

    let hung = Arc::new(device(faulty("hang-arc:RUNNING:RUNNING_P2P")));
    let caller = hung.clone();
    let thread = std::thread::spawn(move || caller.set_state(Stop).is_ok());
    // The state can be asked for all the while, and stays what it was.
    let end = Instant::now() + Duration::from_millis(100);
    while Instant::now() < end {
        assert_eq!(hung.state(), Running);
        std::thread::yield_now();
    }
    assert!(!thread.is_finished());
    hung.release_hang();
    thread.join().unwrap();
}

#[test]
fn a_delay_is_added_to_each_arc() {
    let device = device(Options { arc_delay: Duration::from_millis(20), ..options() });
    let start = Instant::now();
    device.set_state(StopCopy).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(60), "three arcs");
}

#[test]
fn reads_are_short_and_the_stream_is_whole_all_the_same() {
    let source = device(Options { state_size: 8192, ..faulty("short-read:7") });
    source.set_state(StopCopy).unwrap();
    let mut piece = [0; 1000];
    let mut stream = Vec::new();
    while let StateRead::Data(count) = source.read_data(&mut piece).unwrap() {
        assert!(count <= 7);
        stream.extend(&piece[..count]);
    }
    resume(&device(Options { state_size: 8192, ..options() }), &stream);
}

#[test]
fn the_size_estimate_is_wrong() {
    let honest = device(options()).stop_copy_size();
    assert_eq!(device(faulty("wrong-size-estimate:1000")).stop_copy_size(), honest * 10);
    assert_eq!(device(faulty("wrong-size-estimate:0")).stop_copy_size(), 0);
}

#[test]
fn it_dies_in_a_read_after_so_many_bytes() {
    let device = device(faulty("die-in-read:100000"));
    device.set_state(PreCopy).unwrap();
    let mut piece = vec![0; 70_000];
    assert_eq!(device.read_data(&mut piece), Ok(StateRead::Data(70_000)));
    assert_eq!(device.read_data(&mut piece), Ok(StateRead::Data(30_000)));
    assert!(device.read_data(&mut piece).unwrap_err().is_death());
}

#[test]
fn the_session_vanishes_in_mid_stream_and_a_second_one_works() {
    let device = device(faulty("enodev-mid-stream:1000"));
    device.set_state(PreCopy).unwrap();
    let mut piece = vec![0; 5000];
    assert_eq!(device.read_data(&mut piece), Ok(StateRead::Data(1000)));
    for _ in 0..2 {
        assert_eq!(device.read_data(&mut piece).unwrap_err().errno(), Errno::NODEV);
    }
    assert_eq!(device.state(), Running);
    device.set_state(StopCopy).unwrap();
    assert!(read_all(&device).len() > 1 << 20);

    let loading = support::device(faulty("enodev-mid-stream:1000"));
    let stream = read_all(&{
        let donor = support::device(options());
        donor.set_state(StopCopy).unwrap();
        donor
    });
    loading.set_state(Resuming).unwrap();
    loading.write_data(&stream[..1000]).unwrap();
    assert_eq!(loading.write_data(&stream[1000..]).unwrap_err().errno(), Errno::NODEV);
    assert_eq!(loading.state(), Running);
}

/// Saves a device with `fault`, with and without pre-copy, and resumes another one without.
fn tail(options: Options, precopy: bool) -> SampleDevice {
    let source = device(options.clone());
    let mut stream = Vec::new();
    if precopy {
        source.set_state(PreCopy).unwrap();
        stream.extend(read_all(&source));
    }
    source.set_state(StopCopy).unwrap();
    stream.extend(read_all(&source));
    assert_eq!(source.integrity(), 0, "the source itself is well");
    let destination = device(Options { faults: Vec::new(), ..options });
    resume(&destination, &stream);
    destination
}

#[test]
fn an_altered_tail_loads_and_is_found_by_the_device_and_told_to_the_driver() {
    for precopy in [false, true] {
        for rate in [0, 32 << 20] {
            let options = Options { state_dirty_rate: rate, ..faulty("corrupt-tail") };
            let destination = tail(options, precopy);
            destination.set_state(Running).unwrap();
            until(|| destination.sweep_done());
            assert_eq!(destination.integrity(), 1);
            let mut driver = TestDriver::new(DriverConfig::default(), None).unwrap();
            driver.connect(&destination).unwrap();
            driver.start(&destination).unwrap();
            driver.run(&destination, 10, LIMIT).unwrap();
            let found = driver.findings();
            assert_eq!((found.integrity, found.blocks_lost), (1, found.blocks));
        }
    }
    let healthy = tail(options(), true);
    healthy.set_state(Running).unwrap();
    until(|| healthy.sweep_done());
    assert_eq!(healthy.integrity(), 0);
}

#[test]
fn pages_are_missing_from_the_log() {
    let (device, mut driver) = busy(faulty("ignore-dirty-log:2"));
    let base = DriverConfig::default().ram_base;
    device.start_dma_log(4096, &[]).unwrap();
    driver.run(&device, 100, LIMIT).unwrap();
    let mut words = [0; 4];
    device.report_dma_log(base, RAM_SIZE, 4096, &mut words).unwrap();
    assert!(words.iter().any(|word| *word != 0));
    assert!(words.iter().all(|word| word & 0x5555_5555_5555_5555 == 0), "every second page is missing");
}

#[test]
fn a_raise_is_lost_and_the_driver_counts_it() {
    let (device, mut driver) = busy(faulty("lose-raise:0:3"));
    driver.run(&device, 200, LIMIT).unwrap();
    driver.drain(&device, LIMIT).unwrap();
    let found = driver.findings();
    assert_eq!((found.interrupts_lost, found.blocks_lost), (1, 0));
}

#[test]
fn held_descriptors_are_carried_out_on_the_way_out_of_running() {
    let mailbox = |device: &SampleDevice| {
        let mut bytes = vec![0; 64 << 10];
        device.region_read(2, 0, &mut bytes).unwrap();
        bytes
    };
    for arcs in [&[RunningP2p, Stop][..], &[PreCopy, PreCopyP2p, StopCopy], &[Stop]] {
        let (device, peer) = (device(faulty("hold-dma:2")), support::device(options()));
        let target = P2pTarget::of(&peer, 0x4000_0000).unwrap();
        let mut driver = TestDriver::new(DriverConfig::default(), Some(target)).unwrap();
        driver.connect(&device).unwrap();
        driver.start(&device).unwrap();
        // Sixteen of flow 0 come first in the ring, then sixteen for the peer.
        driver.post().unwrap();
        driver.ring(&device).unwrap();
        until(|| driver.done(1).unwrap() == 14);
        let idle = mailbox(&peer);
        // Watched for two thousand times as long as a descriptor takes.
        let end = Instant::now() + Duration::from_millis(100);
        while Instant::now() < end {
            assert_eq!(driver.done(1).unwrap(), 14);
        }
        assert!(mailbox(&peer) == idle);
        device.set_state(arcs[0]).unwrap();
        let quiet = mailbox(&peer);
        if arcs[0] != PreCopy {
            assert_eq!(driver.done(1).unwrap(), 16, "all done by the end of {arcs:?}");
            assert!(quiet != idle);
        }
        arcs[1..].iter().for_each(|state| device.set_state(*state).unwrap());
        assert_eq!(driver.done(1).unwrap(), 16);
        device.set_state(Running).unwrap();
        driver.drain(&device, LIMIT).unwrap();
        driver.recheck().unwrap();
        let found = driver.findings();
        assert_eq!((found.p2p_blocks, found.blocks_lost, found.interrupts_lost), (16, 0, 0));
    }
}

#[test]
fn a_reset_fails() {
    let device = device(faulty("fail-reset:EIO"));
    device.set_state(Stop).unwrap();
    assert_eq!(device.reset().unwrap_err().errno(), Errno::IO);
    assert_eq!(device.state(), Stop);
    let device = self::device(faulty("fail-reset:EIO:2"));
    device.set_state(Stop).unwrap();
    device.reset().unwrap();
    assert_eq!(device.state(), Running);
    assert_eq!(device.reset().unwrap_err().errno(), Errno::IO);
}

#[test]
fn a_read_of_the_stopped_device_hangs_once() {
    let device = device(faulty("hang-read:200"));
    device.set_state(PreCopy).unwrap();
    read_all(&device);
    device.set_state(StopCopy).unwrap();
    let begun = Instant::now();
    read_all(&device);
    assert!(begun.elapsed() >= Duration::from_millis(200));
}

#[test]
fn a_stale_page_is_refused_at_the_end() {
    // No fault of the device: whoever carries the stream applies an old page after a new one.
    let source = device(Options { state_size: 4096, state_dirty_rate: 64 << 20, ..options() });
    source.set_state(PreCopy).unwrap();
    let first = read_all(&source);
    until(|| source.progress().unwrap().dirty_bytes > 0);
    source.set_state(StopCopy).unwrap();
    let rest = read_all(&source);
    let record = 24 + 4096;
    let whole: Vec<u8> = [&first[..], &rest[..]].concat();
    let destination = device(Options { state_size: 4096, ..options() });
    resume(&destination, &whole);
    // As many bytes, records whole, but the old page in place of the new one.
    let stale: Vec<u8> = [&first[..], &first[48..48 + record], &rest[record..]].concat();
    assert_eq!(stale.len(), whole.len());
    destination.set_state(Resuming).unwrap();
    let error = destination.write_data(&stale).unwrap_err();
    assert_eq!(error.errno(), Errno::INVAL);
}
