//! P6: the destination's RAM differs, and it asks for digests until it has found the page.

use vfio_migration_types::{PAGE_SIZE, Phase, RamOffset, Run, Side};
use vfio_migration_wire::RamDigests;

use crate::ram::digests::digest_chunks;
use crate::session::fail::InPhase;
use crate::session::work_error::WorkError;
use crate::source::worker::Worker;

impl Worker {
    pub(super) fn digest_ram(&self, first: u64, count: u64) -> Result<RamDigests, WorkError> {
        let interrupt = &self.shared.interrupt;
        let digests = digest_chunks(&self.ram, Run { first, count }, interrupt, |error| {
            error.in_phase(Side::Source, Phase::Ready).into()
        })?;
        let logs = match count {
            1 => self.dirty.covering(&self.devices, RamOffset(first * PAGE_SIZE)).join(", "),
            _ => String::new(),
        };
        Ok(RamDigests { first, count, digests, logs })
    }
}
