//! The source around its decision, driven by hand.

use std::time::Duration;

use vfio_migration_engine::ownership::SourceState;
use vfio_migration_engine::{
    Barrier, ExpectedWord, IterationReport, SourceAction, SourceConfig, SourceEngine, SourceEvent,
    SourceOutcome, SwitchoverWait,
};
use vfio_migration_types::{AttemptId, CancelCause, Epoch, Failure, GuestOutcome, Phase, Side, VmId};
use vfio_migration_wire::{
    Accept, Commit, FEATURES, FinalEnd, HelloReply, Message, Offer, Ready, Running, VERSIONS,
};

const NOW: Duration = Duration::ZERO;
const ATTEMPT: AttemptId = AttemptId([2; 16]);
const COMMIT: Message = Message::Commit(Commit { epoch: Epoch(8), attempt: ATTEMPT });

fn tell(source: &mut SourceEngine, event: SourceEvent) -> Vec<SourceAction> {
    source.handle(event, NOW);
    std::iter::from_fn(|| source.poll_action()).collect()
}

fn hear(source: &mut SourceEngine, message: Message) -> Vec<SourceAction> {
    tell(source, SourceEvent::Peer(message))
}

fn error() -> Failure {
    Failure {
        side: Side::Destination,
        phase: Phase::Commit,
        device: None,
        arc: None,
        errno: None,
        text: "no".to_owned(),
        remedy: String::new(),
    }
}

fn running(epoch: u64) -> Message {
    Message::Running(Running {
        epoch: Epoch(epoch),
        guest: GuestOutcome::Running,
        boot_id: [0; 16],
        at_ns: 5,
    })
}

fn config() -> SourceConfig {
    SourceConfig {
        vm: VmId([1; 16]),
        attempt: ATTEMPT,
        epoch: Epoch(7),
        versions: VERSIONS,
        features: FEATURES,
        offer: Offer::default(),
        devices: vec![],
        downtime_limit: Duration::from_millis(300),
        commit_reserve: Duration::from_millis(50),
        give_up_after: None,
        pause_before_switchover: false,
        suspend: false,
        verify: false,
        peer_timeout: Duration::from_secs(5),
        rehearse: None,
    }
}

/// A source that sends its first iteration.
fn iterating(config: SourceConfig) -> SourceEngine {
    let mut source = SourceEngine::new(config);
    for event in [
        SourceEvent::Connected,
        SourceEvent::Peer(Message::HelloReply(HelloReply { version: 1, features: 0 })),
        SourceEvent::Peer(Message::Accept(Accept::default())),
        SourceEvent::Judged,
        SourceEvent::Journaled(SourceState::Sending),
        SourceEvent::SetUp { devices: vec![] },
        SourceEvent::Peer(Message::Begun),
    ] {
        tell(&mut source, event);
    }
    source
}

/// A source that writes COMMITTING to its journal.
fn deciding() -> SourceEngine {
    let mut source = SourceEngine::new(config());
    let totals = FinalEnd { ram_pages: 1, ram_digest: None, sections: 1, devices: vec![] };
    let ready =
        Ready { ram_pages: 1, ram_digest: None, verify_ns: 0, sections: 1, devices: vec![], vectors: 0 };
    let mut last = Vec::new();
    for event in [
        SourceEvent::Connected,
        SourceEvent::Peer(Message::HelloReply(HelloReply { version: 1, features: 0 })),
        SourceEvent::Peer(Message::Accept(Accept::default())),
        SourceEvent::Judged,
        SourceEvent::Journaled(SourceState::Sending),
        SourceEvent::SetUp { devices: vec![] },
        SourceEvent::Peer(Message::Begun),
        SourceEvent::IterationSent(IterationReport { wire_bytes: 1, ..IterationReport::default() }),
        SourceEvent::Paused { guest_ran: true, identity: [0; 32] },
        SourceEvent::Reached { barrier: Barrier::P2p, devices: vec![] },
        SourceEvent::Reached { barrier: Barrier::StopCopy, devices: vec![] },
        SourceEvent::FinalSent { totals, verify: Duration::ZERO },
        SourceEvent::LocksReleased,
        SourceEvent::Peer(Message::Ready(ready)),
    ] {
        last = tell(&mut source, event);
    }
    assert_eq!(last, [SourceAction::Journal(SourceState::Committing)]);
    assert_eq!(tell(&mut source, SourceEvent::Cancel(CancelCause::Operator)), [], "it is too late");
    source
}

