//! What the other tests look at after a migration is looked at here with something wrong on purpose.

use std::fs::File;
use std::time::Duration;

use vfio_migration_device::{Device, PciHardware, RegionIndex};
use vfio_migration_guest_driver::registers::offset;
use vfio_migration_memory::{start_all, stop_all};
use vfio_migration_types::{MigrationState, RamOffset};

use super::pair::Pair;
use crate::check::{Outcome, holds};

/// Each thing that is wrong is found, and nothing where all is right.
pub(crate) fn checks() -> Outcome {
    let pair = Pair::new(|_| Ok(()))?;
    let found = |what: &str| holds(pair.goes_on_here().is_err(), &format!("found: {what}"));
    let (here, there) = (&pair.source.cards[0], &pair.destination.cards[0]);
    let logs = pair.source.logs();
    start_all(&logs)?;
    found("a log that still runs")?;
    stop_all(&logs)?;
    here.set_state(MigrationState::RunningP2p)?;
    found("a device that is somewhere else")?;
    here.set_state(MigrationState::Running)?;
    there.region_write(RegionIndex::BAR0, offset::CONTROL, &1u32.to_le_bytes())?;
    found("a destination that was not reset")?;
    there.reset()?;
    let other = pair.destination.clone();
    found("a machine that somebody still holds")?;
    drop(other);
    pair.goes_on_here()?;
    pair.source.guest.stop();
    found("a guest that stands")?;
    let page = RamOffset(1 << 20);
    pair.source.ram.write_u64(page, pair.source.ram.read_u64(page)? ^ 1)?;
    pair.source.guest.go();
    found("a word of memory that is not what it was")?;
    let leaked = File::open("/proc/self/stat")?;
    holds(pair.close_within(Duration::from_millis(100)).is_err(), "found: a descriptor that was left open")?;
    drop(leaked);
    Ok(())
}

/// A reset that nobody spoke of is found by the guest.
pub(crate) fn silent_reset() -> Outcome {
    let pair = Pair::new(|_| Ok(()))?;
    pair.source.cards[0].reset()?;
    let found = pair.source.guest.goes_on().err().ok_or("a reset was not noticed")?;
    holds(found.to_string().contains("was not reset behind its back"), &found.to_string())
}
