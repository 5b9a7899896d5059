//! Fitting what is mapped into as few ranges as a device can log.

use vfio_migration_types::{Iova, RamOffset, Range};

/// One range that a device logs, and the guest RAM in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Logged {
    pub(super) range: Range<Iova>,
    /// The RAM, ascending by IOVA. More than one piece only where ranges had to be joined: what lies between is logged
    /// too, and is nobody's.
    pub(super) pieces: Vec<(Range<Iova>, RamOffset)>,
}

/// At most `most` ranges that cover all of `mapped`, in order: those with the smallest gaps between them are joined.
pub(super) fn fit(mut mapped: Vec<(Range<Iova>, RamOffset)>, most: usize) -> Vec<Logged> {
    mapped.sort_by_key(|(range, _)| range.start());
    let mut gaps: Vec<(u64, usize)> = mapped
        .windows(2)
        .enumerate()
        .map(|(at, pair)| (pair[1].0.start().0.saturating_sub(pair[0].0.end()), at))
        .collect();
    gaps.sort_unstable();
    let joined: Vec<usize> =
        gaps.into_iter().take(mapped.len().saturating_sub(most)).map(|(_, at)| at).collect();
    let mut logged: Vec<Logged> = Vec::new();
    for (at, piece) in mapped.into_iter().enumerate() {
        let joins = at.checked_sub(1).is_some_and(|before| joined.contains(&before));
        match logged.last_mut() {
            Some(last) if joins => {
                let start = last.range.start();
                let end = piece.0.end().max(last.range.end());
                // Not empty and within 64 bits, as its parts are.
                if let Ok(range) = Range::new(start, end - start.0) {
                    last.range = range;
                }
                last.pieces.push(piece);
            }
            _ => logged.push(Logged { range: piece.0, pieces: vec![piece] }),
        }
    }
    logged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> Range<Iova> {
        Range::new(Iova(start), len).unwrap()
    }

    fn pieces(starts: &[u64]) -> Vec<(Range<Iova>, RamOffset)> {
        starts
            .iter()
            .enumerate()
            .map(|(index, start)| (range(*start, 0x1000), RamOffset(index as u64 * 0x1000)))
            .collect()
    }

    #[test]
    fn what_fits_is_left_as_it_was_mapped() {
        let logged = fit(pieces(&[0x8000, 0, 0x1000]), 3);
        assert_eq!(
            logged.iter().map(|one| one.range).collect::<Vec<_>>(),
            [range(0, 0x1000), range(0x1000, 0x1000), range(0x8000, 0x1000)]
        );
    }

    #[test]
    fn the_nearest_are_joined_first() {
        let logged = fit(pieces(&[0, 0x5000, 0x8000, 0x10_0000]), 2);
        assert_eq!(
            logged.iter().map(|one| one.range).collect::<Vec<_>>(),
            [range(0, 0x9000), range(0x10_0000, 0x1000)]
        );
        assert_eq!(logged[0].pieces.len(), 3);
        assert_eq!(fit(Vec::new(), 2), []);
    }

    #[test]
    fn a_thousand_pieces_fit_into_the_kernels_limit_and_none_is_lost() {
        let starts: Vec<u64> = (0..1000u64).map(|n| n * 0x10_0000 + (n * n % 7) * 0x1000).collect();
        let mapped = pieces(&starts);
        let logged = fit(mapped.clone(), 256);
        assert_eq!(logged.len(), 256);
        assert!(logged.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start().0));
        let kept: Vec<_> = logged.iter().flat_map(|one| one.pieces.clone()).collect();
        assert_eq!(kept, mapped);
    }
}
