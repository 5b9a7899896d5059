//! All combination transitions, for the four capability sets, against the kernel's table as published in
//! `include/uapi/linux/vfio.h` and walked by hand. The table is written out, not computed, so that the code and
//! the test cannot share a mistake.

use vfio_migration_types::{ArcError, MigrationFlags, MigrationState, path};

/// `from > step > … > to`, one per line, for a device with P2P and PRE_COPY (flags 7).
const FULL: &str = "
STOP > RUNNING_P2P > RUNNING
STOP > STOP_COPY
STOP > RESUMING
STOP > RUNNING_P2P
STOP > RUNNING_P2P > RUNNING > PRE_COPY
STOP > RUNNING_P2P > PRE_COPY_P2P
RUNNING > RUNNING_P2P > STOP
RUNNING > RUNNING_P2P > STOP > STOP_COPY
RUNNING > RUNNING_P2P > STOP > RESUMING
RUNNING > RUNNING_P2P
RUNNING > PRE_COPY
RUNNING > RUNNING_P2P > PRE_COPY_P2P
RUNNING_P2P > STOP
RUNNING_P2P > RUNNING
RUNNING_P2P > PRE_COPY_P2P
RUNNING_P2P > STOP > STOP_COPY
RUNNING_P2P > STOP > RESUMING
RUNNING_P2P > RUNNING > PRE_COPY
PRE_COPY > RUNNING
PRE_COPY > PRE_COPY_P2P
PRE_COPY > PRE_COPY_P2P > STOP_COPY
PRE_COPY > RUNNING > RUNNING_P2P
PRE_COPY > RUNNING > RUNNING_P2P > STOP
PRE_COPY > RUNNING > RUNNING_P2P > STOP > RESUMING
PRE_COPY_P2P > PRE_COPY
PRE_COPY_P2P > STOP_COPY
PRE_COPY_P2P > RUNNING_P2P
PRE_COPY_P2P > RUNNING_P2P > RUNNING
PRE_COPY_P2P > RUNNING_P2P > STOP
PRE_COPY_P2P > RUNNING_P2P > STOP > RESUMING
STOP_COPY > STOP
STOP_COPY > STOP > RUNNING_P2P
STOP_COPY > STOP > RUNNING_P2P > RUNNING
STOP_COPY > STOP > RESUMING
RESUMING > STOP
RESUMING > STOP > STOP_COPY
RESUMING > STOP > RUNNING_P2P
RESUMING > STOP > RUNNING_P2P > RUNNING
RESUMING > STOP > RUNNING_P2P > RUNNING > PRE_COPY
RESUMING > STOP > RUNNING_P2P > PRE_COPY_P2P
";

fn state(name: &str) -> MigrationState {
    MigrationState::ALL.into_iter().find(|state| state.to_string() == name).expect(name)
}

/// The full table with the states that `flags` lack dropped: as ends, the line goes; as steps, the hop goes.
fn expected(flags: MigrationFlags) -> Vec<Vec<MigrationState>> {
    FULL.trim()
        .lines()
        .map(|line| line.split(" > ").map(state).collect::<Vec<_>>())
        .filter(|walk| flags.has_state(walk[0]) && flags.has_state(walk[walk.len() - 1]))
        .map(|walk| walk.into_iter().filter(|step| flags.has_state(*step)).collect())
        .collect()
}

#[test]
fn every_combination_transition_of_every_capability_set() {
    for flags in MigrationFlags::ALL {
        let table = expected(flags);
        for from in MigrationState::ALL {
            for to in MigrationState::ALL {
                let found = path(from, to, flags);
                if to == MigrationState::Error {
                    assert_eq!(found, Err(ArcError::ToError));
                } else if from == MigrationState::Error {
                    assert_eq!(found, Err(ArcError::InError));
                } else if !flags.has_state(from) || !flags.has_state(to) {
                    assert!(matches!(found, Err(ArcError::MissingState(_))), "{from} to {to} with {flags:?}");
                } else if from == to {
                    assert_eq!(found, Ok(Vec::new()));
                } else if let Some(walk) =
                    table.iter().find(|walk| walk[0] == from && walk[walk.len() - 1] == to)
                {
                    assert_eq!(found.as_deref(), Ok(&walk[1..]), "{from} to {to} with {flags:?}");
                } else {
                    assert_eq!(found, Err(ArcError::Blocked(from, to)), "{from} to {to} with {flags:?}");
                }
            }
        }
    }
}

#[test]
fn only_the_two_ways_back_into_pre_copy_are_blocked() {
    let flags = MigrationFlags { p2p: true, pre_copy: true };
    let blocked: Vec<_> = MigrationState::ALL
        .into_iter()
        .flat_map(|from| MigrationState::ALL.map(|to| (from, to)))
        .filter(|(from, to)| matches!(path(*from, *to, flags), Err(ArcError::Blocked(..))))
        .collect();
    use MigrationState::{PreCopy, PreCopyP2p, StopCopy};
    assert_eq!(blocked, [(StopCopy, PreCopy), (StopCopy, PreCopyP2p)]);
}
