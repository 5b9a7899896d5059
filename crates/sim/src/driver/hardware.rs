//! How a driver reaches a device: in process, or over vfio-user.

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vfio_migration_guest_driver::registers::VECTORS;
use vfio_user_peer::{Client, IoFdKind, Prot, region_index};

use crate::device::SampleDevice;
use crate::dma::DmaTarget;
use crate::error::SimError;
use crate::pci;

/// The error of a device that refused.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// A device as its driver, and the VMM under it, see it.
pub trait Hardware {
    /// Writes to BAR0.
    fn write(&self, at: u64, from: &[u8]) -> Result<(), BoxError>;
    /// Reads from BAR0.
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), BoxError>;
    /// Maps a file, from its start, for DMA.
    fn map(&self, iova: u64, len: u64, fd: BorrowedFd<'_>) -> Result<(), BoxError>;
    /// Connects the MSI-X vectors.
    fn connect_vectors(&self, fds: [BorrowedFd<'_>; VECTORS]) -> Result<(), BoxError>;
    /// The doorbell's eventfd, if it has one.
    fn doorbell(&self) -> Option<OwnedFd>;
}

/// Another device's mailbox, as a target for DMA.
#[derive(Debug)]
pub struct P2pTarget {
    /// Address of the mailbox in the DMA space of the device that writes.
    pub iova: u64,
    /// The memory behind it.
    pub fd: OwnedFd,
}

impl P2pTarget {
    /// The mailbox of `peer`, to be mapped at `iova`.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn of(peer: &SampleDevice, iova: u64) -> Result<Self, std::io::Error> {
        Ok(Self { iova, fd: peer.mailbox_fd().try_clone_to_owned()? })
    }
}

impl Hardware for SampleDevice {
    fn write(&self, at: u64, from: &[u8]) -> Result<(), BoxError> {
        Ok(self.region_write(pci::region::BAR0, at, from)?)
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), BoxError> {
        Ok(self.region_read(pci::region::BAR0, at, into)?)
    }

    fn map(&self, iova: u64, len: u64, fd: BorrowedFd<'_>) -> Result<(), BoxError> {
        Ok(self.dma_map(iova, len, true, DmaTarget::File(fd, 0))?)
    }

    fn connect_vectors(&self, fds: [BorrowedFd<'_>; VECTORS]) -> Result<(), BoxError> {
        for (vector, fd) in fds.into_iter().enumerate() {
            self.connect_vector(vector, Some(fd.try_clone_to_owned()?)).map_err(|error: SimError| error)?;
        }
        Ok(())
    }

    fn doorbell(&self) -> Option<OwnedFd> {
        self.doorbell_fd().try_clone_to_owned().ok()
    }
}

impl Hardware for Client {
    fn write(&self, at: u64, from: &[u8]) -> Result<(), BoxError> {
        Ok(self.region_write(pci::region::BAR0, at, from)?)
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), BoxError> {
        Ok(self.region_read(pci::region::BAR0, at, into)?)
    }

    fn map(&self, iova: u64, len: u64, fd: BorrowedFd<'_>) -> Result<(), BoxError> {
        Ok(self.dma_map(iova, len, Prot::READ_WRITE, Some((fd, 0)))?)
    }

    fn connect_vectors(&self, fds: [BorrowedFd<'_>; VECTORS]) -> Result<(), BoxError> {
        Ok(self.irq_connect(pci::irq::MSIX, 0, &fds)?)
    }

    fn doorbell(&self) -> Option<OwnedFd> {
        let fds = self.region_io_fds(pci::region::BAR0).ok()?;
        let doorbell = fds.iter().find(|fd| matches!(fd.kind, IoFdKind::Eventfd { .. }))?;
        doorbell.fd.as_fd().try_clone_to_owned().ok()
    }
}

const _: () = assert!(pci::region::CONFIG == region_index::CONFIG);
