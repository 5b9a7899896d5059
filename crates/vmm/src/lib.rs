//! The reference VMM: a small machine on KVM that proves the migration engine and shows a VMM author how to embed it.
//!
//! - [`kvm`]: vCPUs, memory slots, interrupts, dirty log, machine state — the hypervisor's side.
//! - [`bus`], [`platform`], [`serial`], [`clock`], [`layout`]: the machine around the vCPUs.
//! - [`guest`]: the bare-metal program that runs inside and checks that nothing is lost.
//! - [`software`]: the same program for hosts without KVM.
//! - [`inherited_signals`]: a process that begins as if its parent had left nothing of its own.
//! - [`machine`]: all of it put together, as the migration library sees a VMM.

pub mod bus;
pub mod clock;
pub mod error;
pub mod guest;
pub mod inherited_signals;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod platform;
mod section;
pub mod serial;
pub mod software;

pub use error::{StopReason, VmmError};
