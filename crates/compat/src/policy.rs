//! What a site allows and asks for, in a file of its own: TOML, or the same as JSON.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vfio_migration_types::DeviceId;

use crate::codes::explain;
use crate::device::PciIdentity;
use crate::error::ManifestError;
use crate::mask::MaskRule;
use crate::tree;

/// A site's policy. The default allows nothing and asks for nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Reasons that count as warnings.
    pub allow: Vec<Allow>,
    /// Most bytes of one device's state.
    pub max_state_size: Option<u64>,
    /// Refuse devices that declare no model.
    pub require_declared_model: bool,
    /// Bytes of config space that are compared, or not, otherwise than by default.
    pub config_mask: Vec<MaskPolicy>,
    /// Which device of the destination stands for which of the source, where names differ.
    pub map: DeviceMap,
}

/// A reason that counts as a warning. What is not named is of no matter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Allow {
    /// Code of the reason: `explain` knows them all.
    pub code: String,
    /// For the device of this name at the source.
    pub device: Option<String>,
    /// For devices of this model.
    pub model: Option<String>,
    /// For this field: `parameters.ecc`.
    pub field: Option<String>,
    /// Why: it is shown with the warning.
    pub reason: Option<String>,
}

/// Rules for the config space of some devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MaskPolicy {
    /// Of this PCI vendor.
    pub vendor: Option<u16>,
    /// Of this PCI device id.
    pub device: Option<u16>,
    /// The rules; later ones win.
    pub rules: Vec<MaskRule>,
    /// Why these bytes may differ, for who reads the policy.
    pub reason: Option<String>,
}

/// Names of devices at the source, and of those that stand for them at the destination.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct DeviceMap(#[schemars(with = "BTreeMap<String, String>")] pub BTreeMap<DeviceId, DeviceId>);

impl DeviceMap {
    /// No map: devices are matched by name.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where `device` goes, when the map says.
    pub fn destination(&self, device: &DeviceId) -> Option<&DeviceId> {
        self.0.get(device)
    }

    /// Whether it maps nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(DeviceId, DeviceId)> for DeviceMap {
    fn from_iter<T: IntoIterator<Item = (DeviceId, DeviceId)>>(pairs: T) -> Self {
        Self(pairs.into_iter().collect())
    }
}

impl Policy {
    /// Longest file, in bytes.
    pub const MAX_BYTES: usize = 1 << 20;
    /// Most entries of a list.
    pub const MAX_ITEMS: usize = 1024;
    /// Most rules for config space, over all devices: a VM tells them to whoever asks it.
    pub const MAX_MASK_RULES: usize = 4096;

    /// Reads a policy: JSON when it begins with `{`, TOML otherwise. `origin`, a file's name for example, goes into
    /// errors.
    ///
    /// # Errors
    /// The path in the document and the rule that it breaks. A field or a code that is not known is refused: a policy
    /// that silently does nothing is none.
    pub fn parse(text: &[u8], origin: &str) -> Result<Self, ManifestError> {
        let policy: Self = tree::read_toml_or_json(text, origin, Self::MAX_BYTES)?;
        policy.check(origin)?;
        Ok(policy)
    }

    fn check(&self, origin: &str) -> Result<(), ManifestError> {
        let wrong = |path: String, rule: String| Err(ManifestError::new(origin, path, rule));
        for (what, count) in
            [("allow", self.allow.len()), ("config_mask", self.config_mask.len()), ("map", self.map.0.len())]
        {
            if count > Self::MAX_ITEMS {
                return wrong(
                    what.into(),
                    format!("{count} entries (at most {} are taken)", Self::MAX_ITEMS),
                );
            }
        }
        let rules = self.config_mask.iter().fold(0, |all: usize, one| all.saturating_add(one.rules.len()));
        if rules > Self::MAX_MASK_RULES {
            let most = Self::MAX_MASK_RULES;
            return wrong("config_mask".into(), format!("{rules} rules (at most {most} are taken)"));
        }
        for (n, allow) in self.allow.iter().enumerate() {
            if explain(&allow.code).is_none() {
                let code = crate::text::quote(&allow.code);
                return wrong(format!("allow[{n}].code"), format!("there is no reason of code {code}"));
            }
        }
        Ok(())
    }

    /// The exceptions for config space of a device: its own, then those of this policy, which win.
    pub fn mask_rules(&self, pci: Option<PciIdentity>, own: &[MaskRule]) -> Vec<MaskRule> {
        let site = self.config_mask.iter().filter(|rules| rules.concern(pci));
        own.iter().chain(site.flat_map(|rules| &rules.rules)).copied().collect()
    }
}

impl MaskPolicy {
    /// Rules for every device.
    pub fn for_all(rules: Vec<MaskRule>) -> Self {
        Self { rules, ..Self::default() }
    }

    /// Whether its rules are for a device of this identity.
    pub(crate) fn concern(&self, pci: Option<PciIdentity>) -> bool {
        let id = |want: Option<u16>, is: fn(PciIdentity) -> u16| {
            want.is_none_or(|want| pci.is_some_and(|pci| is(pci) == want))
        };
        id(self.vendor, |pci| pci.vendor) && id(self.device, |pci| pci.device)
    }
}
