//! Where the guest program keeps its things in guest-physical memory. The assembler source has the same numbers.

use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DEVICES_MAX, PAGE_SIZE};

use crate::error::VmmError;
use crate::layout;

/// The page the VMM writes before boot: see [`BootInfo`](super::BootInfo).
pub const BOOT_INFO: u64 = 0x5000;
/// The page the guest reports in: see [`Report`](super::Report).
pub const REPORT: u64 = 0x6000;
/// The global descriptor table, written by the VMM.
pub const GDT: u64 = 0x7000;
/// End of the stack, which grows down from here.
pub const STACK_END: u64 = 0x1_0000;
/// Address at which the program is loaded and entered.
pub const PROGRAM: u64 = 0x1_0000;
/// Most bytes of the program.
pub const PROGRAM_LIMIT: u64 = 0x1_0000;
/// The program's variables: up to 0x3_0000, where its interrupt descriptor table is.
pub const DATA: u64 = 0x2_0000;
/// Page tables, written by the VMM.
pub const PAGE_TABLES: u64 = 0x10_0000;
/// End of the page tables.
pub const PAGE_TABLES_END: u64 = 0x20_0000;
/// Rings, source and target blocks of the first device; each device has [`DEVICE_STRIDE`] bytes. Behind those of the last are
/// the stamps: see [`Areas`].
pub const DEVICES: u64 = 0x20_0000;
/// Bytes set aside for each device.
pub const DEVICE_STRIDE: u64 = 0x10_0000;
/// Within a device's bytes: its descriptor ring.
pub const DEVICE_RING: u64 = 0;
/// Within a device's bytes: the count of posted descriptors.
pub const DEVICE_TAIL: u64 = 0x1000;
/// Within a device's bytes: the two counts of completed blocks.
pub const DEVICE_DONE: u64 = 0x2000;
/// Within a device's bytes: which block each slot holds, one `u64` per slot, flow 1 at 0x200 from flow 0.
pub const DEVICE_SLOTS: u64 = 0x3000;
/// Within a device's bytes: what it reads, a page per descriptor of the ring.
pub const DEVICE_SOURCES: u64 = 0x4_0000;
/// Within a device's bytes: what it writes in flow 0, a page per slot.
pub const DEVICE_TARGETS: u64 = 0x8_0000;
/// Entries of a descriptor ring.
pub const RING_SIZE: u64 = 64;
/// Slots per device and flow.
pub const SLOTS: u64 = 64;

/// Areas of pages that the writer numbers: one below the 32-bit hole, one above; and where it keeps their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Areas {
    /// Address of the stamps that the pages are expected to hold, one `u64` per page.
    pub stamps: u64,
    /// First address of the lower area.
    pub low_start: u64,
    /// Pages of the area below the hole, at least one.
    pub low_pages: u64,
    /// First address of the upper area, 0 if there is none.
    pub high_start: u64,
    /// Pages of the area above the hole.
    pub high_pages: u64,
}

impl Areas {
    /// All of `ram` that the program does not use otherwise where it drives `devices` sample devices.
    ///
    /// # Errors
    /// The RAM is not laid out by [`layout::ram_regions`], or too little, or the devices are too many.
    pub fn of(ram: &GuestRam, devices: u64) -> Result<Self, VmmError> {
        if devices > u64::from(DEVICES_MAX) {
            return Err(VmmError::TooManyDevices(usize::try_from(devices).unwrap_or(usize::MAX)));
        }
        let regions: Vec<_> =
            ram.regions().iter().map(|region| RamSpec { gpa: region.gpa, len: region.len }).collect();
        let (low, high) = match regions.as_slice() {
            [low] => (low, None),
            [low, high] => (low, Some(high)),
            _ => {
                return Err(VmmError::Refused(format!(
                    "the guest program cannot use {} RAM regions",
                    regions.len()
                )));
            }
        };
        let pages = ram.size() / PAGE_SIZE;
        let stamps = DEVICES + devices * DEVICE_STRIDE;
        let low_start = (stamps + pages * 8).next_multiple_of(PAGE_SIZE);
        let fits = low.gpa.0 == 0
            && low.len <= layout::RAM_LOW_END
            && high.is_none_or(|high| high.gpa.0 == layout::RAM_HIGH_BASE);
        if !fits {
            return Err(VmmError::Refused("the guest program cannot use this layout of RAM".to_owned()));
        }
        if low.len <= low_start {
            return Err(VmmError::Refused(format!(
                "{} MiB of memory are too few for {devices} devices: the guest program keeps {} MiB for each below 4 GiB, \
                 and {} MiB besides",
                ram.size() >> 20,
                DEVICE_STRIDE >> 20,
                (low_start - devices * DEVICE_STRIDE).div_ceil(1 << 20)
            )));
        }
        Ok(Self {
            stamps,
            low_start,
            low_pages: (low.len - low_start) / PAGE_SIZE,
            high_start: high.map_or(0, |high| high.gpa.0),
            high_pages: high.map_or(0, |high| high.len / PAGE_SIZE),
        })
    }

    /// Pages of both areas.
    pub fn pages(&self) -> u64 {
        self.low_pages + self.high_pages
    }

    /// Address of page `number` of the areas.
    pub fn page(&self, number: u64) -> Option<u64> {
        match number.checked_sub(self.low_pages) {
            None => Some(self.low_start + number * PAGE_SIZE),
            Some(upper) if upper < self.high_pages => Some(self.high_start + upper * PAGE_SIZE),
            Some(_) => None,
        }
    }
}
