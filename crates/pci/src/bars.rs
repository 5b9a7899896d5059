//! Where a function's BARs are, and whether that is a place for one.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use vfio_migration_types::{Gpa, Range};

use super::config::ConfigSpace;
use super::devfn::Devfn;
use super::registers::{BAR0, COMMAND, COMMAND_IO, COMMAND_MEMORY};

/// Number of BARs of a type 0 header.
pub(super) const BARS: usize = 6;
/// PCI: a memory BAR has at least 16 bytes.
const SMALLEST: u64 = 16;
/// PCI: an I/O BAR has at least 4 bytes, and on x86 a port number 16 bits.
const SMALLEST_IO: u64 = 4;
const PORTS: u64 = 1 << 16;

/// Where BARs may lie: two windows of guest physical addresses, which have no RAM in them, and one of ports, which has
/// none of the machine's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarWindows {
    /// Window below 4 GiB, for 32-bit BARs.
    pub low: Range<Gpa>,
    /// Above: for 64-bit prefetchable BARs.
    pub high: Range<Gpa>,
    /// Bytes from the start of `high` in which BARs smaller than that lie, and no others; for a guest that maps only so much of
    /// it at first.
    pub small: u64,
    /// Ports, for I/O BARs.
    pub ports: Range<u64>,
}

impl BarWindows {
    fn hold(&self, range: &Range<u64>, io: bool) -> bool {
        let inside = |start: u64, end: u64| range.start() >= start && range.end() <= end;
        match io {
            true => inside(self.ports.start(), self.ports.end()),
            false => [self.low, self.high].iter().any(|window| inside(window.start().0, window.end())),
        }
    }
}

/// A BAR of a function, as its config space says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) index: u8,
    /// Bytes that are decoded: a power of two.
    pub(super) size: u64,
    /// An I/O BAR: in ports, not in memory.
    pub(super) io: bool,
    pub(super) wide: bool,
    pub(super) prefetchable: bool,
}

impl Bar {
    /// The BARs of a device, from its own config space and the sizes of its regions. Such as make no sense (a wide one in
    /// BAR 5, more ports than there are) are left out: they read 0, as absent ones do.
    pub(super) fn discover(config: &[u8], region_size: impl Fn(u8) -> u64) -> Vec<Self> {
        let mut out: Vec<Self> = Vec::new();
        let mut index = 0u8;
        while usize::from(index) < BARS {
            let kind = config.get(usize::from(register(index))).copied().unwrap_or(0);
            let io = kind & 1 != 0;
            let wide = !io && kind & 0x6 == 0x4;
            let (smallest, largest) = match (io, wide) {
                (true, _) => (SMALLEST_IO, PORTS / 2),
                (false, false) => (SMALLEST, 1 << 31),
                (false, true) => (SMALLEST, u64::MAX),
            };
            let size = Some(region_size(index))
                .filter(|size| *size > 0 && !(wide && index == 5))
                .and_then(|size| size.max(smallest).checked_next_power_of_two())
                .filter(|size| *size <= largest);
            if let Some(size) = size {
                out.push(Self { index, size, io, wide, prefetchable: !io && kind & 0x8 != 0 });
            }
            index += if wide && size.is_some() { 2 } else { 1 };
        }
        out
    }

    /// Gives the BAR its register: address bits that size it when all ones are written, and type bits that stay.
    pub(super) fn define(&self, config: &mut ConfigSpace) {
        let address = !(self.size - 1);
        if self.io {
            return config.define_bar(register(self.index), low_half(address), 1);
        }
        let kind = if self.wide { 0x4 } else { 0 } | if self.prefetchable { 0x8 } else { 0 };
        config.define_bar(register(self.index), low_half(address), kind);
        if self.wide {
            config.define_bar(register(self.index + 1), low_half(address >> 32), 0);
        }
    }

    /// The address in the BAR's register, decoded or not.
    pub(super) fn address(&self, config: &ConfigSpace) -> u64 {
        let low = u64::from(config.u32(register(self.index)) & if self.io { !0x3 } else { !0xf });
        let high = if self.wide { u64::from(config.u32(register(self.index + 1))) << 32 } else { 0 };
        high | low
    }

