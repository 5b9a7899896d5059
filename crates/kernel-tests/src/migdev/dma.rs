//! What the device is to a guest: configuration space, DMA with an exact log, interrupts, standing still.

use std::collections::BTreeSet;
use std::path::Path;

use rustix::io::Errno;
use vfio_migration_guest_driver::registers::offset;
use vfio_migration_types::{Granule, MigrationState};
use vfio_migration_uapi::{
    Type1, device_info, disable_irqs, irq_info, mask_irq, region_info, report_dma_logging, start_dma_logging,
    stop_dma_logging, trigger_irq,
};

use super::driver::{DONE, Handle, Job, LEN, MSIX, MigdevDriver, all};
use super::{go, set, small};
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;

pub(super) fn by_group(instance: &Instance) -> Outcome<MigdevDriver> {
    MigdevDriver::new(Handle::Group(instance.open()?))
}

pub(crate) fn describes_itself() -> Outcome {
    let instance = small()?;
    let driver = by_group(&instance)?;
    let device = driver.fd()?;
    let info = device_info(device)?;
    same("regions and interrupts", (info.regions, info.irqs), (9, 5))?;
    for (index, size) in [(0, 16 << 10), (1, 0), (2, 1 << 20), (7, 256)] {
        same(&format!("bytes of region {index}"), region_info(device, index)?.size, size)?;
    }
    same("vectors", irq_info(device, MSIX)?.count, 2)?;
    let mut config = [0; 256];
    driver.read(7, 0, &mut config)?;
    same("ids", &config[..4], &[0x46, 0x56, 0x53, 0x4d])?;
    same("MSI-X", &config[0x40..0x4c], &[0x11, 0x50, 1, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0])?;
    driver.write(7, 0x10, &[0xff; 4])?;
    driver.write(7, 0, &[0xff; 4])?;
    driver.read(7, 0, &mut config)?;
    same(
        "size of BAR0, and ids",
        (&config[0x10..0x14], &config[..2]),
        (&[0, 0xc0, 0xff, 0xff], &[0x46, 0x56]),
    )?;
    same("magic", driver.read32(0)?, 0x4c50_4d53)
}

pub(crate) fn exact() -> Outcome {
    let instance = small()?;
    writes_and_logs(by_group(&instance)?)
}

pub(crate) fn exact_by_cdev() -> Outcome {
    let instance = small()?;
    writes_and_logs(MigdevDriver::new(Handle::Cdev(instance.open_cdev()?))?)
}

/// Blocks land where they should, nothing else changes, and the log has just those pages.
fn writes_and_logs(mut driver: MigdevDriver) -> Outcome {
    let granule = start_dma_logging(driver.fd()?, Granule::PAGE, &[all()?])?;
    let again = start_dma_logging(driver.fd()?, Granule::PAGE, &[all()?]);
    same("a second START", again.err().and_then(|error| error.errno()), Some(Errno::INVAL))?;
    driver.enable()?;
    let jobs = [(0x4_0000, 128), (0x4_2fc0, 4096), (0x5_0000, 65536), (0x4_1000, 4096), (0x6_ff80, 128)]
        .map(|(at, len)| Job { at, len, flags: 0 });
    let mut wanted = BTreeSet::from([DONE / 4096]);
    let blocks: Vec<_> =
        (0..).zip(jobs).map(|(n, job)| Ok((job.at, driver.block(job, n + 1, n)?))).collect::<Outcome<_>>()?;
    for job in jobs {
        driver.post(job)?;
        wanted.extend(job.at / 4096..=(job.at + u64::from(job.len) - 1) / 4096);
    }
    // The descriptors are ours; what the device adds is its blocks and its count.
    let mut memory = driver.memory()?;
    driver.wait(0, 5)?;
    for (at, block) in blocks {
        let at = usize::try_from(at)?;
        memory[at..at + block.len()].copy_from_slice(&block);
    }
    let done = usize::try_from(DONE)?;
    memory[done..done + 8].copy_from_slice(&5u64.to_le_bytes());
    let found = driver.memory()?;
    let differs = memory.iter().zip(&found).position(|(wanted, found)| wanted != found);
    same("first byte that differs", differs, None)?;
    // Stopped, so that the count of the last block is certainly logged.
    driver.write32(offset::CONTROL, 0)?;
    match report(&driver, granule)? {
        Some(pages) => {
            same("dirty pages", pages, wanted)?;
            same("dirty pages, asked again", report(&driver, granule)?, Some(BTreeSet::new()))?;
        }
        None => holds(!Path::new("/dev/iommu").exists(), "a report fails only without iommufd")?,
    }
    stop_dma_logging(driver.fd()?)?;
    stop_dma_logging(driver.fd()?)?;
    let mut bits = [0; 4];
    holds(report_dma_logging(driver.fd()?, all()?, granule, &mut bits).is_err(), "no report after STOP")
}

