//! Mapping memory and asking what is dirty, with a device that does no DMA.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{Gpa, Granule, Iova, RamOffset, Range};
use vfio_migration_uapi::{Dma, UapiError, hw_info, report_dma_logging, start_dma_logging, stop_dma_logging};

use super::one_port;
use crate::check::{Outcome, holds, same};

const LEN: u64 = 1 << 20;

fn ram() -> Outcome<Arc<GuestRam>> {
    Ok(Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: LEN }])?))
}

fn all() -> Outcome<Range<Iova>> {
    Ok(Range::new(Iova(0), LEN)?)
}

/// START succeeds whatever the kernel is; REPORT only where iommufd was built.
pub(crate) fn log() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let device = opened.device()?;
    let granule = start_dma_logging(device, Granule::PAGE, &[all()?])?;
    let mut bits = vec![0; 4];
    match report_dma_logging(device, all()?, granule, &mut bits) {
        Ok(()) => holds(bits.iter().all(|word| *word == 0), "nothing is dirty")?,
        Err(error) => same("errno", error.errno(), Some(Errno::OPNOTSUPP))?,
    }
    let cdev = Path::new("/dev/iommu").exists();
    same(
        "a report works with iommufd alone",
        report_dma_logging(device, all()?, granule, &mut bits).is_ok(),
        cdev,
    )?;
    Ok(stop_dma_logging(device)?)
}

pub(crate) fn type1() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    let container = opened.container()?;
    let info = container.info()?;
    let dirty = info.dirty_pages.ok_or("the container reports no dirty pages")?;
    holds(info.page_sizes & 4096 != 0 && dirty.page_sizes & 4096 != 0, "pages of 4096 bytes")?;
    holds(info.mappings_left.is_some(), "it says how many mappings are left")?;
    let (ram, granule) = (ram()?, Granule::PAGE);
    let memory = ram.host_memory(RamOffset(0), LEN)?;
    let mut bits = vec![0; 4];
    let refused = container.report_dirty(all()?, granule, &mut bits).err().and_then(|error| error.errno());
    same("a report before the start", refused, Some(Errno::INVAL))?;
    container.map(all()?, &memory, Dma::BOTH)?;
    drop(memory);
    holds(
        matches!(container.unmap(Range::new(Iova(0), 4096)?), Err(UapiError::NotMapped { .. })),
        "a part is refused",
    )?;
    container.start_dirty()?;
    container.start_dirty()?;
    container.report_dirty(all()?, granule, &mut bits)?;
    same(
        "an mdev that pins nothing makes nothing dirty",
        bits.iter().map(|word| word.count_ones()).sum(),
        0,
    )?;
    let part = container.report_dirty(Range::new(Iova(4096), 4096)?, granule, &mut bits);
    same("a report that bisects a mapping", part.err().and_then(|error| error.errno()), Some(Errno::INVAL))?;
    container.unmap(all()?)?;
    container.stop_dirty()?;
    same("mapped at the end", container.mapped().len(), 0)?;
    same("who holds the RAM", Arc::strong_count(&ram), 1)
}

pub(crate) fn iommufd() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open_cdev()?;
    let ram = ram()?;
    let memory = ram.host_memory(RamOffset(0), LEN)?;
    opened.space.map(all()?, &memory, Dma::BOTH)?;
    holds(
        matches!(opened.space.map(all()?, &memory, Dma::BOTH), Err(UapiError::Overlaps { .. })),
        "not twice",
    )?;
    // An emulated device has no IOMMU whose page tables could track anything.
    holds(hw_info(opened.space.fd(), opened.id).is_err(), "no hardware to ask")?;
    holds(opened.space.make_tracking_table(opened.id).is_err(), "no table that tracks")?;
    opened.space.unmap(all()?)?;
    drop(memory);
    same("who holds the RAM", Arc::strong_count(&ram), 1)?;
    vfio_migration_uapi::detach(opened.device.as_fd())?;
    Ok(())
}

/// What the refusal is on a kernel as Debian builds it.
pub(crate) fn no_iommufd() -> Outcome {
    let instance = one_port()?;
    let refused = instance.open_cdev().err().ok_or("a device was opened by a file that cannot be there")?;
    holds(
        refused.to_string().contains("No such file"),
        &format!("the reason is that there is no file: {refused}"),
    )
}
