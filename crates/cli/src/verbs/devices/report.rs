//! The report of `devices`, as its JSON has it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration_device::host::Obstacle;

/// What `devices --json` prints.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct DevicesReport {
    /// One entry for each device that was found.
    pub(crate) devices: Vec<DeviceEntry>,
    /// What could not be looked at.
    pub(crate) problems: Vec<String>,
}

/// Whether a device can migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "Migration")]
pub(crate) enum CanMigrate {
    /// The device says so.
    Yes,
    /// Not as it stands; `why-not` has the reasons.
    No,
    /// Nothing speaks against it, but the device was not asked: opening it resets it, which `--probe` allows.
    Unknown,
}

/// How DMA writes of a device are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "DirtyTracking")]
pub(crate) enum DirtyTrackingKind {
    /// The device logs them.
    DeviceLog,
    /// The IOMMU does, through iommufd.
    Iommufd,
    /// The type1 container does, for a mediated device: what the device has pinned.
    Type1,
    /// Nothing does: all RAM is sent while the guest is paused, if that is allowed.
    None,
    /// The device was not asked.
    Unknown,
}

/// What is known of one device, and what it said if it was asked.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "DeviceReport")]
pub(crate) struct DeviceEntry {
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
    /// The device's own file, `/dev/vfio/devices/vfioN`; absent where the kernel makes none.
    pub(crate) cdev: Option<String>,
    /// What has to be opened to open it, and whether this user may.
    pub(crate) files: Vec<FileReport>,
    /// It was opened and asked: what follows is its own word.
    pub(crate) probed: bool,
    /// Whether it can migrate.
    pub(crate) migration: CanMigrate,
    /// `STOP_COPY`, `P2P`, `PRE_COPY`; absent when it was not asked.
    pub(crate) flags: Option<Vec<String>>,
    /// Its migration state (`RUNNING`, `STOP`, …); absent when it was not asked.
    pub(crate) state: Option<String>,
    /// How its DMA writes are known.
    pub(crate) dirty_tracking: DirtyTrackingKind,
    /// Why by that and nothing better, and what follows; absent when it was not asked.
    pub(crate) dirty_tracking_why: Option<String>,
    /// Estimated bytes of its state while stopped.
    pub(crate) stop_copy_size: Option<u64>,
    /// Number of interrupts, by kind.
    pub(crate) interrupts: InterruptCounts,
    /// Its regions; absent when it was not asked.
    pub(crate) regions: Option<Vec<RegionReport>>,
    /// Who has it open.
    pub(crate) users: Vec<UserReport>,
    /// Why it cannot migrate as it stands.
    pub(crate) why_not: Vec<WhyNot>,
}

/// Numbers of interrupts; absent where they could not be read.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub(crate) struct InterruptCounts {
    /// Interrupts by the pin (INTx).
    pub(crate) intx: Option<u32>,
    /// How many MSI vectors it has at most.
    pub(crate) msi: Option<u32>,
    /// How many MSI-X vectors it has.
    pub(crate) msix: Option<u32>,
}

/// A file that opens a device.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct FileReport {
    /// Path of the file.
    pub(crate) path: String,
    /// Why this user may not open it; absent when it may.
    pub(crate) refusal: Option<String>,
}

/// A region of a device.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct RegionReport {
    /// Index of the region, as VFIO numbers them.
    pub(crate) index: u32,
    /// `bar0` to `bar5`, `rom`, `config`, `vga`; absent for one of the driver's own.
    pub(crate) name: Option<String>,
    /// Size of the region, in bytes.
    pub(crate) size: u64,
    /// Bytes of it that may be mapped.
    pub(crate) mappable: u64,
}

/// A process that has a device open.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
pub(crate) struct UserReport {
    /// Id of the process on this host.
    pub(crate) pid: u32,
    /// Name of the command that it runs, where that can be read.
    pub(crate) command: Option<String>,
}

/// A reason why a device cannot migrate as it stands.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Reason")]
pub(crate) struct WhyNot {
    /// Stable code of the reason.
    pub(crate) code: String,
    /// The reason in a sentence.
    pub(crate) text: String,
    /// What would change it.
    pub(crate) change: String,
    /// The commands for it, as root, in order.
    pub(crate) commands: Vec<String>,
}

impl DeviceEntry {
    /// Of a device of which no more is known.
    pub(super) fn blank(name: String, kind: &str) -> Self {
        Self {
            name,
            kind: kind.into(),
            driver: None,
            variant_driver: None,
            id: None,
            parent: None,
            iommu_group: None,
            group: None,
            cdev: None,
            files: Vec::new(),
            probed: false,
            migration: CanMigrate::Unknown,
            flags: None,
            state: None,
            dirty_tracking: DirtyTrackingKind::Unknown,
            dirty_tracking_why: None,
            stop_copy_size: None,
            interrupts: InterruptCounts::default(),
            regions: None,
            users: Vec::new(),
            why_not: Vec::new(),
        }
    }

    /// Adds a reason why it cannot migrate.
    pub(super) fn add_obstacle(&mut self, obstacle: &Obstacle) {
        self.migration = CanMigrate::No;
        self.why_not.push(reason(obstacle));
    }
}

pub(super) fn reason(obstacle: &Obstacle) -> WhyNot {
    WhyNot {
        code: obstacle.code.name().into(),
        text: obstacle.text.clone(),
        change: obstacle.change.clone(),
        commands: obstacle.commands.clone(),
    }
}
