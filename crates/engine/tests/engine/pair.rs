//! Whole migrations in simulated time.

use std::time::Duration;

use vfio_migration_engine::ownership::{DestinationState, SourceState};
use vfio_migration_engine::{
    Abort, DestinationEvent, DestinationOutcome, SourceAction, SourceEngine, SourceEvent, SourceOutcome,
    SourceSummary,
};
use vfio_migration_types::{CancelCause, GuestOutcome, MigrationFlags, PauseCause, Phase, Side};
use vfio_migration_wire::{Reason, VersionRange};

use crate::world::script::{Corrupt, Device, Direction, Fault, MS, SECOND, Script, What};
use crate::world::{self, End, Guest, World};

fn completed(world: &World, end: &End) -> SourceSummary {
    let Some(SourceOutcome::Completed(summary)) = &end.source else {
        panic!("{:?}\n{}", end.source, world.log.join("\n"))
    };
    assert!(matches!(end.destination, Some(DestinationOutcome::Owner { .. })), "{:?}", end.destination);
    assert_eq!(world.side.disk, SourceState::Released);
    assert_eq!(world.other.disk, Some(DestinationState::Owner));
    assert_eq!(world.side.guest, Guest::None);
    summary.clone()
}

/// The source's guest is as it was, nothing ran at the destination, and it holds nothing.
fn aborted(world: &World, end: &End) -> Abort {
    let Some(SourceOutcome::Aborted(abort)) = &end.source else {
        panic!("{:?}\n{}", end.source, world.log.join("\n"))
    };
    source_is_back(world);
    let gone = match end.destination {
        Some(DestinationOutcome::LimitsUnmet(_)) => abort.obstacle,
        Some(DestinationOutcome::Aborted(_) | DestinationOutcome::Cancelled(_)) => !abort.obstacle,
        _ => false,
    };
    assert!(gone, "{:?}\n{}", end.destination, world.log.join("\n"));
    abort.clone()
}

fn source_is_back(world: &World) {
    let guest = if world.script.guest_runs { Guest::Runs } else { Guest::Paused };
    assert_eq!(world.side.guest, guest, "{}", world.log.join("\n"));
    assert_eq!(world.side.disk, SourceState::Owner);
    assert!(!world.side.dirty_logging, "dirty logging is left on");
    assert!(world.side.holds_locks, "locks are lost");
    assert!(!world.other.ever_started);
    assert!(!world.other.reserved, "the destination still holds what it reserved");
}

#[test]
fn a_whole_migration() {
    let (world, end) = World::play(Script::default());
    let summary = completed(&world, &end);
    assert!(summary.iterations >= 2, "{summary:?}");
    let phases: Vec<Phase> = summary.phases.iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, Phase::ALL[1..]);
    let downtime = world.other.started_at.unwrap() - world.side.paused_at.unwrap();
    assert!(downtime < 80 * MS, "{downtime:?}");
    assert!(summary.predicted < 50 * MS, "{summary:?}");
    assert_eq!(world.other.guest, Guest::Runs);
}

#[test]
fn the_order_is_the_designs() {
    let (world, _) = World::play(Script { give_up_after: None, ..Script::default() });
    let names: Vec<&str> = world
        .side
        .actions
        .iter()
        .map(|action| action.split([' ', '{']).next().unwrap())
        .filter(|name| *name != "SendIteration")
        .collect();
    let want = [
        "Judge(Accept",
        "Journal(Sending)",
        "SetUp",
        "Pause",
        "Devices(P2p)",
        "Devices(StopCopy)",
        "SendFinal",
        "ReleaseLocks",
        "Journal(Committing)",
        "Journal(Released)",
        "CleanUp",
    ];
    assert_eq!(names, want);
    let names: Vec<&str> =
        world.other.actions.iter().map(|action| action.split([' ', '{']).next().unwrap()).collect();
    let want = [
        "Reserve(Offer",
        "Journal(Reserved)",
        "Journal(Loading)",
        "BeginResuming",
        "TakeLocks",
        "Load",
        "Journal(Ready)",
        "Journal(Owner)",
        "Start",
    ];
    assert_eq!(names, want);
}