    /// Where the guest sees it, as an address or a port: `None` while its decode is off or the address is no place for a BAR (0, or one that
    /// a guest leaves there in the middle of sizing).
    pub(super) fn place(&self, config: &ConfigSpace, windows: &BarWindows) -> Option<Range<u64>> {
        let range = Range::new(self.address(config), self.size).ok()?;
        let decoded = config.u16(COMMAND) & if self.io { COMMAND_IO } else { COMMAND_MEMORY } != 0;
        (decoded && windows.hold(&range, self.io)).then_some(range)
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

/// The BAR that an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) devfn: Devfn,
    pub(super) bar: u8,
    pub(super) offset: u64,
}

/// All BARs of one kind that are decoded: those in memory by address, or those in ports by port.
#[derive(Debug, Default)]
pub(super) struct AddressMap {
    /// First address → (past the end, function, BAR).
    ranges: RwLock<BTreeMap<u64, (u64, Devfn, u8)>>,
}

impl AddressMap {
    /// Puts a BAR in; `false`, with nothing done, where another one is.
    #[must_use]
    pub(super) fn insert(&self, range: &Range<u64>, devfn: Devfn, bar: u8) -> bool {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let before = ranges.range(..range.end()).next_back();
        if before.is_some_and(|(_, (end, _, _))| *end > range.start()) {
            return false;
        }
        ranges.insert(range.start(), (range.end(), devfn, bar));
        true
    }

    /// Takes the BAR at `start` out.
    pub(super) fn remove(&self, start: u64) {
        self.ranges.write().unwrap_or_else(PoisonError::into_inner).remove(&start);
    }

    /// The BAR in which all of `len` bytes at `at` lie.
    pub(super) fn find(&self, at: u64, len: usize) -> Option<Hit> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (start, (end, devfn, bar)) = ranges.range(..=at).next_back()?;
        let last = at.checked_add(u64::try_from(len).ok()?)?;
        (last <= *end).then_some(Hit { devfn: *devfn, bar: *bar, offset: at - start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::fakes::{sample_config, windows};

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
        assert_eq!(low, Bar { index: 0, size: 0x4000, io: false, wide: false, prefetchable: false });
        assert_eq!(high, Bar { index: 2, size: 0x10_0000, io: false, wide: true, prefetchable: true });
        let mut config = sample_config();
        config[0x10] = 1; // I/O
        config[0x24] = 4; // a wide BAR 5
        let odd = Bar::discover(&config, |index| if index == 2 { 0x1801 } else { 32 });
        let found: Vec<_> = odd.iter().map(|bar| (bar.index, bar.size)).collect();
        assert_eq!(found, [(0, 32), (1, 32), (2, 0x2000), (4, 32)]);
        assert!(odd[0].io && odd[1..].iter().all(|bar| !bar.io));
        assert_eq!(Bar::discover(&config, |_| u64::MAX), []);
    }

    #[test]
    fn a_window_holds_its_last_byte_and_none_beyond() {
        let windows = windows();
        let memory = [windows.low, windows.high].map(|window| (window.start().0, window.end(), false));
        let ports = (windows.ports.start(), windows.ports.end(), true);
        for (start, end, io) in memory.into_iter().chain([ports]) {
            let hold = |at, len| windows.hold(&Range::new(at, len).unwrap(), io);
            assert!(hold(start, 16) && hold(end - 16, 16) && hold(start, end - start), "{start:#x}");
            assert!(!hold(start - 1, 16) && !hold(end - 15, 16) && !hold(end, 16), "{start:#x}");
            assert!(!windows.hold(&Range::new(start, 16).unwrap(), !io), "{start:#x} is of the other kind");
        }
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
        assert_eq!(bars[0].place(&config, &windows()).unwrap().start(), 0xc000_0000);
        config.write(COMMAND, &[0]);
        assert_eq!(bars[0].place(&config, &windows()), None, "decode is off");
    }

    #[test]
    fn addresses_find_their_bar_and_overlap_is_refused() {
        let map = AddressMap::default();
        let range = |start: u64, len| Range::new(start, len).unwrap();
        assert!(map.insert(&range(0x4000, 0x1000), Devfn::in_slot(1), 0));
        assert!(map.insert(&range(0x5000, 0x1000), Devfn::in_slot(2), 2));
        for (start, len) in [(0x4000, 0x10), (0x3000, 0x1001), (0x5fff, 2), (0x3000, 0x10000)] {
            assert!(!map.insert(&range(start, len), Devfn::in_slot(3), 0), "{start:#x}");
        }
        assert_eq!(map.find(0x4ffc, 4), Some(Hit { devfn: Devfn::in_slot(1), bar: 0, offset: 0xffc }));
        assert_eq!(map.find(0x4ffd, 4), None);
        assert_eq!(map.find(0x5000, 8), Some(Hit { devfn: Devfn::in_slot(2), bar: 2, offset: 0 }));
        assert_eq!(map.find(0x6000, 1), None);
        map.remove(0x5000);
        assert_eq!(map.find(0x5000, 8), None);
    }
}
