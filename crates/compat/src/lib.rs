//! Manifests of devices, machines and hosts, and the rules that compare them.
//!
//! A manifest says what a scheduler can compare without contact. The rules here are pure and total: no I/O, no clock,
//! and an answer to any two manifests. How a manifest travels is not known here.
//!
//! - [`DeviceManifest`], [`MachineManifest`], [`HostManifest`]: what each says of itself; [`Document`] is one as a file.
//! - [`check_devices`], [`check_machines`], [`check_placement`]: a [`Report`], that is a verdict and every reason;
//!   [`check_source`]: so much of it as no destination can change.
//! - [`matrix()`]: which device of which host can go to which host; [`machine_matrix`]: which machine; [`baseline()`]: what a
//!   whole pool loads.
//! - [`Policy`]: what a site allows and asks for. [`explain`]: what a reason's code means.
#![forbid(unsafe_code)]

mod address;
mod baseline;
mod check;
mod codes;
mod device;
mod digest;
mod document;
mod error;
mod exemptions;
mod findings;
mod host;
pub mod labels;
mod limits;
mod machine;
mod mask;
mod matrix;
mod pairs;
mod parameter;
mod placement;
mod policy;
mod report;
mod rules;
mod scalar;
mod severity;
mod site;
mod text;
mod tree;
mod version;

pub use address::{GuestPciAddress, GuestPciAddressError};
pub use baseline::{Baseline, BaselineError, baseline, baselines};
pub use check::{check_devices, check_left_behind, check_machines, check_source, check_uncovered};
pub use codes::{Explanation, SessionCode, codes, explain, session_codes};
pub use device::{
    Capability, DeviceManifest, DirtyTracking, Driver, Extra, ManifestNote, PciIdentity, RegionManifest,
};
pub use document::{Document, Manifest, SCHEMA};
pub use error::ManifestError;
pub use exemptions::exemptions;
pub use host::{Accept, HostManifest, HostOffer, Limits};
pub use machine::{MachineManifest, RamRegion};
pub use mask::{MaskRule, MaskRuleError};
pub use matrix::{
    Cell, Matrix, MatrixDevice, MatrixError, MatrixHost, MatrixMachine, PoolMachine, machine_matrix, matrix,
};
pub use parameter::{Allowed, IntRange, Parameter};
pub use placement::{check_device_placement, check_placement};
pub use policy::{Allow, DeviceMap, MaskPolicy, Policy};
pub use report::{Reason, Report, Verdict, worse};
pub use scalar::Scalar;
pub use severity::{Severity, WhoCanFix};
pub use site::SiteFacts;
pub use tree::{Numbers, read_json, read_toml_or_json};
pub use version::{ModelVersion, VersionError, VersionRanges};
