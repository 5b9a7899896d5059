//! What a device says of itself.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration_types::{DeviceId, MigrationFlags};

use crate::address::GuestPciAddress;
use crate::mask::MaskRule;
use crate::parameter::Parameter;
use crate::scalar::Scalar;
use crate::version::VersionRanges;

/// Fields that this version does not know, kept as they came.
pub type Extra = BTreeMap<String, serde_json::Value>;

/// A device. What is not known is `null`, never guessed; a field that is absent is not known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceManifest {
    /// Name that the VMM gave it. Devices are matched by it, or by an explicit map.
    #[schemars(with = "String")]
    pub id: DeviceId,
    /// Model, independent of the implementation, for example `"vfio-migrate.org/sample"`; `null` when nothing declares
    /// one: equality is strict then.
    #[serde(default)]
    pub model: Option<String>,
    /// Version of the model, `X.Y.Z` (or `X.Y`, where Z is 0).
    #[serde(default)]
    pub model_version: Option<String>,
    /// Versions it loads besides those of its own major that are no newer than its own minor: `"1.2.0-1.9.9,2.0.0-"`.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub loads: Option<VersionRanges>,
    /// Parameters of the model.
    #[serde(default)]
    pub parameters: BTreeMap<String, Parameter>,
    /// `"vfio-user"` or `"kernel"`: never compared, since both may serve one model.
    #[serde(default)]
    pub backend: String,
    /// The driver that serves it.
    #[serde(default)]
    pub driver: Option<Driver>,
    /// Release of the kernel that the driver is part of. Not compared.
    #[serde(default)]
    pub kernel: Option<String>,
    /// A mediated device's type, `mtty-2`.
    #[serde(default)]
    pub mdev_type: Option<String>,
    /// What its migration supports.
    #[serde(default)]
    #[schemars(with = "Option<FlagsSchema>")]
    pub flags: Option<MigrationFlags>,
    /// Why it cannot migrate at all, in a sentence; `null` where it can, or where nobody asked.
    #[serde(default)]
    pub no_migration: Option<String>,
    /// PCI identity, when it is a PCI function.
    #[serde(default)]
    pub pci: Option<PciIdentity>,
    /// Where its guest sees it; `null` for a device that no guest has, or one that is no PCI function to its guest.
    #[serde(default)]
    pub guest_address: Option<GuestPciAddress>,
    /// Regions, by VFIO region index. One of no bytes is one that is not there.
    #[serde(default)]
    pub regions: Option<Vec<RegionManifest>>,
    /// Chain of capabilities, standard and extended.
    #[serde(default)]
    pub capabilities: Option<Vec<Capability>>,
    /// Bytes of config space that are compared, or not, otherwise than by default.
    #[serde(default)]
    pub config_mask: Vec<MaskRule>,
    /// Vectors per VFIO IRQ index.
    #[serde(default)]
    pub irqs: Option<BTreeMap<u32, u32>>,
    /// Who logs its DMA writes.
    #[serde(default)]
    pub dirty: Option<DirtyTracking>,
    /// Version of its firmware.
    #[serde(default)]
    pub firmware: Option<String>,
    /// Version of the host's driver behind it, where that is another than [`driver`](Self::driver): a vGPU manager.
    #[serde(default)]
    pub host_driver: Option<String>,
    /// What it has of things that are counted, `"vram"` in bytes. Not compared.
    #[serde(default)]
    pub capacity: BTreeMap<String, u64>,
    /// Page sizes of the IOMMU before it, one bit each.
    #[serde(default)]
    pub iommu_page_sizes: Option<u64>,
    /// Estimated bytes of its state. Not compared with that of the other side.
    #[serde(default)]
    pub state_size: Option<u64>,
    /// What the rules of its driver compare: mtty's `"ports"`, hisi_acc's `"qp_num"`.
    #[serde(default)]
    pub facts: BTreeMap<String, Scalar>,
    /// What its maker declared, and has no effect. Not compared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<ManifestNote>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A field that a device's maker declared, and that has no effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ManifestNote {
    /// Path of the field, as it was declared: `parameters.queues.alowed`.
    pub field: String,
    /// Why it has no effect, in a sentence.
    pub text: String,
}

