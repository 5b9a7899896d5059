//! A device whose writes nobody logs: on a kernel without iommufd one that was handed over, and asked for its log before it
//! could reach any memory.

use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use vfio_migration_device::{IommuHandle, KernelDevice, KernelOptions, TrackerKind};
use vfio_migration_types::DeviceId;
use vfio_migration_uapi::{Type1, group_device, set_container};

use super::machine::{Toy, map, ram};
use super::pair::{Pair, options, refused};
use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::migdev::get;

/// A machine whose one device was opened by hand.
fn handed_over(instances: &[Instance]) -> Outcome<Arc<Toy>> {
    let [instance] = instances else { return Err("one instance".into()) };
    let open = |path: &Path| rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    let group = open(&instance.group()?)?;
    let container = Type1::new(open(Path::new("/dev/vfio/vfio"))?)?;
    set_container(std::os::fd::AsFd::as_fd(&group), &container)?;
    container.set_iommu()?;
    let name = std::ffi::CString::new(instance.uuid())?;
    let device = group_device(std::os::fd::AsFd::as_fd(&group), &name)?;
    let iommu = IommuHandle::Type1 { container: container.fd().try_clone_to_owned()?, group };
    let ram = ram()?;
    let options = KernelOptions::default();
    let card = KernelDevice::from_fd(DeviceId::new("card0")?, device, Arc::clone(&ram), iommu, &options)?;
    let tracker = card.tracker();
    same("tracker", tracker.kind, TrackerKind::Everything)?;
    for said in ["reporting", "nothing is mapped to try it on", "one full copy while the guest is paused"] {
        holds(tracker.why.contains(said), &format!("'{}' says '{said}'", tracker.why))?;
    }
    map(&card, &ram)?;
    Toy::of(ram, vec![card], |device| Arc::new(device))
}

/// Refused without leave, with the reason, before anything has begun; with leave all of RAM is sent once more in the
/// downtime, and nothing that the device wrote is lost.
pub(crate) fn needs_leave() -> Outcome {
    let pair = Pair::of(1, |_| Ok(()), handed_over)?;
    let arcs = get(&pair.from[0], "arcs")?;
    let ended = pair.migrate(options())?;
    let reason = refused(ended)?;
    same("code and device", (&*reason.code, reason.device.as_deref()), ("dirty-all", Some("card0")))?;
    same("arcs taken", get(&pair.from[0], "arcs")?, arcs)?;
    pair.goes_on_here()?;
    let mut options = options();
    options.allow_all_dirty = true;
    options.verify = true;
    let (ended, before) = pair.migrate_at_work(options)?;
    let completed = pair.moved(ended)?;
    same("RAM's digests agree", completed.ram_digest_match, Some(true))?;
    let again = completed.bytes.ram - before;
    holds(again >= before, &format!("{again} bytes once more, after {before}"))?;
    pair.close()
}
