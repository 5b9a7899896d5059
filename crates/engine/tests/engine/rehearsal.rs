//! Rehearsals, refusals of both sides, and leases, in simulated time.

use vfio_migration_engine::{
    DestinationAction, DestinationConfig, DestinationEngine, DestinationEvent, DestinationOutcome, PartBasis,
    PartName, RehearsalResult, Rehearse, SourceOutcome, Time,
};
use vfio_migration_types::{MigrationFlags, Phase, VmId};
use vfio_migration_wire::{
    Commit, FEATURE_ASK, FEATURE_REHEARSE, FEATURES, Final, FinalEnd, Hello, Message, Offer, Ready, Reason,
    VERSIONS,
};

use crate::world::script::{Device, MS, SECOND, Script};
use crate::world::{self, End, Guest, World};

fn rehearsal(rehearse: Rehearse) -> Script {
    Script { rehearse: Some(rehearse), ..Script::default() }
}

/// Both sides are as they were.
fn rehearsed(world: &World, end: &End) -> RehearsalResult {
    let Some(SourceOutcome::Rehearsed(found)) = &end.source else {
        panic!("{:?}\n{}", end.source, world.log.join("\n"))
    };
    no_trace(world);
    // The destination is told what was found.
    let theirs = DestinationOutcome::Rehearsed { obstacle: found.obstacle.clone(), left_undone: None };
    assert_eq!(end.destination, Some(theirs));
    assert_eq!(found.left_undone, None);
    (**found).clone()
}

fn no_trace(world: &World) {
    let guest = if world.script.guest_runs { Guest::Runs } else { Guest::Paused };
    assert_eq!(world.side.guest, guest, "{}", world.log.join("\n"));
    assert!(!world.side.dirty_logging, "dirty logging is left on");
    assert!(world.side.holds_locks, "locks are lost");
    assert!(!world.other.ever_started);
    assert!(!world.other.reserved, "the destination still holds what it reserved");
    assert_eq!(world.other.disk, None, "a rehearsal is in a journal");
}

fn did(actions: &[String], name: &str) -> bool {
    actions.iter().any(|action| action.starts_with(name))
}

#[test]
fn asking_touches_nothing_at_the_source() {
    let (world, end) = World::play(rehearsal(Rehearse::Ask));
    let found = rehearsed(&world, &end);
    assert_eq!((found.iterations, found.parts.len()), (0, 0));
    assert_eq!(world.side.actions.len(), 1, "only Judge: {:?}", world.side.actions);
    assert!(!did(&world.other.actions, "BeginResuming"));
}

/// Whenever another source comes: a rehearsal makes way for it, and a migration only while it owes its beginning.
#[test]
fn a_rehearsal_makes_way_and_a_migration_that_has_begun_does_not() {
    for at in [20 * MS, 60 * MS, 100 * MS] {
        let destination_events = vec![(at, DestinationEvent::Superseded)];
        let script =
            Script { destination_events: destination_events.clone(), ..rehearsal(Rehearse::Precopy) };
        let (world, end) = World::play(script);
        no_trace(&world);
        let Some(DestinationOutcome::Aborted(cause)) = &end.destination else { panic!("{at:?}: {end:?}") };
        assert!(cause.text.contains("a rehearsal does not keep out"), "{at:?}: {cause}");
        let (world, end) = World::play(Script { destination_events, ..Script::default() });
        assert!(matches!(end.source, Some(SourceOutcome::Completed(_))), "{at:?}: {end:?}");
        assert_eq!(world.other.guest, Guest::Runs, "{at:?}");
    }
}

#[test]
fn pre_copy_is_rehearsed_with_the_guest_running() {
    let (world, end) = World::play(rehearsal(Rehearse::Precopy));
    let found = rehearsed(&world, &end);
    assert_eq!(found.obstacle, None);
    assert_eq!(world.side.paused_at, None, "the guest was never paused");
    assert!(did(&world.other.actions, "BeginResuming") && !did(&world.other.actions, "Load"));
    assert!(found.iterations >= 2);
    assert!(found.wire.is_some() && found.load.is_some() && found.ram_dirty.is_some(), "{found:?}");
    assert_eq!(found.devices_dirty.len(), 1);
    let basis = |name: &PartName| found.parts.iter().find(|part| part.name == *name).map(|part| part.basis);
    assert_eq!(basis(&PartName::Quiesce), Some(PartBasis::Unknown), "nothing was paused");
    assert_eq!(basis(&PartName::Ram), Some(PartBasis::Measured));
    assert_eq!(basis(&PartName::Start), Some(PartBasis::Unknown));
    let device = found.parts.iter().find(|part| matches!(part.name, PartName::Device(_)));
    assert_eq!(device.map(|part| part.basis), Some(PartBasis::Declared));
}

