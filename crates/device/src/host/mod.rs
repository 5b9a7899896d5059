//! What VFIO devices a host has, as sysfs, procfs, devfs and devlink tell, without opening any of them: opening a VFIO
//! device resets it. [`HostDevice::openable`] says which may be opened to ask them.
//!
//! Everything read here may be garbled, huge or missing: it is capped, and what cannot be read is unknown, not guessed.
//! The trees are parameters ([`Roots`]), so that a scan can be of a container's view, or of a tree made for a test.
//!
//! Layouts are those of `Documentation/ABI/testing/sysfs-bus-pci`, `sysfs-bus-vfio-mdev`, `sysfs-kernel-iommu_groups`
//! and of `drivers/vfio/vfio_main.c` (`vfio-dev`).

mod aliases;
mod devlink;
pub(crate) mod facts;
mod files;
mod judge;
mod kernel;
mod manifest;
mod obstacle;
mod pci;
mod route;
mod scan;
mod users;
mod vpd;

use std::path::{Path, PathBuf};

pub use devlink::{DevlinkError, running_versions};
pub(crate) use files::attribute;
pub use files::{ReadFailure, access_both_ways, list, read_text};
pub use kernel::{ConfigOption, KernelConfig, KernelVersion, config, has_module, module_file, version};
pub use obstacle::{Obstacle, ObstacleCode};
pub use pci::{PciAddress, PciFacts, PciInterrupts, Sriov};
pub use route::NeededFile;
pub use scan::{HostDevice, HostDeviceKind, Scan, scan};
pub use users::User;

/// Where a host's trees are. [`Default`] is this host's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// sysfs: `/sys`.
    pub sys: PathBuf,
    /// Device nodes: `/dev`.
    pub dev: PathBuf,
    /// procfs: `/proc`.
    pub proc: PathBuf,
    /// Kernel configurations: `/boot`.
    pub boot: PathBuf,
    /// Kernel modules, a folder per release: `/lib/modules`.
    pub modules: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self::under(Path::new("/"))
    }
}

impl Roots {
    /// The trees of a host whose root is `top`.
    pub fn under(top: &Path) -> Self {
        Self {
            sys: top.join("sys"),
            dev: top.join("dev"),
            proc: top.join("proc"),
            boot: top.join("boot"),
            modules: top.join("lib/modules"),
        }
    }
}
