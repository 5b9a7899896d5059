//! The DMA mappings of a device that the VMM runs itself, as the VMM tells of them: which addresses reach which guest RAM.

use std::fmt;

use vfio_migration_memory::GuestRam;
use vfio_migration_types::{Iova, PAGE_SIZE, RamOffset, Range};

use crate::hardware::DmaAccess;

/// One DMA mapping of guest RAM. What is no guest RAM, such as another device's BAR, is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DmaRange {
    /// The bus addresses: of whole pages of 4 KiB, as they were mapped.
    pub iova: Range<Iova>,
    /// Offset in guest RAM of what is at the first of them. The range ends in the RAM region that it begins in.
    pub ram: RamOffset,
    /// The device's rights.
    pub access: DmaAccess,
    /// Of a vfio-user device: its server was given no descriptor, and asks for each access (DMA_READ, DMA_WRITE). The VMM,
    /// who serves that, logs what it writes in a [`DirtySource`](vfio_migration_memory::DirtySource) of its own.
    pub by_message: bool,
}

impl DmaRange {
    /// A mapping for reading and writing.
    pub const fn new(iova: Range<Iova>, ram: RamOffset) -> Self {
        Self { iova, ram, access: DmaAccess::BOTH, by_message: false }
    }

    /// The same with other rights.
    #[must_use]
    pub const fn with_access(self, access: DmaAccess) -> Self {
        Self { access, ..self }
    }

    /// The same, served by messages.
    #[must_use]
    pub const fn served_by_message(self) -> Self {
        Self { by_message: true, ..self }
    }
}

impl fmt::Display for DmaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x} (RAM offset {})", self.iova.start(), self.iova.len(), self.ram)
    }
}

/// All DMA mappings of guest RAM that a device has. Ranges that are left out are ranges that the device cannot write: its
/// writes there would be lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DmaView {
    ranges: Vec<DmaRange>,
}

impl DmaView {
    /// A view of these ranges, in any order.
    pub fn new(ranges: impl IntoIterator<Item = DmaRange>) -> Self {
        Self { ranges: ranges.into_iter().collect() }
    }

    /// All of RAM at its guest physical addresses, as VMMs map it that have no vIOMMU.
    pub fn identity(ram: &GuestRam) -> Self {
        let regions = ram.regions().iter();
        Self::new(regions.filter_map(|region| {
            Some(DmaRange::new(Range::new(Iova(region.gpa.0), region.len).ok()?, region.offset))
        }))
    }

    /// The ranges, as they were given.
    pub fn ranges(&self) -> &[DmaRange] {
        &self.ranges
    }

    /// Makes sure that the ranges can be: each of RAM that is there, and no address in two.
    pub(crate) fn check(&self, ram: &GuestRam, messages: bool) -> Result<(), DmaViewError> {
        self.ranges.iter().try_for_each(|range| range.check(ram, messages))?;
        let mut sorted: Vec<&DmaRange> = self.ranges.iter().collect();
        sorted.sort_by_key(|range| range.iova.start());
        // Sorted, ranges that overlap are neighbours.
        match sorted.windows(2).find(|pair| pair[0].iova.overlaps(&pair[1].iova)) {
            Some(pair) => Err(DmaViewError::Overlap { range: *pair[1], other: *pair[0] }),
            None => Ok(()),
        }
    }
}

impl DmaRange {
    /// `messages`: the device is one that may be served by messages.
    pub(crate) fn check(&self, ram: &GuestRam, messages: bool) -> Result<(), DmaViewError> {
        let (len, offset) = (self.iova.len(), self.ram.0);
        if self.by_message && !messages {
            return Err(DmaViewError::ByMessage(*self));
        }
        if !(self.iova.start().0 | len | offset).is_multiple_of(PAGE_SIZE) {
            return Err(DmaViewError::Misaligned(*self));
        }
        let end = offset.checked_add(len).filter(|end| *end <= ram.size());
        let end = end.ok_or(DmaViewError::NotRam { range: *self, size: ram.size() })?;
        let inside = ram.regions().iter().any(|region| {
            let region_end = region.offset.0 + region.len;
            (region.offset.0..region_end).contains(&offset) && end <= region_end
        });
        if inside { Ok(()) } else { Err(DmaViewError::SeveralRegions(*self)) }
    }
}

