//! Guest RAM, and where its dirty pages are learned from.
//!
//! Everything here is safe to call. Guest memory is shared with vCPUs, with devices and with other processes, all of
//! which write it whenever they like, so no reference to it ever exists: it is read and written word by word through
//! relaxed atomics, or handed to the kernel as a raw pair of address and length. What a caller gets is a copy, which
//! may be torn between two guest writes; whether that matters is for the dirty logs to say, not for the copy.
//!
//! A hole of the memory file (a page never written) costs nothing as long as nobody reads it *through the mapping*:
//! for a shared memory file such a read allocates the page. [`GuestRam::data_extents`], [`GuestRam::scan`],
//! [`GuestRam::is_zero`], [`GuestRam::digest`] and [`GuestRam::zero`] leave holes alone; the plain accesses
//! ([`GuestRam::read`], [`Pieces::send`]) touch what they are asked to touch.
//!
//! What this crate does not do: it decides nothing about a migration, knows no frame and no retry, no device and no hypervisor.
//! Translation by a vIOMMU is not its business either.

mod area;
mod dirty;
mod error;
mod host_memory;
mod mapping;
mod pieces;
mod ram;
mod scan;
mod write_log;

pub use dirty::{DirtySource, report_all, start_all, stop_all};
pub use error::MemoryError;
pub use mapping::Mapping;
pub use pieces::Pieces;
pub use ram::{GuestRam, RamRegionInfo, RamSpec};
pub use scan::{Holes, ScanRun};
pub use write_log::WriteLog;

// Sizes of memory are u64 in every interface and usize at the mapping.
const _: () = assert!(usize::BITS == 64, "guest RAM is mapped whole: 64-bit hosts only");
