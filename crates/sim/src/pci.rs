//! The function's PCI configuration space and its VFIO regions.
//!
//! The embedding VMM emulates MSI-X and places the BARs; what is written here is what a guest wrote through it.

use crate::options::Options;

/// Vendor id in config space.
pub const VENDOR: u16 = 0x5646;
/// Device id in config space.
pub const DEVICE: u16 = 0x4d53;
/// Subsystem id; the subsystem's vendor is [`VENDOR`].
pub const SUBSYSTEM: u16 = 0x0001;
/// Revision id in config space.
pub const REVISION: u8 = 1;
/// Class code: unclassified.
pub const CLASS: u32 = 0xff_0000;

/// Bytes of configuration space.
pub const CONFIG_SIZE: usize = 256;
/// Bytes of BAR0: registers, doorbell, MSI-X table, PBA.
pub const BAR0_SIZE: u64 = 16 << 10;
/// Bytes of BAR2, the mailbox.
pub const BAR2_SIZE: u64 = 1 << 20;
/// The MSI-X table's size as message control has it: entries less one.
const TABLE_SIZE: u16 = 1;
const _: () = assert!(TABLE_SIZE as usize + 1 == vfio_migration_guest_driver::registers::VECTORS);
/// Offset of the MSI-X table in BAR0.
pub const MSIX_TABLE: u32 = 0x2000;
/// Offset of the pending bits in BAR0.
pub const MSIX_PBA: u32 = 0x3000;
/// Offset of the MSI-X capability.
pub const MSIX_CAP: usize = 0x40;
/// Offset of the vendor-specific capability, 8 bytes, whose contents may differ between hosts of one model.
pub const VENDOR_CAP: usize = 0x50;

/// VFIO region indices (`include/uapi/linux/vfio.h`, `VFIO_PCI_*_REGION_INDEX`).
pub mod region {
    /// Region of the registers and the doorbell.
    pub const BAR0: u32 = 0;
    /// Region of the mailbox.
    pub const BAR2: u32 = 2;
    /// Region of configuration space.
    pub const CONFIG: u32 = 7;
    /// Number of indices.
    pub const COUNT: u32 = 9;
}

/// VFIO interrupt indices (`VFIO_PCI_*_IRQ_INDEX`).
pub mod irq {
    /// MSI-X, the only kind this function has.
    pub const MSIX: u32 = 2;
    /// Number of indices.
    pub const COUNT: u32 = 5;
}

/// Size of a region, 0 when the function has none of that index.
pub fn region_size(index: u32) -> u64 {
    match index {
        region::BAR0 => BAR0_SIZE,
        region::BAR2 => BAR2_SIZE,
        region::CONFIG => CONFIG_SIZE as u64,
        _ => 0,
    }
}

/// Configuration space: bytes, and which of their bits software may write.
#[derive(Clone, Debug)]
pub(crate) struct SampleConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
}

impl SampleConfigSpace {
    pub(crate) fn of(options: &Options) -> Self {
        let mut config = Self::new(options.vsc_bytes);
        for (at, byte) in &options.config_bytes {
            config.put(usize::from(*at), &[*byte], &[]);
        }
        config
    }

