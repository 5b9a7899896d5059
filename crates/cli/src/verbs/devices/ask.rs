//! Asking a device itself: a vfio-user server, or, by opening it, a device of the kernel.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use vfio_migration_device::host::{HostDevice, Obstacle, ObstacleCode, Roots};
use vfio_migration_device::{
    Capabilities, CapabilitiesError, Device, DeviceError, IrqIndex, PciHardware, PciRegion, TrackerKind,
    VfioUserDevice, VfioUserOptions, is_late, is_out_of_time,
};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Gpa, error_chain};

use super::report::{CanMigrate, DeviceEntry, DirtyTrackingKind, InterruptCounts, RegionReport};
use crate::exit::CliError;
use crate::probe::ProbedDevice;
use crate::side::{MORE_TIME, silent_server};
use crate::socket_clients::has_client;
use crate::target::for_all;

/// Asks a vfio-user server, which may take `timeout` for each answer. It is left in the state it is in.
pub(super) fn socket(socket: &Path, timeout: Duration) -> Result<DeviceEntry, CliError> {
    let mut report = DeviceEntry::blank(socket.display().to_string(), "vfio-user");
    let options = VfioUserOptions {
        timeout,
        open_timeout: for_all(timeout),
        connect_timeout: Duration::ZERO,
        keep_state: true,
        ..VfioUserOptions::default()
    };
    // Looked at before we are one of its clients ourselves.
    let in_use = has_client(socket);
    let unanswered = |report: &mut DeviceEntry, error: DeviceError| {
        let change = "start its server; a server that another VMM uses answers nobody else";
        let why = match error.errno {
            Some(Errno::TIMEDOUT) if is_late(&error) => silent_server(socket, timeout, in_use),
            _ if is_out_of_time(&error) => format!("{}; {MORE_TIME}", error_chain(&error)),
            _ => error_chain(&error),
        };
        report.add_obstacle(&Obstacle::new(ObstacleCode::NoAnswer, why, change, vec![]));
    };
    match VfioUserDevice::open(id()?, socket, ram()?, &options) {
        Ok(device) => match hardware(&mut report, &device) {
            Ok(capabilities) => {
                let (tracking, why) = match capabilities.dirty_log {
                    true => (DirtyTrackingKind::DeviceLog, "its server logs its DMA writes"),
                    false => (
                        DirtyTrackingKind::None,
                        "its server logs no DMA writes, so all memory counts as dirty: one full copy while the \
                         guest is paused, refused unless --allow-all-dirty is given",
                    ),
                };
                report.dirty_tracking = tracking;
                report.dirty_tracking_why = Some(why.into());
            }
            Err(CapabilitiesError::Device(error)) => unanswered(&mut report, error),
            Err(CapabilitiesError::NotMigratable(why)) => {
                let change = "a server that implements migration";
                report.add_obstacle(&Obstacle::new(ObstacleCode::NoMigrationInServer, why.0, change, vec![]));
            }
        },
        Err(error) => unanswered(&mut report, error),
    }
    Ok(report)
}