#[test]
fn a_standstill_is_measured_and_undone() {
    for verify in [false, true] {
        let (world, end) = World::play(Script { verify, ..rehearsal(Rehearse::Switchover) });
        let found = rehearsed(&world, &end);
        assert_eq!(found.obstacle, None);
        assert!(world.side.paused_at.is_some());
        assert!(did(&world.other.actions, "Load"));
        assert!(!did(&world.side.actions, "ReleaseLocks") && !did(&world.other.actions, "TakeLocks"));
        let measured = found.parts.iter().filter(|part| part.name != PartName::Start);
        assert!(
            measured.clone().count() == 4 && measured.clone().all(|part| part.basis == PartBasis::Measured)
        );
        let total = measured.map(|part| part.took).sum::<std::time::Duration>();
        assert!(total < 100 * MS, "digests are no downtime: {found:?}");
    }
}

#[test]
fn what_would_stop_a_migration_is_found_and_not_suffered() {
    let stalls =
        Script { ram_dirty_rate: 4 << 30, ram_working_set: 512 << 20, ..rehearsal(Rehearse::Precopy) };
    let (world, end) = World::play(stalls);
    let found = rehearsed(&world, &end);
    let obstacle = found.obstacle.expect("it cannot converge");
    assert!(obstacle.text.starts_with("RAM needs"), "{obstacle:?}");
    assert!(!found.parts.is_empty());

    let slow = Script { arc: 200 * MS, ..rehearsal(Rehearse::Switchover) };
    let (world, end) = World::play(slow);
    let found = rehearsed(&world, &end);
    assert!(
        found.obstacle.expect("the watchdog bit").text.contains("would stay paused above the downtime limit"),
        "{world:?}",
        world = world.log
    );
}

#[test]
fn a_device_that_says_nothing_is_unknown() {
    let flags = MigrationFlags { p2p: true, pre_copy: false };
    let device = Device { flags, precopy_info: false, ..Device::new("mute0") };
    let (world, end) = World::play(Script { devices: vec![device], ..rehearsal(Rehearse::Precopy) });
    assert_eq!(rehearsed(&world, &end).devices_dirty, [None]);
}

#[test]
fn a_rehearsal_can_be_cancelled_and_can_fail() {
    for action in 1..6 {
        let cancelled = Script { cancel_at_action: Some(action), ..rehearsal(Rehearse::Switchover) };
        let (world, end) = World::play(cancelled);
        no_trace(&world);
        let Some(SourceOutcome::Aborted(abort)) = &end.source else { panic!("{end:?}") };
        assert!(abort.cancelled && abort.restored);
        let failed = Script { source_fails_at: Some(action), ..rehearsal(Rehearse::Switchover) };
        let (world, end) = World::play(failed);
        no_trace(&world);
        assert!(matches!(end.source, Some(SourceOutcome::Aborted(_))), "{end:?}");
    }
}

#[test]
fn a_destination_that_cannot_rehearse_is_left_alone() {
    let old = Script { destination_features: FEATURES & !FEATURE_REHEARSE, ..rehearsal(Rehearse::Precopy) };
    let (world, end) = World::play(old);
    let Some(SourceOutcome::Aborted(abort)) = &end.source else { panic!("{end:?}") };
    assert!(abort.cause.text.contains("does not know how to rehearse"));
    assert!(world.other.actions.is_empty());
}

#[test]
fn the_sources_own_rules_refuse_too() {
    let reasons = vec![Reason { code: "site-policy".into(), text: "not here".into(), ..Reason::default() }];
    for rehearse in [None, Some(Rehearse::Ask), Some(Rehearse::Precopy)] {
        let script = Script { refuse_here: Some(reasons.clone()), rehearse, ..Script::default() };
        let (world, end) = World::play(script);
        assert_eq!(end.source, Some(SourceOutcome::Refused(reasons.clone())));
        assert_eq!(end.destination, Some(DestinationOutcome::Refused(reasons.clone())), "both users hear it");
        assert_eq!(world.side.guest, Guest::Runs);
        assert!(!world.side.dirty_logging && !world.other.reserved);
        assert_eq!(world.side.actions.len(), 1);
    }
}

#[test]
fn a_lease_is_for_whom_it_was_granted_and_ends() {
    let (world, end) = World::play(Script { stale_lease: true, ..Script::default() });
    let Some(SourceOutcome::Aborted(abort)) = &end.source else { panic!("{end:?}") };
    assert!(abort.cause.text.contains("lease"), "{abort:?}");
    assert!(!world.other.reserved && world.side.guest == Guest::Runs);

    let slow = Script { judging: 90 * SECOND, lease_time: 30 * SECOND, ..Script::default() };
    let (world, end) = World::play(slow);
    let Some(DestinationOutcome::Aborted(cause)) = &end.destination else { panic!("{end:?}") };
    assert!(cause.text.contains("lease has ended"), "{cause:?}");
    assert!(!world.other.reserved && world.side.guest == Guest::Runs);
}

