//! The program that runs in the guest: bare metal, without an operating system, assembled from the `.s` files here when
//! this crate is built.
//!
//! It drives the sample devices, numbers pages at a set rate, and checks over and over that every page, every DMA block and
//! every interrupt is what it should be. The VMM tells it what to do through [`BootInfo`] and reads what it found
//! through [`Report`]. Where it finds the kernel's sample device mtty, a serial card whose only interrupt is its pin, it drives
//! that too: numbered bytes must come back in order, each burst announced by the pin. What it expects lives in guest RAM, so a move that loses a page of that is found as well.
//!
//! It runs at CPL 0 in 64-bit mode with a one-to-one mapping, idles by HLT, and uses no instruction beyond those of
//! the first x86-64 processors: it is correct on any KVM, and fast on one that emulates CPL 0.

mod boot;
pub mod map;
mod report;

pub use boot::load;
pub use map::Areas;
pub use report::{BOOT_MAGIC, BootInfo, GAP_WORD, REPORT_MAGIC, REQUEST_WORD, Report, Stage};

/// Vendor (low half) and device id of the sample device, which the program drives.
pub const SAMPLE_DEVICE: u32 = 0x4d53_5646;

// One image, in this order: `program.s` begins it, `start.s` ends it.
std::arch::global_asm!(
    include_str!("program.s"),
    include_str!("clock.s"),
    include_str!("pages.s"),
    include_str!("blocks.s"),
    include_str!("interrupts.s"),
    include_str!("serial.s"),
    include_str!("start.s"),
    options(raw)
);

/// The program as the assembler made it. It is entered at its first byte, wherever it lies.
pub fn image() -> &'static [u8] {
    unsafe extern "C" {
        static vfio_migrate_guest_start: u8;
        static vfio_migrate_guest_end: u8;
    }
    let start = &raw const vfio_migrate_guest_start;
    let end = &raw const vfio_migrate_guest_end;
    // SAFETY: both labels stand in one read-only section of this program, the second after the first, with only the
    // initialised bytes of the guest program between them.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

#[cfg(test)]
mod tests {
    use vfio_migration_types::DEVICES_MAX;

    #[test]
    fn the_assembler_source_takes_as_many_devices_as_a_machine() {
        let line = format!(".equ DEVICES_MAX, {DEVICES_MAX} ");
        assert!(include_str!("program.s").contains(&line));
    }
}
