//! Dirty logs that leave pages out.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use vfio_migration_memory::{Coverage, DirtySource, MemoryError};
use vfio_migration_types::{Bitmap, PAGE_SIZE, RamOffset};

/// The pages that a report leaves out.
#[derive(Clone, Debug)]
pub(super) enum HiddenPages {
    All,
    Within(Range<RamOffset>),
}

impl HiddenPages {
    /// ORs into `into` what `report` finds, less what is hidden. Every report loses it: a page hidden once and seen the next
    /// time would arrive whole.
    pub(super) fn report(
        &self,
        into: &mut Bitmap,
        report: impl FnOnce(&mut Bitmap) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut found = Bitmap::new(into.len() * into.granule().bytes(), into.granule());
        report(&mut found)?;
        let Self::Within(stretch) = self else { return Ok(()) };
        let per_bit = into.granule().bytes() / PAGE_SIZE;
        let hidden: Vec<u64> = found
            .runs()
            .flat_map(|run| run.first..run.first + run.count)
            .filter(|bit| stretch.contains(&RamOffset(bit * per_bit * PAGE_SIZE)))
            .collect();
        for bit in hidden {
            found.clear(bit);
        }
        into.or(&found);
        Ok(())
    }
}

/// A dirty source that hides pages.
pub(super) struct HidingSource {
    pub(super) source: Arc<dyn DirtySource>,
    pub(super) hidden: HiddenPages,
}

impl fmt::Debug for HidingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HidingSource").field("source", &self.source).finish_non_exhaustive()
    }
}

impl DirtySource for HidingSource {
    fn name(&self) -> String {
        self.source.name()
    }

    fn coverage(&self) -> Coverage {
        self.source.coverage()
    }

    fn start(&self) -> Result<(), MemoryError> {
        self.source.start()
    }

    fn report(&self, into: &mut Bitmap) -> Result<(), MemoryError> {
        self.hidden.report(into, |found| self.source.report(found))
    }

    fn covers(&self, offset: RamOffset) -> bool {
        self.source.covers(offset)
    }

    fn stop(&self) -> Result<(), MemoryError> {
        self.source.stop()
    }
}
