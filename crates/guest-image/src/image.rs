//! The program as the assembler made it.

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
    use crate::map::DEVICES_MAX;

    #[test]
    fn the_assembler_source_takes_as_many_devices() {
        let line = format!(".equ DEVICES_MAX, {DEVICES_MAX} ");
        assert!(include_str!("program.s").contains(&line));
    }
}
