//! Puts the program into RAM and a vCPU in front of it: 64-bit mode, paging on, nothing else to do for the program.

use kvm_bindings::{kvm_regs, kvm_segment};
use vfio_migration_memory::GuestRam;

use super::map::{GDT, PAGE_TABLES, PAGE_TABLES_END, PROGRAM, PROGRAM_LIMIT, STACK_END};
use super::report::place;
use super::{BootInfo, image};
use crate::error::VmmError;
use crate::kvm::KvmVm;
use crate::layout;

const CR0_PE: u64 = 1 << 0;
const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PTE_PRESENT_WRITABLE: u64 = 0b11;
const PTE_UNCACHED: u64 = 1 << 4;
const PTE_LARGE: u64 = 1 << 7;

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;

/// Selectors of the table below.
const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
/// Null; 64-bit code; data, both of ring 0 and already marked accessed, so that nobody writes to the table.
const DESCRIPTORS: [u64; 3] = [0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF];

/// Loads the program with `info` into `vm`'s RAM and points the first vCPU at its entry. For a fresh machine only.
///
/// # Errors
/// The RAM is too small for the program, `info` makes no sense, or KVM refuses.
pub fn load(vm: &KvmVm, info: &BootInfo) -> Result<(), VmmError> {
    let ram = vm.ram();
    let program = image();
    if program.len() as u64 > PROGRAM_LIMIT {
        return Err(VmmError::Refused(format!("the guest program has {} bytes", program.len())));
    }
    ram.write(place(ram, PROGRAM, program.len())?, program)?;
    write_words(ram, GDT, &DESCRIPTORS)?;
    write_page_tables(ram)?;
    info.write(ram)?;
    vm.set_entry(&kvm_regs { rip: PROGRAM, rsp: STACK_END, rflags: 2, ..Default::default() }, |sregs| {
        let code = kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector: CODE,
            type_: 0xB,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: DATA, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 8 * 3 - 1;
        sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
        sregs.cr3 = PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    })
}

/// Identity mapping with 2 MiB pages of the first 4 GiB, the RAM above, and the window of
/// 64-bit BARs as far as those of the devices that it drives lie in it.
fn write_page_tables(ram: &GuestRam) -> Result<(), VmmError> {
    let ram_end = ram.regions().iter().map(|region| region.gpa.0 + region.len).max().unwrap_or(0);
    let low = 0..ram_end.max(layout::RAM_HIGH_BASE).div_ceil(GIB);
    let window = layout::MMIO64_BASE / GIB..(layout::MMIO64_BASE + layout::MMIO64_SMALL_LEN).div_ceil(GIB);
    let directory_pointers = PAGE_TABLES + PAGE;
    let mut table = PAGE_TABLES + 2 * PAGE;
    write_words(ram, PAGE_TABLES, &[directory_pointers | PTE_PRESENT_WRITABLE])?;
    for gib in low.chain(window) {
        if table >= PAGE_TABLES_END {
            return Err(VmmError::Refused("the guest's page tables do not reach all of its RAM".to_owned()));
        }
        let entries: Vec<u64> = (0..512)
            .map(|index| {
                let address = gib * GIB + index * LARGE_PAGE;
                let hole = (layout::MMIO32_BASE..layout::RAM_HIGH_BASE).contains(&address);
                let uncached = if hole || address >= layout::MMIO64_BASE { PTE_UNCACHED } else { 0 };
                address | PTE_PRESENT_WRITABLE | PTE_LARGE | uncached
            })
            .collect();
        write_words(ram, table, &entries)?;
        write_words(ram, directory_pointers + gib * 8, &[table | PTE_PRESENT_WRITABLE])?;
        table += PAGE;
    }
    Ok(())
}

fn write_words(ram: &GuestRam, gpa: u64, words: &[u64]) -> Result<(), VmmError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Ok(ram.write(place(ram, gpa, bytes.len())?, &bytes)?)
}
