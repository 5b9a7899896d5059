//! Migration states and flags as the protocol's crate has them, which stands alone, and as all others share them.

use vfio_migration_types::{MigrationFlags, MigrationState};
use vfio_user_peer as peer;

/// The shared state of the protocol's.
pub(super) fn shared_state(state: peer::MigrationState) -> MigrationState {
    match state {
        peer::MigrationState::Error => MigrationState::Error,
        peer::MigrationState::Stop => MigrationState::Stop,
        peer::MigrationState::Running => MigrationState::Running,
        peer::MigrationState::StopCopy => MigrationState::StopCopy,
        peer::MigrationState::Resuming => MigrationState::Resuming,
        peer::MigrationState::RunningP2p => MigrationState::RunningP2p,
        peer::MigrationState::PreCopy => MigrationState::PreCopy,
        peer::MigrationState::PreCopyP2p => MigrationState::PreCopyP2p,
    }
}

/// The protocol's state of the shared one.
pub(super) fn peer_state(state: MigrationState) -> peer::MigrationState {
    match state {
        MigrationState::Error => peer::MigrationState::Error,
        MigrationState::Stop => peer::MigrationState::Stop,
        MigrationState::Running => peer::MigrationState::Running,
        MigrationState::StopCopy => peer::MigrationState::StopCopy,
        MigrationState::Resuming => peer::MigrationState::Resuming,
        MigrationState::RunningP2p => peer::MigrationState::RunningP2p,
        MigrationState::PreCopy => peer::MigrationState::PreCopy,
        MigrationState::PreCopyP2p => peer::MigrationState::PreCopyP2p,
    }
}

/// The shared flags of the protocol's. What a later version of it may add is nothing that a session here makes use of.
pub(super) fn shared_flags(flags: peer::MigrationFlags) -> MigrationFlags {
    MigrationFlags { p2p: flags.p2p, pre_copy: flags.pre_copy }
}

#[cfg(test)]
mod tests {
    use vfio_migration_types::path;

    use super::*;

    /// A server of the protocol's crate and a session here walk through the same states.
    #[test]
    fn both_know_the_same_numbers_names_and_ways() {
        for state in peer::MigrationState::ALL {
            assert_eq!(peer_state(shared_state(state)), state);
            assert_eq!(shared_state(state) as u32, state as u32);
            assert_eq!(shared_state(state).to_string(), state.to_string());
        }
        assert_eq!(peer::MigrationState::ALL.map(shared_state), MigrationState::ALL);
        assert_eq!(peer::MigrationFlags::ALL.map(shared_flags), MigrationFlags::ALL);
        for flags in peer::MigrationFlags::ALL {
            assert_eq!(shared_flags(flags).bits(), flags.bits());
            for from in peer::MigrationState::ALL {
                for to in peer::MigrationState::ALL {
                    let theirs = from.path_to(to, flags);
                    let theirs = theirs.map(|way| way.into_iter().map(shared_state).collect::<Vec<_>>());
                    let ours = path(shared_state(from), shared_state(to), shared_flags(flags));
                    assert_eq!(
                        theirs.map_err(|error| error.to_string()),
                        ours.map_err(|error| error.to_string()),
                        "{from} to {to}"
                    );
                }
            }
        }
    }
}
