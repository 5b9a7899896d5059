//! Which device is in which slot of the guest's PCI bus.

use super::DeviceConfig;
use crate::error::VmmError;
use crate::pci::PciBus;

/// The slots of `devices`, in their order: the one that was asked for, or the first that nobody has or asked for.
///
/// # Errors
/// Two ask for one slot, or there are more devices than slots.
pub(super) fn assign_slots(devices: &[DeviceConfig]) -> Result<Vec<u8>, VmmError> {
    for (at, device) in devices.iter().enumerate() {
        let before = devices.get(..at).unwrap_or_default();
        if let (Some(slot), Some(other)) =
            (device.slot, before.iter().find(|other| device.slot.is_some() && other.slot == device.slot))
        {
            let text = format!("devices {} and {} are both to be in slot {slot}", other.id, device.id);
            return Err(VmmError::Refused(text));
        }
    }
    let wanted = |slot: &u8| devices.iter().any(|device| device.slot == Some(*slot));
    let mut free = (1..=PciBus::SLOTS).filter(|slot| !wanted(slot));
    let full = || VmmError::Refused(format!("{} devices do not fit on the bus", devices.len()));
    devices.iter().map(|device| device.slot.or_else(|| free.next()).ok_or_else(full)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(wanted: &[Option<u8>]) -> Result<Vec<u8>, String> {
        let device = |(number, slot): (usize, &Option<u8>)| {
            let slot = slot.map(|slot| format!(",slot={slot}")).unwrap_or_default();
            format!("vfio-user:/x,id=net{number}{slot}").parse().unwrap()
        };
        let devices: Vec<DeviceConfig> = wanted.iter().enumerate().map(device).collect();
        assign_slots(&devices).map_err(|error| error.to_string())
    }

    #[test]
    fn each_has_the_slot_that_it_asked_for_or_one_that_nobody_did() {
        assert_eq!(slots(&[None, None]).unwrap(), [1, 2]);
        assert_eq!(slots(&[None, Some(1), None, Some(4), None]).unwrap(), [2, 1, 3, 4, 5]);
        assert_eq!(slots(&[None; 31]).unwrap(), (1..=31).collect::<Vec<_>>());
        assert!(slots(&[None; 32]).unwrap_err().contains("32 devices"));
        let twice = slots(&[Some(7), None, Some(7)]).unwrap_err();
        assert!(twice.contains("net0 and net2 are both to be in slot 7"), "{twice}");
    }
}
