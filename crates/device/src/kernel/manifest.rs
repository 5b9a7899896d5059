//! What a kernel device says of itself.

use std::collections::BTreeMap;

use vfio_migration_compat::{DeviceManifest, PciIdentity, RegionManifest};
use vfio_migration_types::MigrationFlags;

use super::KernelDevice;
use crate::DeviceError;
use crate::hardware::{IrqIndex, PciHardware, RegionIndex};

impl KernelDevice {
    /// What sysfs and its PCI function show. No kernel driver declares a model, so none is made up: equality is strict,
    /// the driver's name included, where sysfs is there to say it.
    pub(super) fn describe(&self, flags: MigrationFlags) -> Result<DeviceManifest, DeviceError> {
        let mut parameters = BTreeMap::new();
        if let Some(sys) = &self.inner.sys {
            parameters.extend(sys.driver.clone().map(|driver| ("driver".to_owned(), driver)));
            parameters.extend(sys.mdev_type.clone().map(|kind| ("mdev_type".to_owned(), kind)));
        }
        let kinds = [IrqIndex::Intx, IrqIndex::Msi, IrqIndex::Msix];
        Ok(DeviceManifest {
            id: self.inner.id.clone(),
            model: None,
            model_version: None,
            backend: "kernel".into(),
            flags,
            pci: self.identity()?,
            regions: self
                .regions()
                .iter()
                .map(|region| RegionManifest { index: region.index.0, size: region.size })
                .collect(),
            irqs: kinds
                .into_iter()
                .map(|kind| (kind.number(), self.irq_count(kind)))
                .filter(|(_, count)| *count > 0)
                .collect(),
            parameters,
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
