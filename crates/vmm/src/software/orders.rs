//! What the program is ordered to do, and what it reports.

use crate::guest::map::Areas;

/// The orders in the boot page.
#[derive(Clone, Copy, Debug)]
pub(super) struct BootOrders {
    pub(super) pages_per_second: u64,
    pub(super) areas: Areas,
    pub(super) devices: u64,
    pub(super) block_len: u32,
    pub(super) in_flight: u64,
    pub(super) p2p: bool,
    pub(super) tick_us: u64,
}

/// Failure codes are those of the assembler source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProgramFailure {
    pub(super) code: u32,
    pub(super) detail: u64,
}

/// Words of the report page, by index.
pub(super) mod word {
    pub(in crate::software) const STAGE: u64 = 1;
    pub(in crate::software) const LOOPS: u64 = 2;
    pub(in crate::software) const PAGES_WRITTEN: u64 = 3;
    pub(in crate::software) const PAGES_CHECKED: u64 = 4;
    pub(in crate::software) const PAGES_LOST: u64 = 5;
    pub(in crate::software) const PAGE_PASSES: u64 = 6;
    pub(in crate::software) const DMA_BLOCKS: u64 = 7;
    pub(in crate::software) const BLOCKS_CHECKED: u64 = 8;
    pub(in crate::software) const BLOCKS_LOST: u64 = 9;
    pub(in crate::software) const BLOCK_PASSES: u64 = 10;
    pub(in crate::software) const INTERRUPTS: u64 = 11;
    pub(in crate::software) const INTERRUPTS_LOST: u64 = 12;
    pub(in crate::software) const SPURIOUS: u64 = 13;
    pub(in crate::software) const LAST_CLOCK: u64 = 15;
    pub(in crate::software) const FAILURE: u64 = 16;
    pub(in crate::software) const DETAIL: u64 = 17;
    pub(in crate::software) const TICKS: u64 = 18;
    pub(in crate::software) const P2P_BLOCKS: u64 = 19;
    pub(in crate::software) const INTEGRITY: u64 = 20;
    pub(in crate::software) const LEAST_POSTED: u64 = 26;
}
