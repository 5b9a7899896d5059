//! Where a function's BARs are, and whether that is a place for one.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use vfio_migration_types::{Gpa, Range};

use super::config::ConfigSpace;
use super::registers::{BAR0, COMMAND, COMMAND_MEMORY};
use crate::layout;

/// Number of BARs of a type 0 header.
pub(super) const BARS: usize = 6;
/// PCI: a memory BAR has at least 16 bytes.
const SMALLEST: u64 = 16;

/// The two windows of guest physical addresses in which BARs may lie. Neither has RAM in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<Gpa>,
    /// Above: for 64-bit prefetchable BARs.
    pub high: Range<Gpa>,
}

impl Default for Windows {
    /// Those of the machine's [`layout`].
    fn default() -> Self {
        let window = |start, len| Range::new(Gpa(start), len);
        match (
            window(layout::MMIO32_BASE, layout::MMIO32_LEN),
            window(layout::MMIO64_BASE, layout::MMIO64_LEN),
        ) {
            (Ok(low), Ok(high)) => Self { low, high },
            // The layout is constant, and a test of it looks at both.
            (Err(error), _) | (_, Err(error)) => unreachable!("{error}"),
        }
    }
}

impl Windows {
    fn hold(&self, range: &Range<Gpa>) -> bool {
        [self.low, self.high]
            .iter()
            .any(|window| window.contains(range.start()) && range.end() <= window.end())
    }
}

/// A memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) index: u8,
    /// Bytes that are decoded: a power of two.
    pub(super) size: u64,
    pub(super) wide: bool,
    pub(super) prefetchable: bool,
}

impl Bar {
    /// The BARs of a device, from its own config space and the sizes of its regions. I/O BARs, and such as make no
    /// sense (a wide one in BAR 5), are left out: they read 0, as absent ones do.
    pub(super) fn discover(config: &[u8], region_size: impl Fn(u8) -> u64) -> Vec<Self> {
        let mut out: Vec<Self> = Vec::new();
        let mut index = 0u8;
        while usize::from(index) < BARS {
            let kind = config.get(usize::from(register(index))).copied().unwrap_or(0);
            let (io, wide) = (kind & 1 != 0, kind & 0x6 == 0x4);
            let size = Some(region_size(index))
                .filter(|size| *size > 0 && !io && !(wide && index == 5))
                .and_then(|size| size.max(SMALLEST).checked_next_power_of_two())
                .filter(|size| wide || *size <= 1 << 31);
            if let Some(size) = size {
                out.push(Self { index, size, wide, prefetchable: kind & 0x8 != 0 });
            }
            index += if wide && size.is_some() { 2 } else { 1 };
        }
        out
    }

    /// Gives the BAR its register: address bits that size it when all ones are written, and type bits that stay.
    pub(super) fn define(&self, config: &mut ConfigSpace) {
        let address = !(self.size - 1);
        let kind = if self.wide { 0x4 } else { 0 } | if self.prefetchable { 0x8 } else { 0 };
        config.define_bar(register(self.index), low_half(address), kind);
        if self.wide {
            config.define_bar(register(self.index + 1), low_half(address >> 32), 0);
        }
    }

    /// What its register says, decoded or not.
    pub(super) fn address(&self, config: &ConfigSpace) -> u64 {
        let low = u64::from(config.u32(register(self.index)) & !0xf);
        let high = if self.wide { u64::from(config.u32(register(self.index + 1))) << 32 } else { 0 };
        high | low
    }

    /// Where the guest sees it: `None` while memory decode is off or the address is no place for a BAR (0, or one that
    /// a guest leaves there in the middle of sizing).
    pub(super) fn place(&self, config: &ConfigSpace, windows: &Windows) -> Option<Range<Gpa>> {
        let range = Range::new(Gpa(self.address(config)), self.size).ok()?;
        let decoded = config.u16(COMMAND) & COMMAND_MEMORY != 0;
        (decoded && windows.hold(&range)).then_some(range)
    }
}

/// Config-space offset of a BAR's register.
pub(super) fn register(index: u8) -> u16 {
    BAR0 + 4 * u16::from(index)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half is meant")]
fn low_half(value: u64) -> u32 {
    value as u32
}

/// Which BAR an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) slot: u8,
    pub(super) bar: u8,
    pub(super) offset: u64,
}