/// The bits of a type1 container, which sets those of what a mediated device writes through it: the same pages as the device's
/// own log has, and none of what was only read.
pub(crate) fn exact_by_container() -> Outcome {
    let instance = small()?;
    let mut driver = by_group(&instance)?;
    container(&driver)?.start_dirty()?;
    same("dirty pages before there is DMA", container_report(&driver)?, BTreeSet::new())?;
    driver.enable()?;
    let mut wanted = BTreeSet::from([DONE / 4096]);
    for (at, len) in [(0x4_0000, 128), (0x4_2fc0, 4096), (0x5_0000, 65536), (0x6_ff80, 128)] {
        driver.post(Job { at, len, flags: 0 })?;
        wanted.extend(at / 4096..=(at + u64::from(len) - 1) / 4096);
    }
    driver.wait(0, 4)?;
    driver.write32(offset::CONTROL, 0)?;
    same("dirty pages", container_report(&driver)?, wanted)?;
    same("dirty pages, asked again", container_report(&driver)?, BTreeSet::new())?;
    Ok(container(&driver)?.stop_dirty()?)
}

fn container(driver: &MigdevDriver) -> Outcome<&Type1> {
    match &driver.handle {
        Handle::Group(opened) => opened.container(),
        Handle::Cdev(_) => Err("a device of its own file has no container".into()),
    }
}

fn container_report(driver: &MigdevDriver) -> Outcome<BTreeSet<u64>> {
    let mut bits = vec![0; usize::try_from(LEN / 4096 / 64)?];
    container(driver)?.report_dirty(all()?, Granule::PAGE, &mut bits)?;
    Ok(pages(&bits))
}

fn pages(bits: &[u64]) -> BTreeSet<u64> {
    let dirty = |n: &u64| bits.get((n / 64) as usize).is_some_and(|word| word >> (n % 64) & 1 == 1);
    (0..LEN / 4096).filter(dirty).collect()
}

