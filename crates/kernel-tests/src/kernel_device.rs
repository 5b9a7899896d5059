//! The kernel back end of the device crate, on the kernel's sample device.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_migration_device::{
    Chunk, Device, DeviceError, DmaAccess, IommuHandle, IrqIndex, KernelDevice, KernelOptions, KernelPath,
    PciHardware, Position, RegionIndex, ResumingSession, SavingSession, SessionError, TrackerKind,
};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{
    Bitmap, DeviceId, Gpa, Granule, Iova, MigrationState, RamOffset, Range, error_chain,
};
use vfio_migration_uapi::set_device_state;

use crate::check::{Outcome, holds, same};
use crate::instance::Instance;
use crate::mtty::{DATA, LINE_STATUS, LOOP, MODEM_CONTROL, one_port};

const LEN: u64 = 1 << 20;
const TEXT: &[u8] = b"kept in flight";

fn ram() -> Outcome<Arc<GuestRam>> {
    Ok(Arc::new(GuestRam::new("ktest", &[RamSpec { gpa: Gpa(0), len: LEN }])?))
}

fn all() -> Outcome<Range<Iova>> {
    Ok(Range::new(Iova(0), LEN)?)
}

fn cdev_kernel() -> bool {
    Path::new("/dev/iommu").exists()
}

fn path(instance: &Instance) -> Outcome<KernelPath> {
    Ok(instance.uuid().parse()?)
}

fn open_with(
    instance: &Instance,
    options: &KernelOptions,
) -> Result<KernelDevice, Box<dyn std::error::Error>> {
    Ok(KernelDevice::open(DeviceId::new("tty0")?, &path(instance)?, ram()?, options)?)
}

fn open(instance: &Instance) -> Outcome<KernelDevice> {
    open_with(instance, &KernelOptions::default())
}

fn by_group() -> KernelOptions {
    KernelOptions { prefer_group: true, ..KernelOptions::default() }
}

/// Leaves `text` in a port's receive queue, by its own loop.
pub(crate) fn fill(device: &KernelDevice, text: &[u8]) -> Outcome {
    device.region_write(RegionIndex::BAR0, MODEM_CONTROL, &[LOOP])?;
    for byte in text {
        device.region_write(RegionIndex::BAR0, DATA, &[*byte])?;
    }
    Ok(())
}

/// Takes all that is in a port's receive queue.
pub(crate) fn drain(device: &KernelDevice) -> Outcome<Vec<u8>> {
    let mut text = Vec::new();
    let read = |register| -> Outcome<u8> {
        let mut byte = [0];
        device.region_read(RegionIndex::BAR0, register, &mut byte)?;
        Ok(byte[0])
    };
    while read(LINE_STATUS)? & 1 != 0 && text.len() < 64 {
        text.push(read(DATA)?);
    }
    Ok(text)
}

/// Moves what there is; how many bytes, and what ended it.
fn pump(from: &mut dyn SavingSession, to: &mut dyn ResumingSession) -> Outcome<(usize, Chunk)> {
    let mut total = 0;
    loop {
        let mut bytes = [0; 7];
        match from.read(&mut bytes)? {
            Chunk::Data(len) => {
                to.write(&bytes[..len])?;
                total += len;
            }
            end => return Ok((total, end)),
        }
    }
}

fn moves(source: &KernelDevice, destination: &KernelDevice) -> Outcome {
    fill(source, TEXT)?;
    let mut saving = source.begin_precopy()?;
    let mut resuming = destination.begin_resuming()?;
    same("initial bytes", saving.progress()?.map(|progress| progress.initial_bytes), Some(24))?;
    same("pre-copy", pump(&mut *saving, &mut *resuming)?, (24, Chunk::NothingNow))?;
    fill(source, b"!")?;
    saving.go(Position::PreCopyP2p)?;
    saving.go(Position::StopCopy)?;
    same("stop-copy", pump(&mut *saving, &mut *resuming)?, (36, Chunk::End))?;
    resuming.finish()?;
    same("destination", destination.state()?, MigrationState::Stop)?;
    destination.set_state(MigrationState::RunningP2p)?;
    destination.set_state(MigrationState::Running)?;
    same("source", saving.end()?, MigrationState::Stop)?;
    same("contents", drain(destination)?, [TEXT, b"!"].concat())
}

/// By mdev UUID: by the device's own file where this kernel has it.
pub(crate) fn contents_move() -> Outcome {
    let (from, to) = (one_port()?, one_port()?);
    moves(&open(&from)?, &open(&to)?)
}

/// By group also where the device has a file of its own; and by the group's and the device's own path.
pub(crate) fn every_path() -> Outcome {
    let (from, to) = (one_port()?, one_port()?);
    let name = from.uuid().to_owned();
    let path = KernelPath::Group { group: from.group()?, name };
    let source = KernelDevice::open(DeviceId::new("tty0")?, &path, ram()?, &KernelOptions::default())?;
    same("its driver", source.driver(), Some("mtty"))?;
    moves(&source, &open_with(&to, &by_group())?)?;
    drop(source);
    if let Some(file) = from.file().filter(|_| cdev_kernel()) {
        let path: KernelPath = file.to_str().ok_or("a path that is no text")?.parse()?;
        let device = KernelDevice::open(DeviceId::new("tty0")?, &path, ram()?, &KernelOptions::default())?;
        same("its driver", device.driver(), Some("mtty"))?;
    }
    Ok(())
}