#[test]
fn several_devices() {
    let devices =
        vec![Device::new("net0"), Device::new("net1"), Device { load: 400 * MS, ..Device::new("gpu0") }];
    let (world, end) = World::play(Script { devices, ..Script::default() });
    let summary = completed(&world, &end);
    // The slow device's initial bytes were waited for with the guest running.
    assert!(summary.paused_at > 400 * MS);
}

#[test]
fn no_device_at_all() {
    let (world, end) = World::play(Script { devices: Vec::new(), ..Script::default() });
    completed(&world, &end);
}

#[test]
fn a_device_without_precopy_and_one_that_cannot_say_how_far_it_is() {
    let flags = MigrationFlags { p2p: true, pre_copy: false };
    let plain = Device { flags, precopy_info: false, stop_copy: 8 << 20, ..Device::new("plain0") };
    let mute = Device { precopy_info: false, ..Device::new("mute0") };
    let (world, end) = World::play(Script { devices: vec![plain, mute], ..Script::default() });
    completed(&world, &end);
}

#[test]
fn a_paused_guest_arrives_paused() {
    let (world, end) = World::play(Script { guest_runs: false, ..Script::default() });
    let summary = completed(&world, &end);
    assert_eq!(summary.running.guest, GuestOutcome::Paused);
    assert_eq!(summary.paused, Some(PauseCause::BeforeItWasSent));
    assert_eq!(world.other.guest, Guest::Paused);
    assert!(world.link.to_destination.iter().any(|sent| sent.starts_with("Final(Final { guest_ran: false")));
}

#[test]
fn digests_are_no_downtime() {
    let (world, end) = World::play(Script { verify: true, ..Script::default() });
    let summary = completed(&world, &end);
    assert_eq!(summary.verify, 1600 * MS, "on both sides");
    assert!(summary.ready.ram_digest.is_some());
}

#[test]
fn digests_are_compared_only_if_both_agreed() {
    let (world, end) = World::play(Script { verify: true, destination_features: 0, ..Script::default() });
    assert_eq!(completed(&world, &end).verify, Duration::ZERO);
}

#[test]
fn new_initial_bytes_in_p3_are_acknowledged_before_the_switchover() {
    let device = Device { reinit_at: vec![1, 2], load: 100 * MS, ..Device::new("net0") };
    let (world, end) = World::play(Script { devices: vec![device], ..Script::default() });
    let summary = completed(&world, &end);
    for generation in 0..3 {
        let loaded = format!("InitialLoaded {{ device: 0, generation: {generation} }}");
        assert!(world.link.to_source.contains(&loaded), "{loaded}");
    }
    assert!(summary.paused_at > 300 * MS);
}

#[test]
fn new_initial_bytes_at_the_p2p_position_go_back_to_p3() {
    let device = Device { reinit_at_p2p: 2, ..Device::new("net0") };
    let (world, end) =
        World::play(Script { devices: vec![device, Device::new("net1")], ..Script::default() });
    let summary = completed(&world, &end);
    let pauses = summary.phases.iter().filter(|(phase, _)| *phase == Phase::Quiesce).count();
    assert_eq!(pauses, 3);
    let actions = world.side.actions.join("\n");
    assert!(actions.contains("Pause\nDevices(P2p)\nDevices(Running)\nResume\nSendIteration"), "{actions}");
}

#[test]
fn a_device_that_never_stops_declaring_initial_bytes_is_named() {
    let device = Device { reinit_at_p2p: u32::MAX, ..Device::new("net1") };
    let (world, end) =
        World::play(Script { devices: vec![Device::new("net0"), device], ..Script::default() });
    let abort = aborted(&world, &end);
    assert_eq!(abort.cause.device.as_deref(), Some("net1"), "{abort:?}");
    assert_eq!(abort.cause.phase, Phase::Quiesce);
}

