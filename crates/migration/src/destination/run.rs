//! P8: the guest is ours. Devices first, through the P2P barrier, then the vCPUs.

use std::time::Instant;

use vfio_migration_types::{Epoch, GuestOutcome, Phase, Side};
use vfio_migration_wire::Running;

use crate::session::fail::InPhase;
use crate::session::host::{boot_id, monotonic_ns};
use crate::session::start_devices::{StartFrom, start_devices};
use crate::session::work_error::WorkError;

use crate::destination::worker::Worker;

impl Worker<'_, '_, '_> {
    /// Starts everything. A failure leaves the guest ours, and paused.
    pub(super) fn start(&mut self, epoch: Epoch, run_guest: bool) -> Result<Running, WorkError> {
        let machine = self.finished(Phase::Run)?;
        let begun = Instant::now();
        let devices = self.devices.iter().map(|incoming| &incoming.moved.device);
        start_devices(devices, StartFrom::Stop, Side::Destination)?;
        self.step("devices STOP to RUNNING", begun.elapsed());
        let begun = Instant::now();
        machine.resume(run_guest).map_err(|error| error.in_phase(Side::Destination, Phase::Run))?;
        let at_ns = monotonic_ns();
        self.step("vCPUs", begun.elapsed());
        let guest = if run_guest { GuestOutcome::Running } else { GuestOutcome::Paused };
        Ok(Running { epoch, guest, boot_id: boot_id(), at_ns })
    }
}
