//! What a machine says of itself.

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration_types::Gpa;

use crate::device::{DeviceManifest, Extra};
use crate::policy::MaskPolicy;

/// A machine: what the guest would notice if it differed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MachineManifest {
    /// What kind of machine this is, for example `"vfio-migrate/q1"`: compared as it stands.
    pub machine: String,
    /// Hypervisor behind the vCPUs: `"kvm"` or `"software"`. State does not move between the two.
    pub accelerator: String,
    /// How many vCPUs the guest has: compared for equality.
    pub vcpus: u32,
    /// RAM, in the order of its RAM offsets. None: it takes the RAM of the guest that arrives.
    pub ram: Vec<RamRegion>,
    /// CPU features the guest was given and the destination must be able to give, by name: opaque words that are
    /// compared as sets (the destination may offer more).
    pub cpu: Vec<String>,
    /// Names and versions of the machine-state sections that will be sent; the other side must load each.
    pub sections: BTreeMap<String, u32>,
    /// The devices, by name.
    pub devices: Vec<DeviceManifest>,
    /// Rules for config space under which it takes a guest: those of its site and of its command line, over its devices' own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub config_rules: Vec<MaskPolicy>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

/// One piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RamRegion {
    /// Where the guest sees it.
    #[schemars(with = "u64")]
    pub gpa: Gpa,
    /// Bytes, a multiple of 4096.
    pub len: u64,
}

impl MachineManifest {
    /// Bytes of guest RAM, over all regions.
    pub fn memory(&self) -> u64 {
        self.ram.iter().fold(0, |all, region| all.saturating_add(region.len))
    }

    /// This machine as a destination of `guest`: with the guest's RAM, where it has none of its own. For manifests that are compared
    /// ahead of a migration; the machine that takes part in one has the RAM that it has.
    pub fn with_ram_of(&self, guest: &Self) -> Cow<'_, Self> {
        if self.ram.is_empty() && !guest.ram.is_empty() {
            Cow::Owned(Self { ram: guest.ram.clone(), ..self.clone() })
        } else {
            Cow::Borrowed(self)
        }
    }
}