#[test]
fn a_device_too_big_is_given_up_by_name() {
    let device = Device {
        flags: MigrationFlags { p2p: true, pre_copy: false },
        precopy_info: false,
        stop_copy: 900 << 20,
        ..Device::new("gpu0")
    };
    let script = Script { devices: vec![Device::new("net0"), device], ..Script::default() };
    let (world, end) = World::play(script.clone());
    let abort = aborted(&world, &end);
    assert_eq!(abort.cause.device.as_deref(), Some("gpu0"));
    assert!(abort.cause.text.contains("device gpu0 needs 1"), "{}", abort.cause.text);
    assert!(abort.cause.text.contains("of the 300 ms"), "{}", abort.cause.text);
    assert!(abort.cause.remedy.contains("raise the downtime limit above 1"), "{}", abort.cause.remedy);
    assert!(world.side.paused_at.is_none(), "the guest was never paused");
    assert!(end.at < 20 * SECOND, "{:?}", end.at);
    // The destination returns the same error, and that another attempt comes to the same.
    assert!(abort.obstacle);
    assert!(
        matches!(&end.destination, Some(DestinationOutcome::LimitsUnmet(cause)) if *cause == abort.cause)
    );

    // Under a limit that it fits into it goes; the operator may raise it while it runs.
    let raised = vec![(2 * SECOND, SourceEvent::SetDowntimeLimit(3 * SECOND))];
    let (world, end) = World::play(Script { source_events: raised, ..script });
    assert!(completed(&world, &end).paused_at >= 2 * SECOND);
}

#[test]
fn ram_that_changes_too_fast_is_given_up_as_ram() {
    let script = Script {
        ram_dirty_rate: 2 << 30,
        ram_working_set: 500 << 20,
        give_up_after: Some(3 * SECOND),
        ..Script::default()
    };
    let (world, end) = World::play(script.clone());
    let abort = aborted(&world, &end);
    assert_eq!(abort.cause.device, None);
    assert!(abort.cause.text.starts_with("RAM needs"), "{}", abort.cause.text);
    assert!((3 * SECOND..4 * SECOND).contains(&end.at), "{:?}", end.at);
    // Without a time it is noticed all the same.
    let (world, end) = World::play(Script { give_up_after: None, ..script });
    aborted(&world, &end);
    assert!(end.at > 4 * SECOND);
}

#[test]
fn the_limit_is_a_ceiling_not_a_target() {
    // 64 MiB of working set fit into 300 ms at once, but a round or two more make it a fraction.
    let script = Script {
        devices: Vec::new(),
        ram_dirty_rate: 20 << 20,
        bandwidth: 256 << 20,
        limit: SECOND,
        ..Script::default()
    };
    let (world, end) = World::play(script);
    let summary = completed(&world, &end);
    assert!(summary.predicted < 60 * MS, "{:?}", summary.predicted);
}

#[test]
fn an_operator_may_hold_the_switchover() {
    let script = Script {
        pause_before_switchover: true,
        give_up_after: Some(2 * SECOND),
        source_events: vec![(10 * SECOND, SourceEvent::ContinueSwitchover)],
        ..Script::default()
    };
    let (world, end) = World::play(script.clone());
    let summary = completed(&world, &end);
    assert!((10 * SECOND..11 * SECOND).contains(&summary.paused_at), "{:?}", summary.paused_at);
    // And may think better of it.
    let source_events = vec![(5 * SECOND, SourceEvent::Cancel(CancelCause::Operator))];
    let (world, end) = World::play(Script { source_events, ..script });
    assert!(aborted(&world, &end).cancelled);
}

#[test]
fn refusals_end_before_anything_moves() {
    let reasons =
        vec![Reason { code: "ram-layout".to_owned(), text: "other RAM".to_owned(), ..Reason::default() }];
    let version = VersionRange { min: 2, max: 3 };
    for (script, code) in [
        (Script { refuse: Some(reasons), ..Script::default() }, "ram-layout"),
        (Script { destination_versions: version, ..Script::default() }, "protocol-version"),
    ] {
        let (world, end) = World::play(script);
        let Some(SourceOutcome::Refused(reasons)) = &end.source else { panic!("{end:?}") };
        assert_eq!(reasons[0].code, code);
        assert_eq!(end.destination, Some(DestinationOutcome::Refused(reasons.clone())));
        source_is_back(&world);
        assert!(world.side.actions.is_empty());
        assert_eq!(world.other.disk, None);
    }
}

