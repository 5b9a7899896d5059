//! The device that this VMM has before the guest: a connection of its own to a vfio-user server, with guest RAM mapped for its DMA.
//! It is opened, mapped and driven here; a migration is only lent it.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use vfio_user_peer::{Client, ClientOptions, DmaHandler, Errno, Prot, irq_index};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::error::Error;
use crate::memory::{Memory, PARTS};

/// Connects to the device at `socket`, resets it, and maps all of RAM for it, at bus addresses that are guest addresses.
pub(crate) fn connect(socket: &Path, memory: &Memory) -> Result<Arc<Client>, Error> {
    let dma: Arc<dyn DmaHandler> = Arc::new(GuestDma(memory.clone()));
    let options = ClientOptions { dma: Some(dma), ..ClientOptions::default() };
    let client = Client::connect(socket, options).map_err(Error::other("connecting to the device"))?;
    client.reset().map_err(Error::other("resetting the device"))?;
    for (part, region) in PARTS.iter().zip(memory.iter()) {
        // Anonymous memory has no file that a server could map: it asks for each access.
        let file = region.file_offset().map(|file| (file.file().as_fd(), file.start()));
        client
            .dma_map(part.gpa, part.len, Prot::READ_WRITE, file)
            .map_err(Error::other("mapping RAM for the device"))?;
    }
    Ok(Arc::new(client))
}

/// Connects a vector to an eventfd.
pub(crate) fn connect_vector(device: &Client, vector: u32, event: &EventFd) -> Result<(), Error> {
    device
        .irq_connect(irq_index::MSIX, vector, &[event_fd(event)])
        .map_err(Error::other("connecting an interrupt"))
}

fn event_fd(event: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: the descriptor is open for as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// The server's accesses to what it cannot map. vm-memory marks what is written in its bitmap, which is a dirty source.
struct GuestDma(Memory);

impl DmaHandler for GuestDma {
    fn dma_read(&self, iova: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.0.read_slice(into, GuestAddress(iova)).map_err(|_| Errno::FAULT)
    }

    fn dma_write(&self, iova: u64, from: &[u8]) -> Result<(), Errno> {
        self.0.write_slice(from, GuestAddress(iova)).map_err(|_| Errno::FAULT)
    }
}
