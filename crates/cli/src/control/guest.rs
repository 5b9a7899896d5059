//! The report page of the guest, as `query-guest` returns it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The guest's report page. Counters run from boot and move with the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct GuestInfo {
    /// 0 no guest yet, 1 booting, 2 driver ready, 3 running, anything else: failed.
    pub(crate) stage: u64,
    /// Turns of the guest's main loop.
    pub(crate) loops: u64,
    /// Pages that the guest wrote a pattern to.
    pub(crate) pages_written: u64,
    /// Times that the guest compared a page with what it wrote there last.
    pub(crate) pages_checked: u64,
    /// Pages that held something else than what was written there last.
    pub(crate) pages_lost: u64,
    /// Full walks over all pages ever written.
    pub(crate) page_passes: u64,
    /// Blocks that were asked of the device that was asked for fewest: it grows if all devices work.
    pub(crate) least_posted: u64,
    /// Blocks that devices wrote by DMA and the guest took.
    pub(crate) dma_blocks: u64,
    /// Of them, written by a device into another's BAR.
    pub(crate) p2p_blocks: u64,
    /// Block checks, new and old blocks.
    pub(crate) blocks_checked: u64,
    /// Checks of blocks that found one missing or altered.
    pub(crate) blocks_lost: u64,
    /// Full walks over all block slots.
    pub(crate) block_passes: u64,
    /// Interrupts that the guest's handlers took.
    pub(crate) interrupts: u64,
    /// Blocks whose interrupt never came.
    pub(crate) interrupts_lost: u64,
    /// Interrupts without a block.
    pub(crate) spurious: u64,
    /// Longest gap between two looks at the host's clock, in nanoseconds.
    pub(crate) longest_gap_ns: u64,
    /// Last look at the host's clock.
    pub(crate) last_clock_ns: u64,
    /// Damaged pages of device state that devices reported.
    pub(crate) integrity_failures: u64,
    /// Bytes that came back from the serial card (the kernel's mtty), where there is one.
    pub(crate) serial_bytes: u64,
    /// Of its bytes, wrong, missing, or too many.
    pub(crate) serial_bytes_lost: u64,
    /// Interrupts of its pin that announced bytes.
    pub(crate) serial_interrupts: u64,
    /// Seconds of running in which it had bytes to announce, and no interrupt came.
    pub(crate) serial_interrupts_lost: u64,
    /// Why it failed, if it did.
    pub(crate) failure: u64,
    /// Detail of the failure.
    pub(crate) failure_detail: u64,
}

/// Stage of a guest whose driver runs and whose checks go on.
pub(crate) const STAGE_RUNNING: u64 = 3;
