//! Reports of dirty pages by bitmap, from a kernel that may set more bits than were asked for.
//!
//! A log works in pages of its own, which may be larger than those asked for: a huge page of the IOMMU's, a device's
//! granule. The kernel reports such a page whole (`intel_iommu_read_and_clear_dirty`, `iova_bitmap_set`), also the part
//! of it that lies behind the range, and then its bits run on behind the bitmap: up to the end of the memory pages that
//! it pinned for the bitmap. Those are all of the bitmap's and, where it begins inside of a page, one more
//! (`iova_bitmap_get`, as of Linux 6.12).

use vfio_migration_types::{Granule, Iova, PAGE_SIZE, Range};

use crate::error::UapiError;

const WORDS: usize = 512;

/// A page of memory, as the kernel pins it.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

const _: () = assert!(size_of::<Page>() as u64 == PAGE_SIZE);

/// Has `ask` report on `range` to a bitmap at the address that it is given, and ORs what it reported into `bitmap`.
///
/// The memory there is ordinary, and has room for all that the kernel may set.
pub(crate) fn read(
    range: Range<Iova>,
    granule: Granule,
    bitmap: &mut [u64],
    ask: impl FnOnce(u64) -> Result<(), UapiError>,
) -> Result<(), UapiError> {
    check(range, granule, bitmap)?;
    let bits = granule.count(range.len());
    // No more than the caller's bitmap, which there is.
    let words = usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX);
    let mut room = vec![Page([0; WORDS]); words.div_ceil(WORDS) + 1];
    ask(room.as_mut_ptr().expose_provenance() as u64)?;
    let reported = room.iter().flat_map(|page| &page.0).take(words);
    for (word, (known, found)) in bitmap.iter_mut().zip(reported).enumerate() {
        *known |= found & inside(bits - word as u64 * 64);
    }
    Ok(())
}

/// The bits of a word that stand for pages of the range, of which `left` are left.
fn inside(left: u64) -> u64 {
    if left < 64 { (1 << left) - 1 } else { u64::MAX }
}

/// Whether a report of `range` in pages of `granule` fits `bitmap`.
pub(crate) fn check(range: Range<Iova>, granule: Granule, bitmap: &[u64]) -> Result<(), UapiError> {
    let (iova, len, page_size) = (range.start().0, range.len(), granule.bytes());
    if !iova.is_multiple_of(page_size) || !len.is_multiple_of(page_size) {
        return Err(UapiError::Misaligned { iova, len, page_size });
    }
    let needed = granule.count(len).div_ceil(64);
    if (bitmap.len() as u64) < needed {
        return Err(UapiError::BitmapTooSmall { words: bitmap.len(), needed });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(count: u64) -> Range<Iova> {
        Range::new(Iova(0x10_0000), count * PAGE_SIZE).unwrap()
    }

    /// A kernel that sets each bit in `words` words from `address`.
    fn set_all(address: u64, words: usize) {
        let start = std::ptr::with_exposed_provenance_mut::<u64>(usize::try_from(address).unwrap());
        for word in 0..words {
            // SAFETY: the tests ask for no more words than the room has.
            unsafe { start.add(word).write(u64::MAX) };
        }
    }

    #[test]
    fn what_runs_on_behind_the_range_reaches_nobody() {
        for (count, words) in [(1, 1), (10, 1), (64, 1), (65, 2), (64 * 512, 512), (64 * 513 - 1, 513)] {
            let mut bitmap = vec![0; words + 1];
            // All pages that the bitmap takes, and one more.
            let room = (words.div_ceil(WORDS) + 1) * WORDS;
            let ask = |address| {
                assert!(address % PAGE_SIZE == 0);
                set_all(address, room);
                Ok(())
            };
            read(pages(count), Granule::PAGE, &mut bitmap, ask).unwrap();
            let set: u64 = bitmap.iter().map(|word| u64::from(word.count_ones())).sum();
            assert_eq!((set, bitmap[words]), (count, 0), "{count}");
        }
    }

    #[test]
    fn what_was_known_stays_and_a_failed_report_adds_nothing() {
        let mut bitmap = [1 << 40, 0];
        let failed = read(pages(10), Granule::PAGE, &mut bitmap, |address| {
            set_all(address, 1);
            Err(UapiError::ReportTooLong(0))
        });
        assert!(failed.is_err());
        assert_eq!(bitmap, [1 << 40, 0]);
        read(pages(10), Granule::PAGE, &mut bitmap, |address| {
            set_all(address, 1);
            Ok(())
        })
        .unwrap();
        assert_eq!(bitmap, [1 << 40 | 0x3ff, 0]);
    }

    #[test]
    fn what_does_not_fit_is_not_asked() {
        let mut bitmap = [0];
        let never = |_| panic!("asked");
        assert!(matches!(
            read(pages(65), Granule::PAGE, &mut bitmap, never),
            Err(UapiError::BitmapTooSmall { words: 1, needed: 2 })
        ));
        let granule = Granule::new(1 << 20).unwrap();
        assert!(matches!(read(pages(1), granule, &mut bitmap, never), Err(UapiError::Misaligned { .. })));
    }
}
