//! VFIO devices of a host, from sysfs, procfs, devfs and devlink, without opening any of them: opening a VFIO device
//! resets it. [`HostDevice::openable`] says which may be opened to ask them.
//!
//! Everything read here may be garbled, huge or missing: it is capped, and what cannot be read is unknown, not guessed.
//! The trees are parameters ([`Roots`]), so that a scan can be of a container's view, or of a tree made for a test.
//!
//! Layouts are those of `Documentation/ABI/testing/sysfs-bus-pci`, `sysfs-bus-vfio-mdev`, `sysfs-kernel-iommu_groups`
//! and of `drivers/vfio/vfio_main.c` (`vfio-dev`).

mod aliases;
mod device;
mod devlink;
pub(crate) mod facts;
pub(crate) mod files;
mod judge;
mod kernel;
mod manifest;
mod obstacle;
mod opening;
mod pci;
mod scan;
mod vpd;

pub use device::{HostDevice, HostDeviceKind};
pub use devlink::{DevlinkError, running_versions};
pub use files::{ReadFailure, Roots, access_both_ways, list, read_text};
pub use kernel::{ConfigOption, KernelConfig, KernelVersion, config, has_module, module_file, version};
pub use obstacle::{Obstacle, ObstacleCode};
pub use opening::{NeededFile, User};
pub use pci::{PciAddress, PciFacts, PciInterrupts, Sriov};
pub use scan::{Scan, scan};