    fn new(vsc_bytes: [u8; 5]) -> Self {
        let mut config = Self { bytes: [0; CONFIG_SIZE], writable: [0; CONFIG_SIZE] };
        config.put(0x00, &VENDOR.to_le_bytes(), &[]);
        config.put(0x02, &DEVICE.to_le_bytes(), &[]);
        // Command: memory space, bus master, SERR#, INTx disable.
        config.put(0x04, &[0; 2], &[0x06, 0x05]);
        // Status: a capability list.
        config.put(0x06, &[0x10, 0], &[]);
        let [class0, class1, class2, _] = CLASS.to_le_bytes();
        config.put(0x08, &[REVISION, class0, class1, class2], &[]);
        // Cache line size and latency timer are plain storage.
        config.put(0x0c, &[0; 2], &[0xff, 0xff]);
        config.put_bar(0, BAR0_SIZE, 0);
        // 64-bit, prefetchable.
        config.put_bar(2, BAR2_SIZE, 0xc);
        config.put(0x2c, &VENDOR.to_le_bytes(), &[]);
        config.put(0x2e, &SUBSYSTEM.to_le_bytes(), &[]);
        config.put(0x34, &[byte(MSIX_CAP)], &[]);
        // Interrupt line is storage; no interrupt pin.
        config.put(0x3c, &[0, 0], &[0xff, 0]);

        config.put(MSIX_CAP, &[0x11, byte(VENDOR_CAP)], &[]);
        // Message control: function mask and enable can be written.
        config.put(MSIX_CAP + 2, &TABLE_SIZE.to_le_bytes(), &[0, 0xc0]);
        config.put(MSIX_CAP + 4, &MSIX_TABLE.to_le_bytes(), &[]);
        config.put(MSIX_CAP + 8, &MSIX_PBA.to_le_bytes(), &[]);
        config.put(VENDOR_CAP, &[0x09, 0, 8], &[]);
        config.put(VENDOR_CAP + 3, &vsc_bytes, &[]);
        config
    }

    /// Reads from `at`; past the end, zeros.
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) {
        for (n, byte) in into.iter_mut().enumerate() {
            *byte = at.checked_add(n).and_then(|at| self.bytes.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes what can be written.
    pub(crate) fn write(&mut self, at: usize, from: &[u8]) {
        let bytes = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in bytes.zip(from) {
            *byte = *byte & !writable | new & writable;
        }
    }

    fn put_bar(&mut self, number: usize, size: u64, kind: u8) {
        let mask = (!(size - 1)).to_le_bytes();
        let wide = kind & 4 != 0;
        let at = 0x10 + number * 4;
        let bytes = if wide { 8 } else { 4 };
        self.writable[at..at + bytes].copy_from_slice(&mask[..bytes]);
        self.bytes[at] = kind;
    }

    fn put(&mut self, at: usize, bytes: &[u8], writable: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.writable[at..at + writable.len()].copy_from_slice(writable);
    }
}

/// An offset in the first 256 bytes, as capability pointers hold it.
#[expect(clippy::cast_possible_truncation, reason = "the offsets are constants below 256")]
const fn byte(offset: usize) -> u8 {
    offset as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(config: &SampleConfigSpace, at: usize) -> u32 {
        let mut bytes = [0; 4];
        config.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_bar_answers_its_size_and_keeps_its_kind() {
        let mut config = SampleConfigSpace::new([1, 2, 3, 4, 5]);
        for at in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
            config.write(at, &[0xff; 4]);
        }
        assert_eq!(word(&config, 0x10), 0xffff_c000);
        assert_eq!(word(&config, 0x14), 0);
        assert_eq!(word(&config, 0x18), 0xfff0_000c);
        assert_eq!(word(&config, 0x1c), 0xffff_ffff);
        assert_eq!((word(&config, 0x20), word(&config, 0x24), word(&config, 0x30)), (0, 0, 0));
    }

    #[test]
    fn the_capabilities_are_linked_and_only_what_may_be_written_is() {
        let mut config = SampleConfigSpace::new([1, 2, 3, 4, 5]);
        let before = config.bytes;
        for at in 0..CONFIG_SIZE {
            if !(0x10..0x28).contains(&at) {
                config.write(at, &[0xff]);
            }
        }
        assert_eq!(word(&config, 0), 0x4d53_5646);
        assert_eq!(word(&config, 4), 0x0010_0506);
        assert_eq!(word(&config, 8), 0xff00_0001);
        assert_eq!(word(&config, 0x2c), 0x0001_5646);
        let first = usize::from(before[0x34]);
        assert_eq!(&before[first..first + 4], &[0x11, 0x50, 1, 0]);
        assert_eq!(word(&config, first), 0xc001_5011);
        assert_eq!((word(&config, first + 4), word(&config, first + 8)), (0x2000, 0x3000));
        assert_eq!(&config.bytes[0x50..0x58], &[0x09, 0, 8, 1, 2, 3, 4, 5]);
    }
}