#[test]
fn a_machine_that_changed_since_it_was_compared_does_not_arrive() {
    let (world, end) = World::play(Script { changed: true, ..Script::default() });
    let Some(SourceOutcome::Aborted(abort)) = &end.source else { panic!("{end:?}") };
    assert!(abort.cause.text.contains("changed since the offer"), "{abort:?}");
    assert_eq!(abort.cause.phase, Phase::Quiesce);
    assert_eq!(world.side.guest, Guest::Runs);
    assert!(!world.other.ever_started && !world.other.reserved);
}

#[test]
fn commit_in_a_rehearsal_is_an_error() {
    let config = DestinationConfig {
        versions: VERSIONS,
        features: FEATURES,
        peer_timeout: SECOND,
        offer_timeout: SECOND,
        suspend: false,
        lease: [5; 16],
        lease_time: SECOND,
    };
    let mut destination = DestinationEngine::new(config, Time::ZERO);
    let (vm, attempt, epoch) = (world::VM, world::ATTEMPT, world::EPOCH);
    let hello = Hello { versions: VERSIONS, features: FEATURE_REHEARSE, vm, attempt, epoch };
    let totals = FinalEnd { ram_pages: 1, ram_digest: None, sections: 1, devices: vec![] };
    let ready =
        Ready { ram_pages: 1, ram_digest: None, verify_ns: 0, sections: 1, devices: vec![], vectors: 0 };
    let mut actions = Vec::new();
    for event in [
        DestinationEvent::Peer(Message::Hello(hello)),
        DestinationEvent::Peer(Message::Offer(Offer::default())),
        DestinationEvent::Reserved { manifest: vec![], reasons: vec![], identity: [0; 32] },
        DestinationEvent::Peer(Message::Begin { lease: [5; 16] }),
        DestinationEvent::ResumingBegun,
        DestinationEvent::Peer(Message::Final(Final { guest_ran: true, suspend: false, identity: [0; 32] })),
        DestinationEvent::Peer(Message::FinalEnd(totals)),
        DestinationEvent::Loaded(ready.clone()),
    ] {
        destination.handle(event, Time::ZERO);
        actions = std::iter::from_fn(|| destination.poll_action()).collect();
    }
    assert_eq!(actions, [DestinationAction::Send(Message::Ready(ready))]);
    let commit = Message::Commit(Commit { epoch: epoch.next(), attempt });
    destination.handle(DestinationEvent::Peer(commit), Time::ZERO);
    let actions: Vec<_> = std::iter::from_fn(|| destination.poll_action()).collect();
    let [DestinationAction::Send(Message::Abort(cause)), DestinationAction::Release] = actions.as_slice()
    else {
        panic!("{actions:?}")
    };
    assert!(cause.text.contains("COMMIT, which is not legal now"), "{cause:?}");
}

/// A destination, and what it does about a HELLO and what follows it.
fn answers(vm: VmId, features: u64, then: &[DestinationEvent]) -> Vec<DestinationAction> {
    let config = DestinationConfig {
        versions: VERSIONS,
        features: FEATURES,
        peer_timeout: SECOND,
        offer_timeout: SECOND,
        suspend: false,
        lease: [5; 16],
        lease_time: SECOND,
    };
    let mut destination = DestinationEngine::new(config, Time::ZERO);
    let hello = Hello { versions: VERSIONS, features, vm, attempt: world::ATTEMPT, epoch: world::EPOCH };
    destination.handle(DestinationEvent::Peer(Message::Hello(hello)), Time::ZERO);
    for event in then {
        while destination.poll_action().is_some() {}
        destination.handle(event.clone(), Time::ZERO);
    }
    std::iter::from_fn(|| destination.poll_action()).collect()
}

#[test]
fn only_a_question_may_name_no_vm() {
    for features in [0, FEATURE_REHEARSE, FEATURE_ASK] {
        let actions = answers(VmId::NIL, features, &[]);
        let Some(DestinationAction::Send(Message::Refuse(reasons))) = actions.first() else {
            panic!("{features:#x}: {actions:?}")
        };
        assert_eq!(reasons[0].code, "vm-id", "{features:#x}");
    }
    let actions = answers(VmId::NIL, FEATURE_REHEARSE | FEATURE_ASK, &[]);
    assert!(matches!(actions[..], [DestinationAction::Send(Message::HelloReply(_))]), "{actions:?}");
}

#[test]
fn nothing_begins_after_a_question() {
    let then = [
        DestinationEvent::Peer(Message::Offer(Offer::default())),
        DestinationEvent::Reserved { manifest: vec![], reasons: vec![], identity: [0; 32] },
        DestinationEvent::Peer(Message::Begin { lease: [5; 16] }),
    ];
    for (features, begins) in [(FEATURE_REHEARSE, true), (FEATURE_REHEARSE | FEATURE_ASK, false)] {
        let actions = answers(world::VM, features, &then);
        let aborted =
            actions.iter().any(|action| matches!(action, DestinationAction::Send(Message::Abort(_))));
        assert_eq!(!aborted, begins, "{features:#x}: {actions:?}");
    }
}
