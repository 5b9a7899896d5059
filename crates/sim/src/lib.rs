//! A sample PCI device worth migrating: a DMA engine on a descriptor ring, a mailbox that peers write, bulk internal
//! state that never rests, interrupts with an acknowledge rule, and all of VFIO's migration, with scripted faults.
//!
//! [`SampleDevice`] is the device without any transport: a test holds one and calls it. [`serve`] puts it on a
//! vfio-user socket. [`driver::TestDriver`] is the other side, the guest's driver, with the checks that tell whether
//! a block, an interrupt or a page of state was lost on a move.
//!
//! # What it does not do
//!
//! It emulates no MSI-X table: the embedding VMM does, as it does for every VFIO device. It does not model errors on
//! the bus, power management or INTx. And it is not fast on purpose: it works at a pace that is set.
#![forbid(unsafe_code)]

mod bulk;
mod device;
mod dma;
pub mod driver;
mod engine;
mod error;
mod fault;
mod migrate;
mod migration;
mod options;
pub mod pci;
mod regs;
mod saving;
mod serve;
mod shared;
mod stream;

pub use device::SampleDevice;
pub use dma::{DmaTarget, MAX_LOG_PAGE, MAX_LOG_RANGES, MAX_MAPPINGS, MessageDma};
pub use error::SimError;
pub use fault::{FAULT_FORMS, Fault, FaultError, Which};
pub use migrate::StateRead;
pub use options::{MAX_STATE_SIZE, Options};
pub use saving::SamplePrecopy;
pub use serve::{SampleBackend, ServeError, serve};
pub use stream::MODEL;
pub use vfio_user_peer::{MigrationFlags, MigrationState, StopHandle};