#[test]
fn the_watchdog_ends_a_switchover_that_takes_too_long() {
    for (script, what) in [
        (Script { arc: 200 * MS, ..Script::default() }, "arcs"),
        (Script { latency: 90 * MS, ..Script::default() }, "latency"),
        (Script { action: 260 * MS, ..Script::default() }, "pausing"),
    ] {
        let (world, end) = World::play(script);
        let abort = aborted(&world, &end);
        assert!(abort.cause.text.contains("300 ms"), "{what}: {}", abort.cause.text);
        assert!(!abort.cancelled);
        assert!(!world.source_committed());
        if let Some(paused_at) = world.side.paused_at {
            let detected = world.side.resumed_at.unwrap() - paused_at;
            // Never above the limit minus reserve until the way back begins.
            let way_back = world.script.arc + world.script.action;
            assert!(detected <= 250 * MS + way_back + MS, "{what}: {detected:?}");
        }
    }
}

#[test]
fn the_watchdog_leaves_a_paused_guest_alone() {
    let (world, end) = World::play(Script { guest_runs: false, arc: 900 * MS, ..Script::default() });
    completed(&world, &end);
}

#[test]
fn ready_must_agree_in_everything() {
    for (corrupt, what) in [
        (Corrupt::Pages, "RAM pages"),
        (Corrupt::Sections, "sections"),
        (Corrupt::DeviceMissing, "devices differ"),
        (Corrupt::DeviceBytes, "the bytes of device"),
        (Corrupt::DeviceDigest, "the bytes of device"),
        (Corrupt::RamDigest, "RAM digests"),
        (Corrupt::NoRamDigest, "RAM digests"),
    ] {
        // The destination sees it before it says READY; a source does not rely on that.
        for corrupt_by_liar in [false, true] {
            let script =
                Script { verify: true, corrupt: Some(corrupt), corrupt_by_liar, ..Script::default() };
            let (world, end) = World::play(script);
            let abort = aborted(&world, &end);
            assert!(abort.cause.text.contains(what), "{}", abort.cause.text);
            assert_eq!(abort.cause.phase, Phase::Ready);
            if what == "RAM digests" {
                let remedy = &abort.cause.remedy;
                let place = |word: &str| remedy.find(word).unwrap_or_else(|| panic!("no {word} in {remedy}"));
                assert!(
                    place("devices (DMA") < place("vCPUs") && place("vCPUs") < place("network"),
                    "{remedy}"
                );
            }
            let said = world.link.to_source.iter().any(|said| said.starts_with("Ready"));
            assert_eq!(said, corrupt_by_liar);
        }
    }
}

#[test]
fn a_destination_that_cannot_start_holds_the_guest() {
    let (world, end) = World::play(Script { start_fails: true, ..Script::default() });
    let Some(DestinationOutcome::OwnedNotStarted { epoch, cause }) = &end.destination else {
        panic!("{end:?}")
    };
    assert_eq!(*epoch, world::EPOCH.next());
    assert_eq!(cause.text, "scripted failure at the destination");
    // The source learns whose the guest is, and why it does not run.
    let Some(SourceOutcome::Completed(summary)) = &end.source else { panic!("{end:?}") };
    assert_eq!(summary.running.guest, GuestOutcome::NotStarted(Box::new(cause.clone())));
    assert_eq!(world.side.disk, SourceState::Released);
}

#[test]
fn a_destination_that_cannot_journal_owner_declines() {
    let (baseline, _) = World::play(Script::default());
    let journal = baseline.other.actions.iter().position(|action| action == "Journal(Owner)").unwrap();
    let (world, end) = World::play(Script { destination_fails_at: Some(journal), ..Script::default() });
    aborted(&world, &end);
    assert_eq!(world.other.disk, Some(DestinationState::Aborted));
    assert!(world.link.to_source.last().unwrap().starts_with("Declined"));
}

