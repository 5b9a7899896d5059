//! The PCI side of a VMM: a bus, VFIO functions on it, and how their interrupts and BARs reach the guest.
//!
//! It knows no hypervisor. What it needs of the machine around it are three traits that a VMM implements, [`Irqfds`],
//! [`MsiRouteTable`] and [`BarMapper`], and where the VMM keeps things: [`BarWindows`], the place of the memory-mapped
//! config space, the interrupt numbers for messages. A VMM that has config space of its own implements
//! [`PciFunction`](vfio_migration_device::PciFunction) itself and leaves this crate out.
//!
//! - [`PciBus`]: bus 0 with a host bridge, config mechanism 1 and ECAM.
//! - [`VfioPciFunction`]: a VFIO device before the guest, and the stock
//!   [`PciFunction`](vfio_migration_device::PciFunction) of a migration.
//! - [`MsiRouter`]: the stock [`IrqRouter`](vfio_migration_device::IrqRouter).
//! - [`Irqfds`], [`MsiRouteTable`], [`BarMapper`]: what they ask of KVM, or of the software guest.
//! - [`BarGate`]: keeps a paused guest away from its devices.
//!
//! What it does not do: expansion ROMs, bridges, hot plug.

#![forbid(unsafe_code)]

mod areas;
mod backend;
mod bars;
mod bus;
mod compare;
mod config;
mod devfn;
mod flr;
mod host;
mod interrupts;
mod intx;
mod own_registers;
mod peers;
mod placing;
mod registers;
mod router;
mod state;
#[cfg(test)]
mod tests;
mod vectors;
mod vfio;

pub use backend::{BarDoorbell, BarMapper, Eventfd, Irqfds, MsiRouteTable};
pub use bars::BarWindows;
pub use bus::{PciBus, PlaceError};
pub use devfn::Devfn;
pub use host::{BarGate, PciHost};
pub use peers::map_guest_ram;
pub use router::MsiRouter;
pub use vfio::VfioPciFunction;
