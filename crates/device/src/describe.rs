//! The manifest of a PCI function, from its config space and regions, whichever back end serves it.

use std::collections::BTreeSet;

use vfio_migration_compat::{Capability, DeviceManifest, PciIdentity, RegionManifest};

use crate::error::DeviceError;
use crate::hardware::{IrqIndex, PciHardware, PciRegion, RegionIndex};

/// Standard capabilities (PCI Local Bus Specification 3.0, 6.7) lie from here to 256, each of four bytes at least.
const STANDARD: u16 = 0x40;
/// Extended capabilities (PCI Express Base Specification, 7.6) lie from here to 4096.
const EXTENDED: u16 = 0x100;
const POINTER: u16 = 0x34;
const STATUS: u16 = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const VENDOR: u8 = 0x09;
const MSIX: u8 = 0x11;
const EXTENDED_VENDOR: u16 = 0x0b;

/// Fills in the facts of an open function's config space, regions and interrupts. For back ends of one's own: those of
/// this crate do it in [`Device::manifest`](crate::Device::manifest).
///
/// # Errors
/// Config space cannot be read, or a chain of capabilities runs in a circle or out of its place.
pub fn describe_hardware(
    device: &dyn PciHardware,
    manifest: DeviceManifest,
) -> Result<DeviceManifest, DeviceError> {
    let regions = device.regions();
    let config = regions.iter().find(|region| region.index == RegionIndex::CONFIG && region.size >= 64);
    let (mut pci, mut capabilities) = (None, None);
    if let Some(config) = config {
        let mut header = [0u8; 64];
        device.region_read(RegionIndex::CONFIG, 0, &mut header)?;
        pci = Some(identity(&header));
        let read = |at: u16, into: &mut [u8]| device.region_read(RegionIndex::CONFIG, at.into(), into);
        let wrong =
            |what: String| DeviceError::new(device.id().clone(), "reading its PCI capabilities", None, what);
        let size = u16::try_from(config.size.min(4096)).unwrap_or(0);
        capabilities = Some(chains(&Space { read: &read, wrong: &wrong }, size)?);
    }
    let kinds = [IrqIndex::Intx, IrqIndex::Msi, IrqIndex::Msix];
    let irqs = kinds.into_iter().map(|kind| (kind.number(), device.irq_count(kind)));
    Ok(DeviceManifest {
        pci,
        capabilities,
        regions: Some(regions.iter().map(region).collect()),
        irqs: Some(irqs.filter(|(_, count)| *count > 0).collect()),
        ..manifest
    })
}

/// Reads bytes at an offset.
type ReadAt<'a, E> = dyn Fn(u16, &mut [u8]) -> Result<(), E> + 'a;

/// A config space, and what to say of one that is wrong.
struct Space<'a, E> {
    read: &'a ReadAt<'a, E>,
    wrong: &'a dyn Fn(String) -> E,
}

/// Both chains of capabilities in the first bytes of a config space; `None` where it is cut short or makes no sense.
pub(crate) fn capabilities(config: &[u8]) -> Option<Vec<Capability>> {
    let size = u16::try_from(config.len().min(4096)).unwrap_or(0);
    let read = |at: u16, into: &mut [u8]| {
        let at = usize::from(at);
        let bytes = at.checked_add(into.len()).and_then(|end| config.get(at..end)).ok_or(())?;
        into.copy_from_slice(bytes);
        Ok(())
    };
    chains(&Space { read: &read, wrong: &|_| () }, size).ok()
}

fn chains<E>(space: &Space<'_, E>, size: u16) -> Result<Vec<Capability>, E> {
    let mut status = [0u8; 1];
    (space.read)(STATUS, &mut status)?;
    let there = status[0] & STATUS_CAPABILITIES != 0;
    let mut found = if there { standard(space, size.min(EXTENDED))? } else { Vec::new() };
    found.extend(extended(space, size)?);
    Ok(found)
}

fn identity(header: &[u8; 64]) -> PciIdentity {
    let word = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    PciIdentity {
        vendor: word(0x00),
        device: word(0x02),
        revision: header[0x08],
        class: u32::from_le_bytes([header[0x09], header[0x0a], header[0x0b], 0]),
        subsystem_vendor: word(0x2c),
        subsystem: word(0x2e),
    }
}

fn region(region: &PciRegion) -> RegionManifest {
    RegionManifest {
        index: region.index.0,
        size: region.size,
        read: Some(region.readable),
        write: Some(region.writable),
        mmap: Some(!region.mappable.is_empty()),
    }
}

fn standard<E>(space: &Space<'_, E>, end: u16) -> Result<Vec<Capability>, E> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut pointer = [0u8; 1];
    (space.read)(POINTER, &mut pointer)?;
    // The two low bits are reserved.
    let mut next = u16::from(pointer[0] & !3);
    while next != 0 {
        check(space, next, STANDARD, end, &mut seen)?;
        let mut head = [0u8; 4];
        (space.read)(next, &mut head)?;
        let [id, after, len, _] = head;
        let len = match id {
            VENDOR => Some(len.into()),
            MSIX => Some(12),
            _ => None,
        };
        found.push(Capability { extended: false, id: id.into(), offset: next, len });
        next = u16::from(after & !3);
    }
    Ok(found)
}

