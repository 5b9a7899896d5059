//! The vocabulary of VFIO migration, shared by every crate above.
//!
//! Everything here is pure: no descriptor, no clock, no thread. Addresses of different spaces are different
//! types, because mixing them has cost real VMMs real bugs; the dirty bitmap is one type with an explicit
//! granule; the migration states and the arcs between them follow the kernel's uAPI table.
#![forbid(unsafe_code)]

mod address;
mod arcs;
mod bitmap;
mod cancel;
mod failure;
mod identity;
mod millis;
mod outcome;
mod phase;
mod rate_limit;
mod state;
mod text;
mod time;

pub use address::{Gpa, Iova, RamOffset, Range, RangeError};
pub use arcs::{ArcError, next_state, path};
pub use bitmap::{Bitmap, Granule, GranuleError, PAGE_SIZE, Run, Runs};
pub use cancel::CancelCause;
pub use failure::{Failure, Side, error_chain, error_chain_of};
pub use identity::{AttemptId, AttemptIdError, DEVICES_MAX, DeviceId, DeviceIdError, Epoch, VmId, VmIdError};
pub use millis::as_millis_f64;
pub use outcome::{GuestOutcome, PauseCause};
pub use phase::Phase;
pub use rate_limit::{RateLimit, Told};
pub use state::{MigrationFlags, MigrationState, UnknownState};
pub use text::{is_control, printable, printable_lines, quote};
pub use time::{milliseconds, rfc3339};
