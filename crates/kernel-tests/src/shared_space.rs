//! Devices that share an address space: of one IOMMU group, behind an emulated IOMMU, where the kernel counts what it pins.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use vfio_migration_device::{
    DeviceError, DmaAccess, DmaSpace, KernelDevice, KernelError, KernelOptions, PciHardware, RegionIndex,
};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Gpa, Iova, RamOffset, Range, error_chain};

use crate::check::{Outcome, holds, same};
use crate::pci;

const LEN: u64 = 4 << 20;

fn ram() -> Outcome<Arc<GuestRam>> {
    Ok(Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: LEN }])?))
}

/// Functions that vfio-pci has, and has no more when this goes: other tests look at every device file that there is.
struct Bound(Vec<PathBuf>);

impl Drop for Bound {
    fn drop(&mut self) {
        for place in &self.0 {
            if let Err(error) = pci::unbind(place) {
                eprintln!("{} stays bound: {error}", place.display());
            }
        }
    }
}

/// The functions of one slot: QEMU's `pci-testdev`, twice.
fn functions() -> Outcome<Bound> {
    let mut found = pci::find_all("0x1b36", "0x0005");
    found.sort();
    let group = |place: &PathBuf| fs::read_link(place.join("iommu_group"));
    let groups = found.iter().map(group).collect::<Result<Vec<_>, _>>()?;
    holds(groups.len() == 2 && groups[0] == groups[1], &format!("two functions of one group: {groups:?}"))?;
    let bound = Bound(found);
    bound.0.iter().try_for_each(|place| pci::bind(place))?;
    Ok(bound)
}

fn open(
    place: &Path,
    ram: &Arc<GuestRam>,
    space: Option<&DmaSpace>,
) -> Outcome<Result<KernelDevice, DeviceError>> {
    let options = KernelOptions { space: space.cloned(), ..KernelOptions::default() };
    let address = pci::address(place)?;
    Ok(KernelDevice::open(
        DeviceId::new(format!("dev-{}", &address[11..]))?,
        &address.parse()?,
        ram.clone(),
        &options,
    ))
}

/// Memory of this process that is counted as locked.
fn locked() -> Outcome<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).ok_or("no VmLck")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse::<u64>()? << 10)
}

/// Both open, RAM is mapped by each and locked once, and stays as long as either has it; each by itself, the second does not open.
pub(crate) fn of_one_group() -> Outcome {
    let places = functions()?;
    let [first, second] = places.0.as_slice() else { return Err("not two functions".into()) };
    let (memory, all) = (ram()?, Range::new(Iova(0), LEN)?);
    let map =
        |device: &KernelDevice| device.dma_map(all, DmaAccess::BOTH, memory.shared_file(RamOffset(0), LEN));
    let alone = open(first, &memory, None)??;
    let refused = open(second, &memory, None)?.err().ok_or("two devices of one group, each by itself")?;
    holds(refused.errno == Some(Errno::BUSY) && refused.is_in_use(), &error_chain(&refused))?;
    drop(alone);

    let before = locked()?;
    let space = DmaSpace::default();
    let one = open(first, &memory, Some(&space))??;
    let other = open(second, &memory, Some(&space))??;
    map(&one)?;
    same("locked by one", locked()? - before, LEN)?;
    map(&other)?;
    same("locked by both", locked()? - before, LEN)?;
    holds(map(&other).is_err(), "not twice by one device")?;
    let half = Range::new(Iova(0), LEN / 2)?;
    let part = other.dma_map(half, DmaAccess::BOTH, memory.shared_file(RamOffset(0), LEN / 2));
    holds(part.is_err(), "not a part of it besides")?;
    let mut id = [0; 4];
    other.region_read(RegionIndex::CONFIG, 0, &mut id)?;
    same("ids", id, [0x36, 0x1b, 0x05, 0x00])?;
    let stranger = open(first, &ram()?, Some(&space))?.err().ok_or("another guest's RAM in one space")?;
    holds(matches!(stranger.source.downcast_ref(), Some(KernelError::OtherRam)), &error_chain(&stranger))?;

    one.dma_unmap(all)?;
    holds(one.dma_unmap(all).is_err(), "not mapped by it any more")?;
    same("locked by the other", locked()? - before, LEN)?;
    map(&one)?;
    drop(other);
    same("locked by the one", locked()? - before, LEN)?;
    // The second may come back while the first goes on.
    let other = open(second, &memory, Some(&space))??;
    map(&other)?;
    drop(one);
    same("locked by the other", locked()? - before, LEN)?;
    drop(other);
    same("locked by none", locked()? - before, 0)?;
    same("who holds the RAM", Arc::strong_count(&memory), 1)?;
    // And the space is as new, for any guest.
    open(first, &ram()?, Some(&space))?.map(drop).map_err(Into::into)
}