/// The fault of a DMA mapping that a VMM told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DmaViewError {
    /// The range is not of whole pages.
    #[error("the DMA range {0} is not of whole pages of 4 KiB")]
    Misaligned(DmaRange),
    /// The range reaches RAM that is not there.
    #[error("the DMA range {range} reaches beyond guest RAM, which has {size:#x} bytes")]
    NotRam {
        /// The range.
        range: DmaRange,
        /// Bytes of guest RAM.
        size: u64,
    },
    /// The range lies in several regions of RAM, which are no neighbours in memory, nor to the guest.
    #[error("the DMA range {0} goes on into another RAM region; give the part in each as a range of its own")]
    SeveralRegions(DmaRange),
    /// Two ranges share addresses.
    #[error("the DMA range {range} overlaps the DMA range {other}")]
    Overlap {
        /// The range.
        range: DmaRange,
        /// The other one.
        other: DmaRange,
    },
    /// A kernel device's accesses are no messages.
    #[error("the DMA range {0} is served by messages, which a kernel device does not send")]
    ByMessage(DmaRange),
    /// No such range is mapped, as far as the VMM has told.
    #[error("no DMA range {0}+{1:#x} is known; it is unmapped as it was mapped")]
    Unknown(Iova, u64),
    /// The device does not map memory for itself.
    #[error(
        "the VMM maps memory for this device, which it runs itself, and tells of that by dma_mapped and dma_unmapped"
    )]
    MappedByVmm,
    /// The device maps memory for itself.
    #[error("memory is mapped for this device by dma_map and dma_unmap")]
    MappedByDevice,
}

#[cfg(test)]
mod tests {
    use vfio_migration_memory::RamSpec;
    use vfio_migration_types::Gpa;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn ram() -> GuestRam {
        let specs = [RamSpec { gpa: Gpa(0), len: MIB }, RamSpec { gpa: Gpa(1 << 32), len: MIB }];
        GuestRam::new("view", &specs).unwrap()
    }

    fn range(iova: u64, len: u64, ram: u64) -> DmaRange {
        DmaRange::new(Range::new(Iova(iova), len).unwrap(), RamOffset(ram))
    }

    #[test]
    fn what_can_be_is_taken_whatever_its_order() {
        let ram = ram();
        DmaView::identity(&ram).check(&ram, false).unwrap();
        assert_eq!(DmaView::identity(&ram).ranges(), [range(0, MIB, 0), range(1 << 32, MIB, MIB)]);
        DmaView::default().check(&ram, false).unwrap();
        // Neighbours, and one piece of RAM at two places.
        let view = [range(2 * MIB, MIB, MIB), range(MIB, MIB, 0), range(0, 4096, 0)];
        DmaView::new(view).check(&ram, false).unwrap();
        DmaView::new([range(0, MIB, 0).served_by_message()]).check(&ram, true).unwrap();
    }

    #[test]
    fn what_cannot_be_is_refused_by_range() {
        let ram = ram();
        let refused = |view: &[DmaRange]| DmaView::new(view.iter().copied()).check(&ram, false).unwrap_err();
        for odd in [range(0x800, 4096, 0), range(0, 4097, 0), range(0, 4096, 0x10)] {
            assert_eq!(refused(&[odd]), DmaViewError::Misaligned(odd));
        }
        for (iova, len, offset) in
            [(0, 4096, 2 * MIB), (0, 2 * MIB, MIB), (0, 4096, 1 << 62), (0, 1 << 62, (1 << 63) + (1 << 62))]
        {
            let beyond = range(iova, len, offset);
            assert_eq!(refused(&[beyond]), DmaViewError::NotRam { range: beyond, size: 2 * MIB });
        }
        let both = range(0, 2 * MIB, 0);
        assert_eq!(refused(&[both]), DmaViewError::SeveralRegions(both));
        let (low, high) = (range(0, MIB, 0), range(MIB - 4096, MIB, MIB));
        assert_eq!(refused(&[high, low]), DmaViewError::Overlap { range: high, other: low });
        // A range within another, and one before both.
        let inner = range(8192, 4096, MIB);
        let found = refused(&[range(16 * MIB, 4096, 0), inner, low]);
        assert_eq!(found, DmaViewError::Overlap { range: inner, other: low });
        assert!(found.to_string().contains("0x2000+0x1000 (RAM offset 0x100000) overlaps"), "{found}");
        let message = low.served_by_message();
        assert_eq!(refused(&[message]), DmaViewError::ByMessage(message));
    }
}
