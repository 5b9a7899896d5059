//! Device and machine manifests, and the rules that compare them.
//!
//! A manifest says what a scheduler can compare without contact. The rules here are pure and know nothing of how
//! a manifest travels.
#![forbid(unsafe_code)]

mod document;
mod manifest;
mod text;
mod verdict;
mod version;

pub use document::ManifestError;
pub use manifest::{DeviceManifest, MachineManifest, PciIdentity, RamRegion, RegionManifest};
pub use verdict::{Reason, Verdict, WhoCanFix, compare};
