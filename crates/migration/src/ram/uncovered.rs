//! Guest RAM to which somebody's writes are not logged.

use vfio_migration_compat::{MachineManifest, Policy, Reason, check_uncovered};
use vfio_migration_memory::{DirtySource, GuestRam, RamRegionInfo};
use vfio_migration_types::{RamOffset, Range};

use crate::machine::{Machine, MigratableDevice};

/// A part of one RAM region, and why writes to it are not seen, in a sentence.
pub(crate) struct Gap {
    pub(crate) part: Range<RamOffset>,
    pub(crate) text: String,
}

/// What `source` leaves out, region by region.
pub(crate) fn gaps(source: &dyn DirtySource, ram: &GuestRam) -> Vec<Gap> {
    let coverage = source.coverage();
    let gaps = coverage.gaps(ram.size());
    if gaps.is_empty() {
        return Vec::new();
    }
    let (name, why) = (source.name(), coverage.why());
    let parts = gaps.iter().flat_map(|gap| parts(gap, ram));
    parts
        .map(|(part, place)| Gap {
            part,
            text: format!("the dirty log of {name} does not see writes to {place}: {why}"),
        })
        .collect()
}

/// The reasons against moving a machine, of which somebody's writes are not seen.
pub(crate) fn of_uncovered(
    machine: &dyn Machine,
    manifest: &MachineManifest,
    devices: &[MigratableDevice],
    policy: &Policy,
) -> Vec<Reason> {
    let (ram, sources) = (machine.ram(), machine.dirty_sources());
    let mut reasons = Vec::new();
    if sources.is_empty()
        && let Ok(all) = Range::new(RamOffset(0), ram.size())
    {
        for (_, place) in parts(&all, &ram) {
            let text = format!("no dirty log sees writes to {place}: the VMM names none");
            reasons.extend(check_uncovered(None, text, policy));
        }
    }
    for source in &sources {
        reasons.extend(
            gaps(&**source, &ram).into_iter().filter_map(|gap| check_uncovered(None, gap.text, policy)),
        );
    }
    for moved in devices {
        let Some(log) = moved.device.dirty_log() else { continue };
        let described = manifest.devices.iter().find(|described| described.id == *moved.device.id());
        reasons.extend(
            gaps(log, &ram).into_iter().filter_map(|gap| check_uncovered(described, gap.text, policy)),
        );
    }
    reasons
}

/// The parts of `range` in each RAM region, and where they are to the guest.
fn parts(range: &Range<RamOffset>, ram: &GuestRam) -> Vec<(Range<RamOffset>, String)> {
    let regions = ram.regions().iter();
    let part = |region: &RamRegionInfo| {
        let start = range.start().0.max(region.offset.0);
        let end = range.end().min(region.offset.0 + region.len);
        let part = Range::new(RamOffset(start), end.checked_sub(start)?).ok()?;
        let (gpa, whole) = (region.gpa.0 + (start - region.offset.0), part.len() == region.len);
        let what = if whole { "the RAM region" } else { "a part of the RAM region" };
        let (region_gpa, region_len) = (region.gpa, region.len);
        let place = format!("guest RAM at {gpa:#x}+{:#x} ({what} {region_gpa}+{region_len:#x})", part.len());
        Some((part, place))
    };
    regions.filter_map(part).collect()
}
