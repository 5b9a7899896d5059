//! What a host says of itself: what it has, what it could create, what it takes.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::device::{DeviceManifest, Extra};
use crate::parameter::Allowed;
use crate::version::VersionRanges;

/// A host, as a scheduler knows it without asking it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HostManifest {
    /// Name of the host, as a scheduler calls it: reports and matrices use it.
    pub name: String,
    /// CPU features it can give to a guest; `null` when not known.
    #[serde(default)]
    pub cpu: Option<Vec<String>>,
    /// vCPUs it can give.
    #[serde(default)]
    pub vcpus: Option<u32>,
    /// Bytes of memory it can give.
    #[serde(default)]
    pub memory: Option<u64>,
    /// Release of its kernel.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Devices that exist on the host.
    #[serde(default)]
    pub devices: Vec<DeviceManifest>,
    /// Devices it could create.
    #[serde(default)]
    pub offers: Vec<HostOffer>,
    /// What it takes from others; `null` for whatever fits its devices and offers.
    #[serde(default)]
    pub accepts: Option<Vec<Accept>>,
    /// What it can bear.
    #[serde(default)]
    pub limits: Limits,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

/// Devices of one kind that a host could create. A parameter's `allowed` are the values it can be created with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "Offer")]
pub struct HostOffer {
    /// What one is like; its `id` names the offer.
    pub device: DeviceManifest,
    /// How many; `null` when not known, which counts as one.
    #[serde(default)]
    pub count: Option<u32>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

/// A model that a host takes from others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Accept {
    /// Name of the model, as devices declare it.
    pub model: String,
    /// Versions of it, `"1.2.0-1.9.9,2.0.0-"`; `null` for all.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub versions: Option<VersionRanges>,
    /// Values of its parameters; one that is not named may have any.
    #[serde(default)]
    pub parameters: BTreeMap<String, Vec<Allowed>>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What a host can bear. `null` is no limit that is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// Bytes of one device's state.
    #[serde(default)]
    pub max_state_bytes: Option<u64>,
    /// Bytes per second for migrations.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// How many migrations the host takes part in at once.
    #[serde(default)]
    pub parallel: Option<u32>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub extra: Extra,
}
