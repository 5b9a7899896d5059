//! A file of the four rooms where a migration runs is named by the phase that it holds.

use std::collections::BTreeSet;

use super::tree::{Tree, inside};

/// The rooms: the source's and the destination's half of the engine and of the session.
const ROOMS: [&str; 4] = [
    "crates/engine/src/source",
    "crates/engine/src/destination",
    "crates/migration/src/source",
    "crates/migration/src/destination",
];

/// The phases in their order and the way back. P5 is `final_pass`, since `final` is a keyword.
const PHASES: [&str; 11] = [
    "plan",
    "hello",
    "setup",
    "iterate",
    "quiesce",
    "final_pass",
    "ready",
    "commit",
    "run",
    "clean",
    "rollback",
];

/// Files that are no phase's, and why each is there. At most eight.
const OTHER_FILES: [(&str, &str); 8] = [
    ("mod", "the face of one side, and who handles what"),
    ("state", "what one side of the engine remembers, in every phase"),
    ("session", "the loop that carries out the engine's actions, in every phase"),
    ("worker", "the machine and its devices, which each phase works on"),
    ("reader", "the thread that hears the other side, in every phase"),
    ("attempt", "what the threads of one attempt share"),
    ("progress", "what observers are shown, in every phase"),
    ("rehearsal", "where a session that is a rehearsal ends"),
];

const _: () = assert!(OTHER_FILES.len() <= 8, "a file of a room is named by its phase");

/// Checks the names of the files and folders of every room.
pub(crate) fn check(tree: &Tree, breaches: &mut Vec<String>) {
    for room in ROOMS {
        let unknown: BTreeSet<&str> =
            tree.below(room).filter_map(|(path, _)| first_unknown(inside(path, room)?)).collect();
        for place in unknown {
            breaches.push(format!("{room}/{place} is named by no phase, nor in xtask/src/rules/names.rs"));
        }
    }
}

/// The path within a room up to its first name that is no phase's and not listed. What is below `tests` is free.
fn first_unknown(path: &str) -> Option<&str> {
    let path = path.trim_end_matches(".rs");
    let mut end = 0;
    for name in path.split('/') {
        end += name.len();
        if name == "tests" {
            return None;
        }
        if !PHASES.contains(&name) && !OTHER_FILES.iter().any(|(other, _)| *other == name) {
            return path.get(..end);
        }
        end += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{Tree, check};

    fn breaches(path: &str) -> Vec<String> {
        let mut breaches = Vec::new();
        check(&Tree::of(&[(path, "")]), &mut breaches);
        breaches
    }

    #[test]
    fn phases_and_listed_files_stand_in_a_room() {
        for name in ["final_pass.rs", "mod.rs", "ready/mod.rs", "tests/world.rs"] {
            assert_eq!(breaches(&format!("crates/engine/src/source/{name}")), [""; 0], "{name}");
        }
        assert_eq!(breaches("crates/engine/src/limits.rs"), [""; 0]);
    }

    #[test]
    fn a_planted_name_that_is_no_phase_s_is_reported() {
        for name in ["judge.rs", "judge/mod.rs"] {
            let expected = "crates/migration/src/destination/judge is named by no phase, nor in xtask/src/rules/names.rs";
            assert_eq!(breaches(&format!("crates/migration/src/destination/{name}")), [expected]);
        }
        let below = breaches("crates/engine/src/source/hello/judge.rs");
        assert_eq!(
            below,
            ["crates/engine/src/source/hello/judge is named by no phase, nor in xtask/src/rules/names.rs"]
        );
    }
}