/// The log's pages; none where this kernel's reports are not supported.
pub(super) fn report(driver: &MigdevDriver, granule: Granule) -> Outcome<Option<BTreeSet<u64>>> {
    let mut bits = vec![0u64; usize::try_from(LEN / 4096 / 64)?];
    match report_dma_logging(driver.fd()?, all()?, granule, &mut bits) {
        Ok(()) => Ok(Some(pages(&bits))),
        Err(error) if error.errno() == Some(Errno::OPNOTSUPP) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A page that the log leaves out is found missing: the negative control of [`exact`].
pub(crate) fn omitted() -> Outcome {
    let instance = small()?;
    set(&instance, "log_omit_every", 2)?;
    let mut driver = by_group(&instance)?;
    let granule = start_dma_logging(driver.fd()?, Granule::PAGE, &[all()?])?;
    driver.enable()?;
    driver.post(Job { at: 0x5_0000, len: 65536, flags: 0 })?;
    driver.wait(0, 1)?;
    driver.write32(offset::CONTROL, 0)?;
    // BASE is a whole number of even pages, so a page's parity is that of its place.
    same("dirty pages", report(&driver, granule)?, Some((0x50..0x60).filter(|page| page % 2 == 1).collect()))
}

/// One raise until it is acknowledged; a masked vector is sent when that ends.
pub(crate) fn interrupts() -> Outcome {
    let instance = small()?;
    let mut driver = by_group(&instance)?;
    let device = driver.fd()?;
    let pending = |driver: &MigdevDriver| rustix::io::read(&driver.events[0], &mut [0; 8]);
    trigger_irq(device, MSIX, 0)?;
    same("triggered", pending(&driver), Ok(8))?;
    mask_irq(device, MSIX, 0, true)?;
    driver.enable()?;
    driver.post(Job { at: 0x4_0000, len: 128, flags: 0 })?;
    // A write that switches the engine off returns between two descriptors; the first may not have begun.
    while driver.read64(offset::BLOCKS0)? < 1 {
        std::thread::yield_now();
    }
    same("masked", pending(&driver), Err(Errno::AGAIN))?;
    mask_irq(driver.fd()?, MSIX, 0, false)?;
    same("not masked any more", pending(&driver), Ok(8))?;
    driver.post(Job { at: 0x4_0000, len: 128, flags: 0 })?;
    while driver.read64(offset::BLOCKS0)? < 2 {
        std::thread::yield_now();
    }
    same("not acknowledged", pending(&driver), Err(Errno::AGAIN))?;
    driver.write64(offset::ACK0, 1)?;
    same("one of two acknowledged", pending(&driver), Ok(8))?;
    driver.write64(offset::ACK0, 2)?;
    same("both acknowledged", pending(&driver), Err(Errno::AGAIN))?;
    disable_irqs(driver.fd()?, MSIX)?;
    driver.post(Job { at: 0x4_0000, len: 128, flags: 0 })?;
    while driver.read64(offset::BLOCKS0)? < 3 {
        std::thread::yield_now();
    }
    driver.connect()?;
    same("raised while not connected", pending(&driver), Ok(8))
}

/// No DMA in STOP, none to peers in RUNNING_P2P; what rang meanwhile is not forgotten.
pub(crate) fn stands_still() -> Outcome {
    let instance = small()?;
    let mut driver = by_group(&instance)?;
    driver.enable()?;
    go(driver.fd()?, MigrationState::Stop)?;
    let before = driver.memory()?;
    driver.post(Job { at: 0x4_0000, len: 128, flags: 0 })?;
    same("blocks in STOP", driver.read64(offset::BLOCKS0)?, 0)?;
    same("a block's place in STOP", &driver.memory()?[0x4_0000..], &before[0x4_0000..])?;
    go(driver.fd()?, MigrationState::RunningP2p)?;
    driver.wait(0, 1)?;
    driver.post(Job { at: 0x4_0000, len: 128, flags: 1 })?;
    driver.post(Job { at: 0x4_1000, len: 128, flags: 0 })?;
    go(driver.fd()?, MigrationState::Stop)?;
    let blocks = (driver.read64(offset::BLOCKS0)?, driver.read64(offset::BLOCKS1)?);
    same("blocks: the peer's descriptor is at the head of the ring", blocks, (1, 0))?;
    go(driver.fd()?, MigrationState::Running)?;
    driver.wait(1, 1)?;
    driver.wait(0, 2)
}

/// A descriptor that points nowhere stops the ring, and says so; enabling again helps.
pub(crate) fn ring_error() -> Outcome {
    let instance = small()?;
    let mut driver = by_group(&instance)?;
    driver.enable()?;
    driver.post(Job { at: LEN, len: 128, flags: 0 })?;
    while driver.read32(offset::STATUS)? & 2 == 0 {
        std::thread::yield_now();
    }
    same("blocks", driver.read64(offset::BLOCKS0)?, 0)?;
    driver.write32(offset::CONTROL, 0)?;
    driver.enable()?;
    driver.post(Job { at: 0x4_0000, len: 128, flags: 0 })?;
    driver.wait(0, 1)
}
