//! Cancels of either side: each ends what is waited for, and is told as what it is.

use vfio_migration_engine::{DestinationEvent, DestinationOutcome, Rehearse, SourceEvent, SourceOutcome};
use vfio_migration_types::CancelCause;

use crate::world::script::{Direction, Fault, MS, SECOND, Script, What};
use crate::world::{Guest, World};

/// A source that hears nothing more: its link hangs, and so no message ends a wait.
fn deaf(index: usize) -> Option<Fault> {
    let what = What::Delay(800 * SECOND);
    Some(Fault { direction: Direction::ToSource, index, what })
}

#[test]
fn a_cancel_ends_every_wait_for_the_destination() {
    let (baseline, _) = World::play(Script::default());
    let decided = baseline.link.to_source.iter().position(|sent| sent.starts_with("Ready")).unwrap();
    for index in 0..=decided {
        let source_events = vec![(4 * SECOND, SourceEvent::Cancel(CancelCause::Operator))];
        let script = Script {
            fault: deaf(index),
            source_events,
            limit: 10 * SECOND,
            peer_timeout: 60 * SECOND,
            ..Script::default()
        };
        let (world, end) = World::play(script);
        let Some(SourceOutcome::Aborted(abort)) = &end.source else { panic!("{index}: {end:?}") };
        assert!(abort.cancelled && abort.restored, "{index}: {abort:?}");
        assert_eq!(world.side.guest, Guest::Runs);
        let at = world.side.ended_at.unwrap();
        assert!(at < 4_200 * MS, "{index}: ended at {at:?}");
    }
}

#[test]
fn a_cancelled_rehearsal_does_not_wait_for_the_destination() {
    for rehearse in [Rehearse::Ask, Rehearse::Precopy, Rehearse::Switchover] {
        let script = Script { rehearse: Some(rehearse), ..Script::default() };
        let (baseline, _) = World::play(script.clone());
        // The last that the destination says is REHEARSED.
        let last = baseline.link.to_source.len() - 1;
        assert!(baseline.link.to_source[last].starts_with("Rehearsed"), "{:?}", baseline.link.to_source);
        let source_events = vec![(4 * SECOND, SourceEvent::Cancel(CancelCause::Operator))];
        let script = Script { fault: deaf(last), source_events, peer_timeout: 60 * SECOND, ..script };
        let (world, end) = World::play(script);
        let Some(SourceOutcome::Aborted(abort)) = &end.source else { panic!("{rehearse:?}: {end:?}") };
        assert!(abort.cancelled && abort.restored, "{abort:?}");
        let at = world.side.ended_at.unwrap();
        assert!(at < 4_200 * MS, "{rehearse:?}: ended at {at:?}");
    }
}

#[test]
fn a_destination_that_is_given_up_says_so() {
    let (baseline, _) = World::play(Script::default());
    let owner = baseline.other.actions.iter().position(|action| action == "Journal(Owner)").unwrap();
    for index in 0..owner {
        let script = Script { destination_cancel_at_action: Some(index), ..Script::default() };
        let (world, end) = World::play(script);
        let cancelled = matches!(&end.destination, Some(DestinationOutcome::Cancelled(_)));
        assert!(cancelled, "{}: {:?}", baseline.other.actions[index], end.destination);
        assert!(matches!(&end.source, Some(SourceOutcome::Aborted(abort)) if !abort.cancelled), "{end:?}");
        assert_eq!(world.side.guest, Guest::Runs);
    }
}

/// The source is gone after READY: without a cancel the destination stays answerable for minutes.
#[test]
fn a_cancel_ends_the_wait_for_the_question_of_a_source_that_is_gone() {
    let (baseline, _) = World::play(Script::default());
    let ready = baseline.link.to_source.iter().position(|sent| sent.starts_with("Ready")).unwrap();
    let cut = What::Cut { source_learns: 800 * SECOND, destination_learns: SECOND, heals_after: None };
    let fault = Some(Fault { direction: Direction::ToSource, index: ready, what: cut });
    for at in [2 * SECOND, 10 * SECOND] {
        let script = Script {
            fault,
            destination_events: vec![(at, DestinationEvent::Cancel(CancelCause::Operator))],
            peer_timeout: 60 * SECOND,
            ..Script::default()
        };
        let (world, _) = World::play(script);
        let ended = world.other.ended_at.unwrap();
        assert!(ended < at + SECOND, "ended at {ended:?}");
    }
}
