//! What a kernel device says of itself.

use vfio_migration_compat::{DeviceManifest, Driver, PciIdentity, RegionManifest};
use vfio_migration_types::MigrationFlags;

use super::KernelDevice;
use crate::DeviceError;
use crate::hardware::{IrqIndex, PciHardware, RegionIndex};

impl KernelDevice {
    /// What sysfs and its PCI function show. No kernel driver declares a model, so none is made up: equality is strict,
    /// the driver's name included, where sysfs is there to say it.
    pub(super) fn describe(&self, flags: MigrationFlags) -> Result<DeviceManifest, DeviceError> {
        let sys = self.inner.sys.as_ref();
        let kinds = [IrqIndex::Intx, IrqIndex::Msi, IrqIndex::Msix];
        Ok(DeviceManifest {
            backend: "kernel".into(),
            driver: sys.and_then(|sys| sys.driver.clone()).map(Driver::new),
            mdev_type: sys.and_then(|sys| sys.mdev_type.clone()),
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
