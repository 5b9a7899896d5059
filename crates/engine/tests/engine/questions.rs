//! COMMIT and questions after it, at a destination driven by hand.

use std::time::Duration;

use vfio_migration_engine::ownership::DestinationState;
use vfio_migration_engine::{
    DestinationAction, DestinationConfig, DestinationEngine, DestinationEvent, DestinationOutcome,
};
use vfio_migration_types::{AttemptId, Epoch, Failure, GuestOutcome, Phase, Side, VmId};
use vfio_migration_wire::{
    Commit, FEATURES, Final, FinalEnd, Hello, Message, Offer, Ready, Running, VERSIONS,
};

const VM: VmId = VmId([1; 16]);
const ATTEMPT: AttemptId = AttemptId([2; 16]);
const EPOCH: Epoch = Epoch(7);
const NOW: Duration = Duration::ZERO;
const COMMIT: Commit = Commit { epoch: Epoch(8), attempt: ATTEMPT };
const QUERY: Message = Message::Query { vm: VM, attempt: ATTEMPT, epoch: Epoch(8), proof: [0; 32] };

fn running() -> Running {
    Running { epoch: Epoch(8), guest: GuestOutcome::Running, boot_id: [0; 16], at_ns: 5 }
}

fn tell(destination: &mut DestinationEngine, event: DestinationEvent) -> Vec<DestinationAction> {
    destination.handle(event, NOW);
    std::iter::from_fn(|| destination.poll_action()).collect()
}

fn hear(destination: &mut DestinationEngine, message: Message) -> Vec<DestinationAction> {
    tell(destination, DestinationEvent::Peer(message))
}

/// A destination that has said READY.
fn ready() -> DestinationEngine {
    let config = DestinationConfig {
        versions: VERSIONS,
        features: FEATURES,
        peer_timeout: Duration::from_secs(5),
        offer_timeout: Duration::from_secs(5),
        suspend: false,
        lease: [5; 16],
        lease_time: Duration::from_secs(60),
    };
    let mut destination = DestinationEngine::new(config, NOW);
    let hello = Hello { versions: VERSIONS, features: 0, vm: VM, attempt: ATTEMPT, epoch: EPOCH };
    let totals = FinalEnd { ram_pages: 1, ram_digest: None, sections: 1, devices: vec![] };
    let verified =
        Ready { ram_pages: 1, ram_digest: None, verify_ns: 0, sections: 1, devices: vec![], vectors: 0 };
    let mut last = Vec::new();
    for event in [
        DestinationEvent::Peer(Message::Hello(hello)),
        DestinationEvent::Peer(Message::Offer(Offer::default())),
        DestinationEvent::Reserved { manifest: vec![], reasons: vec![], identity: [0; 32] },
        DestinationEvent::Journaled(DestinationState::Reserved),
        DestinationEvent::Peer(Message::Begin { lease: [5; 16] }),
        DestinationEvent::Journaled(DestinationState::Loading),
        DestinationEvent::ResumingBegun,
        DestinationEvent::Peer(Message::EndIteration { iteration: 1 }),
        DestinationEvent::Peer(Message::Final(Final { guest_ran: true, suspend: false, identity: [0; 32] })),
        DestinationEvent::Peer(Message::LocksFree),
        DestinationEvent::LocksTaken,
        DestinationEvent::Peer(Message::FinalEnd(totals)),
        DestinationEvent::Loaded(verified.clone()),
        DestinationEvent::Journaled(DestinationState::Ready),
    ] {
        last = tell(&mut destination, event);
    }
    assert_eq!(last, [DestinationAction::Send(Message::Ready(verified))]);
    destination
}

#[test]
fn a_commit_of_another_attempt_or_epoch_is_declined() {
    for wrong in [
        Commit { epoch: EPOCH, ..COMMIT },
        Commit { epoch: Epoch(9), ..COMMIT },
        Commit { attempt: AttemptId([3; 16]), ..COMMIT },
    ] {
        let mut destination = ready();
        let actions = hear(&mut destination, Message::Commit(wrong));
        assert_eq!(actions, [DestinationAction::Journal(DestinationState::Aborted)]);
        let actions = tell(&mut destination, DestinationEvent::Journaled(DestinationState::Aborted));
        assert!(
            matches!(
                &actions[..],
                [DestinationAction::Send(Message::Declined(_)), DestinationAction::Release]
            ),
            "{actions:?}"
        );
        // Not even the right one helps any more.
        let actions = hear(&mut destination, Message::Commit(COMMIT));
        assert!(matches!(&actions[..], [DestinationAction::Send(Message::Declined(_))]), "{actions:?}");
    }
}

