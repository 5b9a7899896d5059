//! The size that a snapshot will have, as far as that is known before: whether there is room for it, and what of a device's
//! state is too much to have an end.

use vfio_migration_device::{DeviceError, is_late};
use vfio_migration_memory::{GuestRam, Holes};
use vfio_migration_types::{DeviceId, RamOffset, Range};

use super::SnapshotError;
use crate::device_state::tracked::{all_answer, tracked};
use crate::machine::Machine;
use crate::regular_file::AtomicFile;
use crate::session::awaited::AwaitedAnswers;

/// Least limit on the state of a device that estimates it, in bytes.
const LEAST: u64 = 1 << 30;
/// The limit for a device that estimates so many times less: it may change much of its state while it is copied.
const TIMES: u64 = 16;
/// The limit for a device that cannot estimate its state, in bytes.
const UNKNOWN: u64 = 64 << 30;
/// RAM that is looked at in one go, in bytes.
const STEP: u64 = 64 << 20;

/// What there is to be saved.
#[derive(Debug)]
pub(super) struct Estimate {
    ram: std::sync::Arc<GuestRam>,
    /// Each device, in the manifest's order, and the bytes of its state if it was stopped now.
    devices: Vec<(DeviceId, Option<u64>)>,
}

impl Estimate {
    /// Asks the machine. What is not known is left out: the session finds out.
    ///
    /// # Errors
    /// A device does not answer: nothing more is asked.
    pub(super) fn of(machine: &dyn Machine, answers: &AwaitedAnswers) -> Result<Self, DeviceError> {
        let devices: Vec<_> = machine.devices().into_iter().map(|moved| tracked(moved, answers)).collect();
        all_answer(&devices)?;
        let asked = devices.iter().map(|moved| {
            let sized = moved.device.capabilities().is_ok_and(|capabilities| capabilities.data_size);
            let size = match sized.then(|| moved.device.stop_copy_size()) {
                Some(Err(error)) if is_late(&error) => return Err(error),
                size => size.and_then(|size| size.ok().flatten()),
            };
            Ok((moved.device.id().clone(), size))
        });
        Ok(Self { ram: machine.ram(), devices: asked.collect::<Result<_, _>>()? })
    }

    /// Compares the room for `file` with what must be written of RAM and devices.
    pub(super) fn check_room(&self, file: &AtomicFile) -> Result<(), SnapshotError> {
        let devices = self.devices.iter().filter_map(|(_, size)| *size).fold(0, u64::saturating_add);
        let Some(free) = file.free() else { return Ok(()) };
        // RAM that cannot be looked at is not counted: whoever reads it next says why.
        let extents = self.ram.data_extents().unwrap_or_default();
        let allocated = extents.iter().fold(0u64, |all, extent| all.saturating_add(extent.len()));
        if devices.saturating_add(allocated) <= free {
            return Ok(());
        }
        // Pages of zeros take no room, and where RAM is pinned all of it is allocated.
        let mut needed = devices;
        for step in extents.iter().flat_map(steps) {
            let runs = self.ram.scan(step, Holes::Excluded).unwrap_or_default();
            let data = runs.iter().filter(|run| !run.zero).map(|run| run.range.len());
            needed = data.fold(needed, u64::saturating_add);
        }
        Ok(file.check_room(needed)?)
    }
}

/// The parts of an extent, each of which is looked at in one go.
fn steps(extent: &Range<RamOffset>) -> impl Iterator<Item = Range<RamOffset>> + use<> {
    let (start, end) = (extent.start().0, extent.end());
    let step = usize::try_from(STEP).unwrap_or(usize::MAX);
    (start..end).step_by(step).filter_map(move |at| Range::new(RamOffset(at), STEP.min(end - at)).ok())
}

/// The state that each device may still give.
#[derive(Debug)]
pub(super) struct StateLimits(Vec<StateLimit>);

#[derive(Debug)]
struct StateLimit {
    device: DeviceId,
    limit: u64,
    left: u64,
}

impl StateLimits {
    /// `limit` for each device, or what its estimate allows.
    pub(super) fn new(estimate: &Estimate, limit: Option<u64>) -> Self {
        let of_device = |(device, size): &(DeviceId, Option<u64>)| {
            let limit = limit.unwrap_or_else(|| allowed(*size));
            StateLimit { device: device.clone(), limit, left: limit }
        };
        Self(estimate.devices.iter().map(of_device).collect())
    }

    /// Takes `bytes` of the device with that index.
    pub(super) fn take(&mut self, device: u16, bytes: u64) -> Result<(), SnapshotError> {
        // The session has no other devices.
        let Some(state) = self.0.get_mut(usize::from(device)) else { return Ok(()) };
        state.left = state
            .left
            .checked_sub(bytes)
            .ok_or_else(|| SnapshotError::StateLimit { device: state.device.clone(), limit: state.limit })?;
        Ok(())
    }
}

fn allowed(estimate: Option<u64>) -> u64 {
    estimate.map_or(UNKNOWN, |size| size.saturating_mul(TIMES).max(LEAST))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_follows_the_estimate() {
        assert_eq!(allowed(Some(0)), 1 << 30);
        assert_eq!(allowed(Some(1 << 30)), 16 << 30);
        assert_eq!(allowed(Some(u64::MAX)), u64::MAX);
        assert_eq!(allowed(None), 64 << 30);
    }

    #[test]
    fn steps_cover_an_extent() {
        let extent = Range::new(RamOffset(STEP / 2), 2 * STEP).unwrap();
        let lens: Vec<u64> = steps(&extent).map(|step| step.len()).collect();
        assert_eq!(lens, [STEP, STEP]);
        assert_eq!(
            steps(&extent).map(|step| step.start().0).collect::<Vec<_>>(),
            [STEP / 2, STEP / 2 + STEP]
        );
    }
}
