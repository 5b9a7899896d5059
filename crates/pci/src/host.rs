//! What the functions of one machine share: the way to the guest, and to one another.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::backend::{BarMapper, Irqfds};
use super::bars::{AddressMap, BarWindows};
use super::peers::Peers;
use super::router::MsiRouter;

/// The way to the guest, which all functions of a machine share.
#[derive(Debug)]
pub struct PciHost {
    pub(super) irq: Arc<dyn Irqfds>,
    pub(super) mapper: Arc<dyn BarMapper>,
    pub(super) router: Arc<MsiRouter>,
    pub(super) gate: Arc<BarGate>,
    pub(super) windows: BarWindows,
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
        windows: BarWindows,
    ) -> Arc<Self> {
        let (gate, peers) = (Arc::default(), Peers::default());
        let (addresses, ports) = (AddressMap::default(), AddressMap::default());
        Arc::new(Self { irq, mapper, router, gate, windows, addresses, ports, peers })
    }

    /// The gate between the guest and its devices.
    pub fn gate(&self) -> &Arc<BarGate> {
        &self.gate
    }

    /// All devices are about to be closed, which takes back what each of them reaches by DMA: from here on nothing of it is taken away
    /// one by one.
    pub fn dissolve_peers(&self) {
        self.peers.dissolve();
    }

    /// The interrupt routes of all functions.
    pub fn router(&self) -> &Arc<MsiRouter> {
        &self.router
    }
}

/// Open while the guest runs. Closed, no access of a guest to a BAR or to a device's config space can reach a device:
/// it reads all ones, writes go nowhere, and the access is counted as an error of the VMM, since paused vCPUs make none.
///
/// What the VMM does on its own behalf (putting config space back, connecting interrupts) does not pass it.
#[derive(Debug, Default)]
pub struct BarGate {
    closed: RwLock<bool>,
    violations: AtomicU64,
}

/// An access under way: while it lives, [`BarGate::close`] waits.
#[derive(Debug)]
pub(crate) struct Passage<'a>(#[expect(dead_code, reason = "held for its drop")] RwLockReadGuard<'a, bool>);

impl BarGate {
    /// A gate that is open.
    pub fn new() -> Self {
        Self::default()
    }

    /// Closes it. When it returns, no access is under way and none will begin.
    pub fn close(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Lets accesses pass again.
    pub fn open(&self) {
        *self.closed.write().unwrap_or_else(PoisonError::into_inner) = false;
    }

    /// Whether it is closed.
    pub fn is_closed(&self) -> bool {
        *self.closed.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accesses that came while it was closed: 0, unless the VMM has a bug.
    pub fn violations(&self) -> u64 {
        self.violations.load(Ordering::Relaxed)
    }

    /// Lets what is no access of the guest's pass, if it is open.
    pub(crate) fn pass_if_open(&self) -> Option<Passage<'_>> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        (!*closed).then_some(Passage(closed))
    }

    /// Lets one access pass, or counts it and gives `None`.
    pub(crate) fn pass(&self) -> Option<Passage<'_>> {
        let closed = self.closed.read().unwrap_or_else(PoisonError::into_inner);
        if *closed {
            self.violations.fetch_add(1, Ordering::Relaxed);
            tracing::error!("a device access by a paused guest was held back");
            return None;
        }
        Some(Passage(closed))
    }
}