#[test]
fn a_question_at_ready_ends_the_attempt_before_it_is_answered() {
    let mut destination = ready();
    assert_eq!(hear(&mut destination, QUERY), [DestinationAction::Journal(DestinationState::Aborted)]);
    // A COMMIT that comes now, over the old connection, is too late, and not answered before the journal is written.
    assert_eq!(hear(&mut destination, Message::Commit(COMMIT)), []);
    let actions = tell(&mut destination, DestinationEvent::Journaled(DestinationState::Aborted));
    assert!(actions.iter().any(|action| matches!(action, DestinationAction::Answer(Message::Declined(_)))));
    tell(&mut destination, DestinationEvent::Released);
    // Asked again, it says the same.
    let actions = hear(&mut destination, QUERY);
    assert!(matches!(&actions[..], [DestinationAction::Answer(Message::Declined(_))]), "{actions:?}");
}

#[test]
fn a_question_while_owner_is_being_journaled_waits_for_the_answer() {
    let mut destination = ready();
    assert_eq!(
        hear(&mut destination, Message::Commit(COMMIT)),
        [DestinationAction::Journal(DestinationState::Owner)]
    );
    assert_eq!(hear(&mut destination, QUERY), []);
    let actions = tell(&mut destination, DestinationEvent::Journaled(DestinationState::Owner));
    assert_eq!(actions, [DestinationAction::Start { epoch: Epoch(8), run_guest: true }]);
    assert_eq!(tell(&mut destination, DestinationEvent::LinkLost("gone".to_owned())), []);
    let actions = tell(&mut destination, DestinationEvent::Started(running()));
    assert_eq!(actions[0], DestinationAction::Answer(Message::Running(running())));
    assert!(matches!(actions[1], DestinationAction::Finish(DestinationOutcome::Owner { .. })), "{actions:?}");
    assert_eq!(actions.len(), 2);
    // And after the end.
    assert_eq!(hear(&mut destination, QUERY), [DestinationAction::Answer(Message::Running(running()))]);
}

#[test]
fn a_question_about_something_else_decides_nothing() {
    let mut destination = ready();
    for (vm, attempt, epoch) in
        [(VmId([9; 16]), ATTEMPT, Epoch(8)), (VM, AttemptId([9; 16]), Epoch(8)), (VM, ATTEMPT, Epoch(7))]
    {
        let actions = hear(&mut destination, Message::Query { vm, attempt, epoch, proof: [0; 32] });
        assert!(matches!(&actions[..], [DestinationAction::Answer(Message::Abort(_))]), "{actions:?}");
    }
    assert_eq!(
        hear(&mut destination, Message::Commit(COMMIT)),
        [DestinationAction::Journal(DestinationState::Owner)]
    );
}

#[test]
fn what_was_given_up_after_ready_stays_answerable_for_a_while() {
    let mut destination = ready();
    tell(&mut destination, DestinationEvent::LinkLost("cut".to_owned()));
    tell(&mut destination, DestinationEvent::Journaled(DestinationState::Aborted));
    assert_eq!(tell(&mut destination, DestinationEvent::Released), [], "it waits for the question");
    let until = destination.deadline().unwrap();
    assert!(until >= Duration::from_secs(15), "{until:?}");
    let actions = hear(&mut destination, QUERY);
    assert!(matches!(&actions[..], [DestinationAction::Answer(Message::Declined(_))]), "{actions:?}");
    destination.handle(DestinationEvent::Tick, until);
    let end = destination.poll_action();
    assert!(matches!(end, Some(DestinationAction::Finish(DestinationOutcome::Aborted(_)))), "{end:?}");
}

#[test]
fn a_source_that_says_it_gave_up_is_not_waited_for() {
    let mut destination = ready();
    let cause = Failure {
        side: Side::Destination,
        phase: Phase::Ready,
        device: None,
        arc: None,
        errno: None,
        text: "over the limit".to_owned(),
        remedy: String::new(),
    };
    hear(&mut destination, Message::Abort(cause.clone()));
    let actions = tell(&mut destination, DestinationEvent::Journaled(DestinationState::Aborted));
    assert_eq!(actions, [DestinationAction::Release], "it knows");
    let actions = tell(&mut destination, DestinationEvent::Released);
    assert_eq!(actions, [DestinationAction::Finish(DestinationOutcome::Aborted(cause))]);
}

#[test]
fn declined_is_not_said_if_aborted_cannot_be_journaled() {
    let mut destination = ready();
    hear(&mut destination, QUERY);
    let failed = Failure {
        side: Side::Destination,
        phase: Phase::Ready,
        device: None,
        arc: None,
        errno: Some(28),
        text: "disk full".to_owned(),
        remedy: String::new(),
    };
    let actions = tell(&mut destination, DestinationEvent::Failed(failed));
    assert!(
        matches!(
            &actions[..],
            [
                DestinationAction::Answer(Message::Abort(_)),
                DestinationAction::Send(Message::Abort(_)),
                DestinationAction::Release
            ]
        ),
        "{actions:?}"
    );
}