#[test]
fn cancel_is_obeyed_until_the_decision() {
    for late_answers in [false, true] {
        let (baseline, _) = World::play(Script::default());
        for (index, name) in baseline.side.actions.iter().enumerate() {
            let script = Script { cancel_at_action: Some(index), late_answers, ..Script::default() };
            let (world, end) = World::play(script);
            let decided = ["Journal(Committing)", "Journal(Released)", "CleanUp"].contains(&name.as_str());
            if decided {
                completed(&world, &end);
            } else {
                let abort = aborted(&world, &end);
                assert!(abort.cancelled, "{name}: {abort:?}");
                let paused = world.side.paused_at.is_some();
                assert!(!paused || world.side.resumed_at.is_some(), "{name}");
            }
        }
        for (index, name) in baseline.other.actions.iter().enumerate() {
            let script =
                Script { destination_cancel_at_action: Some(index), late_answers, ..Script::default() };
            let (world, end) = World::play(script);
            if name == "Journal(Owner)" || name.starts_with("Start") {
                completed(&world, &end);
            } else {
                assert!(!aborted(&world, &end).cancelled, "{name}");
            }
        }
    }
}

#[test]
fn cancelling_twice_is_cancelling_once() {
    let cancel = |at| (at, SourceEvent::Cancel(CancelCause::Operator));
    let source_events = vec![cancel(50 * MS), cancel(50 * MS), cancel(51 * MS), cancel(90 * MS)];
    let (world, end) = World::play(Script { source_events, ..Script::default() });
    assert!(aborted(&world, &end).cancelled);
    assert_eq!(world.side.actions.iter().filter(|action| *action == "RollBack").count(), 1);
    assert!(end.at < SECOND);
}

#[test]
fn a_lost_device_ends_the_attempt() {
    let lost = SourceEvent::DeviceLost(world::failed("guest reset"));
    let (world, end) = World::play(Script { source_events: vec![(100 * MS, lost)], ..Script::default() });
    assert_eq!(aborted(&world, &end).cause.text, "guest reset");
}

/// Whenever it is: before COMMIT the attempt ends at once, and the guest goes on at the source; from COMMIT on nothing changes.
#[test]
fn a_device_that_the_destination_loses_ends_the_attempt_before_commit_alone() {
    let (_, whole) = World::play(Script::default());
    let (mut undone, mut moved) = (0, 0);
    for at in (0..).map(|step| step * 5 * MS).take_while(|at| *at < whole.at) {
        let lost = DestinationEvent::DeviceLost(world::failed("its server died"));
        let (world, end) = World::play(Script { destination_events: vec![(at, lost)], ..Script::default() });
        if matches!(end.source, Some(SourceOutcome::Completed(_))) {
            assert_eq!(world.other.guest, Guest::Runs, "{at:?}");
            moved += 1;
            continue;
        }
        assert_eq!(moved, 0, "{at:?}: the later, the less can be undone");
        assert_eq!(aborted(&world, &end).cause.text, "its server died", "{at:?}");
        assert!(end.at < at + SECOND, "{at:?}: {:?}", end.at);
        undone += 1;
    }
    assert!(undone > 10 && moved > 0, "{undone} {moved}");
}

#[test]
fn a_destination_given_up_by_its_operator() {
    let destination_events = vec![(100 * MS, DestinationEvent::Cancel(CancelCause::Operator))];
    let (world, end) = World::play(Script { destination_events, ..Script::default() });
    let abort = aborted(&world, &end);
    let told = (abort.cause.side, abort.cause.text.as_str());
    assert_eq!(told, (Side::Destination, "cancelled by the operator"));
}

