//! A switchover that its operator holds: what the time given and the rounds of the pre-copy make of it.

use std::time::Duration;

use vfio_migration_engine::{SourceEvent, SourceOutcome, SourceSummary};

use crate::world::script::{Device, MS, SECOND, Script};
use crate::world::{End, World};

fn completed(world: &World, end: &End) -> SourceSummary {
    let Some(SourceOutcome::Completed(summary)) = &end.source else {
        panic!("{:?}\n{}", end.source, world.log.join("\n"))
    };
    summary.clone()
}

/// A switchover that is held until `until`, far longer than the time that is given for the rest.
fn held(until: Duration) -> Script {
    Script {
        pause_before_switchover: true,
        give_up_after: Some(2 * SECOND),
        source_events: vec![(until, SourceEvent::ContinueSwitchover)],
        ..Script::default()
    }
}

#[test]
fn new_initial_bytes_after_a_long_hold_do_not_end_the_migration() {
    for iteration in [5, 15, 100] {
        let device = Device { reinit_at: vec![iteration], load: 300 * MS, ..Device::new("net0") };
        let (world, end) = World::play(Script { devices: vec![device], ..held(200 * SECOND) });
        let summary = completed(&world, &end);
        assert!(summary.iterations > iteration, "they were never declared: {summary:?}");
    }
}

#[test]
fn the_time_given_is_kept_once_the_operator_has_spoken() {
    // From the word on nothing fits any more, and the two seconds have hardly begun.
    let mut script = held(20 * SECOND);
    script.source_events = vec![(20 * SECOND, SourceEvent::SetDowntimeLimit(60 * MS))];
    script.reserve = 55 * MS;
    let (world, end) = World::play(script);
    let Some(SourceOutcome::Aborted(abort)) = &end.source else { panic!("{end:?}") };
    assert!(abort.cause.text.contains("in the time given"), "{}\n{}", abort.cause.text, world.log.join("\n"));
    assert!((21 * SECOND..23 * SECOND).contains(&end.at), "{:?}", end.at);
}

#[test]
fn rounds_are_few_while_the_operator_is_waited_for_and_the_word_is_heard_at_once() {
    let (world, end) = World::play(held(40 * SECOND));
    let summary = completed(&world, &end);
    assert!(summary.iterations < 60, "{} iterations in 40 s", summary.iterations);
    let since = summary.paused_at - 40 * SECOND;
    assert!(since < 300 * MS, "paused {since:?} after the word");
}

#[test]
fn what_is_dirtied_meanwhile_never_outgrows_the_downtime_limit() {
    // A second's worth takes half a second to send: more than the limit allows.
    let script = Script { ram_dirty_rate: 512 << 20, ram_working_set: 512 << 20, ..held(20_250 * MS) };
    let (world, end) = World::play(script);
    let summary = completed(&world, &end);
    assert!(summary.predicted <= 250 * MS, "{summary:?}");
    let since = summary.paused_at - 20_250 * MS;
    assert!(since < SECOND, "paused {since:?} after the word");
    assert!(summary.iterations < 120, "{} iterations in 20 s", summary.iterations);
}