/// Why the watchdog gave up, when the limit passed behind `events`.
fn over_limit(events: &[SourceEvent]) -> String {
    let mut source = iterating(SourceConfig { downtime_limit: Duration::from_millis(300), ..config() });
    let sent = SourceEvent::IterationSent(IterationReport { wire_bytes: 1, ..IterationReport::default() });
    for event in std::iter::once(&sent).chain(events) {
        tell(&mut source, event.clone());
    }
    source.handle(SourceEvent::Tick, Duration::from_secs(10));
    source.abort_cause().expect("the limit has passed").text.clone()
}

/// The cause of an attempt whose guest was paused at second 0, and that found at second 1 that the limit had passed: of `awaited`, or
/// of what fails at second 30.
fn cause_over_limit(awaited: Option<Failure>) -> Failure {
    let mut source = iterating(SourceConfig { downtime_limit: Duration::from_millis(300), ..config() });
    for event in [
        SourceEvent::IterationSent(IterationReport { wire_bytes: 1, ..IterationReport::default() }),
        SourceEvent::Paused { guest_ran: true, identity: [0; 32] },
    ] {
        tell(&mut source, event);
    }
    source.awaits(awaited);
    source.handle(SourceEvent::Tick, Duration::from_secs(1));
    let late =
        Failure::new(Side::Source, Phase::Quiesce, "net0 has not answered within 30 s").of_device("net0");
    source.handle(SourceEvent::Failed(late), Duration::from_secs(30));
    source.abort_cause().expect("the limit has passed").clone()
}

#[test]
fn a_limit_that_passed_for_a_device_has_one_cause_that_says_what_is_so() {
    let told_late = cause_over_limit(None);
    let says = "net0 has not answered within 30 s; by then the guest had been paused for longer than the downtime limit of 300 ms";
    assert_eq!((told_late.text.as_str(), told_late.device.as_deref()), (says, Some("net0")));
    let awaited =
        Failure::new(Side::Source, Phase::Quiesce, "net1 has not answered for 0.9 s").of_device("net1");
    let told_at_once = cause_over_limit(Some(awaited));
    // What the destination was told by then stays the cause.
    assert_eq!(told_at_once.device.as_deref(), Some("net1"));
    assert!(
        told_at_once.text.starts_with("the guest would stay paused above the downtime limit of 300 ms"),
        "{told_at_once}"
    );
    assert!(told_at_once.text.ends_with(": net1 has not answered for 0.9 s"), "{told_at_once}");
}

#[test]
fn what_is_said_of_a_limit_that_passed_is_what_the_guest_did() {
    let asked = over_limit(&[]);
    assert!(
        asked.starts_with("the guest could not be paused within the downtime limit of 300 ms"),
        "{asked}"
    );
    let paused = over_limit(&[SourceEvent::Paused { guest_ran: true, identity: [0; 32] }]);
    assert!(paused.starts_with("the guest would stay paused above the downtime limit of 300 ms"), "{paused}");
    for text in [asked, paused] {
        assert!(!text.contains("has been paused"), "how long it stands is known when it runs again: {text}");
    }
}

#[test]
fn a_word_to_go_on_is_not_kept_for_a_wait_that_has_not_begun() {
    let mut source = SourceEngine::new(SourceConfig { pause_before_switchover: true, ..config() });
    for event in [
        SourceEvent::Connected,
        SourceEvent::Peer(Message::HelloReply(HelloReply { version: 1, features: 0 })),
        SourceEvent::Peer(Message::Accept(Accept::default())),
        SourceEvent::Judged,
        SourceEvent::ContinueSwitchover,
        SourceEvent::Journaled(SourceState::Sending),
        SourceEvent::SetUp { devices: vec![] },
        SourceEvent::Peer(Message::Begun),
        SourceEvent::ContinueSwitchover,
    ] {
        tell(&mut source, event);
    }
    let report = IterationReport { wire_bytes: 1, ..IterationReport::default() };
    assert_eq!(tell(&mut source, SourceEvent::IterationSent(report)), []);
    assert_eq!(source.progress(NOW).waiting, Some(SwitchoverWait::Operator));
    assert_eq!(tell(&mut source, SourceEvent::ContinueSwitchover), [SourceAction::Pause]);
}

