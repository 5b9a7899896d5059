//! The regions of a kernel device, as the kernel describes them.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;
use vfio_migration_types::{DeviceId, Range};
use vfio_migration_uapi::{self as uapi, Region};

use super::error::KernelError;
use crate::error::DeviceError;
use crate::hardware::{PciRegion, RegionIndex};

/// A region, with where it is in the device's file.
#[derive(Debug)]
pub(super) struct Regions {
    pub(super) infos: Vec<PciRegion>,
    pub(super) offsets: Vec<u64>,
}

/// All regions that the device has, of `count` that it may have.
pub(super) fn find_regions(
    id: &DeviceId,
    device: BorrowedFd<'_>,
    count: u32,
) -> Result<Regions, DeviceError> {
    let mut regions = Regions { infos: Vec::new(), offsets: Vec::new() };
    for index in 0..count {
        let doing = || format!("asking for region {index}");
        let region = match uapi::region_info(device, index) {
            Ok(region) => region,
            // Some drivers say so of a region that is merely absent (vfio_pci_core.c: VGA of a device without).
            Err(error) if error.errno() == Some(Errno::INVAL) => continue,
            Err(error) => return Err(DeviceError::new(id.clone(), doing(), error.errno(), error)),
        };
        if region.size == 0 {
            continue;
        }
        regions.offsets.push(region.offset);
        regions.infos.push(PciRegion {
            index: RegionIndex(index),
            size: region.size,
            readable: region.readable,
            writable: region.writable,
            mappable: mappable(region).map_err(|error| DeviceError::new(id.clone(), doing(), None, error))?,
        });
    }
    Ok(regions)
}

/// The parts of a region that may be mapped.
fn mappable(region: Region) -> Result<Vec<Range<u64>>, KernelError> {
    if !region.mappable {
        return Ok(Vec::new());
    }
    let Some(areas) = region.sparse else {
        return Ok(Range::new(0, region.size).into_iter().collect());
    };
    let mut parts: Vec<Range<u64>> = Vec::new();
    for area in areas {
        if area.end() > region.size || parts.iter().any(|part| part.overlaps(&area)) {
            return Err(KernelError::Region { start: area.start(), len: area.len(), size: region.size });
        }
        parts.push(area);
    }
    Ok(parts)
}
