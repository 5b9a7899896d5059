//! Migration states and capabilities of a VFIO device, and the arcs between the states (`include/uapi/linux/vfio.h`, v2 migration protocol).

use std::fmt;

/// State of a device's migration state machine: `enum vfio_device_mig_state`, with the kernel's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum MigrationState {
    /// Undefined; only a reset leaves it. Nothing may be SET on a device in it.
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
    /// [`PreCopy`](Self::PreCopy) with [`RunningP2p`](Self::RunningP2p)'s rule on peer-to-peer DMA.
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

    /// Every state that a device with `flags` enters on its way from this one to `to`, the last being `to`; none when they are equal.
    /// It is the shortest way of single arcs that the uAPI names, without those through states that the device lacks.
    ///
    /// # Errors
    /// The transition is one that no device takes. The kernel answers EINVAL to it.
    pub fn path_to(self, to: Self, flags: MigrationFlags) -> Result<Vec<Self>, ArcError> {
        if to == Self::Error {
            return Err(ArcError::ToError);
        }
        if self == Self::Error {
            return Err(ArcError::InError);
        }
        if let Some(missing) = [self, to].into_iter().find(|state| !flags.has_state(*state)) {
            return Err(ArcError::MissingState(missing));
        }
        if self == Self::StopCopy && matches!(to, Self::PreCopy | Self::PreCopyP2p) {
            return Err(ArcError::Blocked(self, to));
        }
        // The ways in the order of their lengths. Seven states: none is longer than six arcs.
        let mut ways = std::collections::VecDeque::from([Vec::new()]);
        while let Some(way) = ways.pop_front() {
            let here = way.last().copied().unwrap_or(self);
            if here == to {
                return Ok(way);
            }
            // Nothing passes through a saving session; inside one all its states may be passed.
            let passes = way.is_empty() || !here.is_saving() || (self.is_saving() && to.is_saving());
            for next in here.arcs(flags).filter(|next| passes && *next != self && !way.contains(next)) {
                ways.push_back(way.iter().copied().chain([next]).collect());
            }
        }
        Err(ArcError::Blocked(self, to))
    }

    /// The ends of the single arcs out of this state that a device with `flags` takes.
    fn arcs(self, flags: MigrationFlags) -> impl Iterator<Item = Self> {
        let ends: &[Self] = match (self, flags.p2p) {
            (Self::Running, true) => &[Self::RunningP2p, Self::PreCopy],
            (Self::Running, false) => &[Self::Stop, Self::PreCopy],
            (Self::RunningP2p, _) => &[Self::Stop, Self::Running, Self::PreCopyP2p],
            (Self::Stop, true) => &[Self::RunningP2p, Self::StopCopy, Self::Resuming],
            (Self::Stop, false) => &[Self::Running, Self::StopCopy, Self::Resuming],
            (Self::StopCopy | Self::Resuming, _) => &[Self::Stop],
            (Self::PreCopy, true) => &[Self::Running, Self::PreCopyP2p],
            (Self::PreCopy, false) => &[Self::Running, Self::StopCopy],
            (Self::PreCopyP2p, _) => &[Self::RunningP2p, Self::PreCopy, Self::StopCopy],
            (Self::Error, _) => &[],
        };
        ends.iter().copied().filter(move |state| flags.has_state(*state))
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

/// The reason for which a transition is refused before anything moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArcError {
    /// The device's flags lack the state.
    #[error("the device has no state {0}")]
    MissingState(MigrationState),
    /// Nothing may be SET on a device in ERROR; it leaves that state by a reset alone.
    #[error("the device is in ERROR, which only a reset leaves")]
    InError,
    /// ERROR cannot be asked for.
    #[error("ERROR cannot be asked for")]
    ToError,
    /// A saving session cannot go back from STOP_COPY to pre-copy.
    #[error("{0} to {1} is blocked: leave the saving session first")]
    Blocked(MigrationState, MigrationState),
}

/// Migration capabilities of a device: `struct vfio_device_feature_migration.flags`.
///
/// STOP_COPY is not a field: a device without it does not migrate, and is never described by this type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MigrationFlags {
    /// `VFIO_MIGRATION_P2P`: the `*_P2P` states exist.
    pub p2p: bool,
    /// `VFIO_MIGRATION_PRE_COPY`: the `PRE_COPY*` states exist.
    pub pre_copy: bool,
}

impl MigrationFlags {
    const STOP_COPY: u64 = 1 << 0;
    const P2P: u64 = 1 << 1;
    const PRE_COPY: u64 = 1 << 2;

    /// Every set that the uAPI allows: STOP_COPY alone, with P2P, with PRE_COPY, with both.
    pub const ALL: [Self; 4] =
        [Self::new(false, false), Self::new(true, false), Self::new(false, true), Self::new(true, true)];

    /// STOP_COPY, and what else.
    pub const fn new(p2p: bool, pre_copy: bool) -> Self {
        Self { p2p, pre_copy }
    }

    /// Reads the kernel's flag word; `None` when STOP_COPY, which every migratable device has, is missing.
    /// Flags of later kernels are ignored, as the uAPI asks.
    pub fn from_bits(bits: u64) -> Option<Self> {
        (bits & Self::STOP_COPY != 0).then_some(Self::new(bits & Self::P2P != 0, bits & Self::PRE_COPY != 0))
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