/// Between the wait that an operator saw and the word that ends it, a round may find the downtime too long again.
#[test]
fn a_word_to_go_on_counts_though_a_round_waits_for_something_else() {
    let mut source = iterating(SourceConfig { pause_before_switchover: true, ..config() });
    let took = Duration::from_secs(1);
    let round =
        |ram_left| IterationReport { wire_bytes: 1 << 20, took, ram_left, ..IterationReport::default() };
    tell(&mut source, SourceEvent::IterationSent(round(0)));
    assert_eq!(source.progress(NOW).waiting, Some(SwitchoverWait::Operator));
    // A second for a mebibyte: what is dirty now is far above the limit, and the next round begins at once.
    let mut now = source.deadline().unwrap().max(NOW);
    source.handle(SourceEvent::Tick, now);
    assert_eq!(source.poll_action(), Some(SourceAction::SendIteration { iteration: 2 }));
    now += took;
    source.handle(SourceEvent::IterationSent(round(8 << 20)), now);
    assert_eq!(source.poll_action(), Some(SourceAction::SendIteration { iteration: 3 }));
    assert_eq!(source.progress(now).waiting, Some(SwitchoverWait::Convergence));
    source.handle(SourceEvent::ContinueSwitchover, now);
    now += took;
    source.handle(SourceEvent::IterationSent(round(0)), now);
    assert_eq!(source.poll_action(), Some(SourceAction::Pause));
}

#[test]
fn ram_that_is_sent_again_counts_against_the_downtime() {
    let mut source = iterating(config());
    // One second for everything, and everything is sent again: no limit of 300 ms holds.
    let report = IterationReport {
        wire_bytes: 1 << 20,
        took: Duration::from_secs(1),
        ram_left: 0,
        ram_again: 1 << 20,
        devices: vec![],
    };
    assert_eq!(tell(&mut source, SourceEvent::IterationSent(report)), []);
    let progress = source.progress(NOW);
    assert_eq!(progress.waiting, Some(SwitchoverWait::Convergence));
    assert!(progress.predicted > Some(Duration::from_secs(1)), "{progress:?}");
}

/// One that has said COMMIT.
fn committed() -> SourceEngine {
    let mut source = deciding();
    let actions = tell(&mut source, SourceEvent::Journaled(SourceState::Committing));
    assert_eq!(actions, [SourceAction::Send(COMMIT)]);
    assert_eq!(
        tell(&mut source, SourceEvent::Cancel(CancelCause::Operator)),
        [],
        "the other side may run already"
    );
    source
}

#[test]
fn a_link_lost_while_the_decision_is_written_down_is_asked_after() {
    let mut source = deciding();
    assert_eq!(tell(&mut source, SourceEvent::LinkLost("cut".to_owned())), []);
    let actions = tell(&mut source, SourceEvent::Journaled(SourceState::Committing));
    assert_eq!(actions, [SourceAction::AskAgain], "COMMITTING is on disk: it never resumes by itself");
}

#[test]
fn a_destination_that_gives_up_while_the_decision_is_written_down_is_asked() {
    for doubt in [Message::Abort(error()), running(8), Message::Accept(Accept::default())] {
        let mut source = deciding();
        assert_eq!(hear(&mut source, doubt), []);
        let actions = tell(&mut source, SourceEvent::Journaled(SourceState::Committing));
        assert_eq!(actions, [SourceAction::AskAgain]);
    }
}

#[test]
fn a_stream_damaged_while_the_decision_is_written_down_undoes_nothing_behind_the_journal() {
    let mut source = deciding();
    assert_eq!(tell(&mut source, SourceEvent::Damaged(error())), []);
    assert_eq!(tell(&mut source, SourceEvent::LinkLost("damaged".to_owned())), []);
    let actions = tell(&mut source, SourceEvent::Journaled(SourceState::Committing));
    assert_eq!(actions, [SourceAction::AskAgain]);
}

#[test]
fn a_device_that_cannot_even_be_reset_is_named() {
    let mut source = deciding();
    tell(&mut source, SourceEvent::Failed(error()));
    let toy = vfio_migration_types::DeviceId::new("toy0").unwrap();
    let back =
        SourceEvent::RolledBack { reset: vec![], not_reset: vec![toy], locks_lost: vec![], restored: false };
    tell(&mut source, back);
    let actions = tell(&mut source, SourceEvent::Journaled(SourceState::Owner));
    let [SourceAction::Finish(SourceOutcome::Aborted(abort))] = &actions[..] else { panic!("{actions:?}") };
    assert!(!abort.restored && abort.cause.text.contains("device toy0"), "{abort:?}");
}

