//! The start of a machine's devices, through the P2P barrier: at the end of a migration, and when it is tried again later.

use std::sync::Arc;

use vfio_migration_device::{CapabilitiesError, Device};
use vfio_migration_types::{Failure, MigrationState, Phase, Side};

use crate::session::fail::InPhase;
use crate::session::parallel::for_each_device_parallel;

/// Where the devices are that are to be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StartFrom {
    /// All of them stopped, and loaded with their guest's state.
    Stop,
    /// Each where an attempt to start or to stop it left it: it is asked. One that never migrates is left alone.
    Anywhere,
}

/// Takes all devices to RUNNING. No device may reach for another's memory before that one answers: all of them first to
/// RUNNING_P2P, then all of them on.
pub(crate) fn start_devices<'a>(
    devices: impl Iterator<Item = &'a Arc<dyn Device>> + Clone,
    from: StartFrom,
    side: Side,
) -> Result<(), Failure> {
    for state in [MigrationState::RunningP2p, MigrationState::Running] {
        let moved = for_each_device_parallel(devices.clone(), |device| take_to(&**device, state, from, side));
        moved.into_iter().find(Result::is_err).unwrap_or(Ok(()))?;
    }
    Ok(())
}

fn take_to(device: &dyn Device, state: MigrationState, from: StartFrom, side: Side) -> Result<(), Failure> {
    let flags = match (device.capabilities(), from) {
        (Ok(capabilities), _) => capabilities.flags,
        (Err(CapabilitiesError::Device(error)), _) => return Err(error.in_phase(side, Phase::Run)),
        (Err(CapabilitiesError::NotMigratable(_)), StartFrom::Anywhere) => return Ok(()),
        (Err(CapabilitiesError::NotMigratable(why)), StartFrom::Stop) => {
            return Err(Failure::new(side, Phase::Run, why.0).of_device(device.id()));
        }
    };
    if from == StartFrom::Anywhere {
        let now = device.state().map_err(|error| error.in_phase(side, Phase::Run))?;
        // It runs already: the barrier is for those that do not.
        if now == MigrationState::Running {
            return Ok(());
        }
    }
    if flags.has_state(state) {
        device.set_state(state).map_err(|error| error.in_phase(side, Phase::Run))?;
    }
    Ok(())
}
