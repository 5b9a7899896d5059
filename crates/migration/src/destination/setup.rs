//! P2: every device RESUMING, and a queue before each.

use std::sync::Arc;

use vfio_migration_types::{Failure, Phase, Side};

use crate::destination::reader::Sink;
use crate::destination::worker::Worker;
use crate::device_state::receive::DeviceReceiver;
use crate::ram::receive::PageReceiver;
use crate::session::fail::InPhase;
use crate::session::parallel::for_each_device_parallel;
use crate::session::threads::{no_thread, spawn};
use crate::session::work_error::{self, WorkError};

impl Worker<'_, '_, '_> {
    /// Opens a resuming session on every device, all at once, and a queue before each.
    pub(super) fn begin_resuming(&mut self) -> Result<(), WorkError> {
        let phase = Phase::Setup;
        let machine = self.machine(phase)?;
        let begun = for_each_device_parallel(self.devices.iter_mut(), |incoming| {
            incoming.touched = true;
            incoming.session = Some(
                incoming
                    .moved
                    .device
                    .begin_resuming()
                    .map_err(|error| error.in_phase(Side::Destination, phase))?,
            );
            Ok(())
        });
        work_error::worst_of(begun)?;
        let devices: Vec<Arc<DeviceReceiver>> = (0..)
            .zip(&self.devices)
            .map(|(index, device)| {
                let id = device.moved.device.id().clone();
                Arc::new(DeviceReceiver::new(index, id, self.options.device_window))
            })
            .collect();
        let sink = Sink {
            ram: PageReceiver::new(machine.ram()),
            devices: devices.clone(),
            sections: Default::default(),
            written: Arc::default(),
        };
        let written = Arc::clone(&sink.written);
        for (arriving, device) in self.devices.iter_mut().zip(&devices) {
            let Some(session) = arriving.session.take() else { continue };
            let (device, link, events) = (Arc::clone(device), Arc::clone(&self.link), self.events.clone());
            let written = Arc::clone(&written);
            spawn(self.scope, "loader", move || device.write_to(session, &link, &events, &written))
                .map_err(|error| no_thread(Side::Destination, phase, "loader of a device's state", &error))?;
        }
        if self.shared.sink.set(sink).is_err() {
            return Err(Failure::new(
                Side::Destination,
                phase,
                "the sessions were opened twice: a defect of this program",
            )
            .into());
        }
        devices.iter().try_for_each(|device| device.open(&self.link))
    }
}