/// Opens a device of the host, asks it, and closes it. Left as it is where it is in use.
pub(super) fn host(device: &HostDevice, roots: &Roots, report: &mut DeviceEntry) -> Result<(), CliError> {
    let ProbedDevice { device: opened, mapped } = match ProbedDevice::open(device, id()?, roots) {
        Ok(probed) => probed,
        Err(error) if error.is_in_use() => {
            let text = format!("it was not opened, somebody has it: {}", error_chain(&error));
            let change = "to move it, ask the VMM that has it; whose processes they are, root may see";
            report.add_obstacle(&Obstacle::new(ObstacleCode::InUse, text, change, vec![]));
            return Ok(());
        }
        Err(error) => {
            let change = "what the text says, and the kernel's log";
            report.add_obstacle(&Obstacle::new(
                ObstacleCode::OpenFailed,
                error_chain(&error),
                change,
                vec![],
            ));
            return Ok(());
        }
    };
    match hardware(report, &opened) {
        Ok(_) => {
            // A driver that was taken for one without migration has it.
            report.why_not.retain(|why| why.code != ObstacleCode::NoMigrationInDriver.name());
            let tracker = opened.tracker();
            report.dirty_tracking = match tracker.kind {
                TrackerKind::DeviceLog => DirtyTrackingKind::DeviceLog,
                TrackerKind::Iommufd => DirtyTrackingKind::Iommufd,
                TrackerKind::Type1 => DirtyTrackingKind::Type1,
                TrackerKind::Everything => DirtyTrackingKind::None,
                _ => DirtyTrackingKind::Unknown,
            };
            report.dirty_tracking_why = Some(tracker.why.clone());
        }
        Err(_) if report.why_not.iter().any(|why| why.code == ObstacleCode::NoMigrationInDriver.name()) => {
            report.migration = CanMigrate::No;
        }
        Err(CapabilitiesError::Device(error)) => {
            let change = "what the text says, and the kernel's log";
            report.add_obstacle(&Obstacle::new(ObstacleCode::NoAnswer, error_chain(&error), change, vec![]));
        }
        Err(CapabilitiesError::NotMigratable(why)) => {
            let change = "the vendor's variant driver, and migration turned on in the device's firmware or by its \
                          physical function's driver";
            report.add_obstacle(&Obstacle::new(ObstacleCode::NoMigrationInDriver, why.0, change, vec![]));
        }
    }
    if let Err(error) = mapped {
        let change = "raise this user's limit on locked memory (ulimit -l), and see the kernel's log";
        let text = format!("no memory can be mapped for it: {}", error_chain(&error));
        report.add_obstacle(&Obstacle::new(ObstacleCode::MappingRefused, text, change, vec![]));
    }
    Ok(())
}

/// Facts that either kind of device reports of itself, and whether it migrates.
fn hardware<D: Device + PciHardware>(
    report: &mut DeviceEntry,
    device: &D,
) -> Result<Capabilities, CapabilitiesError> {
    report.probed = true;
    let count = |kind| Some(device.irq_count(kind));
    report.interrupts = InterruptCounts {
        intx: count(IrqIndex::Intx),
        msi: count(IrqIndex::Msi),
        msix: count(IrqIndex::Msix),
    };
    report.regions = Some(device.regions().iter().map(region).collect());
    let capabilities = device.capabilities()?;
    let flags =
        [(true, "STOP_COPY"), (capabilities.flags.p2p, "P2P"), (capabilities.flags.pre_copy, "PRE_COPY")];
    report.flags = Some(flags.iter().filter(|(has, _)| *has).map(|(_, name)| (*name).into()).collect());
    report.migration = CanMigrate::Yes;
    let name = report.name.clone();
    let unknown = |error| tracing::warn!("{name}: {}", error_chain(&error));
    report.state = device.state().map_err(unknown).ok().map(|state| state.to_string());
    report.stop_copy_size = device.stop_copy_size().map_err(unknown).ok().flatten();
    let pci = device.manifest().map_err(unknown).ok().and_then(|manifest| manifest.pci);
    if let Some(pci) = pci {
        report.id = Some(format!("{:04x}:{:04x}", pci.vendor, pci.device));
    }
    Ok(capabilities)
}

fn region(region: &PciRegion) -> RegionReport {
    let name = match region.index.0 {
        bar @ 0..=5 => Some(format!("bar{bar}")),
        6 => Some("rom".into()),
        7 => Some("config".into()),
        8 => Some("vga".into()),
        _ => None,
    };
    let mappable = region.mappable.iter().map(|part| part.len()).sum();
    RegionReport { index: region.index.0, name, size: region.size, mappable }
}

fn id() -> Result<DeviceId, CliError> {
    DeviceId::new("asked").map_err(|error| CliError::caused("cannot ask", &error))
}

fn ram() -> Result<Arc<GuestRam>, CliError> {
    let ram = GuestRam::new("devices", &[RamSpec { gpa: Gpa(0), len: 4096 }])
        .map_err(|error| CliError::caused("cannot ask", &error))?;
    Ok(Arc::new(ram))
}
