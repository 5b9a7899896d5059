//! Obstacles of a device, from what was found of it. The order is that in which a person would clear them.

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::device::{HostDevice, HostDeviceKind};
use super::obstacle::{Obstacle, ObstacleCode};
use super::opening::NeededFile;

/// VFIO drivers in Linux 7.3 that have no migration, by the name of the driver: `drivers/vfio/pci/vfio_pci.c`,
/// `nvgrace-gpu`, `ism`, `platform`, `fsl-mc`, `cdx`, and s390's.
const WITHOUT_MIGRATION: [&str; 10] = [
    "vfio-pci",
    "nvgrace_gpu_vfio_pci",
    "nvgrace-gpu-vfio-pci",
    "ism_vfio_pci",
    "vfio-platform",
    "vfio-amba",
    "vfio-fsl-mc",
    "vfio-cdx",
    "vfio_ap_mdev",
    "vfio_ccw_mdev",
];

/// Facts of the host, and of its group, that a device is judged by.
pub(super) struct Surroundings<'a> {
    pub(super) sys: &'a Path,
    /// VFIO is loaded.
    pub(super) vfio: bool,
    /// The kernel's configuration says that it has none to load.
    pub(super) built_without: bool,
    /// The group is one without an IOMMU.
    pub(super) noiommu: bool,
    /// Members of its group that keep it from VFIO.
    pub(super) strangers: &'a [String],
}

/// Everything that speaks against `device`.
pub(super) fn obstacles(device: &HostDevice, place: &Surroundings<'_>) -> Vec<Obstacle> {
    let mut found = Vec::new();
    if let HostDeviceKind::Pci(facts) = &device.kind {
        if facts.vendor.is_none() {
            let change = "look at what sysfs holds for it, and at the kernel log";
            found.push(Obstacle::new(
                ObstacleCode::Unreadable,
                "sysfs does not say what it is",
                change,
                vec![],
            ));
            return found;
        }
        let sriov = facts.sriov.filter(|_| facts.physical.is_none() && !device.vfio);
        if let Some(sriov) = sriov {
            found.push(physical(device, sriov.total, sriov.now));
            return found;
        }
    }
    if !place.vfio && !device.vfio && place.built_without {
        let change = "a kernel with CONFIG_VFIO";
        found.push(Obstacle::new(ObstacleCode::NoVfio, "the kernel is built without VFIO", change, vec![]));
    } else if !place.vfio && !device.vfio {
        let commands = vec!["modprobe vfio-pci".to_owned()];
        let change = "load VFIO; see `vfio-migrate doctor`";
        found.push(Obstacle::new(ObstacleCode::NoVfio, "the kernel has no VFIO loaded", change, commands));
    }
    let pci = matches!(device.kind, HostDeviceKind::Pci(_));
    if pci && device.iommu_group.is_none() {
        let change = "turn the IOMMU on in the firmware (VT-d, AMD-Vi) and in the kernel (intel_iommu=on), and restart";
        found.push(Obstacle::new(ObstacleCode::NoIommuGroup, "it is in no IOMMU group", change, vec![]));
    }
    if place.noiommu {
        let change = "use an IOMMU, and load vfio without enable_unsafe_noiommu_mode";
        let text = "VFIO runs without an IOMMU here, and maps no guest memory";
        found.push(Obstacle::new(ObstacleCode::NoIommu, text, change, vec![]));
    }
    if device.vfio {
        bound(device, place, &mut found)
    } else {
        found.push(not_bound(device, place))
    }
    found
}

fn physical(device: &HostDevice, total: u32, now: u32) -> Obstacle {
    let text = format!("it is a physical function ({now} of {total} virtual functions made): those migrate");
    let name = &device.name;
    let (change, commands) = match (&device.driver, now) {
        (_, 1..) => ("give the guest one of its virtual functions", vec![]),
        (None, 0) => (
            "bind it to its host driver, and make virtual functions",
            vec![
                format!("echo {name} > /sys/bus/pci/drivers_probe"),
                format!("echo 1 > /sys/bus/pci/devices/{name}/sriov_numvfs"),
            ],
        ),
        (Some(_), 0) => {
            ("make virtual functions", vec![format!("echo 1 > /sys/bus/pci/devices/{name}/sriov_numvfs")])
        }
    };
    Obstacle::new(ObstacleCode::PhysicalFunction, text, change, commands)
}

fn not_bound(device: &HostDevice, place: &Surroundings<'_>) -> Obstacle {
    let mut commands = Vec::new();
    let binds = device.driver.is_none() && device.iommu_group.is_some() && !place.built_without;
    let change = match (&device.kind, &device.variant) {
        (HostDeviceKind::Pci(_), Some(variant)) => {
            commands = rebind(device, variant, place);
            format!("bind it to its VFIO variant driver {variant}")
        }
        (HostDeviceKind::Pci(_), None) if binds => {
            commands = rebind(device, "vfio-pci", place);
            "bind it to vfio-pci: a guest can have it then, but cannot migrate with it, since no VFIO variant driver of \
             this kernel is made for it"
                .into()
        }
        // No command that takes a device from the host for so little.
        (HostDeviceKind::Pci(_), None) => {
            "no VFIO variant driver of this kernel is made for it; vfio-pci would take it, without migration"
                .into()
        }
        _ => "load the VFIO driver of its parent".into(),
    };
    match &device.driver {
        None => Obstacle::new(ObstacleCode::Unbound, "no driver has it", change, commands),
        Some(driver) => Obstacle::new(
            ObstacleCode::HostDriver,
            format!("the host's driver {driver} has it"),
            change,
            commands,
        ),
    }
}

