//! Devices whose server goes away while nothing is asked of it.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;
use vfio_migration_types::DeviceId;

use super::running::RunningVm;
use crate::control::protocol::Event;
use crate::output::say;

/// How often it is looked.
pub(super) const EVERY: Duration = Duration::from_millis(250);

/// The devices that are known to be lost.
#[derive(Debug, Default)]
pub(super) struct Watch {
    lost: BTreeSet<DeviceId>,
}

impl Watch {
    /// Says of each device that is lost since the last look that it is. The guest is left as it is.
    pub(super) fn look(&mut self, vm: &RunningVm) {
        let lost = vm.state.slot().machine().map(|machine| machine.lost_devices()).unwrap_or_default();
        for device in self.new_among(lost) {
            say(format_args!(
                "vfio-migrate: device {device} is lost: its server is gone; the guest cannot be moved any more"
            ));
            vm.publisher.publish(&Event::new("DEVICE_LOST", json!({"device": device.to_string()})));
        }
    }

    /// Which of `lost` were not. Those of a guest that has left are forgotten.
    fn new_among(&mut self, lost: Vec<DeviceId>) -> Vec<DeviceId> {
        let lost: BTreeSet<DeviceId> = lost.into_iter().collect();
        let new = lost.difference(&self.lost).cloned().collect();
        self.lost = lost;
        new
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn each_loss_is_said_once() {
        let id = |name: &str| DeviceId::new(name).unwrap();
        let mut watch = Watch::default();
        assert_eq!(watch.new_among(vec![]), []);
        assert_eq!(watch.new_among(vec![id("b")]), [id("b")]);
        assert_eq!(watch.new_among(vec![id("a"), id("b")]), [id("a")]);
        assert_eq!(watch.new_among(vec![id("a"), id("b")]), []);
        // Another guest came, and its device of that name is lost too.
        assert_eq!(watch.new_among(vec![]), []);
        assert_eq!(watch.new_among(vec![id("a")]), [id("a")]);
    }
}
