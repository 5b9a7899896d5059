//! `devices`: what VFIO devices the host has, and why each can or cannot migrate.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration_device::host::{self, Code, HostDevice, Kind, Obstacle};
use vfio_migration_device::{Device, IrqIndex, NotMigratable, PciHardware, VfioUserDevice, VfioUserOptions};
use vfio_migration_memory::{GuestRam, RamSpec};
use vfio_migration_types::{DeviceId, Gpa};

use crate::args::Devices;
use crate::exit::{Exit, Failure, chain};
use crate::output::{print, print_json};
use crate::units::show_size;

/// Longest wait for a vfio-user server, for each thing it is asked.
const PATIENCE: Duration = Duration::from_secs(3);

/// What `devices --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct DevicesReport {
    /// The devices.
    pub(crate) devices: Vec<DeviceReport>,
    /// What could not be looked at.
    pub(crate) problems: Vec<String>,
}

/// Whether a device can migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Migration {
    /// The device says so.
    Yes,
    /// Not as it stands; `why-not` has the reasons.
    No,
    /// Nothing speaks against it, but the device was not asked: opening it would reset it.
    Unknown,
}

/// How DMA writes of a device are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DirtyTracking {
    /// The device logs them.
    DeviceLog,
    /// Nothing does: all RAM is sent while the guest stands still, if that is allowed.
    None,
    /// The device was not asked.
    Unknown,
}

/// A device.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct DeviceReport {
    /// PCI address, UUID of an mdev, name on another bus, or socket.
    pub(crate) name: String,
    /// `pci`, `mdev`, `other` or `vfio-user`.
    pub(crate) kind: String,
    /// Driver that has it.
    pub(crate) driver: Option<String>,
    /// VFIO variant driver that the kernel's modules have for it.
    pub(crate) variant_driver: Option<String>,
    /// PCI `VENDOR:DEVICE`, in hexadecimal.
    pub(crate) id: Option<String>,
    /// Physical function of a virtual one, or parent of an mdev.
    pub(crate) parent: Option<String>,
    /// Number of its IOMMU group.
    pub(crate) iommu_group: Option<u32>,
    /// File of its group.
    pub(crate) group: Option<String>,
    /// Its own file.
    pub(crate) cdev: Option<String>,
    /// Whether it can migrate.
    pub(crate) migration: Migration,
    /// `STOP_COPY`, `P2P`, `PRE_COPY`; absent when it was not asked.
    pub(crate) flags: Option<Vec<String>>,
    /// How its DMA writes are known.
    pub(crate) dirty_tracking: DirtyTracking,
    /// Estimated bytes of its state while stopped.
    pub(crate) stop_copy_size: Option<u64>,
    /// Interrupts.
    pub(crate) interrupts: InterruptCounts,
    /// Who has it open.
    pub(crate) users: Vec<UserReport>,
    /// Why it cannot migrate as it stands.
    pub(crate) why_not: Vec<Reason>,
}

/// Numbers of interrupts; absent where they could not be read.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct InterruptCounts {
    /// The pin.
    pub(crate) intx: Option<u32>,
    /// MSI vectors.
    pub(crate) msi: Option<u32>,
    /// MSI-X vectors.
    pub(crate) msix: Option<u32>,
}

/// A process.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct UserReport {
    /// Its id.
    pub(crate) pid: u32,
    /// Its name.
    pub(crate) command: Option<String>,
}

/// A reason.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct Reason {
    /// Stable.
    pub(crate) code: String,
    /// In a sentence.
    pub(crate) text: String,
    /// What would change it.
    pub(crate) change: String,
    /// The commands for it, as root, in order.
    pub(crate) commands: Vec<String>,
}

pub(crate) fn run(options: &Devices) -> Result<Exit, Failure> {
    let scan = host::scan(&options.root.roots());
    let wanted = |device: &&HostDevice| options.all || device.is_candidate();
    let mut report = DevicesReport {
        devices: scan.devices.iter().filter(wanted).map(of_host).collect(),
        problems: scan.problems,
    };
    for socket in &options.sockets {
        report.devices.push(of_socket(socket)?);
    }
    if options.json {
        print_json(&report)?
    } else {
        print(text(&report))?
    }
    Ok(Exit::Done)
}

fn of_host(device: &HostDevice) -> DeviceReport {
    let shown = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let mut report = DeviceReport {
        driver: device.driver.clone(),
        variant_driver: device.variant.clone(),
        iommu_group: device.iommu_group,
        group: shown(&device.group_file),
        cdev: shown(&device.cdev),
        migration: if device.obstacles.is_empty() { Migration::Unknown } else { Migration::No },
        users: device
            .users
            .iter()
            .map(|user| UserReport { pid: user.pid, command: user.command.clone() })
            .collect(),
        why_not: device.obstacles.iter().map(reason).collect(),
        ..blank(device.name.clone(), "other")
    };
    match &device.kind {
        Kind::Pci(facts) => {
            report.kind = "pci".into();
            report.id = facts.vendor.zip(facts.device).map(|(vendor, id)| format!("{vendor:04x}:{id:04x}"));
            report.parent = facts.physical.clone();
            let irqs = facts.interrupts;
            report.interrupts = InterruptCounts { intx: irqs.intx, msi: irqs.msi, msix: irqs.msix };
        }
        Kind::Mdev { parent, .. } => {
            report.kind = "mdev".into();
            report.parent = parent.clone();
        }
        _ => {}
    }
    report
}

