//! Where the guest program keeps its things in guest-physical memory. The assembler source has the same numbers.

use crate::error::GuestImageError;

/// Most sample devices that it drives.
pub const DEVICES_MAX: u64 = 64;
/// Bytes of a page.
pub const PAGE_SIZE: u64 = 4096;
/// End of the RAM below the hole for 32-bit BARs and the interrupt controllers.
pub const RAM_LOW_END: u64 = 0xC000_0000;
/// Start of the RAM above it.
pub const RAM_HIGH_BASE: u64 = 1 << 32;
/// Start of 64-bit BARs: of those of the devices that it drives, which must lie within [`MMIO64_LEN`] bytes from here, or in the hole.
pub const MMIO64_BASE: u64 = 1 << 38;
/// Bytes from there that its page tables reach.
pub const MMIO64_LEN: u64 = 1 << 30;
/// The page the VMM writes before boot: see [`BootInfo`](crate::BootInfo).
pub const BOOT_INFO: u64 = 0x5000;
/// The page the guest reports in: see [`Report`](crate::Report).
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

/// A region of the guest's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamPart {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
}

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
    /// The RAM is neither one region from address 0 on, up to [`RAM_LOW_END`], nor that and one at [`RAM_HIGH_BASE`]; it is too
    /// little, or the devices are too many.
    pub fn of(ram: &[RamPart], devices: u64) -> Result<Self, GuestImageError> {
        if devices > DEVICES_MAX {
            return Err(GuestImageError::TooManyDevices(devices));
        }
        let (low, high) = match ram {
            [low] => (low, None),
            [low, high] => (low, Some(high)),
            _ => return Err(GuestImageError::Regions(ram.len())),
        };
        let pages = (low.len + high.map_or(0, |high| high.len)) / PAGE_SIZE;
        let stamps = DEVICES + devices * DEVICE_STRIDE;
        let low_start = (stamps + pages * 8).next_multiple_of(PAGE_SIZE);
        let fits =
            low.gpa == 0 && low.len <= RAM_LOW_END && high.is_none_or(|high| high.gpa == RAM_HIGH_BASE);
        if !fits {
            return Err(GuestImageError::Layout);
        }
        if low.len <= low_start {
            let memory = pages * PAGE_SIZE;
            let besides = low_start - devices * DEVICE_STRIDE;
            return Err(GuestImageError::TooLittleMemory { memory, devices, besides });
        }
        Ok(Self {
            stamps,
            low_start,
            low_pages: (low.len - low_start) / PAGE_SIZE,
            high_start: high.map_or(0, |high| high.gpa),
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
