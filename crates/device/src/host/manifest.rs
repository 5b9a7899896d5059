//! A device's manifest, as far as sysfs tells without the device being opened. What only an open device tells is not known.

use std::collections::BTreeMap;
use std::path::Path;

use vfio_migration_compat::{DeviceManifest, Driver, PciIdentity, RegionManifest};
use vfio_migration_types::DeviceId;

use super::files::{attribute, hex, read_head, read_text};
use super::pci::PciFacts;
use super::{HostDevice, Kind, Roots, facts, version};
use crate::describe;

/// `resource` has a line for each of six BARs, the ROM, and what bridges and SR-IOV have
/// (`Documentation/PCI/sysfs-pci.rst`).
const RESOURCE_MAX: u64 = 4096;
/// Bytes of a PCI Express function's config space.
const CONFIG_MAX: u64 = 4096;
/// BARs 0 to 5 and the ROM: VFIO's indices are the same numbers.
const RESOURCES: usize = 7;

impl HostDevice {
    /// What sysfs shows of it, under the name `id`.
    pub fn manifest(&self, id: &DeviceId, roots: &Roots) -> DeviceManifest {
        let driver = self.driver.as_ref().map(|name| Driver {
            version: attribute(&roots.sys.join("module").join(name.replace('-', "_")).join("version")),
            ..Driver::new(name)
        });
        let known = DeviceManifest {
            backend: "kernel".into(),
            driver,
            kernel: version(roots).map(|version| version.release),
            ..DeviceManifest::new(id.clone())
        };
        match &self.kind {
            Kind::Pci(facts) => {
                let dir = roots.sys.join("bus/pci/devices").join(&self.name);
                DeviceManifest {
                    pci: identity(facts, &dir),
                    regions: regions(&dir),
                    irqs: irqs(facts),
                    capabilities: whole_config(&dir).and_then(|config| describe::capabilities(&config)),
                    firmware: facts::firmware(&dir),
                    facts: facts::product(&dir),
                    ..known
                }
            }
            Kind::Mdev { mdev_type, .. } => {
                let dir = roots.sys.join("bus/mdev/devices").join(&self.name);
                let facts = facts::mediated(&dir, self.driver.as_deref(), mdev_type.as_deref());
                DeviceManifest { mdev_type: mdev_type.clone(), facts, ..known }
            }
            Kind::Other => known,
        }
    }
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

/// BARs and ROM. Config space is not among the resources, and whether a part can be mapped only VFIO tells.
fn regions(dir: &Path) -> Option<Vec<RegionManifest>> {
    let text = read_text(&dir.join("resource"), RESOURCE_MAX).ok()?;
    let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16).ok();
    let mut found = Vec::new();
    for (index, line) in (0..).zip(text.lines().take(RESOURCES)) {
        let mut words = line.split_whitespace();
        let (start, end) = (number(words.next()?)?, number(words.next()?)?);
        if end > start {
            let size = end.checked_sub(start)?.checked_add(1)?;
            found.push(RegionManifest { index, size, read: None, write: None, mmap: None });
        }
    }
    Some(found)
}

/// Vectors by VFIO's index; known only if all three counts are.
fn irqs(facts: &PciFacts) -> Option<BTreeMap<u32, u32>> {
    let counts = facts.interrupts;
    let all = [(0, counts.intx?), (1, counts.msi?), (2, counts.msix?)];
    Some(all.into_iter().filter(|(_, count)| *count > 0).collect())
}
