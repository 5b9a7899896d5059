//! The fixed devices of the machine: serial line, host clock, failure port.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vfio_migration_types::Gpa;

use crate::bus::IoBus;
use crate::clock::HostClock;
use crate::serial::Serial;

pub use vfio_migration_guest_image::ports::{CLOCK_HIGH, CLOCK_LOW, FAILURE};

/// The fixed devices of the machine — serial line, host clock, failure port — in front of another bus, usually the
/// PCI bus.
#[derive(Debug)]
pub struct PlatformBus {
    inner: Arc<dyn IoBus>,
    serial: Serial,
    clock: HostClock,
    /// The failure code plus one, or zero.
    failure: AtomicU64,
}

impl PlatformBus {
    /// Puts the fixed devices in front of `inner`.
    pub fn new(inner: Arc<dyn IoBus>) -> Self {
        Self { inner, serial: Serial::default(), clock: HostClock::default(), failure: AtomicU64::new(0) }
    }

    /// The first serial line.
    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    /// The host clock, whose latch is part of the machine's state.
    pub fn clock(&self) -> &HostClock {
        &self.clock
    }

    /// The code the guest gave up with, if it did.
    pub fn failure(&self) -> Option<u32> {
        let stored = self.failure.load(Ordering::Acquire);
        stored.checked_sub(1).and_then(|code| u32::try_from(code).ok())
    }
}

impl IoBus for PlatformBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        match port {
            CLOCK_LOW => self.clock.read_low(data),
            CLOCK_HIGH => self.clock.read_high(data),
            _ if Serial::claims(port) => self.serial.read(port, data),
            _ => self.inner.pio_read(port, data),
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match port {
            FAILURE => {
                let mut code = [0; 4];
                code.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
                let code = u32::from_le_bytes(code);
                tracing::error!(code, "the guest program gave up");
                self.failure.store(u64::from(code) + 1, Ordering::Release);
            }
            CLOCK_LOW | CLOCK_HIGH => {}
            _ if Serial::claims(port) => self.serial.write(port, data),
            _ => self.inner.pio_write(port, data),
        }
    }

    fn mmio_read(&self, gpa: Gpa, data: &mut [u8]) {
        self.inner.mmio_read(gpa, data);
    }

    fn mmio_write(&self, gpa: Gpa, data: &[u8]) {
        self.inner.mmio_write(gpa, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::EmptyBus;

    #[test]
    fn clock_halves_make_one_reading() {
        let bus = PlatformBus::new(Arc::new(EmptyBus));
        let mut low = [0; 4];
        let mut high = [0; 4];
        let mut last = 0;
        for _ in 0..100 {
            bus.pio_read(CLOCK_LOW, &mut low);
            bus.pio_read(CLOCK_HIGH, &mut high);
            let now = u64::from(u32::from_le_bytes(high)) << 32 | u64::from(u32::from_le_bytes(low));
            assert!(now > 0 && now >= last);
            last = now;
        }
    }

    #[test]
    fn failure_keeps_code_zero_apart_from_none() {
        let bus = PlatformBus::new(Arc::new(EmptyBus));
        assert_eq!(bus.failure(), None);
        bus.pio_write(FAILURE, &[0, 0, 0, 0]);
        assert_eq!(bus.failure(), Some(0));
        bus.pio_write(FAILURE, &7u32.to_le_bytes());
        assert_eq!(bus.failure(), Some(7));
    }

    #[test]
    fn what_nobody_answers_reads_as_ones() {
        let bus = PlatformBus::new(Arc::new(EmptyBus));
        let mut data = [0; 4];
        bus.pio_read(0xCFC, &mut data);
        assert_eq!(data, [0xFF; 4]);
        bus.mmio_read(Gpa(0xE000_0000), &mut data);
        assert_eq!(data, [0xFF; 4]);
    }
}
