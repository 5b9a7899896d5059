//! Devices made of nothing, for tests: of this crate, and of those that use it.
#![expect(clippy::cast_possible_truncation, reason = "the numbers of tests are small")]

mod device;
mod hardware;

pub use device::{FakeDevice, FakeDeviceKind, FakeFault, FakeFunction};
pub use hardware::{FakeEvent, FakeHardware, FakeHardwareState, legacy_config, mailbox, sample_config};
