//! The guest program in this machine's RAM.

use kvm_bindings::{kvm_regs, kvm_segment};
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Gpa, RamOffset};

use crate::error::VmmError;
use crate::kvm::KvmVm;

pub use vfio_migration_guest_image::{
    Areas, BOOT_MAGIC, BootInfo, GAP_WORD, GuestImageError, REPORT_MAGIC, REQUEST_WORD, RamPart, Report,
    Stage, map,
};
use vfio_migration_guest_image::{ENTRY, REPORT_LEN, REQUEST, contents};

/// Vendor (low half) and device id of the sample device, which the program drives.
pub use vfio_migration_guest_image::SAMPLE_DEVICE;

/// Loads the program with `info` into `vm`'s RAM and points the first vCPU at its entry. For a fresh machine only.
///
/// # Errors
/// The RAM is too small for the program, `info` makes no sense, or KVM refuses.
pub fn load(vm: &KvmVm, info: &BootInfo) -> Result<(), VmmError> {
    let ram = vm.ram();
    for (gpa, bytes) in contents(&parts(ram), info)? {
        ram.write(place(ram, gpa, bytes.len())?, &bytes)?;
    }
    let regs = kvm_regs { rip: ENTRY.rip, rsp: ENTRY.rsp, rflags: ENTRY.rflags, ..Default::default() };
    vm.set_entry(&regs, |sregs| {
        let code = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: ENTRY.code_selector,
            type_: 0xB,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: ENTRY.data_selector, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt.base = ENTRY.gdt_base;
        sregs.gdt.limit = ENTRY.gdt_limit;
        sregs.cr0 = ENTRY.cr0;
        sregs.cr3 = ENTRY.cr3;
        sregs.cr4 = ENTRY.cr4;
        sregs.efer = ENTRY.efer;
    })
}

/// The regions of `ram`, as the program knows them.
pub fn parts(ram: &GuestRam) -> Vec<RamPart> {
    ram.regions().iter().map(|region| RamPart { gpa: region.gpa.0, len: region.len }).collect()
}

/// Reads the program's report. The counts of a running guest need not be of one instant.
///
/// # Errors
/// The RAM cannot be read.
pub fn read_report(ram: &GuestRam) -> Result<Report, VmmError> {
    let mut bytes = [0; REPORT_LEN];
    ram.read(place(ram, map::REPORT, bytes.len())?, &mut bytes)?;
    Ok(Report::parse(&bytes))
}

/// Writes the boot page.
///
/// # Errors
/// A number is out of range, or the RAM cannot be written.
pub(crate) fn write_boot_page(ram: &GuestRam, info: &BootInfo) -> Result<(), VmmError> {
    let bytes = info.to_bytes()?;
    Ok(ram.write(place(ram, map::BOOT_INFO, bytes.len())?, &bytes)?)
}

/// Asks the program to forget the longest gap; it has when [`Report::request`] is `false` again. This write to guest RAM is the VMM's
/// own: returns where it went, for the VMM's write log.
///
/// # Errors
/// The RAM cannot be written.
pub fn ask_to_reset_gap(ram: &GuestRam) -> Result<RamOffset, VmmError> {
    let offset = place(ram, REQUEST, 8)?;
    ram.write_u64(offset, 1)?;
    Ok(offset)
}

/// The RAM offset of `len` bytes at `gpa`.
fn place(ram: &GuestRam, gpa: u64, len: usize) -> Result<RamOffset, VmmError> {
    ram.offset_of(Gpa(gpa), len as u64)
        .ok_or_else(|| VmmError::Refused(format!("the guest program needs RAM at {gpa:#x}")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_program_drives_as_many_devices_as_a_machine_has() {
        assert_eq!(super::map::DEVICES_MAX, u64::from(vfio_migration_types::DEVICES_MAX));
        assert_eq!(super::map::PAGE_SIZE, vfio_migration_types::PAGE_SIZE);
    }
}
