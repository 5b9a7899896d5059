//! What a PCI function asks of the machine around it: interrupts, routes, and BARs in the guest's address space.
//!
//! Traits, so that the same function serves KVM and the software guest, and is tested without either.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use vfio_migration_device::MsiMessage;
use vfio_migration_types::Gpa;

use vfio_migration_memory::Mapping;

/// An eventfd: a counter in the kernel that remembers that it was signalled until it is drained.
#[derive(Debug)]
pub struct Eventfd(OwnedFd);

impl Eventfd {
    /// A new one, not signalled.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    /// Signals it. A counter that is full is signalled already.
    pub fn signal(&self) -> io::Result<()> {
        loop {
            match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
                Ok(_) | Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Takes what was signalled: whether it was.
    pub fn drain(&self) -> io::Result<bool> {
        let mut count = [0; 8];
        loop {
            match rustix::io::read(&self.0, &mut count) {
                Ok(_) => return Ok(true),
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl From<OwnedFd> for Eventfd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Eventfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Takes eventfds as interrupts of the guest (KVM: irqfd).
pub trait Irqfds: fmt::Debug + Send + Sync {
    /// Number of the interrupt that pin `pin` (1 to 4: INTA to INTD) of a function in `slot` is wired to. Several may be wired to
    /// one.
    fn number_of_pin(&self, slot: u8, pin: u8) -> u32;

    /// From now on a signal on `event` raises `gsi`; one that it holds already does so at once.
    fn attach(&self, gsi: u32, event: &Arc<Eventfd>) -> io::Result<()>;

    /// Undoes [`attach`](Self::attach). When it returns, each signal either has reached the interrupt controller's
    /// state, or is still in `event`.
    fn detach(&self, gsi: u32, event: &Arc<Eventfd>) -> io::Result<()>;

    /// From now on a signal on `event` raises the level of `gsi`, a pin of the IOAPIC. When the guest ends the interrupt
    /// the level is lowered and `resample` signalled. Several functions may share a pin.
    fn attach_level(&self, gsi: u32, event: &Arc<Eventfd>, resample: &Arc<Eventfd>) -> io::Result<()>;

    /// Undoes [`attach_level`](Self::attach_level), and lowers the level as far as it came from here. A signal that did
    /// not raise it is still in `event`; one that did is forgotten.
    fn detach_level(&self, gsi: u32, event: &Arc<Eventfd>, resample: &Arc<Eventfd>) -> io::Result<()>;
}

/// The machine's whole table of message-signalled routes, replaced at once (KVM: `KVM_SET_GSI_ROUTING`).
pub trait MsiRouteTable: fmt::Debug + Send + Sync {
    /// Makes `routes` all the routes of message-signalled interrupts there are. Pins keep theirs.
    fn replace(&self, routes: &BTreeMap<u32, MsiMessage>) -> io::Result<()>;
}

/// A doorbell at its place in the guest.
#[derive(Clone, Debug)]
pub struct BarDoorbell {
    /// Address of its first byte.
    pub gpa: Gpa,
    /// Width of the write in bytes; 0 for any width.
    pub size: u64,
    /// The value that rings it; `None` for any value.
    pub datamatch: Option<u64>,
    /// Eventfd that a write signals.
    pub event: Arc<Eventfd>,
}

/// Puts mapped BARs and doorbells into the guest's address space.
pub trait BarMapper: fmt::Debug + Send + Sync {
    /// Makes all of `memory` appear at `gpa` (KVM: a memory slot). What is there must not be RAM or another BAR.
    fn map(&self, gpa: Gpa, memory: &Arc<Mapping>) -> io::Result<()>;

    /// Takes it away again. When it returns no vCPU reaches it.
    fn unmap(&self, gpa: Gpa, memory: &Arc<Mapping>) -> io::Result<()>;

    /// Turns the guest's writes at a doorbell into signals (KVM: ioeventfd).
    fn attach_doorbell(&self, doorbell: &BarDoorbell) -> io::Result<()>;

    /// Undoes it: writes are trapped again.
    fn detach_doorbell(&self, doorbell: &BarDoorbell) -> io::Result<()>;
}
