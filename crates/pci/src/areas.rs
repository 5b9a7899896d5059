//! Which parts of a BAR the guest may have mapped.

use std::sync::Arc;

use vfio_migration_device::{PciHardware, RegionFile, RegionIndex};
use vfio_migration_memory::Mapping;
use vfio_migration_types::Range;

use super::bars::Bar;
use super::config::MsixLayout;
use super::vectors::ENTRY;

/// Smallest unit that can be mapped, in bytes: the architecture has no other.
const PAGE: u64 = 4096;

/// A mapped piece of a BAR, by its offset.
pub(super) type MappedPiece = (u64, Arc<Mapping>);

/// The parts of `mappable` that can be mapped: whole pages, without those that `trapped` touches. In rising order.
fn whole_pages(mappable: &[Range<u64>], trapped: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out = Vec::new();
    for range in mappable {
        let Some(mut start) = range.start().checked_next_multiple_of(PAGE) else { continue };
        let end = range.end() / PAGE * PAGE;
        let mut traps: Vec<(u64, u64)> = trapped
            .iter()
            .map(|trap| {
                (trap.start() / PAGE * PAGE, trap.end().checked_next_multiple_of(PAGE).unwrap_or(u64::MAX))
            })
            .collect();
        traps.sort_unstable();
        for (from, to) in traps {
            if from < end && to > start {
                out.extend(Range::new(start, from.saturating_sub(start)));
                start = to;
            }
        }
        out.extend(Range::new(start, end.saturating_sub(start)));
    }
    out.sort_unstable();
    out
}

/// Maps what the guest may have of a BAR. The pages of the MSI-X structures stay trapped, and so does what cannot be
/// mapped, or not safely.
pub(super) fn map_memory(
    hardware: &dyn PciHardware,
    bar: &Bar,
    layout: Option<&MsixLayout>,
) -> Vec<MappedPiece> {
    let index = RegionIndex(bar.index.into());
    let region = hardware.regions().iter().find(|region| region.index == index);
    let (Some(region), Some(file)) = (region, hardware.region_file(index)) else { return Vec::new() };
    // A mapping cannot keep the guest from reading, nor from writing: the trap can.
    if !region.readable || !region.writable {
        return Vec::new();
    }
    let trapped: Vec<Range<u64>> = layout
        .into_iter()
        .flat_map(|layout| {
            let vectors = u64::from(layout.vectors);
            [(layout.table, vectors * ENTRY), (layout.pba, vectors.div_ceil(64) * 8)]
        })
        .filter(|((in_bar, _), _)| *in_bar == bar.index)
        .filter_map(|((_, start), len)| Range::new(start, len).ok())
        .collect();
    let mut out = Vec::new();
    for area in whole_pages(&region.mappable, &trapped) {
        match map_area(&file, bar, &area) {
            Ok(mapping) => out.push((area.start(), Arc::new(mapping))),
            Err(error) => {
                let area = format_args!("{:#x}+{:#x}", area.start(), area.len());
                tracing::warn!(device = %hardware.id(), bar = bar.index, %area, %error, "trapped, not mapped");
            }
        }
    }
    out
}

fn map_area(
    file: &RegionFile<'_>,
    bar: &Bar,
    area: &Range<u64>,
) -> Result<Mapping, Box<dyn std::error::Error + Send + Sync>> {
    if area.end() > bar.size {
        return Err("it ends outside of the BAR".into());
    }
    let offset = file.offset.checked_add(area.start()).ok_or("its file offset overflows")?;
    if !offset.is_multiple_of(PAGE) {
        return Err(format!("its file offset {offset:#x} is no whole page").into());
    }
    let mapping = Mapping::new(file.fd, offset, area.len(), true)?;
    // Once it is shorter, an access of the guest's would end this process.
    if mapping.can_shrink() {
        return Err("its file is not sealed against shrinking".into());
    }
    Ok(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> Range<u64> {
        Range::new(start, len).unwrap()
    }

    #[test]
    fn trapped_pages_are_left_out() {
        assert_eq!(whole_pages(&[range(0, 0x4000)], &[]), [range(0, 0x4000)]);
        assert_eq!(
            whole_pages(&[range(0, 0x4000)], &[range(0x2010, 32), range(0x1000, 8)]),
            [range(0, 0x1000), range(0x3000, 0x1000)]
        );
        assert_eq!(whole_pages(&[range(0x10, 0x1ff0)], &[]), [range(0x1000, 0x1000)]);
        assert_eq!(whole_pages(&[range(0x10, 0x20)], &[]), []);
        assert_eq!(whole_pages(&[range(0, 0x1000)], &[range(0, 1)]), []);
    }
}
