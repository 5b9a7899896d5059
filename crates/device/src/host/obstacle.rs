//! Obstacles: reasons why a device cannot migrate, with what would change each.

use std::fmt;

macro_rules! obstacles {
    ($($(#[doc = $doc:literal])* $code:ident, $name:literal: $meaning:literal, $remedy:literal;)*) => {
        /// A stable code for a reason. The text beside it may change, the code does not.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum ObstacleCode {
            $($(#[doc = $doc])* $code,)*
        }

        impl ObstacleCode {
            /// All codes, in the order of [`ObstacleCode`].
            pub const ALL: &[Self] = &[$(Self::$code),*];

            /// The code's name, the same in every version.
            pub fn name(self) -> &'static str {
                match self { $(Self::$code => $name),* }
            }

            /// What was found of a device with this code, in a sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$code => $meaning),* }
            }

            /// What to do about it.
            pub fn remedy(self) -> &'static str {
                match self { $(Self::$code => $remedy),* }
            }
        }
    };
}

obstacles! {
    /// Its entry in sysfs cannot be read.
    Unreadable, "unreadable": "Its entry in sysfs cannot be read.", "Look at the kernel log.";
    /// The kernel has no VFIO, or it is not loaded.
    NoVfio, "no-vfio": "The kernel has no VFIO, or it is not loaded.", "`modprobe vfio-pci`; `vfio-migrate doctor` says more.";
    /// No IOMMU isolates it.
    NoIommuGroup, "no-iommu-group": "No IOMMU isolates it.", "Turn the IOMMU on in the firmware and on the kernel's command line.";
    /// VFIO runs without an IOMMU: guest memory cannot be mapped for it.
    NoIommu, "no-iommu": "VFIO runs without an IOMMU: guest memory cannot be mapped for it.", "Give the host an IOMMU.";
    /// No driver has it.
    Unbound, "unbound": "No driver has it.", "Bind it to its VFIO variant driver; with plain vfio-pci it does not migrate.";
    /// A driver of the host has it.
    HostDriver, "host-driver": "A driver of the host has it.", "Rebind it, if the host can do without it.";
    /// It is a physical function: its virtual functions are what migrates.
    PhysicalFunction, "physical-function": "It is a physical function: its virtual functions are what migrates.", "Create virtual functions by `sriov_numvfs`.";
    /// The VFIO driver that has it has no migration, or said so when it was asked.
    NoMigrationInDriver, "no-migration-in-driver": "The VFIO driver that has it has no migration, or said so when it was asked.", "Bind it to its variant driver, where there is one.";
    /// Another device of its IOMMU group belongs to a driver of the host.
    GroupNotViable, "group-not-viable": "Another device of its IOMMU group belongs to a driver of the host.", "Unbind that one.";
    /// It is bound to VFIO, but there is no file to open it by.
    NoDeviceFile, "no-device-file": "It is bound to VFIO, but there is no file to open it by.", "Look at udev, at the container, at the modules that make `/dev/iommu` and `/dev/vfio/vfio`.";
    /// The caller may not open one of its files.
    NoPermission, "no-permission": "The caller may not open one of its files.", "`setfacl`, for this user.";
    /// A process has it, or its group, open.
    InUse, "in-use": "A process has it, or its group, open.", "End that process, or ask the VMM that has it.";
    /// The kernel refused to open it, when it was to be asked.
    OpenFailed, "open-failed": "The kernel refused to open it, when it was to be asked.", "Look at what the reason says, and at the kernel log.";
    /// The kernel maps no memory for it, once it was opened.
    MappingRefused, "mapping-refused": "The kernel maps no memory for it, once it was opened.", "Raise the limit on locked memory, and look at the kernel log.";
    /// Nobody listens at the socket, or what listens is no vfio-user server or does not answer.
    NoAnswer, "no-answer": "Nobody listens at the socket, or what listens is no vfio-user server or does not answer.", "Start the server; one that another VMM uses answers nobody else.";
    /// The vfio-user server has no migration.
    NoMigrationInServer, "no-migration-in-server": "The vfio-user server has no migration.", "Take another server.";
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
