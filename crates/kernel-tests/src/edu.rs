//! The kernel back end on a device of plain vfio-pci behind an emulated IOMMU: QEMU's `edu`, which does not migrate.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_migration_device::{
    Device, DmaAccess, IrqIndex, KernelDevice, KernelOptions, KernelPath, PciHardware, RegionIndex,
    TrackerKind,
};
use vfio_migration_memory::{GuestRam, Mapping, RamSpec};
use vfio_migration_types::{DeviceId, Gpa, Granule, Iova, RamOffset, Range, error_chain};
use vfio_migration_uapi::Dma;

use crate::check::{Outcome, holds, same};
use crate::instance::Opened;
use crate::pci;

const LEN: u64 = 1 << 20;
/// Register 0: the device's version.
const VERSION: u64 = 0;

/// Where it is in sysfs, if it is there and there is a driver for it.
pub(crate) fn place() -> Option<PathBuf> {
    fs::metadata("/sys/bus/pci/drivers/vfio-pci").ok()?;
    find()
}

/// Where it is in sysfs.
pub(crate) fn find() -> Option<PathBuf> {
    pci::find("0x1234", "0x11e8")
}

/// Gives it to vfio-pci, where it stays; its address.
pub(crate) fn bind() -> Outcome<String> {
    let place = place().ok_or("there is no edu")?;
    pci::bind(&place)?;
    Ok(pci::address(&place)?.to_owned())
}

/// A type1 container knows nothing of what an IOMMU's hardware saw: while a group behind one is in it, and pins nothing, every
/// page that is mapped is dirty, every time.
pub(crate) fn container_finds_every_page_dirty() -> Outcome {
    let address = bind()?;
    let group = fs::read_link(format!("/sys/bus/pci/devices/{address}/iommu_group"))?;
    let group = Path::new("/dev/vfio").join(group.file_name().ok_or("a group without a number")?);
    let opened = Opened::by_group(&group, &address)?;
    let container = opened.container()?;
    let ram = Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: LEN }])?);
    let iova = Range::new(Iova(0), LEN)?;
    container.map(iova, &ram.host_memory(RamOffset(0), LEN)?, Dma::BOTH)?;
    container.start_dirty()?;
    for _ in 0..3 {
        let mut bits = [0; 4];
        container.report_dirty(iova, Granule::PAGE, &mut bits)?;
        same("dirty pages", bits, [u64::MAX; 4])?;
    }
    container.stop_dirty()?;
    Ok(container.unmap(iova)?)
}

pub(crate) fn does_not_migrate() -> Outcome {
    let place = place().ok_or("there is no edu")?;
    let address = pci::address(&place)?;
    let path: KernelPath = address.parse()?;
    let options = KernelOptions { prefer_group: true, ..KernelOptions::default() };
    let ram = Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: LEN }])?);
    let id = DeviceId::new("edu0")?;
    let open = |options: &KernelOptions| KernelDevice::open(id.clone(), &path, ram.clone(), options);

    let unbound = open(&options).err().ok_or("it was opened without a VFIO driver")?;
    holds(error_chain(&unbound).contains("bound to no driver; bind it"), &error_chain(&unbound))?;
    bind()?;

    for options in [options, KernelOptions::default()] {
        let device = open(&options)?;
        same("driver", device.driver(), Some("vfio-pci"))?;
        let none = device.capabilities().err().ok_or("plain vfio-pci migrates")?;
        let none = none.to_string();
        holds(none.contains("plain vfio-pci never has"), &none)?;
        let iova = Range::new(Iova(0), LEN)?;
        device.dma_map(iova, DmaAccess::BOTH, ram.shared_file(RamOffset(0), LEN))?;
        let tracker = device.tracker();
        same("tracker", tracker.kind, TrackerKind::Everything)?;
        holds(tracker.why.contains("--allow-all-dirty"), &tracker.why)?;
        holds(device.dirty_log().is_none(), "no log")?;

        let mut version = [0; 4];
        device.region_read(RegionIndex::BAR0, VERSION, &mut version)?;
        same("version", u32::from_le_bytes(version) & 0xff, 0xed)?;
        // Memory decode is off after a reset: vfio-pci faults an access through the mapping then.
        let mut command = [0; 2];
        device.region_read(RegionIndex::CONFIG, 4, &mut command)?;
        device.region_write(RegionIndex::CONFIG, 4, &[command[0] | 2, command[1]])?;
        let file = device.region_file(RegionIndex::BAR0).ok_or("BAR 0 can be mapped")?;
        let mapping = Mapping::new(file.fd, file.offset, 4096, true)?;
        same("version, mapped", mapping.read_u32(VERSION)? & 0xff, 0xed)?;

        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mut count = [0; 8];
        holds(device.irq_count(IrqIndex::Msi) >= 1, "MSI")?;
        device.disable_irqs(IrqIndex::Msi)?;
        device.set_irq_eventfds(IrqIndex::Msi, 0, &[Some(event.as_fd())])?;
        device.trigger_irq(IrqIndex::Msi, 0)?;
        same("raised", rustix::io::read(&event, &mut count), Ok(8))?;
        device.disable_irqs(IrqIndex::Msi)?;
        device.disable_irqs(IrqIndex::Msi)?;
        device.set_irq_eventfds(IrqIndex::Intx, 0, &[Some(event.as_fd())])?;
        let resample = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        device.set_intx_resample(Some(resample.as_fd()))?;
        device.trigger_irq(IrqIndex::Intx, 0)?;
        same("raised", rustix::io::read(&event, &mut count), Ok(8))?;
        device.set_intx_resample(None)?;
        device.disable_irqs(IrqIndex::Intx)?;
        same("nothing more", rustix::io::read(&event, &mut count), Err(Errno::AGAIN))?;
        // It has no reset of any kind, and that is not passed over.
        same("reset", device.reset().err().and_then(|error| error.errno), Some(Errno::INVAL))?;
        device.dma_unmap(iova)?;
        holds(device.dma_unmap(iova).is_err(), "not mapped any more")?;
    }
    Ok(())
}
