//! A guest that is to arrive paused.

use vfio_migration_engine::{DestinationOutcome, SourceOutcome};
use vfio_migration_types::{GuestOutcome, PauseCause};

use crate::world::script::Script;
use crate::world::{Guest, World};

#[test]
fn a_guest_arrives_paused_where_either_side_asks_for_it() {
    for (suspend, suspend_there) in [(true, false), (false, true), (true, true)] {
        let (world, end) = World::play(Script { suspend, suspend_there, ..Script::default() });
        let Some(SourceOutcome::Completed(summary)) = &end.source else { panic!("{end:?}") };
        assert_eq!(summary.running.guest, GuestOutcome::Paused);
        assert_eq!(world.other.guest, Guest::Paused);
        let cause = if suspend { PauseCause::SourceAsked } else { PauseCause::DestinationAsked };
        assert_eq!(summary.paused, Some(cause));
        let Some(DestinationOutcome::Owner { paused, .. }) = &end.destination else { panic!("{end:?}") };
        assert_eq!(*paused, Some(cause), "both sides say the same");
        let sent = format!("Final(Final {{ guest_ran: true, suspend: {suspend}");
        assert!(world.link.to_destination.iter().any(|message| message.starts_with(&sent)));
    }
}

#[test]
fn a_guest_that_was_to_arrive_paused_runs_on_where_it_does_not_leave() {
    let (baseline, _) = World::play(Script { suspend: true, ..Script::default() });
    let actions = &baseline.side.actions;
    let paused = actions.iter().position(|action| action == "Pause").unwrap();
    let decided = actions.iter().position(|action| action == "Journal(Committing)").unwrap();
    for (index, action) in actions.iter().enumerate().take(decided).skip(paused) {
        let script = Script { suspend: true, source_fails_at: Some(index), ..Script::default() };
        let (world, end) = World::play(script);
        assert!(matches!(&end.source, Some(SourceOutcome::Aborted(abort)) if abort.restored), "{end:?}");
        assert_eq!(world.side.guest, Guest::Runs, "{action}");
    }
}
