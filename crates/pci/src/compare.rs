//! Whether a saved config space may go into a function: which bits must agree.
//!
//! Compared by default: vendor, device, revision, class, header type, subsystem, interrupt pin and timing, where each
//! capability lies and what it is, and what read-only registers of known capabilities say. Exempt: what a guest writes
//! (COMMAND, STATUS, cache line, latency, BARs, interrupt line, the enable, mask, address and control bits of
//! capabilities), and the contents of vendor-specific capabilities, in which hosts of one model differ. Registers of the
//! device itself that a guest sets are put back by `own_registers`.

use vfio_migration_device::{ConfigRules, PciError};
use vfio_migration_types::DeviceId;

use super::config::{ConfigCapability, ConfigSpace};
use super::registers::{
    CAP_EXPRESS, CAP_MSI, CAP_MSIX, CAP_PM, CAP_VENDOR, CAP_VPD, CAPABILITY_LIST, EXT_RESIZABLE_BAR,
    EXTENDED, HEADER_TYPE,
};

/// Checks `saved`, the source's config space, against the function's own.
pub(super) fn compare(
    device: &DeviceId,
    own: &ConfigSpace,
    saved: &[u8],
    rules: &ConfigRules,
) -> Result<(), PciError> {
    let unfit = |what: String| PciError::Unfit { device: device.clone(), what };
    if saved.len() != own.len() {
        return Err(unfit(format!(
            "its config space has {} bytes, and the function's {}",
            saved.len(),
            own.len()
        )));
    }
    let mut mask = default_mask(own);
    for rule in &rules.rules {
        // A site's rules are for devices of many kinds: where this one has no such bytes, there is nothing to compare.
        for byte in mask.iter_mut().skip(rule.offset.into()).take(rule.len.into()) {
            *byte = if rule.compare { 0xff } else { 0 };
        }
    }
    let bytes = saved.iter().zip(own.bytes()).zip(mask);
    for (offset, ((source, destination), mask)) in (0u16..).zip(bytes) {
        if (source ^ destination) & mask != 0 {
            return Err(PciError::ConfigMismatch {
                device: device.clone(),
                offset,
                source_byte: *source,
                destination_byte: *destination,
                mask,
            });
        }
    }
    Ok(())
}

fn default_mask(own: &ConfigSpace) -> Vec<u8> {
    let mut mask = vec![0; own.len()];
    let mut set = |offset: u16, bits: &[u8]| {
        for (byte, bits) in mask.iter_mut().skip(offset.into()).zip(bits) {
            *byte = *bits;
        }
    };
    set(0x00, &[0xff; 4]); // vendor, device
    set(0x08, &[0xff; 4]); // revision, class
    set(HEADER_TYPE, &[0x7f]); // whether a slot has several functions is the bus's to say
    set(0x28, &[0xff; 8]); // CardBus CIS, subsystem
    set(CAPABILITY_LIST, &[0xff]);
    set(0x3d, &[0xff; 3]); // interrupt pin, min_gnt, max_lat

    let mut capabilities = own.capabilities();
    capabilities.sort_by_key(|cap| cap.offset);
    let ends = capabilities.iter().skip(1).map(|cap| cap.offset).chain([EXTENDED]).collect::<Vec<_>>();
    for (capability, end) in capabilities.iter().zip(ends) {
        let room = usize::from(end.saturating_sub(capability.offset));
        let bits = capability_mask(own, *capability, room);
        set(capability.offset, bits.get(..room.min(bits.len())).unwrap_or(&bits));
    }

    // Extended capabilities: where they lie and what they are; their contents are the driver's affair.
    for (id, offset) in own.extended_capabilities() {
        set(offset, &[0xff; 4]);
        if id == EXT_RESIZABLE_BAR {
            // The size of a BAR is the device's, and where it lies depends on it.
            set(offset + 4, &[0xff; 8]);
        }
    }
    mask
}