/// Asks a vfio-user server. It is left in the state it is in.
fn of_socket(socket: &Path) -> Result<DeviceReport, Failure> {
    let mut report = blank(socket.display().to_string(), "vfio-user");
    let id = DeviceId::new("asked").map_err(|error| Failure::caused("cannot ask", &error))?;
    let ram = GuestRam::new("devices", &[RamSpec { gpa: Gpa(0), len: 4096 }])
        .map_err(|error| Failure::caused("cannot ask", &error))?;
    let options = VfioUserOptions {
        timeout: PATIENCE,
        connect_timeout: Duration::ZERO,
        keep_state: true,
        ..VfioUserOptions::default()
    };
    let device = match VfioUserDevice::open(id, socket, Arc::new(ram), &options) {
        Ok(device) => device,
        Err(error) => {
            report.migration = Migration::No;
            let change = "start its server; a server that another VMM uses answers nobody else";
            report.why_not.push(reason(&Obstacle::new(Code::NoAnswer, chain(&error), change, vec![])));
            return Ok(report);
        }
    };
    let count = |kind| Some(device.irq_count(kind));
    report.interrupts = InterruptCounts {
        intx: count(IrqIndex::Intx),
        msi: count(IrqIndex::Msi),
        msix: count(IrqIndex::Msix),
    };
    match device.capabilities() {
        Ok(capabilities) => {
            let flags = [
                (true, "STOP_COPY"),
                (capabilities.flags.p2p, "P2P"),
                (capabilities.flags.pre_copy, "PRE_COPY"),
            ];
            report.flags =
                Some(flags.iter().filter(|(has, _)| *has).map(|(_, name)| (*name).into()).collect());
            report.migration = Migration::Yes;
            report.dirty_tracking =
                if capabilities.dirty_log { DirtyTracking::DeviceLog } else { DirtyTracking::None };
            report.stop_copy_size = device.stop_copy_size().unwrap_or_else(|error| {
                tracing::warn!("{}: {}", socket.display(), chain(&error));
                None
            });
            match device.manifest() {
                Ok(manifest) => {
                    report.id = manifest.pci.map(|pci| format!("{:04x}:{:04x}", pci.vendor, pci.device));
                }
                Err(error) => tracing::warn!("{}: {}", socket.display(), chain(&error)),
            }
        }
        Err(NotMigratable(why)) => {
            report.migration = Migration::No;
            let change = "a server that implements migration";
            report.why_not.push(reason(&Obstacle::new(Code::NoMigrationInServer, why, change, vec![])));
        }
    }
    Ok(report)
}

fn blank(name: String, kind: &str) -> DeviceReport {
    DeviceReport {
        name,
        kind: kind.into(),
        driver: None,
        variant_driver: None,
        id: None,
        parent: None,
        iommu_group: None,
        group: None,
        cdev: None,
        migration: Migration::Unknown,
        flags: None,
        dirty_tracking: DirtyTracking::Unknown,
        stop_copy_size: None,
        interrupts: InterruptCounts::default(),
        users: Vec::new(),
        why_not: Vec::new(),
    }
}

fn reason(obstacle: &Obstacle) -> Reason {
    Reason {
        code: obstacle.code.name().into(),
        text: obstacle.text.clone(),
        change: obstacle.change.clone(),
        commands: obstacle.commands.clone(),
    }
}

/// The report for people.
fn text(report: &DevicesReport) -> String {
    let mut text = String::new();
    let width = report.devices.iter().map(|device| device.name.chars().count()).max().unwrap_or(0);
    for device in &report.devices {
        let count = |n: Option<u32>| n.map_or("?".to_owned(), |n| n.to_string());
        let or_dash = |word: &Option<String>| word.clone().unwrap_or_else(|| "-".into());
        let irqs = device.interrupts;
        let migration = match (device.migration, &device.flags) {
            (Migration::Yes, Some(flags)) => flags.join(" "),
            (Migration::Yes, None) => "yes".into(),
            (Migration::No, _) => "no".into(),
            (Migration::Unknown, _) => "unknown (the device was not opened)".into(),
        };
        text.push_str(&format!(
            "{:width$}  {:9}  {:20}  {:9}  group {:4}  intx {} msi {} msix {}  migration: {migration}\n",
            device.name,
            device.kind,
            or_dash(&device.driver),
            or_dash(&device.id),
            device.iommu_group.map_or("-".into(), |group| group.to_string()),
            count(irqs.intx),
            count(irqs.msi),
            count(irqs.msix),
        ));
        if device.migration == Migration::Yes {
            let size = device.stop_copy_size.map_or("not said".into(), show_size);
            let log = if device.dirty_tracking == DirtyTracking::DeviceLog { "device log" } else { "none" };
            text.push_str(&format!("    dirty tracking: {log}; state: {size}\n"));
        }
        for file in device.cdev.iter().chain(&device.group) {
            text.push_str(&format!("    {file}\n"));
        }
        for why in &device.why_not {
            text.push_str(&format!("    {}: {}; to change it: {}\n", why.code, why.text, why.change));
            for command in &why.commands {
                text.push_str(&format!("        {command}\n"));
            }
        }
    }
    if report.devices.is_empty() {
        text.push_str(
            "no VFIO device, and none that could be one; `vfio-migrate doctor` looks at the host\n",
        );
    }
    for problem in &report.problems {
        text.push_str(&format!("not looked at: {problem}\n"));
    }
    text
}
