//! How PCI functions reach a guest on KVM: irqfds, the routing table, memory slots, ioeventfds.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_migration_device::MsiMessage;
use vfio_migration_memory::Mapping;
use vfio_migration_types::Gpa;

use crate::layout::pci_pin;

use super::irq::GsiRoute;
use super::slots::SlotId;
use super::vm::KvmVm;
use crate::error::VmmError;
use vfio_migration_pci::{BarDoorbell, BarMapper, Eventfd, Irqfds, MsiRouteTable};

/// The way between PCI functions and a guest on KVM: [`Irqfds`], [`MsiRouteTable`] and [`BarMapper`] in one.
#[derive(Debug)]
pub struct KvmBackend {
    vm: Arc<KvmVm>,
    /// Mapped BARs: each keeps its memory mapped for as long as the guest has it.
    slots: Mutex<BTreeMap<Gpa, (SlotId, Arc<Mapping>)>>,
}

impl KvmBackend {
    /// A way to the guest of `vm`, over which nothing goes yet.
    pub fn new(vm: Arc<KvmVm>) -> Self {
        Self { vm, slots: Mutex::default() }
    }

    fn slots(&self) -> MutexGuard<'_, BTreeMap<Gpa, (SlotId, Arc<Mapping>)>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn other(error: VmmError) -> io::Error {
    io::Error::other(error)
}

fn width(doorbell: &BarDoorbell) -> io::Result<u32> {
    u32::try_from(doorbell.size).map_err(io::Error::other)
}

impl Irqfds for KvmBackend {
    fn number_of_pin(&self, slot: u8, pin: u8) -> u32 {
        pci_pin(slot, pin)
    }

    fn attach(&self, gsi: u32, event: &Arc<Eventfd>) -> io::Result<()> {
        self.vm.register_irqfd(event.as_fd(), gsi).map_err(other)
    }

    fn detach(&self, gsi: u32, event: &Arc<Eventfd>) -> io::Result<()> {
        self.vm.unregister_irqfd(event.as_fd(), gsi).map_err(other)
    }

    fn attach_level(&self, gsi: u32, event: &Arc<Eventfd>, resample: &Arc<Eventfd>) -> io::Result<()> {
        self.vm.register_level_irqfd(event.as_fd(), resample.as_fd(), gsi).map_err(other)
    }

    // KVM lowers the level with the last irqfd of the pin; where another function shares it, that one's next end of
    // interrupt does.
    fn detach_level(&self, gsi: u32, event: &Arc<Eventfd>, _resample: &Arc<Eventfd>) -> io::Result<()> {
        self.vm.unregister_irqfd(event.as_fd(), gsi).map_err(other)
    }
}

impl MsiRouteTable for KvmBackend {
    fn replace(&self, routes: &BTreeMap<u32, MsiMessage>) -> io::Result<()> {
        let routes: Vec<GsiRoute> = routes
            .iter()
            .map(|(gsi, message)| GsiRoute { gsi: *gsi, address: message.address, data: message.data })
            .collect();
        self.vm.set_gsi_routes(&routes).map_err(other)
    }
}

impl BarMapper for KvmBackend {
    fn map(&self, gpa: Gpa, memory: &Arc<Mapping>) -> io::Result<()> {
        let mut slots = self.slots();
        // SAFETY: the mapping stays as long as its Arc lives; `slots` holds one until the slot is removed, and is
        // dropped no earlier than the machine that uses it, since nothing but `unmap` removes entries and the machine
        // is held by `self`. No reference into it exists: `Mapping` hands out copies only.
        let slot = unsafe { self.vm.add_memory_slot(gpa, memory.host_address(), memory.len(), false) };
        slots.insert(gpa, (slot.map_err(other)?, Arc::clone(memory)));
        Ok(())
    }

    fn unmap(&self, gpa: Gpa, _memory: &Arc<Mapping>) -> io::Result<()> {
        let mut slots = self.slots();
        let Some((slot, _)) = slots.get(&gpa) else {
            return Err(io::Error::other(format!("nothing is mapped at {gpa}")));
        };
        self.vm.remove_memory_slot(*slot).map_err(other)?;
        slots.remove(&gpa);
        Ok(())
    }

    fn attach_doorbell(&self, doorbell: &BarDoorbell) -> io::Result<()> {
        let BarDoorbell { gpa, datamatch, event, .. } = doorbell;
        self.vm.register_ioeventfd(event.as_fd(), *gpa, width(doorbell)?, *datamatch).map_err(other)
    }

    fn detach_doorbell(&self, doorbell: &BarDoorbell) -> io::Result<()> {
        let BarDoorbell { gpa, datamatch, event, .. } = doorbell;
        self.vm.unregister_ioeventfd(event.as_fd(), *gpa, width(doorbell)?, *datamatch).map_err(other)
    }
}

impl Drop for KvmBackend {
    fn drop(&mut self) {
        // The vCPUs may still be there for others who hold the machine; BAR memory must not be unmapped under them.
        for (slot, _) in self.slots().values() {
            if let Err(error) = self.vm.remove_memory_slot(*slot) {
                tracing::error!(%error, "a BAR could not be taken from the guest");
                self.vm.shutdown();
            }
        }
    }
}
