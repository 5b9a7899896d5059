//! Every message, in both directions: dropped, delayed, doubled, the connection cut there, either side killed there.
//!
//! What must hold is in [`judge`]; the rules of ownership are checked by the world itself after every event.

use std::time::Duration;

use crate::world::script::{Device, Direction, Fault, MS, SECOND, Sabotage, Script, What};
use crate::world::{End, Guest, World};
use vfio_migration_engine::ownership::{DestinationState, SourceState};
use vfio_migration_engine::{DestinationOutcome, Rehearse, SourceOutcome};

/// Longest simulated time from start to end, with every fault: the migration itself takes less than two seconds, the
/// longest wait is a dozen `peer_timeout`s.
const BOUND: Duration = Duration::from_secs(150);

fn whats(source: bool) -> Vec<What> {
    let mut out = vec![
        What::Drop,
        What::Duplicate,
        What::Delay(100 * MS),
        What::Delay(3 * SECOND),
        What::Delay(30 * SECOND),
    ];
    let (now, late) = (Duration::ZERO, 3 * SECOND);
    for (source_learns, destination_learns) in [(now, now), (now, late), (late, now), (late, late)] {
        for heals_after in [Some(Duration::ZERO), Some(8 * SECOND), None] {
            out.push(What::Cut { source_learns, destination_learns, heals_after });
        }
    }
    for before in [true, false] {
        // A few milliseconds: while the peer journals what the last message made it decide.
        for peer_learns in [now, 2 * MS, 3 * MS, late] {
            out.push(What::Kill { source, before, peer_learns });
            out.push(What::Kill { source: !source, before, peer_learns });
        }
    }
    out
}

fn killed(what: What) -> (bool, bool) {
    match what {
        What::Kill { source, .. } => (source, !source),
        _ => (false, false),
    }
}

fn heals(what: What) -> bool {
    !matches!(what, What::Cut { heals_after: None, .. })
}

/// What must hold at the end, whatever the fault.
fn judge(world: &World, end: &End, what: What) -> Result<(), String> {
    if let Some(violation) = world.violations.first() {
        return Err(violation.clone());
    }
    let (source_killed, destination_killed) = killed(what);
    if end.at > BOUND {
        return Err(format!("it took {:?}", end.at));
    }
    // No wedge: whoever lives has ended.
    if !source_killed && end.source.is_none() {
        return Err("the source has not ended".to_owned());
    }
    if !destination_killed && end.destination.is_none() {
        return Err("the destination has not ended".to_owned());
    }
    let as_before = if world.script.guest_runs { Guest::Runs } else { Guest::Paused };
    match &end.source {
        None => {}
        Some(SourceOutcome::Completed(_)) => {
            let owns = world.other.disk == Some(DestinationState::Owner);
            if !owns || world.side.guest != Guest::None {
                return Err("completed, but the guest is not the destination's".to_owned());
            }
        }
        Some(SourceOutcome::Aborted(abort)) => {
            if world.side.guest != as_before || !abort.restored || world.side.disk != SourceState::Owner {
                return Err(format!("aborted, but the source's guest is {:?}", world.side.guest));
            }
            if world.side.dirty_logging || !world.side.holds_locks {
                return Err("aborted, but dirty logging or locks are not as before".to_owned());
            }
            if world.other.ever_started || world.other.disk == Some(DestinationState::Owner) {
                return Err("aborted, but the destination has it too".to_owned());
            }
            if abort.cause.text.is_empty() {
                return Err("aborted without a cause".to_owned());
            }
        }
        Some(SourceOutcome::Unresolved(_)) => {
            if world.side.disk != SourceState::Committing {
                return Err("unresolved, but COMMITTING is not in the journal".to_owned());
            }
            // A question can be answered whenever the network lets it through and somebody has the journal.
            if heals(what) && world.script.listens_after_end {
                return Err("unresolved, although the destination could be asked".to_owned());
            }
        }
        Some(SourceOutcome::Rehearsed(_)) if world.script.rehearse.is_some() => {
            let undone = world.side.guest == as_before && !world.side.dirty_logging && world.side.holds_locks;
            if !source_killed && !undone {
                return Err("rehearsed, but the source is not as before".to_owned());
            }
        }
        Some(other) => return Err(format!("an outcome that no fault explains: {other:?}")),
    }
    match &end.destination {
        None => {}
        Some(DestinationOutcome::Owner { .. } | DestinationOutcome::OwnedNotStarted { .. })
            if world.other.disk == Some(DestinationState::Owner) => {}
        Some(DestinationOutcome::Owner { .. } | DestinationOutcome::OwnedNotStarted { .. }) => {
            return Err("owner without a journal".to_owned());
        }
        Some(_) if world.other.ever_started || world.other.reserved => {
            return Err("the destination gave up, but started or kept something".to_owned());
        }
        Some(_) => {}
    }
    // Any fault before the decision leaves the guest at a source that lives.
    if !source_killed && !world.source_committed() && world.side.guest != as_before {
        return Err("the source had not committed, and its guest is not back".to_owned());
    }
    Ok(())
}

