//! Registers in capabilities that live in the device and that a guest sets: which of them a move puts back.
//!
//! | register | at the destination |
//! |---|---|
//! | PCI Express: Device Control, Device Control 2 | written, read back, refused if it differs then |
//! | advanced error reporting: masks, severity, ECRC enables | the same |
//! | latency tolerance: largest latencies | the same |
//! | sizes of resizable BARs | refused if they differ |
//! | PCI Express: largest payload (Device Control), Link Control, and Slot and Root Control | left: the link is the host's, and vfio-pci lets no guest change it |
//! | power management: power state, PME | left: the destination's device is in D0, as a device has to be to load its state |
//! | all status registers, logs of errors, VPD address and data | left: they tell of the device that is there |
//! | vendor-specific capabilities | left: they are in the device's own state |
//!
//! MSI, MSI-X and the header are emulated and move as they are. (PCI Express 5.0, 7.5.3, 7.8.4, 7.8.2; `vfio_pci_config.c`)

use vfio_migration_device::{ConfigRule, ConfigRules, DeviceError, PciError, PciHardware, RegionIndex};

use super::config::ConfigSpace;
use super::registers::{CAP_EXPRESS, EXT_AER, EXT_LTR, EXTENDED};

/// A register of the device that a move puts back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OwnRegister {
    offset: u16,
    /// Bytes: 2 or 4.
    len: u16,
    /// Bits that a guest sets.
    mask: u32,
}

impl OwnRegister {
    /// Those that the function has.
    pub(super) fn find(config: &ConfigSpace) -> Vec<Self> {
        let mut out = Vec::new();
        for capability in config.capabilities().iter().filter(|cap| cap.id == CAP_EXPRESS) {
            // Not the bit that resets the function, nor payload size, phantom functions and auxiliary power, which are the
            // host's to set.
            out.push(Self { offset: capability.offset + 0x8, len: 2, mask: 0x791f });
            // Version 2 of the capability.
            if config.u16(capability.offset + 2) & 0xf >= 2 {
                // Not ARI forwarding, which is a port's.
                out.push(Self { offset: capability.offset + 0x28, len: 2, mask: 0xffdf });
            }
        }
        out.retain(|register| register.offset + register.len <= EXTENDED);
        for (id, at) in config.extended_capabilities() {
            let dword = |offset: u16, mask| Self { offset: at + offset, len: 4, mask };
            match id {
                EXT_AER => {
                    out.extend([dword(0x8, u32::MAX), dword(0xc, u32::MAX), dword(0x14, u32::MAX)]);
                    out.push(dword(0x18, 0x140));
                }
                EXT_LTR => out.push(dword(0x4, 0x1fff_1fff)),
                _ => {}
            }
        }
        out.retain(|register| usize::from(register.offset + register.len) <= config.len());
        out
    }

    /// Whether an access of `len` bytes at `offset` touches it.
    pub(super) fn touched(&self, offset: u16, len: usize) -> bool {
        usize::from(offset) < usize::from(self.offset + self.len)
            && usize::from(offset) + len > usize::from(self.offset)
    }

    /// Offset of its first byte in config space.
    pub(super) fn offset(&self) -> u16 {
        self.offset
    }

    /// Bytes of it that the device has now.
    pub(super) fn read(&self, hardware: &dyn PciHardware) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = vec![0; self.len.into()];
        hardware.region_read(RegionIndex::CONFIG, self.offset.into(), &mut bytes)?;
        Ok(bytes)
    }

    /// Writes what `saved` has of it, where the device has something else, and looks whether the device took it. Returns
    /// its bytes then.
    ///
    /// # Errors
    /// A [`PciError::ConfigMismatch`] where it did not, unless `rules` exempt it.
    pub(super) fn restore(
        &self,
        hardware: &dyn PciHardware,
        saved: &[u8],
        rules: &ConfigRules,
    ) -> Result<Vec<u8>, PciError> {
        let failed = |doing: &str| {
            let doing = format!("{doing} config space at {:#x}", self.offset);
            move |error: DeviceError| PciError::Failed {
                device: hardware.id().clone(),
                doing,
                source: Box::new(error),
            }
        };
        let masks = self.mask.to_le_bytes();
        let wanted = saved.get(usize::from(self.offset)..).unwrap_or_default();
        let differs = |there: &[u8]| {
            let bits = there.iter().zip(wanted).zip(masks);
            bits.enumerate().find(|(_, ((own, wanted), mask))| (*own ^ *wanted) & mask != 0).map(|(at, _)| at)
        };
        let there = self.read(hardware).map_err(failed("reading"))?;
        if differs(&there).is_none() {
            return Ok(there);
        }
        let bits = there.iter().zip(wanted).zip(masks);
        let bytes: Vec<u8> = bits.map(|((own, wanted), mask)| own & !mask | wanted & mask).collect();
        hardware.region_write(RegionIndex::CONFIG, self.offset.into(), &bytes).map_err(failed("writing"))?;
        let took = self.read(hardware).map_err(failed("reading"))?;
        let Some(at) = differs(&took) else { return Ok(took) };
        let offset = self.offset.saturating_add(u16::try_from(at).unwrap_or(0));
        let of_offset =
            |rule: &&ConfigRule| (rule.offset..rule.offset.saturating_add(rule.len)).contains(&offset);
        if rules.rules.iter().rfind(of_offset).is_some_and(|rule| !rule.compare) {
            return Ok(took);
        }
        let byte = |bytes: &[u8]| bytes.get(at).copied().unwrap_or(0);
        Err(PciError::ConfigMismatch {
            device: hardware.id().clone(),
            offset,
            source_byte: byte(wanted),
            destination_byte: byte(&took),
            mask: byte(&masks),
        })
    }
}