#[test]
fn every_action_that_fails_leads_back() {
    for late_answers in [false, true] {
        let (baseline, _) = World::play(Script::default());
        for (index, name) in baseline.side.actions.iter().enumerate() {
            let script = Script { source_fails_at: Some(index), late_answers, ..Script::default() };
            let (world, end) = World::play(script);
            if ["Journal(Released)", "CleanUp"].contains(&name.as_str()) {
                let Some(SourceOutcome::Completed(summary)) = &end.source else { panic!("{name}: {end:?}") };
                assert_eq!(summary.left_undone.len(), 1, "{name}");
                assert_eq!(world.other.guest, Guest::Runs);
            } else {
                let abort = aborted(&world, &end);
                assert_eq!(abort.cause.text, "scripted failure at the source", "{name}");
                assert_eq!(abort.cause.errno, Some(5));
                // Both sides return one error.
                let same = matches!(&end.destination, Some(DestinationOutcome::Aborted(cause)) if *cause == abort.cause);
                assert!(same || index == 0, "{name}: {:?}", end.destination);
            }
        }
        for (index, name) in baseline.other.actions.iter().enumerate() {
            let script = Script { destination_fails_at: Some(index), late_answers, ..Script::default() };
            let (world, end) = World::play(script);
            if name.starts_with("Start") {
                assert!(
                    matches!(end.destination, Some(DestinationOutcome::OwnedNotStarted { .. })),
                    "{end:?}"
                );
            } else {
                let abort = aborted(&world, &end);
                assert_eq!(abort.cause.text, "scripted failure at the destination", "{name}");
            }
        }
    }
}

#[test]
fn a_way_back_that_fails_is_reported() {
    // The rollback is the action after the one at which the operator cancels.
    let (baseline, _) = World::play(Script::default());
    let index =
        baseline.side.actions.iter().position(|action| action == "SendFinal { verify: false }").unwrap();
    let script =
        Script { cancel_at_action: Some(index), source_fails_at: Some(index + 1), ..Script::default() };
    let (world, end) = World::play(script);
    let Some(SourceOutcome::Aborted(abort)) = &end.source else { panic!("{end:?}") };
    assert!(!abort.restored);
    assert_eq!(abort.locks_lost, ["disk0"]);
    assert_eq!(world.side.guest, Guest::Paused);
}

#[test]
fn a_cancel_is_obeyed_until_it_is_too_late() {
    let cancelled = |source: &mut Option<SourceEngine>, now| {
        let source = source.as_mut().unwrap();
        source.handle(SourceEvent::Cancel(CancelCause::Operator), now);
        source.poll_action()
    };
    let mut world = World::new(Script::default());
    let finished = cancelled(&mut world.source, world.now);
    assert!(
        matches!(&finished, Some(SourceAction::Finish(SourceOutcome::Aborted(abort))) if abort.cancelled)
    );
    let mut world = World::new(Script::default());
    world.run();
    assert_eq!(cancelled(&mut world.source, world.now), None);
}

#[test]
fn progress_says_what_is_waited_for() {
    use vfio_migration_engine::SwitchoverWait;
    let mut source = World::new(Script {
        pause_before_switchover: true,
        source_events: vec![(20 * SECOND, SourceEvent::Cancel(CancelCause::Operator))],
        ..Script::default()
    });
    source.run();
    let waited = source.log.iter().any(|line| line.contains("SendIteration { iteration: 20 }"));
    assert!(waited, "rounds go on while the operator thinks");
    let progress = source.source.as_ref().unwrap().progress(source.now);
    assert!(progress.iteration > 20 && progress.bandwidth.is_some() && progress.predicted.is_some());
    assert_eq!(progress.waiting, None::<SwitchoverWait>, "it is over");
}

#[test]
fn a_destination_that_stops_acknowledging_is_noticed_in_p3() {
    let (baseline, _) = World::play(Script::default());
    for (what, device) in [("InitialLoaded", Some("net0")), ("Applied", None)] {
        let index = baseline.link.to_source.iter().position(|said| said.starts_with(what)).unwrap();
        let fault = Some(Fault { direction: Direction::ToSource, index, what: What::Drop });
        // The operator holds the switchover, so nothing but the silence can end it.
        let (world, end) = World::play(Script {
            fault,
            give_up_after: None,
            pause_before_switchover: true,
            source_events: vec![(80 * SECOND, SourceEvent::Cancel(CancelCause::Operator))],
            ..Script::default()
        });
        let abort = aborted(&world, &end);
        if what == "InitialLoaded" {
            assert_eq!(abort.cause.device.as_deref(), device);
            assert!(abort.cause.text.contains("INITIAL_LOADED within 60000 ms"), "{}", abort.cause.text);
        } else {
            // A later acknowledgement covers an earlier one.
            assert!(abort.cancelled, "{}", abort.cause.text);
        }
    }
}