/// Runs every fault at every message of `script`; returns what failed, and how many runs there were.
fn sweep(script: &Script) -> (Vec<String>, usize) {
    let mut baseline = World::new(Script { sabotage: None, ..script.clone() });
    let end = baseline.run();
    baseline.assert_sound();
    match end.source {
        Some(SourceOutcome::Completed(_)) if script.rehearse.is_none() => {}
        Some(SourceOutcome::Rehearsed(_)) if script.rehearse.is_some() => {}
        _ => panic!("{end:?}\n{}", baseline.log.join("\n")),
    }
    let (mut failures, mut runs) = (Vec::new(), 0);
    for direction in [Direction::ToDestination, Direction::ToSource] {
        let messages = match direction {
            Direction::ToDestination => &baseline.link.to_destination,
            Direction::ToSource => &baseline.link.to_source,
        };
        for (index, message) in messages.iter().enumerate() {
            for what in whats(direction == Direction::ToDestination) {
                runs += 1;
                let fault = Some(Fault { direction, index, what });
                let mut world = World::new(Script { fault, ..script.clone() });
                let end = world.run();
                if let Err(why) = judge(&world, &end, what) {
                    failures.push(format!(
                        "{why}\n  {what:?} of {direction:?} {index} {message}\n{}",
                        world.log.join("\n")
                    ));
                }
            }
        }
    }
    (failures, runs)
}

fn assert_clean(script: &Script) {
    let (failures, runs) = sweep(script);
    let least = if script.rehearse.is_some() { 100 } else { 400 };
    assert!(runs > least, "only {runs} runs");
    assert!(failures.is_empty(), "{} of {runs}; the first: {}", failures.len(), failures[0]);
}

#[test]
fn one_device() {
    assert_clean(&Script::default());
}

#[test]
fn writes_that_a_crash_tears() {
    assert_clean(&Script { torn_writes: true, ..Script::default() });
}

#[test]
fn late_answers_of_interrupted_actions() {
    assert_clean(&Script { late_answers: true, journal: 20 * MS, ..Script::default() });
}

#[test]
fn a_destination_that_is_gone_when_it_has_ended() {
    assert_clean(&Script { listens_after_end: false, ..Script::default() });
}

#[test]
fn two_devices_with_new_initial_bytes_and_digests() {
    let devices = vec![
        Device { reinit_at: vec![1], reinit_at_p2p: 1, ..Device::new("net0") },
        Device { load: 150 * MS, ..Device::new("gpu0") },
    ];
    assert_clean(&Script { devices, verify: true, ..Script::default() });
}

#[test]
fn a_paused_guest() {
    assert_clean(&Script { guest_runs: false, ..Script::default() });
}

#[test]
fn a_destination_that_cannot_start() {
    assert_clean(&Script { start_fails: true, ..Script::default() });
}

#[test]
fn rehearsals() {
    for rehearse in [Rehearse::Ask, Rehearse::Precopy, Rehearse::Switchover] {
        assert_clean(&Script { rehearse: Some(rehearse), ..Script::default() });
        let late = Script { late_answers: true, guest_runs: false, ..Script::default() };
        assert_clean(&Script { rehearse: Some(rehearse), ..late });
    }
}

/// A second failure on top of the first: every local action fails once while a connection is cut at every message.
#[test]
fn a_failing_action_and_a_fault() {
    let baseline = World::play(Script::default()).0;
    let mut runs = 0;
    let cut = |source_learns, destination_learns| What::Cut {
        source_learns,
        destination_learns,
        heals_after: Some(Duration::ZERO),
    };
    for direction in [Direction::ToDestination, Direction::ToSource] {
        for index in 0..baseline.link.to_destination.len() {
            for what in [What::Drop, cut(MS, MS), cut(Duration::ZERO, SECOND), cut(SECOND, Duration::ZERO)] {
                let fault = Some(Fault { direction, index, what });
                for action in 0..14 {
                    for source in [true, false] {
                        let mut world = World::new(Script {
                            fault,
                            source_fails_at: source.then_some(action),
                            destination_fails_at: (!source).then_some(action),
                            ..Script::default()
                        });
                        let end = world.run();
                        world.assert_sound();
                        let ended = end.source.is_some() && end.destination.is_some();
                        assert!(
                            ended && end.at < BOUND,
                            "{what:?} {index} {action}\n{}",
                            world.log.join("\n")
                        );
                        runs += 1;
                    }
                }
            }
        }
    }
    assert!(runs > 1000);
}

/// The sweep sees what it is there to see.
#[test]
fn broken_rules_are_found() {
    for (sabotage, finds) in [
        (Sabotage::SourceResumesOnSilence, "two guests run"),
        (Sabotage::DestinationRunsOnSilence, "two guests run"),
        (Sabotage::DeclinesUnread, "DECLINED without ABORTED"),
        (Sabotage::JournalLies, "without"),
        (Sabotage::RollbackForgetsTheGuest, "the source's guest is Paused"),
    ] {
        let (failures, runs) = sweep_sabotaged(sabotage);
        let found = failures.iter().any(|failure| failure.contains(finds));
        assert!(found, "{sabotage:?}: {} of {runs} found, none with '{finds}'", failures.len());
    }
}

fn sweep_sabotaged(sabotage: Sabotage) -> (Vec<String>, usize) {
    sweep(&Script { sabotage: Some(sabotage), ..Script::default() })
}
