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

    /// The short name for programs, `"P0"` to `"P9"`.
    pub fn code(self) -> &'static str {
        self.names().0
    }

    /// The name for people: what every text says. It differs from the name of the phase's files where the trade has a word of
    /// its own.
    pub fn name(self) -> &'static str {
        self.names().1
    }

    /// Whether it is part of the switchover: the guest is paused for it, or about to be.
    pub fn in_switchover(self) -> bool {
        (Self::Quiesce..=Self::Run).contains(&self)
    }

    /// The one table of names: the code and the name of each phase.
    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Plan => ("P0", "plan"),
            Self::Hello => ("P1", "hello"),
            Self::Setup => ("P2", "setup"),
            Self::Iterate => ("P3", "pre-copy"),
            Self::Quiesce => ("P4", "quiesce"),
            Self::Final => ("P5", "final"),
            Self::Ready => ("P6", "ready"),
            Self::Commit => ("P7", "commit"),
            Self::Run => ("P8", "run"),
            Self::Clean => ("P9", "clean-up"),
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_count_and_texts_have_names() {
        for (number, phase) in Phase::ALL.into_iter().enumerate() {
            assert_eq!(phase.code(), format!("P{number}"));
            assert_eq!(phase.to_string(), phase.name());
            assert!(!phase.name().starts_with('P'), "{phase}");
        }
        let switchover: Vec<_> = Phase::ALL.into_iter().filter(|phase| phase.in_switchover()).collect();
        assert_eq!(switchover.first().zip(switchover.last()), Some((&Phase::Quiesce, &Phase::Run)));
    }
}
