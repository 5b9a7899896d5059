//! Devices that the VMM runs itself, all in one address space of its own: handed over as they are, they keep their mappings,
//! and move.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};
use vfio_migration_device::{
    Device, DmaAccess, DmaView, DmaViewError, KernelDevice, KernelOptions, PciHardware, ResetCallback,
    TrackerKind, VmmDevice, VmmIommu,
};
use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, Iova, MigrationState, RamOffset, Range, error_chain};
use vfio_migration_uapi::{Dma, Ioas, Type1, attach, bind_iommufd, group_device, reset, set_container};

use super::machine::{Toy, ram};
use super::pair::{Pair, options};
use super::program::LEN;
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;

/// A VMM's address space, and the devices in it. Closed in this order.
struct Vmm {
    devices: Vec<(OwnedFd, Option<OwnedFd>)>,
    space: Space,
    resets: AtomicU64,
}

enum Space {
    Container(Type1),
    Iommufd(Ioas),
}

fn open(path: &Path) -> Outcome<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

impl Vmm {
    /// Opens the instances, by their own files where this kernel has those, and maps all of RAM for them, once.
    fn new(instances: &[Instance], ram: &Arc<GuestRam>) -> Outcome<Self> {
        let mut devices = Vec::new();
        let cdevs = Path::new("/dev/iommu").exists();
        let space = if cdevs {
            let space = Ioas::new(Arc::new(open(Path::new("/dev/iommu"))?))?;
            for instance in instances {
                let device = open(&instance.file().ok_or("it has no file of its own")?)?;
                bind_iommufd(device.as_fd(), space.fd())?;
                attach(device.as_fd(), space.id())?;
                devices.push((device, None));
            }
            Space::Iommufd(space)
        } else {
            let container = Type1::new(open(Path::new("/dev/vfio/vfio"))?)?;
            for instance in instances {
                let group = open(&instance.group()?)?;
                set_container(group.as_fd(), &container)?;
                if devices.is_empty() {
                    container.set_iommu()?;
                }
                let device = group_device(group.as_fd(), &CString::new(instance.uuid())?)?;
                devices.push((device, Some(group)));
            }
            Space::Container(container)
        };
        let (all, memory) = (Range::new(Iova(0), LEN)?, ram.host_memory(RamOffset(0), LEN)?);
        match &space {
            Space::Container(container) => container.map(all, &memory, Dma::BOTH)?,
            Space::Iommufd(space) => space.map(all, &memory, Dma::BOTH)?,
        }
        Ok(Self { devices, space, resets: AtomicU64::new(0) })
    }

    fn iommu(&self) -> Outcome<VmmIommu> {
        Ok(match &self.space {
            Space::Container(container) => VmmIommu::type1(container.fd().try_clone_to_owned()?)?,
            Space::Iommufd(space) => VmmIommu::address_space(&space.fd().try_clone_to_owned()?)?,
        })
    }

    /// Hands device number `n` over.
    fn hand_over(
        self: &Arc<Self>,
        n: usize,
        instance: &Instance,
        iommu: &VmmIommu,
        ram: &Arc<GuestRam>,
    ) -> Outcome<KernelDevice> {
        let vmm = Arc::clone(self);
        let by_vmm = ResetCallback::new(move || {
            vmm.resets.fetch_add(1, Ordering::Relaxed);
            let (device, _) = vmm.devices.get(n).ok_or("no such device")?;
            Ok(reset(device.as_fd())?)
        });
        let (device, _) = self.devices.get(n).ok_or("no such device")?;
        let mut given = VmmDevice::new(device.try_clone()?, DmaView::identity(ram), by_vmm);
        given.iommu = Some(iommu.clone());
        given.path = Some(instance.uuid().parse()?);
        let id = DeviceId::new(format!("card{n}"))?;
        Ok(KernelDevice::adopt(id, given, Arc::clone(ram), &KernelOptions::default())?)
    }
}

/// A machine whose devices its VMM runs.
fn run_by_vmm(instances: &[Instance]) -> Outcome<Arc<Toy>> {
    let ram = ram()?;
    let vmm = Arc::new(Vmm::new(instances, &ram)?);
    let iommu = vmm.iommu()?;
    let hand_over = |(n, instance)| vmm.hand_over(n, instance, &iommu, &ram);
    let cards = instances.iter().enumerate().map(hand_over).collect::<Outcome<Vec<_>>>()?;
    Toy::of(ram, cards, |device| Arc::new(device))
}

/// To devices that are opened there, and back, while everything changes.
pub(crate) fn two_devices_of_one_address_space() -> Outcome {
    let pair = Pair::of_both(2, run_by_vmm, Toy::new)?;
    for card in &pair.source.cards {
        let wanted =
            if Path::new("/dev/iommu").exists() { TrackerKind::DeviceLog } else { TrackerKind::Type1 };
        same(&format!("tracker, since {}", card.tracker().why), card.tracker().kind, wanted)?;
    }
    let mut options = options();
    options.verify = true;
    let (ended, _) = pair.migrate_at_work(options.clone())?;
    let completed = pair.moved(ended)?;
    same("RAM's digests agree", completed.ram_digest_match, Some(true))?;
    let back = pair.turned();
    let completed = back.moved(back.migrate(options)?)?;
    same("RAM's digests agree", completed.ram_digest_match, Some(true))?;
    back.close()
}

/// A guest at work whose device is handed over goes on, during and after it; a log that still ran is stopped.
pub(crate) fn keeps_its_mappings() -> Outcome {
    let instances = [Instance::new("migdev", "migdev-0")?];
    let [instance] = &instances;
    let ram = ram()?;
    let vmm = Arc::new(Vmm::new(&instances, &ram)?);
    let iommu = vmm.iommu()?;
    let hand_over = || vmm.hand_over(0, instance, &iommu, &ram);
    let toy = Toy::of(Arc::clone(&ram), vec![hand_over()?], |device| Arc::new(device))?;
    toy.boot()?;
    for _ in 0..2 {
        let card = hand_over()?;
        same("its driver", card.driver(), Some("migdev"))?;
        let all = Range::new(Iova(0), LEN)?;
        let file = ram.shared_file(RamOffset(0), LEN);
        for refused in [card.dma_map(all, DmaAccess::BOTH, file), card.dma_unmap(all)] {
            let refused = refused.err().ok_or("an adopted device was mapped for")?;
            let why: Option<&DmaViewError> = refused.source.downcast_ref();
            same(&error_chain(&refused), why, Some(&DmaViewError::MappedByVmm))?;
        }
        card.dirty_log().ok_or("no log")?.start()?;
        toy.guest.goes_on()?;
        same("state", card.state()?, MigrationState::Running)?;
        drop(card);
        toy.guest.goes_on()?;
    }
    same("resets", vmm.resets.load(Ordering::Relaxed), 0)?;
    toy.guest.stop();
    toy.guest.expect_restart();
    toy.cards.first().ok_or("no card")?.reset()?;
    same("resets", vmm.resets.load(Ordering::Relaxed), 1)?;
    toy.guest.go();
    toy.guest.goes_on()?;
    holds(toy.guest.restarts() == 1, "the guest found it reset")
}
