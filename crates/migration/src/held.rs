//! A guest that is ours and was left paused, since something failed when it was to run: the second attempt to start it.

use vfio_migration_types::{Failure, Phase, Side};

use crate::error::OwnedNotStarted;
use crate::machine::Machine;
use crate::session::fail::InPhase;
use crate::session::start_devices::{StartFrom, start_devices};

/// Starts the guest of a machine that a session left paused, and ends the pause: the storage locks, the devices that do not run,
/// each from the state in which it is, through the P2P barrier, then interrupts and vCPUs ([`Machine::resume`]). For
/// the machine of [`IncomingError::OwnedNotStarted`](crate::IncomingError::OwnedNotStarted) at the destination, and for
/// that of an attempt that was not [restored](crate::Aborted::restored) at the source. May be called again after an error.
///
/// # Errors
/// The guest is paused still. A device in ERROR stays there: only a reset would help, which loses its state.
pub fn start_held(machine: &dyn Machine, side: Side) -> Result<(), Failure> {
    machine.take_locks().map_err(|error| error.in_phase(side, Phase::Run))?;
    let devices = machine.devices();
    start_devices(devices.iter().map(|moved| &moved.device), StartFrom::Anywhere, side)?;
    machine.resume(true).map_err(|error| error.in_phase(side, Phase::Run))
}

impl OwnedNotStarted {
    /// Tries again to start the guest, as [`start_held`] does.
    ///
    /// # Errors
    /// As there.
    pub fn start(&self) -> Result<(), Failure> {
        start_held(&*self.machine, Side::Destination)
    }
}
