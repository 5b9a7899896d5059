//! A device's manifest, as far as sysfs has it without the device being opened. What only an open device reports is not
//! known.

use std::collections::BTreeMap;
use std::path::Path;

use vfio_migration_compat::{Capability, DeviceManifest, Driver, PciIdentity, RegionManifest};
use vfio_migration_types::DeviceId;

use super::device::{HostDevice, HostDeviceKind};
use super::facts;
use super::files::{Roots, attribute, hex, read_head, read_text};
use super::kernel::version;
use super::obstacle::ObstacleCode;
use super::pci::PciFacts;
use crate::describe;
use crate::hardware::RegionIndex;

/// `resource` has a line for each of six BARs, the ROM, and what bridges and SR-IOV have
/// (`Documentation/PCI/sysfs-pci.rst`).
const RESOURCE_MAX: u64 = 4096;
/// Bytes of a PCI Express function's config space.
const CONFIG_MAX: u64 = 4096;
/// BARs 0 to 5 and the ROM: VFIO's indices are the same numbers.
const RESOURCES: usize = 7;
/// The capabilities that VFIO does not hide (`drivers/vfio/pci/vfio_pci_config.c` of Linux 6.12, `pci_cap_length`): power
/// management, AGP, VPD, MSI, PCI-X, HyperTransport, vendor, PCI Express, MSI-X, SATA, advanced features.
const STANDARD_SHOWN: [u16; 11] = [0x01, 0x02, 0x03, 0x05, 0x07, 0x08, 0x09, 0x10, 0x11, 0x12, 0x13];
/// The same of the extended ones (`pci_ext_cap_length`): AER, VC, serial number, power budgeting, MFVC, VC with MFVC,
/// vendor, ACS, ARI, ATS, SR-IOV, multicast, PRI, resizable BAR, DPA, TPH, LTR, DVSEC. Not so PASID, among others.
const EXTENDED_SHOWN: [u16; 18] = [
    0x01, 0x02, 0x03, 0x04, 0x08, 0x09, 0x0b, 0x0d, 0x0e, 0x0f, 0x10, 0x12, 0x13, 0x15, 0x16, 0x17, 0x18,
    0x23,
];

impl HostDevice {
    /// The device's manifest from sysfs, under the name `id`.
    pub fn manifest(&self, id: &DeviceId, roots: &Roots) -> DeviceManifest {
        let driver = self.driver.as_ref().map(|name| Driver {
            version: attribute(&roots.sys.join("module").join(name.replace('-', "_")).join("version")),
            ..Driver::new(name)
        });
        let known = DeviceManifest {
            backend: "kernel".into(),
            driver,
            kernel: version(roots).map(|version| version.release),
            no_migration: self.obstacles.iter().find_map(|obstacle| {
                (obstacle.code == ObstacleCode::NoMigrationInDriver).then(|| obstacle.text.clone())
            }),
            ..DeviceManifest::new(id.clone())
        };
        match &self.kind {
            HostDeviceKind::Pci(facts) => {
                let dir = roots.sys.join("bus/pci/devices").join(&self.name);
                DeviceManifest {
                    pci: identity(facts, &dir),
                    regions: regions(&dir),
                    irqs: irqs(facts),
                    capabilities: whole_config(&dir).and_then(|config| capabilities(&config)),
                    firmware: facts::firmware(&dir),
                    facts: facts::product(&dir),
                    ..known
                }
            }
            HostDeviceKind::Mdev { mdev_type, .. } => {
                let dir = roots.sys.join("bus/mdev/devices").join(&self.name);
                let facts = facts::mediated(&dir, self.driver.as_deref(), mdev_type.as_deref());
                DeviceManifest { mdev_type: mdev_type.clone(), facts, ..known }
            }
            HostDeviceKind::Other => known,
        }
    }
}

/// The PCI capabilities that VFIO offers an owner of the function.
fn capabilities(config: &[u8]) -> Option<Vec<Capability>> {
    let mut all = describe::capabilities(config)?;
    all.retain(|capability| {
        let shown: &[u16] = if capability.extended { &EXTENDED_SHOWN } else { &STANDARD_SHOWN };
        shown.contains(&capability.id)
    });
    Some(all)
}

/// Config space, if all of it may be read: beyond 64 bytes it takes root.
fn whole_config(dir: &Path) -> Option<Vec<u8>> {
    let config = read_head(&dir.join("config"), CONFIG_MAX).ok()?;
    (config.len() >= 256).then_some(config)
}

fn identity(facts: &PciFacts, dir: &Path) -> Option<PciIdentity> {
    let word = |number: Option<u32>| number.and_then(|number| u16::try_from(number).ok());
    Some(PciIdentity {
        vendor: word(facts.vendor)?,
        device: word(facts.device)?,
        class: facts.class?,
        subsystem_vendor: word(hex(&dir.join("subsystem_vendor")))?,
        subsystem: word(hex(&dir.join("subsystem_device")))?,
        revision: hex(&dir.join("revision")).and_then(|number| u8::try_from(number).ok())?,
    })
}

/// BARs, ROM and config space. Whether a part can be mapped only VFIO reports.
fn regions(dir: &Path) -> Option<Vec<RegionManifest>> {
    let text = read_text(&dir.join("resource"), RESOURCE_MAX).ok()?;
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let mut found = Vec::new();
    for (index, line) in (0..).zip(text.lines().take(RESOURCES)) {
        let mut words = line.split_whitespace();
        let (start, end) = (number(words.next()?)?, number(words.next()?)?);
        if end > start {
            let size = end.checked_sub(start)?.checked_add(1)?;
            found.push(region(index, size));
        }
    }
    // Its size is known to whoever may not read it all.
    let config = std::fs::metadata(dir.join("config")).ok()?;
    found.push(region(RegionIndex::CONFIG.0, config.len()));
    Some(found)
}

fn region(index: u32, size: u64) -> RegionManifest {
    RegionManifest { index, size, read: None, write: None, mmap: None }
}

/// Vectors by VFIO's index; known only if all three counts are.
fn irqs(facts: &PciFacts) -> Option<BTreeMap<u32, u32>> {
    let counts = facts.interrupts;
    let all = [(0, counts.intx?), (1, counts.msi?), (2, counts.msix?)];
    Some(all.into_iter().filter(|(_, count)| *count > 0).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_that_vfio_hides_are_left_out() {
        let mut config = vec![0; 4096];
        (config[0x06], config[0x34]) = (0x10, 0x40);
        // A bridge's subsystem, then MSI-X.
        config[0x40..0x44].copy_from_slice(&[0x0d, 0x48, 0, 0]);
        config[0x48..0x4c].copy_from_slice(&[0x11, 0x00, 0x03, 0x00]);
        // PASID, then ATS.
        config[0x100..0x104].copy_from_slice(&0x1201_001bu32.to_le_bytes());
        config[0x120..0x124].copy_from_slice(&0x0001_000fu32.to_le_bytes());
        let shown: Vec<_> =
            capabilities(&config).unwrap().iter().map(|it| (it.extended, it.id, it.offset)).collect();
        assert_eq!(shown, [(false, 0x11, 0x48), (true, 0x0f, 0x120)]);
        assert_eq!(describe::capabilities(&config).unwrap().len(), 4);
        // VFIO leaves a null capability where it hid the first.
        config[0x100..0x104].copy_from_slice(&0x1200_0000u32.to_le_bytes());
        assert_eq!(describe::capabilities(&config).unwrap().len(), 3);
    }
}
