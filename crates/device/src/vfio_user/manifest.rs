//! What a vfio-user device says of itself.

use std::collections::BTreeMap;

use serde::Deserialize;
use vfio_migration_compat::{DeviceManifest, Parameter, PciIdentity, RegionManifest};
use vfio_migration_types::MigrationFlags;

use super::{Inner, VfioUserDevice};
use crate::DeviceError;
use crate::hardware::{IrqIndex, PciHardware, RegionIndex};

/// The extension's manifest document. Fields of later versions are ignored.
#[derive(Debug, Default, Deserialize)]
struct Declared {
    model: Option<String>,
    model_version: Option<String>,
    #[serde(default)]
    parameters: BTreeMap<String, Parameter>,
}

impl Inner {
    fn declared(&self) -> Result<Declared, DeviceError> {
        if !self.client.negotiated().extension.manifest {
            return Ok(Declared::default());
        }
        let doing = "reading the device's manifest";
        let bytes = self.client.device_manifest().map_err(|error| self.failed(doing, error))?;
        serde_json::from_slice(&bytes).map_err(|error| DeviceError::new(self.id.clone(), doing, None, error))
    }
}

impl VfioUserDevice {
    /// Puts together what the server declares and what its PCI function shows.
    pub(super) fn describe(&self, flags: MigrationFlags) -> Result<DeviceManifest, DeviceError> {
        let declared = self.inner.declared()?;
        let kinds = [IrqIndex::Intx, IrqIndex::Msi, IrqIndex::Msix];
        Ok(DeviceManifest {
            model: declared.model,
            model_version: declared.model_version,
            backend: "vfio-user".into(),
            flags: Some(flags),
            pci: self.identity()?,
            regions: Some(self.regions().iter().map(region).collect()),
            irqs: Some(
                kinds
                    .into_iter()
                    .map(|kind| (kind.number(), self.irq_count(kind)))
                    .filter(|(_, count)| *count > 0)
                    .collect(),
            ),
            parameters: declared.parameters,
            ..DeviceManifest::new(self.inner.id.clone())
        })
    }

    fn identity(&self) -> Result<Option<PciIdentity>, DeviceError> {
        if !self.regions().iter().any(|region| region.index == RegionIndex::CONFIG && region.size >= 64) {
            return Ok(None);
        }
        let mut header = [0u8; 64];
        self.region_read(RegionIndex::CONFIG, 0, &mut header)?;
        let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        Ok(Some(PciIdentity {
            vendor: word(0x00),
            device: word(0x02),
            revision: header[0x08],
            class: u32::from_le_bytes([header[0x09], header[0x0a], header[0x0b], 0]),
            subsystem_vendor: word(0x2c),
            subsystem: word(0x2e),
        }))
    }
}

fn region(region: &crate::hardware::RegionInfo) -> RegionManifest {
    RegionManifest { index: region.index.0, size: region.size, ..RegionManifest::default() }
}