fn bound(device: &HostDevice, place: &Surroundings<'_>, found: &mut Vec<Obstacle>) {
    let driver = device.driver.as_deref().unwrap_or("?");
    if WITHOUT_MIGRATION.contains(&driver) {
        let (change, commands) = match &device.variant {
            Some(variant) => {
                (format!("bind it to its VFIO variant driver {variant}"), rebind(device, variant, place))
            }
            None => ("a VFIO variant driver for it; no module of this kernel is one".into(), vec![]),
        };
        let text = format!("its driver {driver} has no migration");
        found.push(Obstacle::new(ObstacleCode::NoMigrationInDriver, text, change, commands));
    }
    if !place.strangers.is_empty() {
        let text = format!("others in its IOMMU group belong to the host: {}", place.strangers.join(", "));
        let unbind = |stranger: &String| {
            let name = stranger.split(' ').next().unwrap_or_default();
            format!("echo {name} > /sys/bus/pci/devices/{name}/driver/unbind")
        };
        let change = "take them from their drivers, if the host can do without them";
        found.push(Obstacle::new(
            ObstacleCode::GroupNotViable,
            text,
            change,
            place.strangers.iter().map(unbind).collect(),
        ));
    }
    files(device, found);
    if !device.users.is_empty() {
        let users = device.users.iter().map(|user| {
            let command = user.command.as_deref().unwrap_or("unknown");
            format!("{} ({command})", user.pid)
        });
        let users = users.collect::<Vec<_>>().join(", ");
        let (process, has) = if device.users.len() == 1 { ("process", "has") } else { ("processes", "have") };
        let text = format!("{process} {users} {has} it, or its group, open");
        let change = "to move it, ask the VMM that has it; to look into it, end that VMM first";
        found.push(Obstacle::new(ObstacleCode::InUse, text, change, vec![]));
    }
}

/// Whether the caller could open it, with all that it takes.
fn files(device: &HostDevice, found: &mut Vec<Obstacle>) {
    if device.needs.is_empty() {
        let text = "it has neither a file under /dev/vfio/devices nor a group's under /dev/vfio";
        let change = "let udev make it, or, in a container, pass it in";
        found.push(Obstacle::new(ObstacleCode::NoDeviceFile, text, change, vec![]));
    }
    let refused = |file: &NeededFile| file.refusal.map(|errno| (file.path.clone(), errno));
    let (gone, closed): (Vec<_>, Vec<_>) =
        device.needs.iter().filter_map(refused).partition(|(_, errno)| *errno == Errno::NOENT);
    for (path, _) in &gone {
        let text = format!("there is no {}", path.display());
        let (change, module) = match path.file_name().and_then(|name| name.to_str()) {
            Some("iommu") => ("load iommufd, on a kernel with CONFIG_IOMMUFD", "iommufd"),
            _ => ("load VFIO's containers, or, in a container, pass the file in", "vfio_iommu_type1"),
        };
        found.push(Obstacle::new(
            ObstacleCode::NoDeviceFile,
            text,
            change,
            vec![format!("modprobe {module}")],
        ));
    }
    if !closed.is_empty() {
        let text = |(path, errno): &(PathBuf, Errno)| format!("{}: {errno}", path.display());
        let text = format!(
            "opening it takes what this user may not open: {}",
            closed.iter().map(text).collect::<Vec<_>>().join("; ")
        );
        let user = rustix::process::geteuid().as_raw();
        let commands =
            closed.iter().map(|(path, _)| format!("setfacl -m u:{user}:rw {}", path.display())).collect();
        let change = format!("let the VMM's user (this one: {user}) open it");
        found.push(Obstacle::new(ObstacleCode::NoPermission, text, change, commands));
    }
}

/// Commands that give a PCI function to `driver`.
fn rebind(device: &HostDevice, driver: &str, place: &Surroundings<'_>) -> Vec<String> {
    let name = &device.name;
    // A PCI driver's name is mostly its module's, but not always in its dashes: the folder of the bus knows, once it is
    // loaded.
    let dashed = driver.replace('_', "-");
    let drivers = place.sys.join("bus/pci/drivers");
    let known = if drivers.join(&dashed).is_dir() { dashed.as_str() } else { driver };
    let mut commands = vec![
        format!("modprobe {driver}"),
        format!("echo {known} > /sys/bus/pci/devices/{name}/driver_override"),
    ];
    if device.driver.is_some() {
        commands.push(format!("echo {name} > /sys/bus/pci/devices/{name}/driver/unbind"));
    }
    commands.push(format!("echo {name} > /sys/bus/pci/drivers_probe"));
    commands
}
