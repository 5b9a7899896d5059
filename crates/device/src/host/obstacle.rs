//! Obstacles: reasons why a device cannot migrate, with what would change each.

use std::fmt;

/// A stable code for a reason. The text beside it may change, the code does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ObstacleCode {
    /// Its entry in sysfs cannot be read.
    Unreadable,
    /// The kernel has no VFIO, or it is not loaded.
    NoVfio,
    /// No IOMMU isolates it.
    NoIommuGroup,
    /// VFIO without an IOMMU: guest memory cannot be mapped for it.
    NoIommu,
    /// No driver has it.
    Unbound,
    /// A driver of the host has it.
    HostDriver,
    /// A physical function: its virtual functions are what migrates.
    PhysicalFunction,
    /// The VFIO driver that has it has no migration.
    NoMigrationInDriver,
    /// Another device of its IOMMU group belongs to a driver of the host.
    GroupNotViable,
    /// Bound to VFIO, but there is no file to open it by.
    NoDeviceFile,
    /// The caller may not open it.
    NoPermission,
    /// Somebody has it open.
    InUse,
    /// The kernel refused to open it, when it was to be asked.
    OpenFailed,
    /// The kernel maps no memory for it, once it was opened.
    MappingRefused,
    /// Nobody listens at the socket, or what listens is no vfio-user server or does not answer.
    NoAnswer,
    /// The vfio-user server has no migration.
    NoMigrationInServer,
}

impl ObstacleCode {
    /// All codes, in the order of [`ObstacleCode`].
    pub const ALL: [Self; 16] = [
        Self::Unreadable,
        Self::NoVfio,
        Self::NoIommuGroup,
        Self::NoIommu,
        Self::Unbound,
        Self::HostDriver,
        Self::PhysicalFunction,
        Self::NoMigrationInDriver,
        Self::GroupNotViable,
        Self::NoDeviceFile,
        Self::NoPermission,
        Self::InUse,
        Self::OpenFailed,
        Self::MappingRefused,
        Self::NoAnswer,
        Self::NoMigrationInServer,
    ];

    /// The code's name, the same in every version.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::NoVfio => "no-vfio",
            Self::NoIommuGroup => "no-iommu-group",
            Self::NoIommu => "no-iommu",
            Self::Unbound => "unbound",
            Self::HostDriver => "host-driver",
            Self::PhysicalFunction => "physical-function",
            Self::NoMigrationInDriver => "no-migration-in-driver",
            Self::GroupNotViable => "group-not-viable",
            Self::NoDeviceFile => "no-device-file",
            Self::NoPermission => "no-permission",
            Self::InUse => "in-use",
            Self::OpenFailed => "open-failed",
            Self::MappingRefused => "mapping-refused",
            Self::NoAnswer => "no-answer",
            Self::NoMigrationInServer => "no-migration-in-server",
        }
    }
}

impl fmt::Display for ObstacleCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A reason why a device cannot migrate in its present state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Code of the reason.
    pub code: ObstacleCode,
    /// The reason, in a sentence.
    pub text: String,
    /// The change that would clear it, in a sentence.
    pub change: String,
    /// The commands for it, as root, in order; none where no command does it.
    pub commands: Vec<String>,
}

impl Obstacle {
    /// An obstacle from its parts.
    pub fn new(
        code: ObstacleCode,
        text: impl Into<String>,
        change: impl Into<String>,
        commands: Vec<String>,
    ) -> Self {
        Self { code, text: text.into(), change: change.into(), commands }
    }
}