#[test]
fn a_destination_that_declines_while_the_decision_is_written_down() {
    let mut source = deciding();
    assert_eq!(hear(&mut source, Message::Declined(error())), []);
    let actions = tell(&mut source, SourceEvent::Journaled(SourceState::Committing));
    assert_eq!(actions, [SourceAction::Journal(SourceState::Owner)]);
    let actions = tell(&mut source, SourceEvent::Journaled(SourceState::Owner));
    assert_eq!(actions.last(), Some(&SourceAction::RollBack), "{actions:?}");
}

#[test]
fn a_decision_that_cannot_be_written_down_is_none() {
    let mut source = deciding();
    let actions = tell(&mut source, SourceEvent::Failed(error()));
    assert_eq!(actions, [SourceAction::Send(Message::Abort(error())), SourceAction::RollBack]);
    let back =
        SourceEvent::RolledBack { reset: vec![], not_reset: vec![], locks_lost: vec![], restored: true };
    assert_eq!(tell(&mut source, back), [SourceAction::Journal(SourceState::Owner)]);
}

#[test]
fn only_running_and_declined_decide() {
    for nothing in [running(7), running(9), Message::Accept(Accept::default()), Message::Ping { token: 1 }] {
        let mut source = committed();
        assert_eq!(hear(&mut source, nothing), []);
    }
    for event in [
        SourceEvent::Cancel(CancelCause::Operator),
        SourceEvent::DeviceLost(error()),
        SourceEvent::Failed(error()),
        SourceEvent::Damaged(error()),
        SourceEvent::SetDowntimeLimit(NOW),
        SourceEvent::RolledBack { reset: vec![], not_reset: vec![], locks_lost: vec![], restored: true },
    ] {
        let mut source = committed();
        assert_eq!(tell(&mut source, event), []);
    }
    let mut source = committed();
    assert_eq!(hear(&mut source, running(8)), [SourceAction::Journal(SourceState::Released)]);
    // It is decided: nothing that comes now is heard.
    assert_eq!(hear(&mut source, Message::Declined(error())), []);
}

#[test]
fn declined_runs_nothing_before_owner_is_on_disk() {
    let mut source = committed();
    assert_eq!(hear(&mut source, Message::Declined(error())), [SourceAction::Journal(SourceState::Owner)]);
    // The disk is full: the guest stays paused, and a person is told.
    let actions = tell(&mut source, SourceEvent::Failed(error()));
    assert!(
        matches!(&actions[..], [SourceAction::Finish(SourceOutcome::Unresolved(why))] if why.contains("declined")),
        "{actions:?}"
    );
}

