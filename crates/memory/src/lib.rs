//! Guest RAM, and where its dirty pages are learned from.
//!
//! Everything here is safe to call. Guest memory is shared with vCPUs, with devices and with other processes, all of
//! which write it whenever they like, so no reference to it ever exists: it is read and written word by word through
//! relaxed atomics, or handed to the kernel as a raw pair of address and length. What a caller gets is a copy, which
//! may be torn between two guest writes; whether that matters is for the dirty logs to say, not for the copy.
//!
//! RAM is a list of regions, each with a mapping of its own: a shared file, private anonymous memory, or a private mapping of
//! a file ([`RamKind`]). This library makes it ([`GuestRam::new`], [`GuestRam::owned`]), or the VMM lends what it has
//! ([`GuestRam::lent`], and with the feature `vm-memory` a `GuestMemoryMmap`). A RAM offset counts through the regions, and
//! is no place in a file.
//!
//! A hole (a page never written) costs nothing as long as nobody reads it *through the mapping*: for a shared file such a
//! read allocates the page. [`GuestRam::data_extents`], [`GuestRam::scan`], [`GuestRam::is_zero`], [`GuestRam::digest`] and
//! [`GuestRam::zero`] leave holes alone; the plain accesses ([`GuestRam::read`], [`Pieces::send`]) touch what they are asked
//! to touch.
//!
//! What this crate does not do: it decides nothing about a migration, knows no frame and no retry, no device and no hypervisor.
//! Translation by a vIOMMU is not its business either.

mod area;
mod dirty;
mod error;
mod hold;
mod host_memory;
mod lent;
mod mapping;
mod numa;
mod owned;
mod pagemap;
mod pieces;
mod ram;
mod region;
mod scan;
#[cfg(feature = "vm-memory")]
mod vm_memory;
mod write_log;

pub use dirty::{Coverage, DirtySource, report_all, start_all, stop_all};
pub use error::{MemoryError, RegionError};
pub use hold::{RamHeld, RamHold};
pub use lent::LentRegion;
pub use mapping::Mapping;
pub use owned::{OwnedRegion, RamSpec};
pub use pieces::Pieces;
pub use ram::GuestRam;
pub use region::{RamKind, RamPageSize, RamRegionInfo};
pub use scan::{Holes, ScanRun};
pub use write_log::WriteLog;

#[cfg(feature = "vm-memory")]
pub use self::vm_memory::AtomicBitmapLog;

// Sizes of memory are u64 in every interface and usize at the mapping.
const _: () = assert!(usize::BITS == 64, "guest RAM is mapped whole: 64-bit hosts only");