/// The bits of a capability that must agree, from its first byte.
fn capability_mask(own: &ConfigSpace, capability: ConfigCapability, room: usize) -> Vec<u8> {
    let header = [0xff, 0xff];
    let rest: &[u8] = match capability.id {
        // Capabilities are compared; control and status are the guest's.
        CAP_PM => &[0xff, 0xff, 0, 0, 0, 0],
        CAP_VPD => &[],
        // Message control without the enable bit and the count of vectors in use.
        CAP_MSI => &[0x8e, 0x01],
        // Table size without the enable and mask bits; where table and pending bits lie.
        CAP_MSIX => &[0xff, 0x07, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        // Its length is layout.
        CAP_VENDOR => &[0xff],
        // PCI Express: the capability registers of device, link, slot (2 bytes + 4 + ...); not control and status.
        CAP_EXPRESS => {
            const C: [u8; 4] = [0xff; 4];
            const S: [u8; 4] = [0; 4];
            let registers = [C, S, C, S, C, S, S, S, C, S, C, S, C, S];
            let mut bits = vec![0xff; 4];
            bits.extend(registers.concat());
            return bits;
        }
        // Nothing is known of it: all of it, up to the next capability. A list that ends here says nothing of its
        // length: then its header alone.
        _ => {
            let last = usize::from(capability.offset) + room >= usize::from(EXTENDED).min(own.len());
            return vec![0xff; if last { 2 } else { room }];
        }
    };
    [&header, rest].concat()
}

#[cfg(test)]
mod tests {
    use vfio_migration_device::ConfigRule;

    use super::*;
    use crate::tests::fakes::sample_config;

    fn check(change: impl FnOnce(&mut Vec<u8>), rules: &[ConfigRule]) -> Result<(), PciError> {
        let own = ConfigSpace::new(sample_config());
        let mut saved = own.bytes().to_vec();
        change(&mut saved);
        compare(&DeviceId::new("d").unwrap(), &own, &saved, &ConfigRules { rules: rules.to_vec() })
    }

    fn differs_at(result: Result<(), PciError>) -> Option<u16> {
        match result {
            Err(PciError::ConfigMismatch { offset, .. }) => Some(offset),
            _ => None,
        }
    }

    #[test]
    fn what_a_guest_writes_is_exempt() {
        let exempt = [0x04, 0x05, 0x06, 0x0c, 0x0d, 0x10, 0x13, 0x18, 0x27, 0x30, 0x3c, 0x53, 0x57];
        for offset in exempt {
            assert!(check(|saved| saved[offset] ^= 0xff, &[]).is_ok(), "{offset:#x}");
        }
        assert!(check(|saved| saved[0x43] ^= 0xc0, &[]).is_ok(), "MSI-X enable and mask bits");
    }

    #[test]
    fn identity_and_layout_are_compared() {
        let compared = [
            0x00, 0x02, 0x08, 0x0b, 0x0e, 0x2c, 0x2f, 0x34, 0x3d, 0x40, 0x41, 0x42, 0x44, 0x48, 0x50, 0x51,
            0x52,
        ];
        for offset in compared {
            let result = check(|saved| saved[usize::from(offset)] ^= 1, &[]);
            assert_eq!(differs_at(result), Some(offset), "{offset:#x}");
        }
    }

    #[test]
    fn rules_change_the_mask_and_later_ones_win() {
        let rule = |offset, len, compare| ConfigRule { offset, len, compare };
        let touch = |saved: &mut Vec<u8>| saved[0x54] ^= 1;
        assert!(check(touch, &[]).is_ok());
        assert_eq!(differs_at(check(touch, &[rule(0x50, 8, true)])), Some(0x54));
        assert!(check(touch, &[rule(0x50, 8, true), rule(0x54, 1, false)]).is_ok());
        assert_eq!(differs_at(check(touch, &[rule(0x54, 1, false), rule(0x50, 8, true)])), Some(0x54));
        assert!(check(|saved| saved[8] ^= 1, &[rule(8, 1, false)]).is_ok());
        assert!(check(|_| (), &[rule(255, 2, true), rule(0x100, 1, true)]).is_ok());
        assert_eq!(differs_at(check(|saved| saved[255] ^= 1, &[rule(255, 2, true)])), Some(255));
        assert!(matches!(check(|saved| saved.push(0), &[]), Err(PciError::Unfit { .. })));
    }
}
