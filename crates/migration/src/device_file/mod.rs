//! One device to and from a file, without a VM around it: for whoever writes drivers and device servers.
//!
//! The device is put into a [machine](machine) that has nothing else, and that machine is saved and restored as any other
//! is: the same frames, the same checks of a file, the same order of states. The device is watched on the way, which notes
//! each arc and hides what the device can do and is not to.

mod control;
mod error;
mod machine;
mod report;
mod restore;
mod save;

pub use control::DeviceControl;
pub use error::{DeviceFate, DeviceFileError};
pub use report::{DeviceArc, DeviceReport};
pub use restore::{RestoreDeviceOptions, restore_device};
pub use save::{SaveDeviceOptions, save_device};

pub(crate) use machine::KIND;
