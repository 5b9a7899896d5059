//! A virtual machine on KVM: its vCPUs, memory slots, interrupts, dirty log and state.
//!
//! [`KvmVm`] is the handle that everything shares. It is made with its RAM, begins to run by
//! [`start`](KvmVm::start) followed by [`resume`](KvmVm::resume), and can be paused, saved, loaded and resumed as often
//! as one likes. Dropping the last handle ends the vCPU threads.

mod backend;
mod dirty;
mod features;
mod gate;
mod irq;
mod kick;
mod lock;
mod memory;
mod msr;
mod run;
mod slots;
mod state;
mod vcpu;
mod vfio;
mod vm;

pub use backend::KvmBackend;
pub use dirty::KvmDirtyLog;
pub use features::{cpu_features, offered_features};
pub use irq::GsiRoute;
pub use slots::SlotId;
pub use state::section_versions;
pub use vm::{KvmVm, VCPUS_MAX};
