//! The seam between the vCPUs and the machine around them: every access that leaves guest RAM goes over an
//! [`IoBus`].

use std::fmt;

use vfio_migration_pci::PciBus;
use vfio_migration_types::Gpa;

/// The target of the guest's port and memory accesses that neither RAM nor KVM itself answered.
///
/// Called from vCPU threads, at several at once when there are several vCPUs. A call holds its vCPU up until it
/// returns, and with it a pause of the machine, so it must not wait for one. Slices are one, two, four or eight
/// bytes long in practice, but any length must be survived: it comes from the guest.
///
/// What nobody answers reads as ones and swallows writes, as on a PC: see [`unclaimed`].
pub trait IoBus: fmt::Debug + Send + Sync {
    /// An `in` from `port`; `data` is to be filled in whole.
    fn pio_read(&self, port: u16, data: &mut [u8]);

    /// An `out` to `port`.
    fn pio_write(&self, port: u16, data: &[u8]);

    /// A load from `gpa`; `data` is to be filled in whole.
    fn mmio_read(&self, gpa: Gpa, data: &mut [u8]);

    /// A store to `gpa`.
    fn mmio_write(&self, gpa: Gpa, data: &[u8]);
}

/// Answers a read that no device claims.
pub fn unclaimed(data: &mut [u8]) {
    data.fill(0xFF);
}

/// A bus with nothing on it.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmptyBus;

impl IoBus for EmptyBus {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        unclaimed(data);
    }

    fn pio_write(&self, _port: u16, _data: &[u8]) {}

    fn mmio_read(&self, _gpa: Gpa, data: &mut [u8]) {
        unclaimed(data);
    }

    fn mmio_write(&self, _gpa: Gpa, _data: &[u8]) {}
}

impl IoBus for PciBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        Self::pio_read(self, port, data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        Self::pio_write(self, port, data);
    }

    fn mmio_read(&self, gpa: Gpa, data: &mut [u8]) {
        Self::mmio_read(self, gpa, data);
    }

    fn mmio_write(&self, gpa: Gpa, data: &[u8]) {
        Self::mmio_write(self, gpa, data);
    }
}
