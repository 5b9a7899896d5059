//! A vfio-user device that the VMM runs itself: the connection is its own, and so are the DMA mappings.

use std::sync::Arc;

use vfio_migration_memory::GuestRam;
use vfio_migration_types::{DeviceId, Iova, Range};
use vfio_user_peer::Client;

use super::device::{Connected, VfioUserDevice};
use super::dma::GuestDma;
use crate::dma_view::{DmaRange, DmaView, DmaViewError};
use crate::error::DeviceError;
use crate::reset_callback::ResetCallback;

/// A vfio-user device that the VMM runs itself, as it hands it to [`VfioUserDevice::adopt`].
#[derive(Debug)]
#[non_exhaustive]
pub struct VmmConnection {
    /// The connection to its server.
    pub client: Arc<Client>,
    /// What the VMM has mapped of guest RAM for it.
    pub dma: DmaView,
    /// The VMM's reset of it.
    pub reset: ResetCallback,
    /// Use the device's PRE_COPY, where it has one. True.
    pub pre_copy: bool,
}

impl VmmConnection {
    /// A device whose PRE_COPY is used.
    pub fn new(client: Arc<Client>, dma: DmaView, reset: ResetCallback) -> Self {
        Self { client, dma, reset, pre_copy: true }
    }
}

impl VfioUserDevice {
    /// Takes in a device that the VMM runs over a connection of its own, in the state that it is in. The VMM goes on
    /// using the connection, and loses nothing when this is dropped.
    ///
    /// No DMA_MAP, DMA_UNMAP or RESET is sent: the VMM maps, and the reset is its own. What the server writes by DMA_WRITE is
    /// served and logged by the VMM.
    ///
    /// # Errors
    /// With a [`DmaViewError`] as the source, a DMA range that cannot be, by its addresses. The server does not answer, or its
    /// device is no PCI device.
    pub fn adopt(id: DeviceId, device: VmmConnection, ram: Arc<GuestRam>) -> Result<Self, DeviceError> {
        const DOING: &str = "taking in a device that the VMM runs";
        let VmmConnection { client, dma, reset, pre_copy } = device;
        dma.check(&ram, true).map_err(|error| DeviceError::new(id.clone(), DOING, None, error))?;
        let guest_dma = Arc::new(GuestDma::new(&id, ram));
        for range in dma.ranges() {
            guest_dma.map_ram(range.iova, range.access, !range.by_message, range.ram);
        }
        let limits = (client.transition_timeout(), client.timeout());
        let connected = Connected { client, dma: guest_dma, reset: Some(reset) };
        Self::of(id, connected, pre_copy, false, limits)
    }

    /// Tells of guest RAM that the VMM is about to map for a device that it [runs itself](Self::adopt). While a log runs, all
    /// of it counts as dirty.
    ///
    /// # Errors
    /// With a [`DmaViewError`] as the source.
    pub fn dma_mapped(&self, range: DmaRange) -> Result<(), DeviceError> {
        let dma = &self.inner.dma;
        let told = self.told_by_vmm().and_then(|()| range.check(dma.ram(), true)).and_then(|()| {
            match dma.overlapping(range.iova) {
                Some((iova, ram)) => Err(DmaViewError::Overlap { range, other: DmaRange::new(iova, ram) }),
                None => Ok(()),
            }
        });
        told.map_err(|error| self.not_told("hearing of a DMA mapping", error))?;
        dma.map_ram(range.iova, range.access, !range.by_message, range.ram);
        Ok(())
    }

    /// Tells of guest RAM that the VMM is about to unmap again, as it was mapped. While a log runs, all of it counts as dirty.
    ///
    /// # Errors
    /// With a [`DmaViewError`] as the source.
    pub fn dma_unmapped(&self, iova: Range<Iova>) -> Result<(), DeviceError> {
        let known = self.told_by_vmm().and_then(|()| match self.inner.dma.unmap(iova) {
            true => Ok(()),
            false => Err(DmaViewError::Unknown(iova.start(), iova.len())),
        });
        known.map_err(|error| self.not_told("hearing that a DMA mapping goes", error))
    }

    fn told_by_vmm(&self) -> Result<(), DmaViewError> {
        if self.inner.run_by_vmm { Ok(()) } else { Err(DmaViewError::MappedByDevice) }
    }

    fn not_told(&self, doing: &str, error: DmaViewError) -> DeviceError {
        DeviceError::new(self.inner.id.clone(), doing, None, error)
    }
}
