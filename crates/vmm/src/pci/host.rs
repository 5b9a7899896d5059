//! What the functions of one machine share: the way to the guest, and to one another.

use std::sync::Arc;

use super::backend::{BarMapper, Irqfds};
use super::bars::{AddressMap, Windows};
use super::gate::BarGate;
use super::peers::Peers;
use super::router::MsiRouter;

/// What all functions of a machine share: the way to the guest.
#[derive(Debug)]
pub struct PciHost {
    pub(super) irq: Arc<dyn Irqfds>,
    pub(super) mapper: Arc<dyn BarMapper>,
    pub(super) router: Arc<MsiRouter>,
    pub(super) gate: Arc<BarGate>,
    pub(super) windows: Windows,
    pub(super) addresses: AddressMap,
    pub(super) ports: AddressMap,
    pub(super) peers: Peers,
}

impl PciHost {
    /// A host whose BARs lie in `windows`.
    pub fn new(
        irq: Arc<dyn Irqfds>,
        mapper: Arc<dyn BarMapper>,
        router: Arc<MsiRouter>,
        windows: Windows,
    ) -> Arc<Self> {
        let (gate, peers) = (Arc::default(), Peers::default());
        let (addresses, ports) = (AddressMap::default(), AddressMap::default());
        Arc::new(Self { irq, mapper, router, gate, windows, addresses, ports, peers })
    }

    /// The gate between the guest and its devices.
    pub fn gate(&self) -> &Arc<BarGate> {
        &self.gate
    }

    /// The interrupt routes of all functions.
    pub fn router(&self) -> &Arc<MsiRouter> {
        &self.router
    }
}
