//! Where on the guest's PCI bus each device is.

use vfio_migration_types::DEVICES_MAX;

use super::DeviceConfig;
use crate::error::VmmError;
use vfio_migration_pci::{Devfn, PciBus};

/// The places of `devices`, in their order: function 0 of the slot that was asked for; the others get function 0 of the slots
/// that nobody has or asked for, then function 1 of all slots, and so on. So no slot has functions but no function 0, where a
/// guest would look for none, and up to 31 devices are functions that have their slot to themselves.
///
/// # Errors
/// Two ask for one slot, or there are more devices than a machine takes.
pub fn assign_places(devices: &[DeviceConfig]) -> Result<Vec<Devfn>, VmmError> {
    if devices.len() > usize::from(DEVICES_MAX) {
        return Err(VmmError::TooManyDevices(devices.len()));
    }
    for (at, device) in devices.iter().enumerate() {
        let before = devices.get(..at).unwrap_or_default();
        if let (Some(slot), Some(other)) =
            (device.slot, before.iter().find(|other| device.slot.is_some() && other.slot == device.slot))
        {
            let text = format!("devices {} and {} are both to be in slot {slot}", other.id, device.id);
            return Err(VmmError::Refused(text));
        }
    }
    let wanted = |slot: u8| devices.iter().any(|device| device.slot == Some(slot));
    let mut free = (0..PciBus::FUNCTIONS)
        .flat_map(|function| (1..=PciBus::SLOTS).map(move |slot| Devfn::new(slot, function)))
        .filter(|place| place.function() != 0 || !wanted(place.slot()));
    let full = || VmmError::TooManyDevices(devices.len());
    let place = |device: &DeviceConfig| device.slot.map(Devfn::in_slot).or_else(|| free.next());
    devices.iter().map(place).map(|place| place.ok_or_else(full)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn places(wanted: &[Option<u8>]) -> Result<Vec<Devfn>, String> {
        let device = |(number, slot): (usize, &Option<u8>)| {
            let slot = slot.map(|slot| format!(",slot={slot}")).unwrap_or_default();
            format!("vfio-user:/x,id=net{number}{slot}").parse().unwrap()
        };
        let devices: Vec<DeviceConfig> = wanted.iter().enumerate().map(device).collect();
        assign_places(&devices).map_err(|error| error.to_string())
    }

    fn alone(slots: impl IntoIterator<Item = u8>) -> Vec<Devfn> {
        slots.into_iter().map(Devfn::in_slot).collect()
    }

    #[test]
    fn each_has_the_slot_that_it_asked_for_or_one_that_nobody_did() {
        assert_eq!(places(&[None, None]).unwrap(), alone([1, 2]));
        assert_eq!(places(&[None, Some(1), None, Some(4), None]).unwrap(), alone([2, 1, 3, 4, 5]));
        assert_eq!(places(&[None; 31]).unwrap(), alone(1..=31));
        let twice = places(&[Some(7), None, Some(7)]).unwrap_err();
        assert!(twice.contains("net0 and net2 are both to be in slot 7"), "{twice}");
    }

    #[test]
    fn every_device_has_a_place_of_its_own_and_no_slot_lacks_function_0() {
        for count in 0..=usize::from(DEVICES_MAX) {
            for wanted in [None, Some(3), Some(31)] {
                let mut devices = vec![None; count];
                if let Some(last) = devices.last_mut() {
                    *last = wanted;
                }
                let places = places(&devices).unwrap();
                let all: BTreeSet<Devfn> = places.iter().copied().collect();
                assert_eq!(all.len(), count, "{wanted:?}");
                assert!(
                    all.iter().all(|place| place.slot() != 0 && all.contains(&Devfn::in_slot(place.slot())))
                );
                if let (Some(slot), Some(last)) = (wanted, places.last()) {
                    assert_eq!(*last, Devfn::in_slot(slot));
                }
            }
        }
        let usual = places(&[None; 33]).unwrap();
        assert_eq!(usual[30..], [Devfn::in_slot(31), Devfn::new(1, 1), Devfn::new(2, 1)]);
        assert_eq!(usual[32].to_string(), "00:02.1");
        let more = usize::from(DEVICES_MAX) + 1;
        let error = places(&vec![None; more]).unwrap_err();
        assert_eq!(error, "65 devices are too many: a machine takes up to 64");
    }
}
