//! A device that a scan found.

use std::path::PathBuf;

use super::obstacle::{Obstacle, ObstacleCode};
use super::opening::{NeededFile, User};
use super::pci::PciFacts;

/// The kind of a host's device, with the facts of its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostDeviceKind {
    /// A PCI function, physical or virtual.
    Pci(Box<PciFacts>),
    /// A mediated device: by name the device that it is made of, and its type.
    Mdev {
        /// Name of the device that the mediated device is a part of.
        parent: Option<String>,
        /// The type, of those that its parent offers.
        mdev_type: Option<String>,
    },
    /// Another VFIO device: of a platform, AP, CCW or the like.
    Other,
}

/// A device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostDevice {
    /// PCI address, UUID, or the name that its bus gives it.
    pub name: String,
    /// The device's kind, with the facts of its kind.
    pub kind: HostDeviceKind,
    /// Driver that has it.
    pub driver: Option<String>,
    /// The driver is a VFIO driver.
    pub vfio: bool,
    /// VFIO variant driver that is made for it, where the kernel's modules have one.
    pub variant: Option<String>,
    /// Number of its IOMMU group.
    pub iommu_group: Option<u32>,
    /// File of its group, where there is one.
    pub group_file: Option<PathBuf>,
    /// The device's own file under `/dev/vfio/devices`, where there is one.
    pub cdev: Option<PathBuf>,
    /// Files that opening the device takes. Empty where no VFIO driver has it, or no file was made.
    pub needs: Vec<NeededFile>,
    /// Processes that have the device or its group open, as far as the caller may see.
    pub users: Vec<User>,
    /// Reasons why it cannot migrate in its present state. Empty: nothing in sysfs speaks against it; the driver has
    /// the last word.
    pub obstacles: Vec<Obstacle>,
}

impl HostDevice {
    /// Whether it has to do with VFIO: it is bound to it, could be by a variant driver, or could have virtual functions
    /// that are. What cannot be read may have.
    pub fn is_candidate(&self) -> bool {
        let pci = match &self.kind {
            HostDeviceKind::Pci(facts) => {
                facts.sriov.is_some() || facts.physical.is_some() || facts.vendor.is_none()
            }
            HostDeviceKind::Mdev { .. } | HostDeviceKind::Other => true,
        };
        self.vfio || self.variant.is_some() || pci
    }

    /// Whether it can be opened to ask it: a VFIO driver has it, nobody known uses it, and nothing prevents it. A
    /// driver that is known to have no migration does not.
    pub fn openable(&self) -> bool {
        let asks = matches!(self.kind, HostDeviceKind::Pci(_) | HostDeviceKind::Mdev { .. });
        let in_the_way = |obstacle: &Obstacle| obstacle.code != ObstacleCode::NoMigrationInDriver;
        asks && self.vfio && !self.obstacles.iter().any(in_the_way)
    }
}
