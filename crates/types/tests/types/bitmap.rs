//! The bitmap against the plainest model there is: a set of numbers.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vfio_migration_types::{Bitmap, Granule, PAGE_SIZE};

#[derive(Clone, Debug)]
enum Op {
    Set(u64),
    Clear(u64),
    SetRange(u64, u64),
    ClearRange(u64, u64),
    SetBytes(u64, u64),
    OrWords(u64, Vec<u64>),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0u64..400).prop_map(Op::Set),
        (0u64..400).prop_map(Op::Clear),
        (0u64..400, 0u64..200).prop_map(|(a, b)| Op::SetRange(a, b)),
        (0u64..400, 0u64..200).prop_map(|(a, b)| Op::ClearRange(a, b)),
        (0u64..400 * PAGE_SIZE, 0u64..20 * PAGE_SIZE).prop_map(|(a, b)| Op::SetBytes(a, b)),
        (0u64..400, prop::collection::vec(any::<u64>(), 0..4)).prop_map(|(a, b)| Op::OrWords(a, b)),
    ]
}

proptest! {
    #[test]
    fn behaves_as_a_set(len in 0u64..330, ops in prop::collection::vec(op(), 0..40)) {
        let mut map = Bitmap::new(len * PAGE_SIZE, Granule::PAGE);
        let mut model = BTreeSet::new();
        for op in ops {
            match op {
                Op::Set(n) => { map.set(n); model.insert(n); }
                Op::Clear(n) => { map.clear(n); model.remove(&n); }
                Op::SetRange(first, count) => { map.set_range(first, count); model.extend(first..first + count); }
                Op::ClearRange(first, count) => {
                    map.clear_range(first, count);
                    model.retain(|n| !(first..first + count).contains(n));
                }
                Op::SetBytes(start, bytes) => {
                    map.set_bytes(start, bytes);
                    if bytes > 0 { model.extend(start / PAGE_SIZE..=(start + bytes - 1) / PAGE_SIZE); }
                }
                Op::OrWords(first, words) => {
                    map.or_words(first, &words);
                    for (base, word) in (0..).step_by(64).zip(&words) {
                        model.extend((0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| first + base + bit));
                    }
                }
            }
            model.retain(|n| *n < len);
            prop_assert_eq!(map.count(), model.len() as u64);
        }
        let mut listed = Vec::new();
        let mut last_end = None;
        for run in map.runs() {
            prop_assert!(run.count > 0 && last_end.is_none_or(|end| run.first > end), "runs are maximal");
            last_end = Some(run.first + run.count);
            listed.extend(run.first..run.first + run.count);
        }
        prop_assert_eq!(listed, model.iter().copied().collect::<Vec<_>>());
        for n in 0..len + 70 { prop_assert_eq!(map.test(n), model.contains(&n)); }
        let taken = map.take();
        prop_assert!(!map.any());
        prop_assert_eq!(taken.count(), model.len() as u64);
    }

    /// A coarser report marks every page it covers; a finer one marks the page it lies in; nothing else.
    #[test]
    fn rescaling_loses_and_invents_nothing(
        coarse in 12u32..16, fine in 12u32..16, bits in prop::collection::btree_set(0u64..96, 0..30)
    ) {
        let bytes = 96 << 15;
        let (from, to) = (Granule::new(1 << coarse).unwrap(), Granule::new(1 << fine).unwrap());
        let mut source = Bitmap::new(bytes, from);
        bits.iter().for_each(|bit| source.set(*bit));
        let mut target = Bitmap::new(bytes, to);
        target.or(&source);
        for n in 0..target.len() {
            let (start, end) = (n * to.bytes(), (n + 1) * to.bytes());
            let touched = bits.iter().any(|bit| bit * from.bytes() < end && (bit + 1) * from.bytes() > start);
            prop_assert_eq!(target.test(n), touched, "granule {}", n);
        }
    }
}

#[test]
fn granules_are_powers_of_two_from_a_page_up() {
    for bad in [0, 1, 2048, 4097, 12288] {
        assert!(Granule::new(bad).is_err(), "{bad}");
    }
    assert_eq!(Granule::new(2 << 20).unwrap().count((2 << 20) + 1), 2);
}