impl DeviceManifest {
    /// A device of which only the name is known.
    pub fn new(id: DeviceId) -> Self {
        Self {
            id,
            model: None,
            model_version: None,
            loads: None,
            parameters: BTreeMap::new(),
            backend: String::new(),
            driver: None,
            kernel: None,
            mdev_type: None,
            flags: None,
            no_migration: None,
            pci: None,
            guest_address: None,
            regions: None,
            capabilities: None,
            config_mask: Vec::new(),
            irqs: None,
            dirty: None,
            firmware: None,
            host_driver: None,
            capacity: BTreeMap::new(),
            iommu_page_sizes: None,
            state_size: None,
            facts: BTreeMap::new(),
            notes: Vec::new(),
            extra: Extra::new(),
        }
    }

    /// The name of its driver.
    pub fn driver_name(&self) -> Option<&str> {
        self.driver.as_ref().map(|driver| driver.name.as_str())
    }
}

impl Default for DeviceManifest {
    /// A device called `unnamed`.
    fn default() -> Self {
        Self::new(DeviceId::new("unnamed").expect("a legal name"))
    }
}

/// The host driver that a device is bound to: a VFIO variant driver, or the server of a vfio-user device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Driver {
    /// As the kernel calls it: `mlx5_vfio_pci`.
    pub name: String,
    /// Its own version, of the module; `null` where it has none besides its kernel's.
    #[serde(default)]
    pub version: Option<String>,
    /// Vendor of a driver that is not the kernel's own. Not compared.
    #[serde(default)]
    pub vendor: Option<String>,
}

impl Driver {
    /// A driver of which only the name is known.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), version: None, vendor: None }
    }
}

/// Identity words of a PCI function's config space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PciIdentity {
    /// Vendor id, config space 0x00.
    pub vendor: u16,
    /// Device id, config space 0x02.
    pub device: u16,
    /// Subsystem vendor id, config space 0x2c.
    pub subsystem_vendor: u16,
    /// Subsystem id, config space 0x2e.
    pub subsystem: u16,
    /// Revision id, config space 0x08.
    pub revision: u8,
    /// Class code, 24 bits.
    pub class: u32,
}

/// A VFIO region of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RegionManifest {
    /// VFIO region index: 0 to 5 are BARs, 7 is config space.
    pub index: u32,
    /// Size of the region, in bytes.
    pub size: u64,
    /// It may be read.
    #[serde(default)]
    pub read: Option<bool>,
    /// It may be written.
    #[serde(default)]
    pub write: Option<bool>,
    /// Some of it may be mapped. Not compared: a VMM can trap what it cannot map.
    #[serde(default)]
    pub mmap: Option<bool>,
}

/// A capability of a PCI function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub struct Capability {
    /// Of those in extended config space, whose ids are numbers of their own.
    #[serde(default)]
    pub extended: bool,
    /// PCI capability id: 0x11 is MSI-X.
    pub id: u16,
    /// Where in config space it is.
    pub offset: u16,
    /// Bytes, where it says.
    #[serde(default)]
    pub len: Option<u16>,
}

/// Who logs a device's DMA writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DirtyTracking {
    /// The device logs its own writes (`VFIO_DEVICE_FEATURE_DMA_LOGGING_START`).
    #[serde(default)]
    pub device_log: Option<bool>,
    /// The IOMMU before it.
    #[serde(default)]
    pub iommu: Option<bool>,
    /// The container (type1), for a mediated device.
    #[serde(default)]
    pub container: Option<bool>,
    /// All that it may write counts as dirty, each time.
    #[serde(default)]
    pub all_dirty: Option<bool>,
    /// Sizes of the pages that are logged, one bit each.
    #[serde(default)]
    pub page_sizes: Option<u64>,
}

/// [`MigrationFlags`] in a schema.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
struct FlagsSchema {
    /// `VFIO_MIGRATION_P2P`: it can be kept from writing to its peers before it is stopped.
    p2p: bool,
    /// `VFIO_MIGRATION_PRE_COPY`: its state can be read while it runs.
    pre_copy: bool,
}
