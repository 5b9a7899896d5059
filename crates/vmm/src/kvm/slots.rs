//! Memory slots, as KVM was told of them.

use std::collections::BTreeMap;

use vfio_migration_types::{Gpa, RamOffset};

/// Names a slot until it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub(super) u32);

/// The slots in use.
#[derive(Debug)]
pub(super) struct Slots {
    limit: u32,
    pub(super) used: BTreeMap<u32, Slot>,
    pub(super) logging: bool,
}

/// A slot, as KVM was told of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) gpa: Gpa,
    pub(super) host: u64,
    pub(super) len: u64,
    /// Offset in RAM; `None` for a slot that is not RAM.
    pub(super) ram: Option<RamOffset>,
    pub(super) flags: u32,
}

/// A slot of RAM, for the dirty log.
#[derive(Clone, Copy, Debug)]
pub(super) struct RamSlot {
    pub(super) id: u32,
    pub(super) offset: RamOffset,
    pub(super) len: u64,
}

impl Slots {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: u32::try_from(limit).unwrap_or(u32::MAX), used: BTreeMap::new(), logging: false }
    }

    pub(super) fn free_id(&self) -> Option<u32> {
        (0..self.limit).find(|id| !self.used.contains_key(id))
    }
}