/// All BARs that are decoded, by address.
#[derive(Debug, Default)]
pub(super) struct AddressMap {
    /// First address → (past the end, slot, BAR).
    ranges: RwLock<BTreeMap<u64, (u64, u8, u8)>>,
}

impl AddressMap {
    /// Puts a BAR in; `false`, with nothing done, where another one is.
    #[must_use]
    pub(super) fn insert(&self, range: &Range<Gpa>, slot: u8, bar: u8) -> bool {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let before = ranges.range(..range.end()).next_back();
        if before.is_some_and(|(_, (end, _, _))| *end > range.start().0) {
            return false;
        }
        ranges.insert(range.start().0, (range.end(), slot, bar));
        true
    }

    /// Takes the BAR at `start` out.
    pub(super) fn remove(&self, start: Gpa) {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&start.0);
    }

    /// The BAR in which all of `len` bytes at `gpa` lie.
    pub(super) fn find(&self, gpa: Gpa, len: usize) -> Option<Hit> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (start, (end, slot, bar)) = ranges.range(..=gpa.0).next_back()?;
        let last = gpa.0.checked_add(u64::try_from(len).ok()?)?;
        (last <= *end).then_some(Hit { slot: *slot, bar: *bar, offset: gpa.0 - start })
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::pci::testing::{sample_config, windows};

    fn bars() -> Vec<Bar> {
        Bar::discover(&sample_config(), |index| match index {
            0 => 0x4000,
            2 => 0x10_0000,
            _ => 0,
        })
    }

    #[test]
    fn bars_are_found_by_type_and_size() {
        let [low, high] = bars()[..] else { panic!() };
        assert_eq!(low, Bar { index: 0, size: 0x4000, wide: false, prefetchable: false });
        assert_eq!(high, Bar { index: 2, size: 0x10_0000, wide: true, prefetchable: true });
        let mut config = sample_config();
        config[0x10] = 1; // I/O
        config[0x24] = 4; // a wide BAR 5
        let odd = Bar::discover(&config, |index| if index == 2 { 0x1801 } else { 32 });
        let found: Vec<_> = odd.iter().map(|bar| (bar.index, bar.size)).collect();
        assert_eq!(found, [(1, 32), (2, 0x2000), (4, 32)]);
        assert_eq!(Bar::discover(&config, |_| u64::MAX), []);
    }

    #[test]
    fn all_ones_size_a_bar() {
        let mut config = ConfigSpace::new(sample_config());
        let bars = bars();
        bars.iter().for_each(|bar| bar.define(&mut config));
        for index in 0..6 {
            config.write(register(index), &[0xff; 4]);
        }
        let read: Vec<u32> = (0..6).map(|index| config.u32(register(index))).collect();
        assert_eq!(read, [0xffff_c000, 0, 0xfff0_000c, 0xffff_ffff, 0, 0]);
        config.write(COMMAND, &[2]);
        assert_eq!(bars[0].place(&config, &windows()), None, "an address left by sizing is no place");
        config.write(register(0), &0xc000_0000u32.to_le_bytes());
        assert_eq!(bars[0].place(&config, &windows()).unwrap().start(), Gpa(0xc000_0000));
        config.write(COMMAND, &[0]);
        assert_eq!(bars[0].place(&config, &windows()), None, "decode is off");
    }

    #[test]
    fn addresses_find_their_bar_and_overlap_is_refused() {
        let map = AddressMap::default();
        let range = |start, len| Range::new(Gpa(start), len).unwrap();
        assert!(map.insert(&range(0x4000, 0x1000), 1, 0));
        assert!(map.insert(&range(0x5000, 0x1000), 2, 2));
        for (start, len) in [(0x4000, 0x10), (0x3000, 0x1001), (0x5fff, 2), (0x3000, 0x10000)] {
            assert!(!map.insert(&range(start, len), 3, 0), "{start:#x}");
        }
        assert_eq!(map.find(Gpa(0x4ffc), 4), Some(Hit { slot: 1, bar: 0, offset: 0xffc }));
        assert_eq!(map.find(Gpa(0x4ffd), 4), None);
        assert_eq!(map.find(Gpa(0x5000), 8), Some(Hit { slot: 2, bar: 2, offset: 0 }));
        assert_eq!(map.find(Gpa(0x6000), 1), None);
        map.remove(Gpa(0x5000));
        assert_eq!(map.find(Gpa(0x5000), 8), None);
    }
}
