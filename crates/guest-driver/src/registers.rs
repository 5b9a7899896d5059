//! The registers of the sample device: page 0 of BAR0, and the doorbell.

/// Number of vectors, and of flows: flow `n` raises vector `n`.
pub const VECTORS: usize = 2;

/// Offsets of the registers in BAR0.
pub mod offset {
    /// u32, read-only: [`MAGIC`](super::MAGIC).
    pub const MAGIC: u64 = 0x00;
    /// u32, read-only: major version in the high half, minor in the low.
    pub const VERSION: u64 = 0x04;
    /// u32: bit 0 enables the DMA engine.
    pub const CONTROL: u64 = 0x08;
    /// u32, read-only: bit 0 enabled, bit 1 ring error, bit 2 integrity error.
    pub const STATUS: u64 = 0x0c;
    /// u64: IOVA of the descriptor ring.
    pub const RING_BASE: u64 = 0x10;
    /// u32: entries of the ring, a power of two from 2 to 4096.
    pub const RING_SIZE: u64 = 0x18;
    /// u64: IOVA of the free-running count of posted descriptors.
    pub const TAIL_ADDR: u64 = 0x20;
    /// u64: IOVA of two free-running counts of completed blocks, one per flow.
    pub const DONE_ADDR: u64 = 0x28;
    /// u64: count of blocks of flow 0 that the driver has handled.
    pub const ACK0: u64 = 0x30;
    /// u64: the same for flow 1.
    pub const ACK1: u64 = 0x38;
    /// u64, read-only: bytes of bulk internal state.
    pub const STATE_SIZE: u64 = 0x40;
    /// u64, read-only: completed blocks of flow 0.
    pub const BLOCKS0: u64 = 0x48;
    /// u64, read-only: the same for flow 1.
    pub const BLOCKS1: u64 = 0x50;
    /// u32: writing 1 makes the device declare its initial pre-copy data anew.
    pub const REINIT: u64 = 0x58;
    /// u64, read-only: free-running count of consumed descriptors of both flows.
    pub const HEAD: u64 = 0x60;
    /// The doorbell: any write.
    pub const DOORBELL: u64 = 0x1000;
}

/// Value of [`offset::MAGIC`]: "SMPL".
pub const MAGIC: u32 = 0x4c50_4d53;
/// [`offset::CONTROL`] and [`offset::STATUS`]: the DMA engine is enabled.
pub const ENABLE: u32 = 1 << 0;
/// [`offset::STATUS`]: a descriptor was malformed or its memory not mapped; enabling again clears it.
pub const RING_ERROR: u32 = 1 << 1;
/// [`offset::STATUS`]: damage was found in the internal state.
pub const INTEGRITY_ERROR: u32 = 1 << 2;
