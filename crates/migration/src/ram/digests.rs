//! Digests of RAM by chunks, and the search for the first page whose digests differ.

use vfio_migration_memory::{GuestRam, MemoryError};
use vfio_migration_types::{PAGE_SIZE, RamOffset, Range, Run};
use vfio_migration_wire::{RamDigests, limits};

use crate::session::interrupt::Interrupt;
use crate::session::work_error::WorkError;

/// Pages of each chunk of `count`: the last may be shorter.
fn chunk(count: u64) -> u64 {
    count.div_ceil(limits::RAM_DIGESTS.into()).max(1)
}

/// The chunks that `pages` are divided into, ascending.
fn chunks(pages: Run) -> impl Iterator<Item = Run> {
    let (end, step) = (pages.first + pages.count, chunk(pages.count));
    let starts = (0..pages.count.div_ceil(step)).map(move |index| pages.first + index * step);
    starts.map(move |first| Run { first, count: step.min(end - first) })
}

/// Digests of the chunks of `pages`. `failed` says what a failure of memory is here.
pub(crate) fn digest_chunks(
    ram: &GuestRam,
    pages: Run,
    interrupt: &Interrupt,
    failed: impl Fn(MemoryError) -> WorkError,
) -> Result<Vec<[u8; 32]>, WorkError> {
    let outside = || MemoryError::OutOfBounds {
        offset: pages.first.saturating_mul(PAGE_SIZE),
        len: pages.count.saturating_mul(PAGE_SIZE),
        size: ram.size(),
    };
    let end = pages.first.checked_add(pages.count).and_then(|end| end.checked_mul(PAGE_SIZE));
    if pages.count == 0 || end.is_none_or(|end| end > ram.size()) {
        return Err(failed(outside()));
    }
    chunks(pages)
        .map(|chunk| {
            interrupt.check()?;
            let range = Range::new(RamOffset(chunk.first * PAGE_SIZE), chunk.count * PAGE_SIZE);
            let range = range.map_err(|_| failed(outside()))?;
            ram.digest_of(range).map_err(&failed)
        })
        .collect()
}

/// What became of the search.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FirstDifference {
    /// Its number, and the logs of the source that it is for to report.
    Page { page: u64, logs: String },
    /// All digests agree now, though those of all RAM did not.
    None,
    /// The source has no RAM to digest.
    Unknown,
    /// The source's answer did not come in time, or is none to what was asked.
    Unanswered,
}

/// Digests of the same pages on both sides.
pub(crate) struct ComparedDigests {
    /// The source's answer.
    pub(crate) theirs: RamDigests,
    /// The destination's own, by chunks.
    pub(crate) ours: Vec<[u8; 32]>,
}

/// Looks for the first page that differs. `ask` gives both sides' digests of pages; `None`: not in the time that is left. A round divides what is left by 64.
pub(crate) fn find_first_difference<E>(
    pages: u64,
    mut ask: impl FnMut(Run) -> Result<Option<ComparedDigests>, E>,
) -> Result<FirstDifference, E> {
    let mut within = Run { first: 0, count: pages };
    loop {
        let Some(ComparedDigests { theirs, ours }) = ask(within)? else {
            return Ok(FirstDifference::Unanswered);
        };
        if theirs.digests.is_empty() {
            return Ok(FirstDifference::Unknown);
        }
        if (theirs.first, theirs.count) != (within.first, within.count) || theirs.digests.len() != ours.len()
        {
            return Ok(FirstDifference::Unanswered);
        }
        let differs = theirs.digests.iter().zip(&ours).position(|(theirs, ours)| theirs != ours);
        let Some(chunk) = differs.and_then(|index| chunks(within).nth(index)) else {
            return Ok(FirstDifference::None);
        };
        // One page is asked for by itself, because only that answer names its logs.
        if within.count == 1 {
            return Ok(FirstDifference::Page { page: within.first, logs: theirs.logs });
        }
        within = chunk;
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// Searches RAM of `pages` pages, of which those of `differing` differ.
    fn search(pages: u64, differing: &[u64]) -> (FirstDifference, u32) {
        let mut rounds = 0;
        let found = find_first_difference::<Infallible>(pages, |within| {
            rounds += 1;
            let ours: Vec<_> = chunks(within).map(|_| [0; 32]).collect();
            let theirs = chunks(within)
                .map(|chunk| {
                    let hit =
                        differing.iter().any(|page| (chunk.first..chunk.first + chunk.count).contains(page));
                    [u8::from(hit); 32]
                })
                .collect();
            let logs = if within.count == 1 { "kvm".to_owned() } else { String::new() };
            let theirs = RamDigests { first: within.first, count: within.count, digests: theirs, logs };
            Ok(Some(ComparedDigests { theirs, ours }))
        });
        (found.unwrap(), rounds)
    }

    #[test]
    fn chunks_hold_every_page_once() {
        for count in (1..300).chain([4096, 4097, 1 << 40, (1 << 52) - 7]) {
            let all: Vec<Run> = chunks(Run { first: 7, count }).collect();
            assert!(all.len() <= usize::from(limits::RAM_DIGESTS), "{count}");
            assert!(all.iter().all(|chunk| chunk.count > 0), "{count}");
            let end = all.iter().fold(7, |at, chunk| {
                assert_eq!(chunk.first, at);
                at + chunk.count
            });
            assert_eq!(end, 7 + count);
        }
    }

    #[test]
    fn the_first_of_several_pages_is_found() {
        for (pages, differing) in [
            (1, vec![0]),
            (64, vec![63]),
            (65, vec![64, 3]),
            (2048, vec![2047, 1500, 1499]),
            (1 << 40, vec![(1 << 40) - 1, 123_456_789]),
        ] {
            let (found, rounds) = search(pages, &differing);
            let page = *differing.iter().min().unwrap();
            assert_eq!(found, FirstDifference::Page { page, logs: "kvm".into() });
            assert!(rounds <= 8, "{pages}: {rounds}");
        }
        assert_eq!(search(4096, &[]).0, FirstDifference::None);
    }

    #[test]
    fn an_answer_to_something_else_ends_the_search() {
        let answer = |first, count, digests: usize| {
            let theirs = RamDigests { first, count, digests: vec![[1; 32]; digests], logs: String::new() };
            let answered = || ComparedDigests { theirs: theirs.clone(), ours: vec![[0; 32]; 64] };
            find_first_difference::<Infallible>(128, |_| Ok(Some(answered()))).unwrap()
        };
        assert_eq!(answer(1, 128, 64), FirstDifference::Unanswered);
        assert_eq!(answer(0, 127, 64), FirstDifference::Unanswered);
        assert_eq!(answer(0, 128, 63), FirstDifference::Unanswered);
        assert_eq!(answer(0, 128, 0), FirstDifference::Unknown);
        let silent = find_first_difference::<Infallible>(128, |_| Ok(None)).unwrap();
        assert_eq!(silent, FirstDifference::Unanswered);
    }
}
