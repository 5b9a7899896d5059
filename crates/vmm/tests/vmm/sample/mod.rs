//! Sample devices in this process on a PCI bus, and how they move to another one.

mod hardware;

use std::sync::Arc;

use vfio_migration_device::{ConfigRules, IrqRouter, PciFunction, PciState};
use vfio_migration_memory::GuestRam;
use vfio_migration_pci::{Devfn, PciBus, PciHost, VfioPciFunction, map_guest_ram};
use vfio_migration_sim::{MigrationState, Options, StateRead};
use vfio_migration_types::Gpa;
use vfio_migration_vmm::layout;

pub(crate) use hardware::Hardware;

/// A bus, with a sample device in each slot from 1.
pub(crate) struct SampleBus {
    pub(crate) host: Arc<PciHost>,
    pub(crate) bus: Arc<PciBus>,
    pub(crate) hardware: Vec<Arc<Hardware>>,
}

impl SampleBus {
    pub(crate) fn new(ram: &GuestRam, host: Arc<PciHost>, devices: usize, options: &Options) -> Self {
        let bus = Arc::new(PciBus::new(host.clone(), Gpa(layout::ECAM_BASE)));
        let mut hardware = Vec::new();
        for slot in 1..=u8::try_from(devices).unwrap() {
            let device = Hardware::new(&format!("dev{slot}"), options.clone());
            map_guest_ram(&*device, ram).unwrap();
            bus.add(Arc::new(
                VfioPciFunction::new(Devfn::in_slot(slot), device.clone(), host.clone()).unwrap(),
            ));
            hardware.push(device);
        }
        Self { host, bus, hardware }
    }

    /// Stops the devices of a guest that is paused, and reads out what the functions hold besides the devices' state.
    pub(crate) fn stop(&self) -> Vec<PciState> {
        self.host.gate().close();
        for state in [MigrationState::RunningP2p, MigrationState::Stop] {
            self.hardware.iter().for_each(|hardware| hardware.device.set_state(state).unwrap());
        }
        let functions = self.bus.functions();
        let save = |function: &Arc<VfioPciFunction>| {
            function.save_interrupts(function.save_config().unwrap()).unwrap()
        };
        functions.iter().map(save).collect()
    }

    /// Moves the state of devices that are stopped into those of `to`.
    pub(crate) fn move_devices(&self, to: &Self) {
        for (from, to) in self.hardware.iter().zip(&to.hardware) {
            from.device.set_state(MigrationState::StopCopy).unwrap();
            to.device.set_state(MigrationState::Resuming).unwrap();
            let mut bytes = vec![0; 1 << 20];
            loop {
                match from.device.read_data(&mut bytes).unwrap() {
                    StateRead::Data(len) => to.device.write_data(&bytes[..len]).unwrap(),
                    StateRead::NothingNow => panic!("a stopped device has nothing for now"),
                    StateRead::End => break,
                }
            }
        }
    }

    /// Puts back what [`stop`](Self::stop) of another bus read out, and has the devices run; their state and the
    /// machine's are in.
    pub(crate) fn start(&self, from: &Self, states: &[PciState]) {
        self.bus.set_config_address(from.bus.config_address());
        let functions = self.bus.functions();
        for (function, state) in functions.iter().zip(states) {
            function.restore_config(state, &ConfigRules::default()).unwrap();
        }
        for (function, state) in functions.iter().zip(states) {
            function.stage_interrupts(state).unwrap();
        }
        self.host.router().commit().unwrap();
        for (function, state) in functions.iter().zip(states) {
            assert_eq!(function.connect_interrupts(state).unwrap(), 2);
        }
        for state in [MigrationState::Stop, MigrationState::RunningP2p, MigrationState::Running] {
            self.hardware.iter().for_each(|hardware| hardware.device.set_state(state).unwrap());
        }
    }
}
