//! Message routes: each vector of the device has an interrupt number of KVM's.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

use crate::error::Error;

/// First interrupt number of messages: the pins of the interrupt controllers are below.
const FIRST: u32 = 24;

/// The table of routes. No pin is in it: nothing in this machine uses one.
#[derive(Debug, Default)]
pub(crate) struct Routes(Mutex<BTreeMap<u32, (u64, u32)>>);

impl Routes {
    /// The interrupt number of a vector.
    pub(crate) fn gsi(vector: usize) -> u32 {
        FIRST.saturating_add(u32::try_from(vector).unwrap_or(u32::MAX))
    }

    /// Notes the message of a vector. Whether that is another than before.
    pub(crate) fn set(&self, vector: usize, address: u64, data: u32) -> bool {
        let mut routes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        routes.insert(Self::gsi(vector), (address, data)) != Some((address, data))
    }

    /// Makes what is noted KVM's table.
    pub(crate) fn commit(&self, vm: &VmFd) -> Result<(), Error> {
        let routes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entries: Vec<_> =
            routes.iter().map(|(gsi, (address, data))| entry(*gsi, *address, *data)).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Text("too many routes"))?;
        vm.set_gsi_routing(&table).map_err(Error::other("setting interrupt routes"))
    }
}

fn entry(gsi: u32, address: u64, data: u32) -> kvm_irq_routing_entry {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    let msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a, b, c, d]),
        address_hi: u32::from_le_bytes([e, f, g, h]),
        data,
        ..Default::default()
    };
    let u = kvm_irq_routing_entry__bindgen_ty_1 { msi };
    kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, u, ..Default::default() }
}
