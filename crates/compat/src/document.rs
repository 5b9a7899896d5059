//! A machine's manifest as a JSON document, as it comes from a stranger.

use std::collections::BTreeSet;

use crate::MachineManifest;

/// Why a document is no manifest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ManifestError {
    /// It has too many bytes.
    #[error("a manifest of {0} bytes (at most {max} are taken)", max = MachineManifest::MAX_BYTES)]
    TooLong(usize),
    /// It is not JSON, or not the JSON of a manifest; a field that this version does not know is refused too.
    #[error("the document is no machine manifest")]
    Malformed(#[source] serde_json::Error),
    /// It has too many of something.
    #[error("the manifest has {count} {what} (at most {max} are taken)")]
    TooMany {
        /// Of what, plural.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many are taken.
        max: usize,
    },
    /// It names something twice.
    #[error("the manifest has {0} twice")]
    Twice(String),
}

impl MachineManifest {
    /// Longest document, in bytes.
    pub const MAX_BYTES: usize = 1 << 20;
    /// Most devices.
    pub const MAX_DEVICES: usize = 64;
    /// Most of anything else that is counted: sections, CPU features, RAM regions; regions, IRQs and parameters of one device.
    pub const MAX_ITEMS: usize = 4096;

    /// The manifest as JSON: UTF-8, compact, the same bytes for the same manifest.
    ///
    /// # Errors
    /// [`from_json`](Self::from_json) would not take it back.
    pub fn to_json(&self) -> Result<Vec<u8>, ManifestError> {
        self.check()?;
        let json = serde_json::to_vec(self).map_err(ManifestError::Malformed)?;
        if json.len() > Self::MAX_BYTES {
            return Err(ManifestError::TooLong(json.len()));
        }
        Ok(json)
    }

    /// Reads a manifest. `json` may come from anybody.
    pub fn from_json(json: &[u8]) -> Result<Self, ManifestError> {
        if json.len() > Self::MAX_BYTES {
            return Err(ManifestError::TooLong(json.len()));
        }
        let manifest: Self = serde_json::from_slice(json).map_err(ManifestError::Malformed)?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), ManifestError> {
        at_most("devices", self.devices.len(), Self::MAX_DEVICES)?;
        at_most("RAM regions", self.ram.len(), Self::MAX_ITEMS)?;
        at_most("CPU features", self.cpu.len(), Self::MAX_ITEMS)?;
        at_most("sections", self.sections.len(), Self::MAX_ITEMS)?;
        let mut ids = BTreeSet::new();
        for device in &self.devices {
            at_most("regions of a device", device.regions.len(), Self::MAX_ITEMS)?;
            at_most("IRQ indices of a device", device.irqs.len(), Self::MAX_ITEMS)?;
            at_most("parameters of a device", device.parameters.len(), Self::MAX_ITEMS)?;
            if !ids.insert(&device.id) {
                return Err(ManifestError::Twice(format!("device {}", device.id)));
            }
            let mut indices = BTreeSet::new();
            if let Some(region) = device.regions.iter().find(|region| !indices.insert(region.index)) {
                return Err(ManifestError::Twice(format!("region {} of device {}", region.index, device.id)));
            }
        }
        Ok(())
    }
}

fn at_most(what: &'static str, count: usize, max: usize) -> Result<(), ManifestError> {
    if count > max { Err(ManifestError::TooMany { what, count, max }) } else { Ok(()) }
}