/// Descriptors that somebody else opened.
pub(crate) fn handed_over() -> Outcome {
    let (from, to) = (one_port()?, one_port()?);
    let opened = from.open()?;
    let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let iommu =
        IommuHandle::Type1 { container: copy(opened.container()?.fd())?, group: copy(opened.group())? };
    let fd = copy(opened.device()?)?;
    let source = KernelDevice::from_fd(DeviceId::new("tty0")?, fd, ram()?, iommu, &KernelOptions::default())?;
    moves(&source, &open(&to)?)
}

/// The same with a device's own file, bound by whoever hands it over to an iommufd that lives on.
pub(crate) fn handed_over_bound() -> Outcome {
    let (from, to) = (one_port()?, one_port()?);
    let opened = from.open_cdev()?;
    for _ in 0..2 {
        let iommufd = opened.space.fd().try_clone_to_owned()?;
        let iommu = IommuHandle::Iommufd { iommufd, bound: Some(opened.id) };
        let (id, fd, memory) = (DeviceId::new("tty0")?, opened.device.try_clone()?, ram()?);
        let source = KernelDevice::from_fd(id, fd, memory.clone(), iommu, &KernelOptions::default())?;
        source.dma_map(all()?, DmaAccess::BOTH, memory.shared_file(RamOffset(0), LEN))?;
        moves(&source, &open(&to)?)?;
        source.set_state(MigrationState::Running)?;
        drain(&source)?;
        drop(source);
        same("who holds the RAM", Arc::strong_count(&memory), 1)?;
    }
    Ok(())
}

/// Memory that is not the guest's RAM, as another device's BAR is.
pub(crate) fn maps_other_memory() -> Outcome {
    let instance = one_port()?;
    let device = open(&instance)?;
    let (mine, other) = (ram()?, ram()?);
    device.dma_map(all()?, DmaAccess::BOTH, other.shared_file(RamOffset(0), LEN))?;
    same("who holds the RAM", Arc::strong_count(&mine), 1)?;
    device.dma_unmap(all()?)?;
    let event = eventfd(0, EventfdFlags::CLOEXEC)?;
    let refused = device.dma_map(all()?, DmaAccess::BOTH, Some((event.as_fd(), 0)));
    let refused = refused.err().ok_or("a file without memory was mapped")?;
    holds(refused.is_no_peer_dma(), &error_chain(&refused))?;
    let refused = device.dma_map(all()?, DmaAccess::BOTH, None).err().ok_or("nothing was mapped")?;
    holds(!refused.is_no_peer_dma(), "a mapping without a file is a mistake of the VMM")?;
    // Neither left a trace.
    device.dma_map(all()?, DmaAccess::BOTH, other.shared_file(RamOffset(0), LEN))?;
    Ok(())
}

pub(crate) fn describes_itself() -> Outcome {
    let instance = one_port()?;
    let device = open(&instance)?;
    let manifest = device.manifest()?;
    same("back end", manifest.backend.as_str(), "kernel")?;
    same("model", manifest.model.as_deref(), None)?;
    same("driver", manifest.driver_name(), Some("mtty"))?;
    let pci = manifest.pci.ok_or("it has a PCI identity")?;
    same("ids", (pci.vendor, pci.device), (0x4348, 0x3253))?;
    holds(manifest.flags.is_some_and(|flags| flags.p2p && flags.pre_copy), "P2P and PRE_COPY")?;
    same("estimated size", device.stop_copy_size()?, Some(60))?;
    holds(!device.reports_reinit(), "no pre-copy info v2 on this kernel")?;
    let capabilities = device.capabilities()?;
    holds(capabilities.precopy_info && capabilities.data_size, "progress and size")?;
    let mut byte = [0];
    let outside = device.region_read(RegionIndex::CONFIG, 255, &mut byte);
    holds(outside.is_err(), "config space ends where the driver says")
}

/// The choice of a tracker: the device's log where a trial of it works, the container's otherwise.
pub(crate) fn chooses_its_tracker() -> Outcome {
    let instance = one_port()?;
    for options in [KernelOptions::default(), by_group()] {
        let memory = ram()?;
        let (id, path) = (DeviceId::new("tty0")?, path(&instance)?);
        let device = KernelDevice::open(id, &path, memory.clone(), &options)?;
        device.dma_map(all()?, DmaAccess::BOTH, memory.shared_file(RamOffset(0), LEN))?;
        holds(
            device.dma_map(all()?, DmaAccess::BOTH, memory.shared_file(RamOffset(0), LEN)).is_err(),
            "not twice",
        )?;
        // START succeeds on either kernel, REPORT on one of them alone.
        let wanted = if cdev_kernel() { TrackerKind::DeviceLog } else { TrackerKind::Type1 };
        let tracker = device.tracker();
        same("tracker", tracker.kind, wanted).map_err(|error| format!("{error}; {}", tracker.why))?;
        let log = device.dirty_log().ok_or("there is no log")?;
        let mut dirty = Bitmap::new(LEN, Granule::PAGE);
        log.start()?;
        holds(log.start().is_err(), "a log is started once")?;
        log.report(&mut dirty)?;
        same("dirty pages of a device without DMA", dirty.count(), 0)?;
        device.dma_unmap(all()?)?;
        log.report(&mut dirty)?;
        same("dirty pages of what was unmapped", dirty.count(), LEN / 4096)?;
        log.stop()?;
        log.stop()?;
        holds(device.dma_unmap(all()?).is_err(), "not mapped any more")?;
    }
    Ok(())
}

