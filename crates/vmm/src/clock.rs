//! The host's monotonic clock as the guest reads it: two ports, one latch.
//!
//! The clock is the host's `CLOCK_MONOTONIC`, the same in every process of one host, so a guest that moves between
//! two processes of a host sees in it exactly how long it stood still. Between two hosts it is meaningless: see
//! `docs/guest-clock.md`.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};
use vfio_migration::Section;

use crate::error::VmmError;
use crate::section::SectionReader;

/// Name of the section that carries the latch.
pub const SECTION: &str = "platform.clock";
/// Layout of the section: one `u64`, the latched value in nanoseconds.
pub const SECTION_VERSION: u32 = 1;

/// The clock device. Reading the low half latches both, so that the halves belong together.
#[derive(Debug, Default)]
pub struct HostClock {
    latch: AtomicU64,
}

impl HostClock {
    /// Latches the clock and gives bytes 0 to 3.
    pub fn read_low(&self, data: &mut [u8]) {
        let now = monotonic_ns();
        self.latch.store(now, Ordering::Relaxed);
        fill(data, now);
    }

    /// Gives bytes 4 to 7 of what was latched last.
    pub fn read_high(&self, data: &mut [u8]) {
        fill(data, self.latch.load(Ordering::Relaxed) >> 32);
    }

    /// The latch: a guest may move between its two reads.
    pub fn save(&self) -> Section {
        let bytes = self.latch.load(Ordering::Relaxed).to_le_bytes().to_vec();
        Section { name: SECTION.to_owned(), version: SECTION_VERSION, bytes }
    }

    /// Loads what [`save`](Self::save) gave.
    ///
    /// # Errors
    /// The section is of another version or length.
    pub fn load(&self, section: &Section) -> Result<(), VmmError> {
        let mut reader = SectionReader::open(section, SECTION_VERSION)?;
        let latch = reader.u64()?;
        reader.end()?;
        self.latch.store(latch, Ordering::Relaxed);
        Ok(())
    }
}

/// `CLOCK_MONOTONIC` of this host, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The clock counts from boot and cannot be negative.
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds * 1_000_000_000 + nanoseconds
}

fn fill(data: &mut [u8], value: u64) {
    data.fill(0);
    data.iter_mut().zip(value.to_le_bytes()).take(4).for_each(|(to, from)| *to = from);
}
