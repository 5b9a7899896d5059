//! `devices`: what VFIO devices the host has, and why each can or cannot migrate.

mod ask;
pub(crate) mod report;
mod text;

use std::path::{Path, PathBuf};

use vfio_migration_device::KernelPath;
use vfio_migration_device::host::{self, HostDevice, HostDeviceKind, Roots, Scan};

use self::report::{CanMigrate, DeviceEntry, DevicesReport, FileReport, InterruptCounts, UserReport, reason};
use crate::args::ask::DevicesCommand;
use crate::exit::{CliError, Exit};
use crate::output::{print, print_json};
use crate::words::check_socket_path;

pub(crate) fn run(options: &DevicesCommand) -> Result<Exit, CliError> {
    let roots = options.root.roots();
    let scan = host::scan(&roots);
    let (named, sockets) = named(&options.targets, &roots, &scan)?;
    let wanted = |device: &&HostDevice| match named.is_empty() {
        true => options.all || device.is_candidate(),
        false => named.contains(&device.name),
    };
    let mut report = DevicesReport { devices: Vec::new(), problems: scan.problems.clone() };
    for device in scan.devices.iter().filter(wanted) {
        let mut entry = of_host(device);
        if options.probe && device.openable() {
            ask::host(device, &roots, &mut entry)?;
        }
        report.devices.push(entry);
    }
    for socket in sockets {
        report.devices.push(ask::socket(socket, options.patience.timeout)?);
    }
    if options.json {
        print_json(&report)?
    } else {
        print(text::text(&report))?
    }
    Ok(Exit::Done)
}

/// Separates devices of the host, by name, from sockets.
fn named<'a>(
    targets: &'a [PathBuf],
    roots: &Roots,
    scan: &Scan,
) -> Result<(Vec<String>, Vec<&'a Path>), CliError> {
    let (mut names, mut sockets) = (Vec::new(), Vec::new());
    let vfio = roots.dev.join("vfio");
    for target in targets {
        let parsed = target.to_str().and_then(|text| text.parse::<KernelPath>().ok());
        let is: Box<dyn Fn(&HostDevice) -> bool> = match parsed {
            Some(KernelPath::Pci(name) | KernelPath::Mdev(name)) => {
                Box::new(move |device| device.name == name)
            }
            Some(KernelPath::Group { group, name }) if group.starts_with(&vfio) => {
                Box::new(move |device| device.name == name && device.group_file.as_ref() == Some(&group))
            }
            Some(KernelPath::Cdev(file)) if file.starts_with(&vfio) => {
                Box::new(move |device| device.cdev.as_ref() == Some(&file))
            }
            _ => {
                check_socket_path(target)?;
                sockets.push(target.as_path());
                continue;
            }
        };
        let found = scan.devices.iter().find(|device| is(device)).ok_or_else(|| {
            let shown = target.display();
            CliError::failed(format!(
                "there is no device {shown}; `vfio-migrate devices --all` lists what is"
            ))
        })?;
        names.push(found.name.clone());
    }
    Ok((names, sockets))
}

fn of_host(device: &HostDevice) -> DeviceEntry {
    let shown = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let mut report = DeviceEntry {
        driver: device.driver.clone(),
        variant_driver: device.variant.clone(),
        iommu_group: device.iommu_group,
        group: shown(&device.group_file),
        cdev: shown(&device.cdev),
        files: device
            .needs
            .iter()
            .map(|file| FileReport {
                path: file.path.display().to_string(),
                refusal: file.refusal.map(|errno| errno.to_string()),
            })
            .collect(),
        migration: if device.obstacles.is_empty() { CanMigrate::Unknown } else { CanMigrate::No },
        users: device
            .users
            .iter()
            .map(|user| UserReport { pid: user.pid, command: user.command.clone() })
            .collect(),
        why_not: device.obstacles.iter().map(reason).collect(),
        ..DeviceEntry::blank(device.name.clone(), "other")
    };
    match &device.kind {
        HostDeviceKind::Pci(facts) => {
            report.kind = "pci".into();
            report.id = facts.vendor.zip(facts.device).map(|(vendor, id)| format!("{vendor:04x}:{id:04x}"));
            report.parent = facts.physical.clone();
            let irqs = facts.interrupts;
            report.interrupts = InterruptCounts { intx: irqs.intx, msi: irqs.msi, msix: irqs.msix };
        }
        HostDeviceKind::Mdev { parent, .. } => {
            report.kind = "mdev".into();
            report.parent = parent.clone();
        }
        _ => {}
    }
    report
}
