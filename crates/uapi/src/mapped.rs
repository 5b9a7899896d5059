//! What an address space of the IOMMU has mapped, so that the memory behind it outlives the mapping.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vfio_migration_types::{Iova, Range};

use crate::error::UapiError;
use crate::host_memory::HostMemory;

/// Mapped ranges, by their first address.
#[derive(Debug, Default)]
pub(crate) struct Mapped {
    ranges: Mutex<BTreeMap<u64, (u64, HostMemory)>>,
}

impl Mapped {
    /// Maps `memory` at `iova` by `map`, and keeps it.
    pub(crate) fn add(
        &self,
        iova: Range<Iova>,
        memory: &HostMemory,
        map: impl FnOnce() -> Result<(), UapiError>,
    ) -> Result<(), UapiError> {
        if memory.len() != iova.len() {
            return Err(UapiError::WrongLength { memory: memory.len(), range: iova.len() });
        }
        let mut ranges = self.lock();
        let before = ranges.range(..iova.end()).next_back();
        if before.is_some_and(|(start, (len, _))| start + len > iova.start().0) {
            return Err(UapiError::Overlaps { iova: iova.start().0, len: iova.len() });
        }
        map()?;
        ranges.insert(iova.start().0, (iova.len(), memory.clone()));
        Ok(())
    }

    /// Unmaps exactly a range that was added, by `unmap`, and lets go of its memory: only if that succeeded.
    pub(crate) fn remove(
        &self,
        iova: Range<Iova>,
        unmap: impl FnOnce() -> Result<(), UapiError>,
    ) -> Result<(), UapiError> {
        let mut ranges = self.lock();
        if ranges.get(&iova.start().0).is_none_or(|(len, _)| *len != iova.len()) {
            return Err(UapiError::NotMapped { iova: iova.start().0, len: iova.len() });
        }
        unmap()?;
        ranges.remove(&iova.start().0);
        Ok(())
    }

    /// All ranges, in order.
    pub(crate) fn ranges(&self) -> Vec<Range<Iova>> {
        self.lock().iter().filter_map(|(start, (len, _))| Range::new(Iova(*start), *len).ok()).collect()
    }

    /// Forgets the memory for good without freeing it: a device may still reach it.
    pub(crate) fn leak(&self) {
        std::mem::forget(std::mem::take(&mut *self.lock()));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, (u64, HostMemory)>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustix::io::Errno;

    use super::*;

    fn memory(len: u64) -> (HostMemory, Arc<()>) {
        let owner = Arc::new(());
        // SAFETY: nothing is ever done with the address.
        (unsafe { HostMemory::new(0x1000, len, owner.clone()) }, owner)
    }

    fn range(start: u64, len: u64) -> Range<Iova> {
        Range::new(Iova(start), len).unwrap()
    }

    const REFUSED: UapiError = UapiError::System { doing: "testing", source: Errno::NOMEM };

    #[test]
    fn memory_lives_as_long_as_it_is_mapped() {
        let mapped = Mapped::default();
        let (held, owner) = memory(0x2000);
        mapped.add(range(0x4000, 0x2000), &held, || Ok(())).unwrap();
        drop(held);
        assert_eq!(Arc::strong_count(&owner), 2);
        // What could not be unmapped is kept.
        assert!(mapped.remove(range(0x4000, 0x2000), || Err(REFUSED)).is_err());
        assert_eq!(Arc::strong_count(&owner), 2);
        assert!(matches!(mapped.remove(range(0x4000, 0x1000), || Ok(())), Err(UapiError::NotMapped { .. })));
        mapped.remove(range(0x4000, 0x2000), || Ok(())).unwrap();
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn what_was_not_mapped_is_not_kept() {
        let mapped = Mapped::default();
        let (held, owner) = memory(0x1000);
        assert!(mapped.add(range(0, 0x1000), &held, || Err(REFUSED)).is_err());
        assert!(matches!(mapped.add(range(0, 0x2000), &held, || Ok(())), Err(UapiError::WrongLength { .. })));
        drop(held);
        assert_eq!((Arc::strong_count(&owner), mapped.ranges().len()), (1, 0));
    }

    #[test]
    fn overlaps_are_refused_before_the_kernel_is_asked() {
        let mapped = Mapped::default();
        let (held, _owner) = memory(0x2000);
        mapped.add(range(0x4000, 0x2000), &held, || Ok(())).unwrap();
        for start in [0x3000, 0x4000, 0x5000] {
            let refused = mapped.add(range(start, 0x2000), &held, || panic!("asked"));
            assert!(matches!(refused, Err(UapiError::Overlaps { .. })), "{start:#x}");
        }
        mapped.add(range(0x2000, 0x2000), &held, || Ok(())).unwrap();
        mapped.add(range(0x6000, 0x2000), &held, || Ok(())).unwrap();
        assert_eq!(mapped.ranges().len(), 3);
    }
}
