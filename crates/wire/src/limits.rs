//! Limits on what one frame may carry.
//!
//! They bound what a peer can make the other side allocate for a frame: one payload, never more than [`PAYLOAD`] bytes.
//! They are part of protocol version 1: a peer may rely on them.

use vfio_migration_types::{DEVICES_MAX, PAGE_SIZE};

/// Devices of one machine; a device's index is below it.
pub const DEVICES: u16 = DEVICES_MAX;
/// Bytes of the machine's manifest, at least 2 (`{}`).
pub const MANIFEST: usize = 1 << 20;
/// Bytes of a VMM's own configuration, [`Offer::configuration`](crate::Offer::configuration).
pub const CONFIGURATION: usize = u16::MAX as usize;
/// Pages in one [`Bulk::Pages`](crate::Bulk::Pages): a body of at most 1 MiB.
pub const PAGES: u32 = 256;
/// No page has this number or a greater one: `page × 4096` fits in 64 bits.
pub const PAGE_NUMBERS: u64 = u64::MAX / PAGE_SIZE + 1;
/// Bytes in one [`Bulk::DeviceData`](crate::Bulk::DeviceData), at least 1.
pub const DEVICE_DATA: usize = 1 << 20;
/// Bytes of one machine-state section.
pub const SECTION: usize = 16 << 20;
/// Bytes of a section's name, at least 1, all of them graphic ASCII.
pub const SECTION_NAME: usize = 128;
/// Sections of one machine. Whoever receives counts them: the codec sees one at a time.
pub const SECTIONS: u32 = 4096;
/// Bytes of all sections of one machine together, counted by whoever receives and holds them.
pub const SECTIONS_BYTES: u64 = 256 << 20;
/// Reasons in one [`Message::Refuse`](crate::Message::Refuse) or [`Accept`](crate::Accept). More are cut off by the encoder.
pub const REASONS: usize = 256;
/// Bytes of a reason's code. A longer one is cut by the encoder.
pub const REASON_CODE: usize = 64;
/// Bytes of a reason's sentence. A longer one is cut by the encoder.
pub const REASON_TEXT: usize = 1024;
/// Bytes of a reason's field. A longer one is cut by the encoder.
pub const REASON_FIELD: usize = 128;
/// Bytes of each of a reason's two values. A longer one is cut by the encoder.
pub const REASON_VALUE: usize = 512;
/// Bytes of a reason's severity, and of who can fix it. A longer one is cut by the encoder.
pub const REASON_WORD: usize = 32;
/// Bytes of a device's name.
pub const DEVICE_NAME: usize = 64;
/// Bytes of a device's name in a [`Failure`](vfio_migration_types::Failure). A longer one is cut by the encoder.
pub const ERROR_DEVICE: usize = 64;
/// Bytes of [`Failure::text`](vfio_migration_types::Failure::text). A longer one is cut by the encoder.
pub const ERROR_TEXT: usize = 4096;
/// Bytes of [`Failure::remedy`](vfio_migration_types::Failure::remedy). A longer one is cut by the encoder.
pub const ERROR_REMEDY: usize = 1024;
/// Digests in one [`RamDigests`](crate::RamDigests).
pub const RAM_DIGESTS: u16 = 64;
/// Bytes of [`RamDigests::logs`](crate::RamDigests::logs). A longer text is cut by the encoder.
pub const DIRTY_LOGS: usize = 1024;
/// Payload of an optional frame that this version does not know and skips.
pub const SKIPPED: usize = 64 << 10;
/// The longest payload of any frame: a section's.
pub const PAYLOAD: usize = 8 + SECTION_NAME + SECTION;