#[test]
fn a_lost_answer_is_asked_for_with_pauses_until_a_person_is() {
    let mut source = committed();
    let mut now = NOW;
    let mut asked = Vec::new();
    assert_eq!(tell(&mut source, SourceEvent::LinkLost("cut".to_owned())), [SourceAction::AskAgain]);
    let outcome = loop {
        source.handle(SourceEvent::LinkLost("refused".to_owned()), now);
        now = source.deadline().expect("it is not over");
        source.handle(SourceEvent::Tick, now);
        match source.poll_action() {
            Some(SourceAction::AskAgain) => asked.push(now),
            Some(SourceAction::Finish(outcome)) => break outcome,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(outcome, SourceOutcome::Unresolved(_)), "{outcome:?}");
    assert!((Duration::from_secs(30)..Duration::from_secs(60)).contains(&now), "{now:?}");
    assert!((8..30).contains(&asked.len()), "{asked:?}");
    assert!(asked[0] <= Duration::from_millis(100));
}

/// The process of the source ends: an answer that is on its way still comes, and one that does not come is not waited for.
#[test]
fn a_process_that_ends_does_not_wait_for_the_answer_to_its_commit() {
    let ends = || SourceEvent::Cancel(CancelCause::ProcessEnds("SIGTERM".to_owned()));
    let lost = || SourceEvent::LinkLost("cut".to_owned());
    let cases: [(&str, Vec<SourceEvent>); 4] = [
        ("awaiting", vec![ends()]),
        ("asking", vec![lost(), ends()]),
        ("asking later", vec![lost(), lost(), ends()]),
        ("asking after it", vec![ends(), lost()]),
    ];
    for (what, events) in cases {
        let mut source = committed();
        for event in events {
            tell(&mut source, event);
        }
        let (now, outcome) = loop {
            let now = source.deadline().unwrap_or_else(|| panic!("{what}: it is over"));
            source.handle(SourceEvent::Tick, now);
            match source.poll_action() {
                Some(SourceAction::Finish(outcome)) => break (now, outcome),
                Some(SourceAction::AskAgain) | None => {}
                other => panic!("{what}: {other:?}"),
            }
        };
        let SourceOutcome::Unresolved(why) = outcome else { panic!("{what}: {outcome:?}") };
        assert!(why.contains("ended by SIGTERM"), "{what}: {why}");
        assert_eq!(now, NOW + Duration::from_millis(500), "{what}");
    }
    let mut source = committed();
    tell(&mut source, ends());
    assert_eq!(hear(&mut source, running(8)), [SourceAction::Journal(SourceState::Released)]);
    // COMMIT is sent once it is journaled, and its answer has as long from then.
    let mut source = deciding();
    assert_eq!(tell(&mut source, ends()), []);
    let later = NOW + Duration::from_secs(3);
    source.handle(SourceEvent::Journaled(SourceState::Committing), later);
    assert_eq!(source.poll_action(), Some(SourceAction::Send(COMMIT)));
    assert_eq!(source.deadline(), Some(later + Duration::from_millis(500)));
}

/// Whoever looks is told what is waited for, since when, and how long at most.
#[test]
fn a_lost_answer_is_told_as_one_that_is_asked_for() {
    let mut source = committed();
    let after = |seconds| NOW + Duration::from_secs(seconds);
    source.handle(SourceEvent::LinkLost("cut".to_owned()), after(2));
    for event in [SourceEvent::LinkLost("refused".to_owned()), SourceEvent::Tick] {
        let Some((word, waited, limit)) = source.expects_word(after(3)) else { panic!("nothing is told") };
        assert_eq!((word, waited), (ExpectedWord::Outcome, Duration::from_secs(1)));
        assert!(limit > Duration::from_secs(10), "{limit:?}");
        source.handle(event, after(3));
    }
}

/// Nothing that is late is waited for: the journal is written behind the end, and what comes after it is nobody's.
#[test]
fn a_rollback_that_is_late_ends_the_attempt() {
    let late = || SourceEvent::RollBackLate { left_undone: vec![error()], restored: true };
    let finished = |actions: &[SourceAction]| match actions.last() {
        Some(SourceAction::Finish(SourceOutcome::Aborted(abort))) => abort.clone(),
        other => panic!("{other:?}"),
    };
    let mut source = iterating(config());
    assert!(!source.is_rolling_back());
    assert_eq!(
        tell(&mut source, SourceEvent::Cancel(CancelCause::Operator)).last(),
        Some(&SourceAction::RollBack)
    );
    assert!(source.is_rolling_back());
    let actions = tell(&mut source, late());
    assert_eq!(actions.first(), Some(&SourceAction::Journal(SourceState::Owner)), "{actions:?}");
    let abort = finished(&actions);
    assert!(abort.cancelled && abort.restored && abort.left_undone == [error()], "{abort:?}");
    assert_eq!(tell(&mut source, SourceEvent::Journaled(SourceState::Owner)), []);
    // The journal itself.
    let mut source = iterating(config());
    tell(&mut source, SourceEvent::Cancel(CancelCause::Operator));
    let back =
        SourceEvent::RolledBack { reset: vec![], not_reset: vec![], locks_lost: vec![], restored: true };
    assert_eq!(tell(&mut source, back), [SourceAction::Journal(SourceState::Owner)]);
    let actions = tell(&mut source, late());
    assert_eq!(actions.len(), 1, "{actions:?}");
    assert_eq!(finished(&actions).left_undone, [error()]);
    // A guest that is paused is not said to run.
    let mut source = iterating(config());
    tell(&mut source, SourceEvent::Failed(error()));
    let paused = SourceEvent::RollBackLate { left_undone: vec![error()], restored: false };
    let abort = finished(&tell(&mut source, paused));
    assert!(!abort.cancelled && !abort.restored, "{abort:?}");
}
