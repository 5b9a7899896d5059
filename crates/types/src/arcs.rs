//! Arcs between migration states, and the combination transitions a device takes when asked for a distant state.
//!
//! The rule is the uAPI's (`include/uapi/linux/vfio.h`, "vfio_device_mig_state"): the shortest path of single
//! arcs, no saving state as an interior step; states that a device's flags lack are skipped over.

use crate::state::{MigrationFlags, MigrationState};

/// The reason a transition is refused before anything moves. The kernel answers EINVAL in each case.
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

/// The first arc's end on the way from `from` to `to` for a device with `flags`; `to` itself when both are equal.
pub fn next_state(
    from: MigrationState,
    to: MigrationState,
    flags: MigrationFlags,
) -> Result<MigrationState, ArcError> {
    Ok(path(from, to, flags)?.first().copied().unwrap_or(to))
}

/// Every state entered on the way from `from` to `to`, the last being `to`; empty when both are equal.
///
/// # Errors
/// The transition is one that no device takes, see [`ArcError`].
pub fn path(
    from: MigrationState,
    to: MigrationState,
    flags: MigrationFlags,
) -> Result<Vec<MigrationState>, ArcError> {
    if to == MigrationState::Error {
        return Err(ArcError::ToError);
    }
    if from == MigrationState::Error {
        return Err(ArcError::InError);
    }
    for state in [from, to] {
        if !flags.has_state(state) {
            return Err(ArcError::MissingState(state));
        }
    }
    if from == to {
        return Ok(Vec::new());
    }
    let back = matches!(to, MigrationState::PreCopy | MigrationState::PreCopyP2p);
    if from == MigrationState::StopCopy && back {
        return Err(ArcError::Blocked(from, to));
    }
    shortest(from, to, flags).ok_or(ArcError::Blocked(from, to))
}

/// Breadth-first over single arcs; the graph has at most seven nodes.
fn shortest(from: MigrationState, to: MigrationState, flags: MigrationFlags) -> Option<Vec<MigrationState>> {
    let mut open = std::collections::VecDeque::from([vec![from]]);
    let mut seen = vec![from];
    while let Some(walk) = open.pop_front() {
        let here = *walk.last()?;
        // A saving state is legal as an end of the walk, and as an interior step only while the walk stays
        // inside the saving session it began in.
        let interior = walk.len() > 1;
        if interior && here.is_saving() && !(from.is_saving() && to.is_saving()) {
            continue;
        }
        for next in single_arcs(here, flags) {
            if next == to {
                return Some(walk.iter().skip(1).copied().chain([to]).collect());
            }
            if !seen.contains(&next) {
                seen.push(next);
                open.push_back(walk.iter().copied().chain([next]).collect());
            }
        }
    }
    None
}

/// The ends of the single arcs out of `from` that a device with `flags` takes.
fn single_arcs(from: MigrationState, flags: MigrationFlags) -> impl Iterator<Item = MigrationState> {
    use MigrationState::{PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy};
    let ends: &[MigrationState] = match (from, flags.p2p) {
        (Running, true) => &[RunningP2p, PreCopy],
        (Running, false) => &[Stop, PreCopy],
        (RunningP2p, _) => &[Stop, Running, PreCopyP2p],
        (Stop, true) => &[RunningP2p, StopCopy, Resuming],
        (Stop, false) => &[Running, StopCopy, Resuming],
        (StopCopy, _) => &[Stop],
        (Resuming, _) => &[Stop],
        (PreCopy, true) => &[Running, PreCopyP2p],
        (PreCopy, false) => &[Running, StopCopy],
        (PreCopyP2p, _) => &[RunningP2p, PreCopy, StopCopy],
        (MigrationState::Error, _) => &[],
    };
    ends.iter().copied().filter(move |state| flags.has_state(*state))
}
