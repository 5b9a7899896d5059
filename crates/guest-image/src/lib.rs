//! A program that runs in a guest and finds out what a migration lost: bare metal, without an operating system, assembled from
//! the `.s` files here when this crate is built.
//!
//! It drives the sample devices, numbers pages at a set rate, and checks over and over that every page, every DMA block and
//! every interrupt is what it should be. The VMM tells it what to do through [`BootInfo`], writes [`contents`] to RAM, starts a
//! processor at [`ENTRY`], and reads what the program found through [`Report`]. What it asks of a machine is in [`map`] and [`ports`]. Where it finds the kernel's sample device mtty, a serial card whose only interrupt is its pin, it drives
//! that too: numbered bytes must come back in order, each burst announced by the pin. What it expects lives in guest RAM, so a move that loses a page of that is found as well.
//!
//! It runs at CPL 0 in 64-bit mode with a one-to-one mapping, idles by HLT, and uses no instruction beyond those of
//! the first x86-64 processors: it is correct on any KVM, and fast on one that emulates CPL 0.

mod boot;
mod error;
mod image;
pub mod map;
pub mod ports;
mod report;

pub use boot::{ENTRY, Entry, contents};
pub use error::GuestImageError;
pub use image::image;
pub use map::{Areas, RamPart};
pub use report::{
    BOOT_MAGIC, BootInfo, GAP_WORD, REPORT_LEN, REPORT_MAGIC, REQUEST, REQUEST_WORD, Report, Stage,
};

/// Vendor (low half) and device id of the sample device, which the program drives.
pub const SAMPLE_DEVICE: u32 = 0x4d53_5646;
