//! Memory of this process that a device is let reach.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

/// A stretch of this process's memory that stays mapped, at the same address, for as long as this value or a clone of
/// it lives. Whoever lets a device reach it keeps one.
#[derive(Clone)]
pub struct HostMemory {
    address: u64,
    len: u64,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl HostMemory {
    /// `len` bytes at `address`, which `owner` keeps mapped.
    ///
    /// # Safety
    /// The bytes stay mapped as long as `owner` lives, and it is sound for others to read and write them at any time:
    /// no reference to them is ever made.
    pub unsafe fn new(address: u64, len: u64, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { address, len, _owner: owner }
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u64 {
        self.len
    }
}

impl fmt::Debug for HostMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMemory({:#x}+{:#x})", self.address, self.len)
    }
}

/// Rights of a device to memory that it is let reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dma {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl Dma {
    /// Reading and writing.
    pub const BOTH: Self = Self { read: true, write: true };
}
