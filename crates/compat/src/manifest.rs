//! What a machine and its devices say of themselves.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vfio_migration_types::{DeviceId, Gpa, MigrationFlags};

/// A machine: what the guest would notice if it differed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineManifest {
    /// What kind of machine this is, for example `"vfio-migrate/q1"`: compared as it stands.
    pub machine: String,
    /// Hypervisor behind the vCPUs: `"kvm"` or `"software"`. State does not move between the two.
    pub accelerator: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// RAM, in the order of its RAM offsets.
    pub ram: Vec<RamRegion>,
    /// CPU features the guest was given and the destination must be able to give, by name: opaque words that are
    /// compared as sets (the destination may offer more).
    pub cpu: Vec<String>,
    /// Names and versions of the machine-state sections that will be sent; the other side must load each.
    pub sections: BTreeMap<String, u32>,
    /// The devices, by name.
    pub devices: Vec<DeviceManifest>,
}

/// One piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamRegion {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Bytes, a multiple of 4096.
    pub len: u64,
}

/// A device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceManifest {
    /// Name, equal on both sides.
    pub id: DeviceId,
    /// Model, independent of the implementation, for example `"vfio-migrate.org/sample"`; absent when nothing declares one.
    pub model: Option<String>,
    /// Version of the model, `major.minor`.
    pub model_version: Option<String>,
    /// `"vfio-user"` or `"kernel"`: informative, never compared, since both may serve one model.
    pub backend: String,
    /// What its migration supports.
    pub flags: MigrationFlags,
    /// PCI identity, when it is a PCI function.
    pub pci: Option<PciIdentity>,
    /// Regions, by VFIO region index.
    pub regions: Vec<RegionManifest>,
    /// Vectors per VFIO IRQ index.
    pub irqs: BTreeMap<u32, u32>,
    /// Model parameters that must be equal, for example `"state_size"`.
    pub parameters: BTreeMap<String, String>,
}

/// Identity words of a PCI function's config space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Revision.
    pub revision: u8,
    /// Class code, 24 bits.
    pub class: u32,
}

/// A VFIO region of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionManifest {
    /// VFIO region index: 0 to 5 are BARs, 7 is config space.
    pub index: u32,
    /// Bytes.
    pub size: u64,
}
