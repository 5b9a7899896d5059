//! Migration states and capability flags of a VFIO device (`include/uapi/linux/vfio.h`, v2 migration protocol).

use std::fmt;

use serde::{Deserialize, Serialize};

/// State of a device's migration state machine: `enum vfio_device_mig_state`, with the kernel's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[repr(u32)]
pub enum MigrationState {
    /// Undefined; every data descriptor is dead; only a reset leaves it. Never SET anything on a device in it.
    Error = 0,
    /// No DMA, no interrupts, no change of internal state.
    Stop = 1,
    /// The device runs: it does DMA and raises interrupts.
    Running = 2,
    /// Stopped, a saving session open.
    StopCopy = 3,
    /// Stopped, a resuming session open.
    Resuming = 4,
    /// Starts no new peer-to-peer DMA, but answers that of others.
    RunningP2p = 5,
    /// The device runs, a saving session open, changes of internal state are tracked.
    PreCopy = 6,
    /// [`MigrationState::PreCopy`] with [`MigrationState::RunningP2p`]'s rule on peer-to-peer DMA.
    PreCopyP2p = 7,
}

impl MigrationState {
    /// Every state, in the kernel's order.
    pub const ALL: [Self; 8] = [
        Self::Error,
        Self::Stop,
        Self::Running,
        Self::StopCopy,
        Self::Resuming,
        Self::RunningP2p,
        Self::PreCopy,
        Self::PreCopyP2p,
    ];

    /// Whether a saving session is open in this state; moves inside the group keep the session.
    pub fn is_saving(self) -> bool {
        matches!(self, Self::PreCopy | Self::PreCopyP2p | Self::StopCopy)
    }

    /// Whether the device may do DMA or raise interrupts in this state.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Running | Self::RunningP2p | Self::PreCopy | Self::PreCopyP2p)
    }
}

impl fmt::Display for MigrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "ERROR",
            Self::Stop => "STOP",
            Self::Running => "RUNNING",
            Self::StopCopy => "STOP_COPY",
            Self::Resuming => "RESUMING",
            Self::RunningP2p => "RUNNING_P2P",
            Self::PreCopy => "PRE_COPY",
            Self::PreCopyP2p => "PRE_COPY_P2P",
        })
    }
}

/// A state number that the uAPI does not define.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no VFIO migration state")]
pub struct UnknownState(pub u32);

impl TryFrom<u32> for MigrationState {
    type Error = UnknownState;

    fn try_from(number: u32) -> Result<Self, UnknownState> {
        Self::ALL.into_iter().find(|state| *state as u32 == number).ok_or(UnknownState(number))
    }
}

/// Migration capabilities of a device: `struct vfio_device_feature_migration.flags`.
///
/// STOP_COPY is not a field: a device without it does not migrate, and is never described by this type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MigrationFlags {
    /// `VFIO_MIGRATION_P2P`: the `*_P2P` states exist.
    pub p2p: bool,
    /// `VFIO_MIGRATION_PRE_COPY`: the `PRE_COPY*` states exist.
    pub pre_copy: bool,
}

impl MigrationFlags {
    /// `VFIO_MIGRATION_STOP_COPY`.
    pub const STOP_COPY: u64 = 1 << 0;
    /// `VFIO_MIGRATION_P2P`.
    pub const P2P: u64 = 1 << 1;
    /// `VFIO_MIGRATION_PRE_COPY`.
    pub const PRE_COPY: u64 = 1 << 2;

    /// The four sets that the uAPI allows.
    pub const ALL: [Self; 4] = [
        Self { p2p: false, pre_copy: false },
        Self { p2p: true, pre_copy: false },
        Self { p2p: false, pre_copy: true },
        Self { p2p: true, pre_copy: true },
    ];

    /// Reads the kernel's flag word; `None` when STOP_COPY, which every migratable device has, is missing.
    /// Flags of later kernels are ignored, as the uAPI asks.
    pub fn from_bits(bits: u64) -> Option<Self> {
        (bits & Self::STOP_COPY != 0)
            .then_some(Self { p2p: bits & Self::P2P != 0, pre_copy: bits & Self::PRE_COPY != 0 })
    }

    /// The kernel's flag word.
    pub fn bits(self) -> u64 {
        let p2p = if self.p2p { Self::P2P } else { 0 };
        let pre_copy = if self.pre_copy { Self::PRE_COPY } else { 0 };
        Self::STOP_COPY | p2p | pre_copy
    }

    /// Whether a device with these flags has `state` at all.
    pub fn has_state(self, state: MigrationState) -> bool {
        match state {
            MigrationState::RunningP2p => self.p2p,
            MigrationState::PreCopy => self.pre_copy,
            MigrationState::PreCopyP2p => self.p2p && self.pre_copy,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_flags_are_the_kernels() {
        for number in 0..8 {
            assert_eq!(MigrationState::try_from(number).map(|state| state as u32), Ok(number));
        }
        assert_eq!(MigrationState::try_from(8), Err(UnknownState(8)));
        assert_eq!(MigrationFlags::ALL.map(MigrationFlags::bits), [1, 3, 5, 7]);
        for flags in MigrationFlags::ALL {
            assert_eq!(MigrationFlags::from_bits(flags.bits()), Some(flags));
        }
        assert_eq!(MigrationFlags::from_bits(6), None);
        assert_eq!(MigrationFlags::from_bits(0x101), Some(MigrationFlags::default()));
    }
}
