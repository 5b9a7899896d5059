//! What the tests of the sample device share.

use std::time::{Duration, Instant};

use vfio_migration_sim::driver::{DriverConfig, TestDriver};
use vfio_migration_sim::{Options, SampleDevice, StateRead};
use vfio_user_peer::MigrationState;

/// Long enough for any machine; never waited for when all is well.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Small and quick.
pub(crate) fn options() -> Options {
    Options {
        state_size: 1 << 20,
        state_dirty_rate: 0,
        dma_interval: Duration::from_micros(50),
        ..Options::default()
    }
}

pub(crate) fn device(options: Options) -> SampleDevice {
    SampleDevice::new(options).unwrap()
}

/// A device that a driver keeps busy.
pub(crate) fn busy(options: Options) -> (SampleDevice, TestDriver) {
    let device = device(options);
    let mut driver = TestDriver::new(DriverConfig::default(), None).unwrap();
    driver.connect(&device).unwrap();
    driver.start(&device).unwrap();
    (device, driver)
}

/// Everything that the saving session gives until there is nothing (now).
pub(crate) fn read_all(device: &SampleDevice) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut piece = vec![0; 100_000];
    while let StateRead::Data(count) = device.read_data(&mut piece).unwrap() {
        stream.extend(&piece[..count]);
    }
    stream
}

/// Loads a whole state into a fresh device, up to STOP.
pub(crate) fn resume(device: &SampleDevice, stream: &[u8]) {
    device.set_state(MigrationState::Resuming).unwrap();
    for piece in stream.chunks(70_001) {
        device.write_data(piece).unwrap();
    }
    device.set_state(MigrationState::Stop).unwrap();
}

/// Waits until `done`, which nothing signals.
pub(crate) fn until(mut done: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "it did not happen");
        std::thread::yield_now();
    }
}

/// Whether bit `n` of a report is set.
pub(crate) fn bit(words: &[u64], n: u64) -> bool {
    let word = usize::try_from(n / 64).unwrap();
    words[word] >> (n % 64) & 1 == 1
}
