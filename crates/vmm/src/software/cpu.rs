//! What the software guest sees of the machine: loads, stores and ports.

use std::sync::Arc;

use vfio_migration_memory::{GuestRam, WriteLog};
use vfio_migration_types::Gpa;

use super::SoftwareBackend;
use crate::bus::IoBus;

/// The guest's side of RAM, mapped BARs, doorbells and the bus. Every store to RAM is logged.
#[derive(Debug)]
pub(super) struct Cpu {
    pub(super) ram: Arc<GuestRam>,
    pub(super) log: Arc<WriteLog>,
    pub(super) backend: Arc<SoftwareBackend>,
    pub(super) bus: Arc<dyn IoBus>,
}

impl Cpu {
    pub(super) fn load64(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.load(gpa, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    pub(super) fn load32(&self, gpa: u64) -> u32 {
        let mut bytes = [0; 4];
        self.load(gpa, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn store64(&self, gpa: u64, value: u64) {
        self.store(gpa, &value.to_le_bytes());
    }

    pub(super) fn store32(&self, gpa: u64, value: u32) {
        self.store(gpa, &value.to_le_bytes());
    }

    /// Adds to the word at `gpa`.
    pub(super) fn add(&self, gpa: u64, more: u64) {
        if more != 0 {
            self.store64(gpa, self.load64(gpa).wrapping_add(more));
        }
    }

    /// Loads from wherever `gpa` lies; ones where nothing answers.
    pub(super) fn load(&self, gpa: u64, into: &mut [u8]) {
        let len = into.len() as u64;
        if let Some(offset) = self.ram.offset_of(Gpa(gpa), len) {
            if self.ram.read(offset, into).is_err() {
                into.fill(0xff);
            }
        } else if let Some((memory, offset)) = self.backend.memory(Gpa(gpa), len) {
            if memory.read(offset, into).is_err() {
                into.fill(0xff);
            }
        } else {
            // As a processor does: no access is wider than eight bytes.
            for (at, part) in (gpa..).step_by(8).zip(into.chunks_mut(8)) {
                self.bus.mmio_read(Gpa(at), part);
            }
        }
    }

    /// Stores to wherever `gpa` lies.
    pub(super) fn store(&self, gpa: u64, from: &[u8]) {
        let len = from.len() as u64;
        if let Some(offset) = self.ram.offset_of(Gpa(gpa), len) {
            if self.ram.write(offset, from).is_ok() {
                self.log.mark(offset, len);
            }
        } else if let Some((memory, offset)) = self.backend.memory(Gpa(gpa), len) {
            if let Err(error) = memory.write(offset, from) {
                tracing::error!(gpa, %error, "a store to a BAR failed");
            }
        } else if !self.backend.ring(Gpa(gpa), from) {
            self.bus.mmio_write(Gpa(gpa), from);
        }
    }

    pub(super) fn port_in(&self, port: u16) -> u32 {
        let mut bytes = [0; 4];
        self.bus.pio_read(port, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn port_out(&self, port: u16, value: u32) {
        self.bus.pio_write(port, &value.to_le_bytes());
    }
}