#[track_caller]
fn lost(error: &DeviceError) -> Outcome {
    let lost = matches!(error.source.downcast_ref(), Some(SessionError::Lost(MigrationState::Running)));
    holds(lost, &format!("the session is lost: {}", error_chain(error)))
}

/// A reset under an open session, as a guest's function-level reset is one.
pub(crate) fn reset_ends_a_session() -> Outcome {
    let instance = one_port()?;
    let device = open(&instance)?;
    let mut saving = device.begin_precopy()?;
    device.reset()?;
    lost(&saving.read(&mut [0; 8]).err().ok_or("a dead session was read")?)?;
    lost(&saving.progress().err().ok_or("a dead session made progress")?)?;
    let refused = saving.go(Position::StopCopy).err().ok_or("a dead session went on")?;
    same("where it is", refused.now, Some(MigrationState::Running))?;
    same("after the end", saving.end()?, MigrationState::Running)?;
    let mut resuming = device.begin_resuming()?;
    device.reset()?;
    lost(&resuming.write(&[0; 8]).err().ok_or("a dead session was written")?)?;
    holds(resuming.finish().is_err(), "a device that was reset has not taken its state")?;
    same("state", device.state()?, MigrationState::Running)
}

/// What the driver refuses ends in a reset; a device that somebody left loading is reset when it is opened.
pub(crate) fn refusals_end_in_a_reset() -> Outcome {
    let instance = one_port()?;
    let device = open(&instance)?;
    let mut resuming = device.begin_resuming()?;
    let refused = resuming.write(&[0x55; 24]).err().ok_or("a wrong header was taken")?;
    same("errno", refused.errno, Some(Errno::FAULT))?;
    resuming.abort()?;
    same("after the abort", device.state()?, MigrationState::Running)?;
    let truncated = device.begin_resuming()?.finish().err().ok_or("an empty state was taken")?;
    holds(truncated.now.is_some(), "it says where the device was")?;
    device.reset()?;
    same("after the failure and a reset", device.state()?, MigrationState::Running)?;
    drop(device);
    {
        let opened = instance.open()?;
        // Closed in RESUMING: the driver keeps the state.
        drop(set_device_state(opened.device()?, MigrationState::Resuming)?);
    }
    let kept = KernelOptions { keep_state: true, ..KernelOptions::default() };
    same("kept", open_with(&instance, &kept)?.state()?, MigrationState::Resuming)?;
    same("recovered", open(&instance)?.state()?, MigrationState::Running)
}

/// Errors of opening, with what to do.
pub(crate) fn refusals_to_open() -> Outcome {
    let instance = one_port()?;
    let first = open(&instance)?;
    let second = open(&instance).err().ok_or("a device was opened twice")?;
    holds(error_chain(&*second).contains("holds it"), &format!("busy: {}", error_chain(&*second)))?;
    drop(first);
    open(&instance)?;
    let none: KernelPath = "11111111-0000-4000-8000-000000000000".parse()?;
    let none = KernelDevice::open(DeviceId::new("tty0")?, &none, ram()?, &KernelOptions::default());
    let none = none.err().ok_or("a device was opened that is not there")?;
    holds(error_chain(&none).contains("there is no mediated device"), &error_chain(&none))?;
    let file = KernelPath::Cdev("/dev/vfio/devices/vfio99".into());
    let file = KernelDevice::open(DeviceId::new("tty0")?, &file, ram()?, &KernelOptions::default());
    same("errno", file.err().and_then(|error| error.errno), Some(Errno::NOENT))
}

pub(crate) fn interrupts() -> Outcome {
    let instance = one_port()?;
    let device = open(&instance)?;
    same("lines", device.irq_count(IrqIndex::Intx), 1)?;
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    device.set_irq_eventfds(IrqIndex::Intx, 0, &[Some(event.as_fd())])?;
    let mut count = [0; 8];
    same("before", rustix::io::read(&event, &mut count), Err(Errno::AGAIN))?;
    device.trigger_irq(IrqIndex::Intx, 0)?;
    same("after", rustix::io::read(&event, &mut count), Ok(8))?;
    device.disable_irqs(IrqIndex::Intx)?;
    device
        .disable_irqs(IrqIndex::Intx)
        .map_err(|error| format!("a second time: {}", error_chain(&error)).into())
}
