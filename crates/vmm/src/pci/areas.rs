//! Which parts of a BAR the guest may have mapped.

use vfio_migration_types::Range;

/// Smallest unit that can be mapped, in bytes: the architecture has no other.
pub(super) const PAGE: u64 = 4096;

/// The parts of `mappable` that can be mapped: whole pages, without those that `trapped` touches. In rising order.
pub(super) fn whole_pages(mappable: &[Range<u64>], trapped: &[Range<u64>]) -> Vec<Range<u64>> {
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

#[cfg(test)]
mod test {
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
