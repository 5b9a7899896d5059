//! The program in RAM, and a processor in front of it: 64-bit mode, paging on, nothing else to do for the program.

use crate::error::GuestImageError;
use crate::image::image;
use crate::map::{
    BOOT_INFO, GDT, MMIO64_BASE, MMIO64_LEN, PAGE_TABLES, PAGE_TABLES_END, PROGRAM, PROGRAM_LIMIT,
    RAM_HIGH_BASE, RAM_LOW_END, RamPart, STACK_END,
};
use crate::report::BootInfo;

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

/// What the first processor has to hold where it is not as after a reset. The others wait for INIT and SIPI for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The instruction pointer.
    pub rip: u64,
    /// The stack pointer.
    pub rsp: u64,
    /// The flags.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The MSR EFER.
    pub efer: u64,
    /// Base of the global descriptor table.
    pub gdt_base: u64,
    /// Limit of the global descriptor table.
    pub gdt_limit: u16,
    /// CS: 64-bit code of ring 0 with base 0 and no limit.
    pub code_selector: u16,
    /// DS, ES, FS, GS and SS: writable data of ring 0 with base 0 and no limit.
    pub data_selector: u16,
}

/// Where the program begins.
pub const ENTRY: Entry = Entry {
    rip: PROGRAM,
    rsp: STACK_END,
    rflags: 2,
    cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG,
    cr3: PAGE_TABLES,
    cr4: CR4_PAE,
    efer: EFER_LME | EFER_LMA,
    gdt_base: GDT,
    gdt_limit: 8 * 3 - 1,
    code_selector: CODE,
    data_selector: DATA,
};

/// What is to be written to fresh guest RAM before the program begins: bytes, each by its guest physical address.
///
/// # Errors
/// The RAM is too large for the program's page tables, or `info` makes no sense.
pub fn contents(ram: &[RamPart], info: &BootInfo) -> Result<Vec<(u64, Vec<u8>)>, GuestImageError> {
    let program = image();
    if program.len() as u64 > PROGRAM_LIMIT {
        return Err(GuestImageError::ProgramTooLong(program.len()));
    }
    let mut contents =
        vec![(PROGRAM, program.to_vec()), (GDT, words(&DESCRIPTORS)), (BOOT_INFO, info.to_bytes()?)];
    add_page_tables(ram, &mut contents)?;
    Ok(contents)
}

/// Identity mapping with 2 MiB pages of the first 4 GiB, the RAM above, and the window of
/// 64-bit BARs as far as those of the devices that it drives lie in it.
fn add_page_tables(ram: &[RamPart], contents: &mut Vec<(u64, Vec<u8>)>) -> Result<(), GuestImageError> {
    let ram_end = ram.iter().map(|part| part.gpa + part.len).max().unwrap_or(0);
    let low = 0..ram_end.max(RAM_HIGH_BASE).div_ceil(GIB);
    let window = MMIO64_BASE / GIB..(MMIO64_BASE + MMIO64_LEN).div_ceil(GIB);
    let directory_pointers = PAGE_TABLES + PAGE;
    let mut table = PAGE_TABLES + 2 * PAGE;
    contents.push((PAGE_TABLES, words(&[directory_pointers | PTE_PRESENT_WRITABLE])));
    for gib in low.chain(window) {
        if table >= PAGE_TABLES_END {
            return Err(GuestImageError::TooMuchMemory);
        }
        let entries: Vec<u64> = (0..512)
            .map(|index| {
                let address = gib * GIB + index * LARGE_PAGE;
                let hole = (RAM_LOW_END..RAM_HIGH_BASE).contains(&address);
                let uncached = if hole || address >= MMIO64_BASE { PTE_UNCACHED } else { 0 };
                address | PTE_PRESENT_WRITABLE | PTE_LARGE | uncached
            })
            .collect();
        contents.push((table, words(&entries)));
        contents.push((directory_pointers + gib * 8, words(&[table | PTE_PRESENT_WRITABLE])));
        table += PAGE;
    }
    Ok(())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
