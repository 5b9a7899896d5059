//! The guest-physical map of the reference machine.
//!
//! ```text
//! 0x00_0000_0000  RAM, up to 3 GiB
//! 0x00_C000_0000  32-bit BARs, 512 MiB
//! 0x00_E000_0000  PCI configuration space (ECAM) of bus 0, 1 MiB
//! 0x00_FEC0_0000  IOAPIC
//! 0x00_FEE0_0000  local APIC, and the target of MSIs
//! 0x00_FFFB_C000  KVM's own pages (identity map, TSS), 4 pages
//! 0x01_0000_0000  the rest of RAM
//! 0x40_0000_0000  64-bit BARs, 256 GiB: those below 1 GiB in the first GiB
//! ```

use std::ops::Range;

use vfio_migration_guest_image::map;
use vfio_migration_memory::RamSpec;
use vfio_migration_pci::BarWindows;
use vfio_migration_types::Gpa;

use crate::error::VmmError;

/// End of the RAM below the 32-bit hole.
pub const RAM_LOW_END: u64 = map::RAM_LOW_END;
/// Start of the RAM above it.
pub const RAM_HIGH_BASE: u64 = map::RAM_HIGH_BASE;
/// Start of the window for 32-bit BARs.
pub const MMIO32_BASE: u64 = RAM_LOW_END;
/// Bytes of the window for 32-bit BARs.
pub const MMIO32_LEN: u64 = 0x2000_0000;
/// Start of the memory-mapped configuration space; bus 0 alone exists.
pub const ECAM_BASE: u64 = 0xE000_0000;
/// Bytes of the memory-mapped configuration space: 32 devices of 8 functions of 4 KiB.
pub const ECAM_LEN: u64 = 1 << 20;
/// The local APIC's page, and where MSIs are written to.
pub const LAPIC_BASE: u64 = 0xFEE0_0000;
/// One page that KVM on VMX needs for guests without paging.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages that KVM on VMX needs for guests in real mode.
pub const KVM_TSS: u64 = 0xFFFB_D000;
/// Start of the window for 64-bit BARs. Needs 39 bits of guest-physical address.
pub const MMIO64_BASE: u64 = map::MMIO64_BASE;
/// Bytes of the window for 64-bit BARs: all that 39 bits of guest-physical address have.
pub const MMIO64_LEN: u64 = 1 << 38;
/// Bytes from the start of that window where the smaller BARs lie, which the guest program's page tables reach.
pub const MMIO64_SMALL_LEN: u64 = map::MMIO64_LEN;
/// First of the ports for I/O BARs: the machine's own lie below.
pub const PCI_PORTS_BASE: u64 = 0x1000;
/// Number of ports for I/O BARs: all the rest.
pub const PCI_PORTS_LEN: u64 = 0xF000;
/// Pins of the IOAPIC: interrupts 0 to 23. Message-signalled interrupts have the numbers from here on.
pub const IOAPIC_PINS: u32 = 24;
/// Interrupt numbers there are: Linux's `KVM_MAX_IRQ_ROUTES`.
pub const GSIS: u32 = 4096;
/// Guest-physical address bits that the map above needs.
pub const PHYSICAL_BITS: u8 = 39;

/// Least RAM of a machine, in bytes: the guest program's own tables take ten mebibytes.
pub const RAM_MIN: u64 = 16 << 20;
/// Most RAM of a machine, in bytes: what the page tables that the VMM builds can reach.
pub const RAM_MAX: u64 = 128 << 30;

/// From this size on a machine has RAM above the hole too.
const RAM_SPLIT_FROM: u64 = 64 << 20;
const LARGE_PAGE: u64 = 2 << 20;

/// First pin of the IOAPIC that is a PCI function's: 16 to 23 are, and no chip has any of them.
const FIRST_PCI_PIN: u32 = 16;

/// The interrupt numbers for messages: what the pins leave, and those of the two PICs, which have routes of their own that count
/// too.
pub const MESSAGES: Range<u32> = IOAPIC_PINS..GSIS - 16;

/// The IOAPIC pin that pin `pin` (1 to 4) of a function in `slot` is wired to. Functions share pins.
pub fn pci_pin(slot: u8, pin: u8) -> u32 {
    let pins = IOAPIC_PINS - FIRST_PCI_PIN;
    FIRST_PCI_PIN + (u32::from(slot) + u32::from(pin.saturating_sub(1))) % pins
}

/// Where BARs may lie.
pub fn bar_windows() -> BarWindows {
    let window = |start, len| vfio_migration_types::Range::new(Gpa(start), len);
    match (
        window(MMIO32_BASE, MMIO32_LEN),
        window(MMIO64_BASE, MMIO64_LEN),
        vfio_migration_types::Range::new(PCI_PORTS_BASE, PCI_PORTS_LEN),
    ) {
        (Ok(low), Ok(high), Ok(ports)) => BarWindows { low, high, small: MMIO64_SMALL_LEN, ports },
        // The layout is constant, and a test looks at all of it.
        (Err(error), _, _) | (_, Err(error), _) | (_, _, Err(error)) => unreachable!("{error}"),
    }
}

/// The regions of `memory` bytes of RAM.
///
/// A quarter of it lies above the hole even when all would fit below, so that no guest of a usual size has RAM in one
/// piece and a VMM that confuses guest-physical addresses with RAM offsets is found out at once.
///
/// # Errors
/// `memory` is not a multiple of 2 MiB, or outside [`RAM_MIN`]..=[`RAM_MAX`].
pub fn ram_regions(memory: u64) -> Result<Vec<RamSpec>, VmmError> {
    if !memory.is_multiple_of(LARGE_PAGE) {
        return Err(VmmError::Refused(format!("{memory} bytes of memory are not a multiple of 2 MiB")));
    }
    if !(RAM_MIN..=RAM_MAX).contains(&memory) {
        return Err(VmmError::Refused(format!(
            "{memory} bytes of memory: the machine takes {RAM_MIN} to {RAM_MAX}"
        )));
    }
    let quarter = memory / 4 / LARGE_PAGE * LARGE_PAGE;
    let wanted_high = if memory < RAM_SPLIT_FROM { 0 } else { quarter };
    let low = (memory - wanted_high).min(RAM_LOW_END);
    let mut regions = vec![RamSpec { gpa: Gpa(0), len: low }];
    if low < memory {
        regions.push(RamSpec { gpa: Gpa(RAM_HIGH_BASE), len: memory - low });
    }
    Ok(regions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_memory_is_placed_outside_the_hole() {
        for mib in [16, 32, 64, 66, 512, 1024, 3072, 4096, 5000, 128 << 10] {
            let regions = ram_regions(mib << 20).unwrap();
            assert_eq!(regions.iter().map(|region| region.len).sum::<u64>(), mib << 20);
            for region in &regions {
                let end = region.gpa.0 + region.len;
                assert!(end <= RAM_LOW_END || (region.gpa.0 >= RAM_HIGH_BASE && end <= MMIO64_BASE));
                assert!(region.len.is_multiple_of(LARGE_PAGE) && region.len > 0);
            }
            assert_eq!(regions.len(), if mib < 64 { 1 } else { 2 }, "{mib} MiB");
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for bytes in [0, 1, 4096, RAM_MIN - LARGE_PAGE, RAM_MIN + 4096, RAM_MAX + LARGE_PAGE, u64::MAX] {
            assert!(ram_regions(bytes).is_err(), "{bytes}");
        }
    }
}
