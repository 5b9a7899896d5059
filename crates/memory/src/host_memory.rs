//! Guest RAM and mappings as memory that a device is let reach through an IOMMU.

use std::sync::Arc;

use vfio_migration_types::RamOffset;
use vfio_migration_uapi::HostMemory;

use crate::error::MemoryError;
use crate::mapping::Mapping;
use crate::ram::GuestRam;

impl GuestRam {
    /// `len` bytes of guest RAM, contiguous in one region, to be mapped for DMA. RAM stays mapped in this process as
    /// long as the answer, or whoever was given it, lives; and no page of the region is given back to the host any more,
    /// since an IOMMU has it pinned.
    ///
    /// # Errors
    /// The range is empty or not inside one region.
    pub fn host_memory(self: &Arc<Self>, offset: RamOffset, len: u64) -> Result<HostMemory, MemoryError> {
        let outside = MemoryError::OutOfBounds { offset: offset.0, len, size: self.size() };
        let (region, into) = self.within_region(offset, len).filter(|_| len > 0).ok_or(outside)?;
        region.keep_pages();
        let address = region.area.pointer(into, len)?;
        let address = address.as_ptr().expose_provenance() as u64;
        // SAFETY: the range is mapped as long as `self` lives, which the answer holds; guest RAM may be written by
        // anybody at any time, so that no reference to it is ever made (see the crate's documentation).
        Ok(unsafe { HostMemory::new(address, len, self.clone()) })
    }
}

impl Mapping {
    /// All of it, to be mapped for DMA. It stays mapped in this process as long as the answer, or whoever was given it,
    /// lives.
    pub fn host_memory(self: &Arc<Self>) -> HostMemory {
        let address = self.host_address().as_ptr().expose_provenance() as u64;
        // SAFETY: as for guest RAM: mapped as long as `self` lives, and never referred to.
        unsafe { HostMemory::new(address, self.len(), self.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use vfio_migration_types::Gpa;

    use super::*;
    use crate::owned::RamSpec;

    #[test]
    fn ram_outlives_its_owner_while_a_device_may_reach_it() {
        let spec = RamSpec { gpa: Gpa(0), len: 0x4000 };
        let ram = Arc::new(GuestRam::new("test", &[spec]).unwrap());
        let memory = ram.host_memory(RamOffset(0x1000), 0x2000).unwrap();
        assert_eq!(memory.len(), 0x2000);
        assert_eq!(Arc::strong_count(&ram), 2);
        drop(memory);
        assert_eq!(Arc::strong_count(&ram), 1);
        for (offset, len) in [(0x4000, 0x1000), (0x3000, 0x2000), (0, 0), (u64::MAX, 2)] {
            assert!(ram.host_memory(RamOffset(offset), len).is_err(), "{offset:#x}+{len:#x}");
        }
    }
}