fn extended<E>(space: &Space<'_, E>, end: u16) -> Result<Vec<Capability>, E> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut next = if end > EXTENDED { EXTENDED } else { 0 };
    while next != 0 {
        check(space, next, EXTENDED, end, &mut seen)?;
        let head = word(space, next)?;
        // All zeros at the first: there are none. All ones: nobody answers.
        if head == 0 || head == u32::MAX {
            break;
        }
        let [id_low, id_high, ..] = head.to_le_bytes();
        let id = u16::from_le_bytes([id_low, id_high]);
        let long = id == EXTENDED_VENDOR && end - next >= 8;
        let len = if long { u16::try_from(word(space, next + 4)? >> 20).ok() } else { None };
        // The null capability: VFIO leaves one where it hides the first of the chain.
        if id != 0 {
            found.push(Capability { extended: true, id, offset: next, len });
        }
        next = u16::try_from(head >> 20).unwrap_or(0) & !3;
    }
    Ok(found)
}

fn word<E>(space: &Space<'_, E>, at: u16) -> Result<u32, E> {
    let mut bytes = [0u8; 4];
    (space.read)(at, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Refuses a capability out of its place, and one that was there before: the chain would have no end.
fn check<E>(space: &Space<'_, E>, at: u16, first: u16, end: u16, seen: &mut BTreeSet<u16>) -> Result<(), E> {
    let what = if at < first || end.checked_sub(at).is_none_or(|room| room < 4) {
        format!("a capability at {at:#x} is out of place")
    } else if !seen.insert(at) {
        format!("its chain of capabilities comes back to {at:#x}")
    } else {
        return Ok(());
    };
    Err((space.wrong)(what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeHardware;

    struct Config(Vec<u8>);

    impl Config {
        fn new(len: usize) -> Self {
            let mut bytes = vec![0; len];
            bytes[..4].copy_from_slice(&[0x46, 0x56, 0x53, 0x4d]);
            bytes[usize::from(STATUS)] = STATUS_CAPABILITIES;
            Self(bytes)
        }

        fn put(mut self, at: usize, bytes: &[u8]) -> Self {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
            self
        }

        fn described(self) -> Result<DeviceManifest, DeviceError> {
            described(&FakeHardware::of_config("d", self.0))
        }

        fn chain(self) -> Vec<(bool, u16, u16, Option<u16>)> {
            let all = self.described().unwrap().capabilities.unwrap();
            all.into_iter().map(|one| (one.extended, one.id, one.offset, one.len)).collect()
        }
    }

    fn described(hardware: &FakeHardware) -> Result<DeviceManifest, DeviceError> {
        describe_hardware(hardware, DeviceManifest::new(hardware.id().clone()))
    }

    #[test]
    fn both_chains_are_walked() {
        let config = || {
            Config::new(4096)
                .put(0x34, &[0x43])
                .put(0x40, &[MSIX, 0x50])
                .put(0x50, &[VENDOR, 0, 8])
                .put(0x100, &0x1401_0001u32.to_le_bytes())
                .put(0x140, &0x0001_000bu32.to_le_bytes())
                .put(0x144, &0x0180_0000u32.to_le_bytes())
        };
        assert_eq!(
            config().chain(),
            [
                (false, 0x11, 0x40, Some(12)),
                (false, 0x09, 0x50, Some(8)),
                (true, 1, 0x100, None),
                (true, 0xb, 0x140, Some(24)),
            ]
        );
        let manifest = config().described().unwrap();
        assert_eq!((manifest.pci.unwrap().device, manifest.irqs.unwrap()), (0x4d53, [(2, 3)].into()));
    }

    #[test]
    fn without_capabilities_the_list_is_empty_and_without_config_space_unknown() {
        assert_eq!(Config::new(256).put(usize::from(STATUS), &[0]).put(0x34, &[0x40]).chain(), []);
        assert_eq!(Config::new(4096).put(0x100, &[0xff; 4]).chain(), []);
        let mut hardware = FakeHardware::of_config("d", Config::new(256).0);
        hardware.regions_mut().clear();
        let manifest = described(&hardware).unwrap();
        assert_eq!((manifest.pci, manifest.capabilities), (None, None));
    }

    #[test]
    fn circles_and_strays_are_refused() {
        let refused = |config: Config| config.described().unwrap_err().source.to_string();
        let config = || Config::new(4096).put(0x34, &[0x40]);
        assert!(refused(config().put(0x40, &[1, 0x50]).put(0x50, &[5, 0x40])).contains("comes back to 0x40"));
        assert!(refused(config().put(0x40, &[1, 0x40])).contains("comes back"));
        assert!(refused(config().put(0x34, &[0x20])).contains("out of place"));
        let itself = 0x1001_0001u32.to_le_bytes();
        assert!(refused(Config::new(4096).put(0x100, &itself)).contains("comes back to 0x100"));
        let below = 0x0401_0001u32.to_le_bytes();
        assert!(refused(Config::new(4096).put(0x100, &below)).contains("out of place"));
    }
}
