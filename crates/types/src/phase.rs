//! The phases of a migration, P0 to P9.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A phase of a migration, in order. ARCHITECTURE.md says where each one lives in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// P0: the verdict from declared manifests, without contact.
    Plan,
    /// P1: connect, negotiate, reserve everything that could be lacking.
    Hello,
    /// P2: dirty logging on, devices PRE_COPY here and RESUMING there.
    Setup,
    /// P3: RAM and device pre-copy data, the guest running.
    Iterate,
    /// P4: vCPUs paused, devices P2P, barrier, STOP_COPY.
    Quiesce,
    /// P5: the last pages, machine state, device data to its end.
    Final,
    /// P6: everything loaded and verified at the destination.
    Ready,
    /// P7: the one message that moves ownership.
    Commit,
    /// P8: the destination's devices and vCPUs run.
    Run,
    /// P9: the source releases what it held.
    Clean,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 10] = [
        Self::Plan,
        Self::Hello,
        Self::Setup,
        Self::Iterate,
        Self::Quiesce,
        Self::Final,
        Self::Ready,
        Self::Commit,
        Self::Run,
        Self::Clean,
    ];

    /// The short name, `"P0"` to `"P9"`.
    pub fn code(self) -> &'static str {
        ["P0", "P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9"][self as usize]
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Self::Plan => "plan",
            Self::Hello => "hello",
            Self::Setup => "setup",
            Self::Iterate => "iterate",
            Self::Quiesce => "quiesce",
            Self::Final => "final",
            Self::Ready => "ready",
            Self::Commit => "commit",
            Self::Run => "run",
            Self::Clean => "clean",
        };
        write!(f, "{} {word}", self.code())
    }
}
