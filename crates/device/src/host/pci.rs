//! A PCI function as sysfs has it.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::files::{attribute, hex, link_name, number, read_head};

/// Bytes of config space that every function has, and that hold its classic capabilities.
const CONFIG_SPACE: u64 = 256;
/// Most capabilities that 256 bytes have room for. A list that is longer is a loop.
const CAPABILITIES_MAX: usize = 48;

/// Address of a PCI function, as sysfs writes it: `0000:01:00.0`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress(String);

impl PciAddress {
    /// The address as text, `0000:01:00.0`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Not of the form `DDDD:BB:DD.F`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is no PCI address (want DOMAIN:BUS:DEVICE.FUNCTION, for example 0000:01:00.0)")]
pub struct NoPciAddress;

impl FromStr for PciAddress {
    type Err = NoPciAddress;

    fn from_str(text: &str) -> Result<Self, NoPciAddress> {
        let hex = |part: &str, lengths: std::ops::RangeInclusive<usize>| {
            lengths.contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        let legal = || {
            let (rest, function) = text.rsplit_once('.')?;
            let mut parts = rest.split(':');
            let (domain, bus, device) = (parts.next()?, parts.next()?, parts.next()?);
            // A domain behind a VMD has more than 16 bits.
            let good = hex(domain, 4..=8) && hex(bus, 2..=2) && hex(device, 2..=2) && hex(function, 1..=1);
            (good && parts.next().is_none()).then_some(())
        };
        legal().map(|()| Self(text.to_ascii_lowercase())).ok_or(NoPciAddress)
    }
}

/// Numbers of interrupts; `None` where config space could not be read far enough (beyond 64 bytes it takes root).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciInterrupts {
    /// 1 with a pin, 0 without.
    pub intx: Option<u32>,
    /// Number of MSI vectors; `None` without MSI.
    pub msi: Option<u32>,
    /// Number of MSI-X vectors; `None` without MSI-X.
    pub msix: Option<u32>,
}

/// A function that can have virtual functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sriov {
    /// Most that it can have.
    pub total: u32,
    /// Number that it has now.
    pub now: u32,
}

/// Facts of a PCI function, from sysfs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciFacts {
    /// Vendor id of config space.
    pub vendor: Option<u32>,
    /// Device id of config space.
    pub device: Option<u32>,
    /// Class code, 24 bits.
    pub class: Option<u32>,
    /// The text that module aliases are matched against: `pci:v00008086d…`.
    pub modalias: Option<String>,
    /// Physical function, for a virtual one.
    pub physical: Option<String>,
    /// Set where it can have virtual functions.
    pub sriov: Option<Sriov>,
    /// Interrupts that the function has, by kind.
    pub interrupts: PciInterrupts,
}

/// Reads the facts in `dir`, the function's folder in sysfs.
pub(super) fn facts(dir: &Path) -> PciFacts {
    let total = number(&dir.join("sriov_totalvfs")).filter(|total| *total > 0);
    PciFacts {
        vendor: hex(&dir.join("vendor")),
        device: hex(&dir.join("device")),
        class: hex(&dir.join("class")),
        modalias: attribute(&dir.join("modalias")),
        physical: link_name(&dir.join("physfn")),
        sriov: total.map(|total| Sriov { total, now: number(&dir.join("sriov_numvfs")).unwrap_or(0) }),
        interrupts: read_head(&dir.join("config"), CONFIG_SPACE)
            .map(|bytes| interrupts(&bytes))
            .unwrap_or_default(),
    }
}

/// Reads a config space, of which less than all may be there (PCI Local Bus Specification 3.0, 6.2 and 6.8).
fn interrupts(config: &[u8]) -> PciInterrupts {
    let byte = |at: usize| config.get(at).copied();
    let word = |at: usize| Some(u16::from_le_bytes([byte(at)?, byte(at + 1)?]));
    let intx = byte(0x3d).map(|pin| u32::from((1..=4).contains(&pin)));
    let none = PciInterrupts { intx, msi: Some(0), msix: Some(0) };
    match word(0x06) {
        None => return PciInterrupts::default(),
        // Status bit 4: there is a list of capabilities.
        Some(status) if status & 0x10 == 0 => return none,
        Some(_) => {}
    }
    let mut found = none;
    let mut at = usize::from(byte(0x34).unwrap_or(0) & 0xfc);
    for _ in 0..CAPABILITIES_MAX {
        if at < 0x40 {
            return found;
        }
        let (Some(id), Some(next), Some(control)) = (byte(at), byte(at + 1), word(at + 2)) else {
            break;
        };
        match id {
            0x05 => found.msi = Some(1 << ((control >> 1) & 7).min(5)),
            0x11 => found.msix = Some(u32::from(control & 0x7ff) + 1),
            _ => {}
        }
        at = usize::from(next & 0xfc);
    }
    // The rest of the list is out of reach, or it is a loop: what was found is true, the rest is unknown.
    PciInterrupts { intx, msi: found.msi.filter(|n| *n > 0), msix: found.msix.filter(|n| *n > 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(len: usize) -> Vec<u8> {
        let mut config = vec![0u8; len];
        (config[0x06], config[0x34], config[0x3d]) = (0x10, 0x40, 1);
        config
    }

    #[test]
    fn interrupts_are_counted_from_config_space() {
        let mut config = space(256);
        config[0x40..0x44].copy_from_slice(&[0x05, 0x50, 0x04, 0]);
        config[0x50..0x54].copy_from_slice(&[0x11, 0x00, 0x07, 0x80]);
        assert_eq!(interrupts(&config), PciInterrupts { intx: Some(1), msi: Some(4), msix: Some(8) });
        config[0x06] = 0;
        assert_eq!(interrupts(&config), PciInterrupts { intx: Some(1), msi: Some(0), msix: Some(0) });
        assert_eq!(interrupts(&space(64)), PciInterrupts { intx: Some(1), msi: None, msix: None });
        assert_eq!(interrupts(&[]), PciInterrupts::default());
    }

    #[test]
    fn a_list_that_loops_ends() {
        let mut config = space(256);
        config[0x40..0x44].copy_from_slice(&[0x11, 0x40, 0x00, 0]);
        assert_eq!(interrupts(&config), PciInterrupts { intx: Some(1), msi: None, msix: Some(1) });
    }

    #[test]
    fn addresses() {
        for good in ["0000:01:00.0", "10000:e1:1f.7"] {
            assert_eq!(good.parse::<PciAddress>().map(|address| address.to_string()), Ok(good.into()));
        }
        assert_eq!("0000:AB:00.0".parse::<PciAddress>().map(|a| a.to_string()), Ok("0000:ab:00.0".into()));
        for bad in
            ["", "01:00.0", "0000:01:00", "0000:01:00.10", "0000:01:0g.0", "../..:01:00.0", "0:0:0:0.0"]
        {
            assert!(bad.parse::<PciAddress>().is_err(), "{bad}");
        }
    }
}
