//! Random sequences of events, mostly what is expected, often not: no panic, and the rules of ownership hold whatever a peer or a
//! session does.

use std::time::Duration;

use proptest::prelude::*;
use vfio_migration_engine::ownership::{DestinationState, SourceState};
use vfio_migration_engine::{
    Barrier, DestinationAction, DestinationConfig, DestinationEngine, DestinationEvent, DeviceFacts,
    DeviceProgress, IterationReport, SourceAction, SourceConfig, SourceEngine, SourceEvent,
};
use vfio_migration_types::{
    AttemptId, CancelCause, DeviceId, Epoch, Failure, GuestOutcome, MigrationFlags, Phase, Side, VmId,
};
use vfio_migration_wire::{
    Accept, Applied, Commit, DeviceTotal, FEATURES, Final, FinalEnd, Hello, HelloReply, Message, Offer,
    RamDigests, Ready, Running, VERSIONS,
};

const VM: VmId = VmId([1; 16]);
const ATTEMPT: AttemptId = AttemptId([2; 16]);
const EPOCH: Epoch = Epoch(7);

fn error() -> Failure {
    Failure {
        side: Side::Source,
        phase: Phase::Iterate,
        device: None,
        arc: None,
        errno: None,
        text: "random".to_owned(),
        remedy: String::new(),
    }
}

fn totals() -> FinalEnd {
    FinalEnd {
        ram_pages: 3,
        ram_digest: None,
        sections: 1,
        devices: vec![DeviceTotal { bytes: 9, digest: [1; 32] }; 2],
    }
}

fn ready(vectors: u32) -> Ready {
    let totals = totals();
    Ready {
        ram_pages: totals.ram_pages,
        ram_digest: None,
        verify_ns: 0,
        sections: totals.sections,
        devices: totals.devices,
        vectors,
    }
}

fn running(epoch: Epoch) -> Running {
    Running { epoch, guest: GuestOutcome::Running, boot_id: [0; 16], at_ns: 0 }
}

fn reserved() -> DestinationEvent {
    DestinationEvent::Reserved { manifest: vec![], reasons: vec![], identity: [0; 32] }
}

fn message() -> impl Strategy<Value = Message> {
    let small = 0u32..4;
    let epochs = prop_oneof![3 => Just(EPOCH.next()), 1 => any::<u64>().prop_map(Epoch)];
    let attempts = prop_oneof![3 => Just(ATTEMPT), 1 => any::<[u8; 16]>().prop_map(AttemptId)];
    prop_oneof![
        (any::<u16>(), any::<u16>()).prop_map(|(min, max)| {
            let versions = vfio_migration_wire::VersionRange { min, max };
            Message::Hello(Hello { versions, features: u64::MAX, vm: VM, attempt: ATTEMPT, epoch: EPOCH })
        }),
        (0u16..3, any::<u64>())
            .prop_map(|(version, features)| Message::HelloReply(HelloReply { version, features })),
        Just(Message::Offer(Offer::default())),
        Just(Message::Accept(Accept::default())),
        Just(Message::Refuse(vec![])),
        Just(Message::Begin { lease: [5; 16] }),
        Just(Message::EndRehearsal { obstacle: None }),
        prop::option::of(Just(error())).prop_map(|left_undone| Message::Rehearsed { left_undone }),
        Just(Message::Begun),
        (0u16..4, small.clone()).prop_map(|(device, generation)| Message::InitialSent { device, generation }),
        (0u16..4, small.clone())
            .prop_map(|(device, generation)| Message::InitialLoaded { device, generation }),
        small.clone().prop_map(|iteration| Message::EndIteration { iteration }),
        (small, any::<u64>(), any::<u64>()).prop_map(|(iteration, device_bytes, device_ns)| {
            Message::Applied(Applied { iteration, device_bytes, device_ns })
        }),
        any::<(bool, bool)>().prop_map(|(guest_ran, suspend)| Message::Final(Final {
            guest_ran,
            suspend,
            identity: [0; 32]
        })),
        Just(Message::LocksFree),
        Just(Message::FinalEnd(totals())),
        Just(Message::DigestRam { first: 0, count: 1 }),
        Just(Message::RamDigests(RamDigests { count: 1, ..RamDigests::default() })),
        any::<u32>().prop_map(|vectors| Message::Ready(ready(vectors))),
        (epochs.clone(), attempts.clone())
            .prop_map(|(epoch, attempt)| Message::Commit(Commit { epoch, attempt })),
        Just(Message::Declined(error())),
        epochs.clone().prop_map(|epoch| Message::Running(running(epoch))),
        Just(Message::Abort(error())),
        (epochs, attempts).prop_map(|(epoch, attempt)| Message::Query {
            vm: VM,
            attempt,
            epoch,
            proof: [0; 32]
        }),
        Just(Message::Ping { token: 1 }),
    ]
}

fn progress() -> impl Strategy<Value = Vec<DeviceProgress>> {
    let bytes = || prop_oneof![3 => Just(Some(0)), 1 => any::<Option<u64>>()];
    let device = (bytes(), bytes(), bytes(), 0u32..3, prop::bool::weighted(0.9)).prop_map(
        |(initial_left, dirty_left, stop_copy, generation, initial_sent)| DeviceProgress {
            initial_left,
            dirty_left,
            stop_copy,
            generation,
            initial_sent,
        },
    );
    prop::collection::vec(device, 0..4)
}

fn source_event() -> impl Strategy<Value = SourceEvent> {
    let barrier = prop_oneof![Just(Barrier::Running), Just(Barrier::P2p), Just(Barrier::StopCopy)];
    let state = prop_oneof![
        Just(SourceState::Owner),
        Just(SourceState::Sending),
        Just(SourceState::Committing),
        Just(SourceState::Released)
    ];
    prop_oneof![
        8 => message().prop_map(SourceEvent::Peer),
        1 => Just(SourceEvent::Connected),
        2 => progress().prop_map(|devices| SourceEvent::SetUp { devices }),
        2 => (any::<u64>(), any::<u32>(), any::<u64>(), progress()).prop_map(|(wire_bytes, took, ram_left, devices)| {
            let took = Duration::from_nanos(took.into());
            SourceEvent::IterationSent(IterationReport { wire_bytes, took, ram_left, ram_again: 0, devices })
        }),
        1 => any::<bool>().prop_map(|guest_ran| SourceEvent::Paused { guest_ran, identity: [0; 32] }),
        1 => Just(SourceEvent::Judged),
        1 => Just(SourceEvent::Refused(vec![])),
        2 => (barrier, progress()).prop_map(|(barrier, devices)| SourceEvent::Reached { barrier, devices }),
        1 => Just(SourceEvent::Resumed),
        1 => Just(SourceEvent::FinalSent { totals: totals(), verify: Duration::MAX }),
        1 => Just(SourceEvent::LocksReleased),
        1 => Just(SourceEvent::RamDigested(RamDigests { count: 1, ..RamDigests::default() })),
        2 => state.prop_map(SourceEvent::Journaled),
        1 => Just(SourceEvent::RolledBack { reset: vec![], not_reset: vec![], locks_lost: vec![], restored: false }),
        1 => Just(SourceEvent::CleanedUp),
        1 => Just(SourceEvent::Failed(error())),
        1 => Just(SourceEvent::Damaged(error())),
        1 => Just(SourceEvent::LinkLost("random".to_owned())),
        1 => Just(SourceEvent::Cancel(CancelCause::Operator)),
        1 => any::<u64>().prop_map(|ns| SourceEvent::SetDowntimeLimit(Duration::from_nanos(ns))),
        1 => Just(SourceEvent::ContinueSwitchover),
        1 => Just(SourceEvent::DeviceLost(error())),
        2 => Just(SourceEvent::Tick),
    ]
}

fn destination_event() -> impl Strategy<Value = DestinationEvent> {
    let state = prop_oneof![
        Just(DestinationState::Reserved),
        Just(DestinationState::Loading),
        Just(DestinationState::Ready),
        Just(DestinationState::Owner),
        Just(DestinationState::Aborted)
    ];
    prop_oneof![
        10 => message().prop_map(DestinationEvent::Peer),
        1 => Just(reserved()),
        1 => Just(DestinationEvent::Refused(vec![])),
        1 => Just(DestinationEvent::ResumingBegun),
        1 => (any::<u16>(), any::<u32>()).prop_map(|(device, generation)| DestinationEvent::InitialLoaded { device, generation }),
        1 => (0u32..4).prop_map(|iteration| DestinationEvent::Applied(Applied { iteration, device_bytes: 1, device_ns: 1 })),
        1 => Just(DestinationEvent::LocksTaken),
        1 => any::<u32>().prop_map(|vectors| DestinationEvent::Loaded(ready(vectors))),
        2 => state.prop_map(DestinationEvent::Journaled),
        1 => Just(DestinationEvent::Started(running(EPOCH.next()))),
        1 => Just(DestinationEvent::Released),
        1 => Just(DestinationEvent::Failed(error())),
        1 => Just(DestinationEvent::Damaged(error())),
        1 => Just(DestinationEvent::DeviceLost(error())),
        1 => Just(DestinationEvent::GuestComes),
        1 => Just(DestinationEvent::Superseded),
        1 => Just(DestinationEvent::LinkLost("random".to_owned())),
        1 => Just(DestinationEvent::Cancel(CancelCause::Operator)),
        2 => Just(DestinationEvent::Tick),
    ]
}

/// What a session and a peer that mean well would say next.
fn helpful_source(action: &SourceAction) -> Vec<SourceEvent> {
    let sent = DeviceProgress { initial_left: Some(0), initial_sent: true, ..DeviceProgress::default() };
    let devices = vec![sent; 2];
    let peer = |message| vec![SourceEvent::Peer(message)];
    match action {
        SourceAction::Send(Message::Hello(_)) => {
            peer(Message::HelloReply(HelloReply { version: 1, features: 0 }))
        }
        SourceAction::Send(Message::Offer(_)) => peer(Message::Accept(Accept::default())),
        SourceAction::Judge(_) => vec![SourceEvent::Judged],
        SourceAction::Send(Message::EndRehearsal { .. }) => peer(Message::Rehearsed { left_undone: None }),
        SourceAction::Send(Message::Begin { .. }) => peer(Message::Begun),
        SourceAction::Send(Message::FinalEnd(_)) => peer(Message::Ready(ready(1))),
        SourceAction::Send(Message::Commit(_)) | SourceAction::AskAgain => {
            peer(Message::Running(running(EPOCH.next())))
        }
        SourceAction::SetUp => vec![SourceEvent::SetUp { devices }],
        SourceAction::SendIteration { .. } => vec![
            SourceEvent::Peer(Message::InitialLoaded { device: 0, generation: 0 }),
            SourceEvent::Peer(Message::InitialLoaded { device: 1, generation: 0 }),
            SourceEvent::IterationSent(IterationReport {
                wire_bytes: 1 << 20,
                took: Duration::from_millis(20),
                ram_left: 0,
                ram_again: 0,
                devices,
            }),
        ],
        SourceAction::Pause => vec![SourceEvent::Paused { guest_ran: true, identity: [0; 32] }],
        SourceAction::Devices(barrier) => vec![SourceEvent::Reached { barrier: *barrier, devices }],
        SourceAction::Resume => vec![SourceEvent::Resumed],
        SourceAction::SendFinal { .. } => {
            vec![SourceEvent::FinalSent { totals: totals(), verify: Duration::ZERO }]
        }
        SourceAction::DigestRam { first, count } => {
            vec![SourceEvent::RamDigested(RamDigests {
                first: *first,
                count: *count,
                ..RamDigests::default()
            })]
        }
        SourceAction::ReleaseLocks => vec![SourceEvent::LocksReleased],
        SourceAction::Journal(state) => vec![SourceEvent::Journaled(*state)],
        SourceAction::RollBack => {
            vec![SourceEvent::RolledBack {
                reset: vec![],
                not_reset: vec![],
                locks_lost: vec![],
                restored: true,
            }]
        }
        SourceAction::CleanUp => vec![SourceEvent::CleanedUp],
        _ => vec![],
    }
}

fn source() -> SourceEngine {
    let device = |name: &str| DeviceFacts {
        id: DeviceId::new(name).unwrap(),
        flags: MigrationFlags { p2p: true, pre_copy: true },
        precopy_info: true,
    };
    SourceEngine::new(SourceConfig {
        vm: VM,
        attempt: ATTEMPT,
        epoch: EPOCH,
        versions: VERSIONS,
        features: FEATURES,
        offer: Offer::default(),
        devices: vec![device("a"), device("b")],
        downtime_limit: Duration::from_millis(300),
        commit_reserve: Duration::from_millis(50),
        give_up_after: Some(Duration::from_secs(100)),
        pause_before_switchover: false,
        suspend: false,
        verify: false,
        peer_timeout: Duration::from_secs(5),
        rehearse: None,
    })
}

/// What the outside has seen of a source.
#[derive(Default)]
struct Seen {
    /// The last state that was confirmed.
    confirmed: Option<SourceState>,
    declined: bool,
    finished: bool,
    heard_running: bool,
    /// COMMIT was said, or asked after: the destination may own the guest.
    committed: bool,
}

impl Seen {
    fn event(&mut self, event: &SourceEvent, asked: Option<SourceState>) {
        match event {
            SourceEvent::Journaled(state) if asked == Some(*state) => self.confirmed = Some(*state),
            SourceEvent::Peer(Message::Declined(_)) => self.declined = true,
            SourceEvent::Peer(Message::Running(said)) => self.heard_running |= said.epoch == EPOCH.next(),
            _ => {}
        }
    }

    fn action(&mut self, action: &SourceAction) -> Result<(), TestCaseError> {
        prop_assert!(!self.finished, "{action:?} after Finish");
        let committing = self.confirmed == Some(SourceState::Committing);
        match action {
            SourceAction::Send(Message::Commit(commit)) => {
                prop_assert!(committing, "COMMIT before COMMITTING");
                prop_assert_eq!(commit.epoch, EPOCH.next());
                self.committed = true;
            }
            SourceAction::AskAgain => self.committed = true,
            SourceAction::RollBack if self.committed => {
                prop_assert_eq!(self.confirmed, Some(SourceState::Owner), "runs before OWNER is on disk");
            }
            SourceAction::Resume => prop_assert!(!self.committed),
            SourceAction::Journal(SourceState::Owner) => {
                prop_assert!(!self.committed || self.declined, "taken back without DECLINED");
            }
            SourceAction::Journal(SourceState::Released) => prop_assert!(committing && self.heard_running),
            SourceAction::CleanUp => prop_assert!(self.heard_running),
            SourceAction::Finish(_) => self.finished = true,
            _ => {}
        }
        Ok(())
    }
}

/// The expected event with figures of its own.
fn with_figures(event: SourceEvent, figures: Option<Figures>) -> SourceEvent {
    let Some((devices, wire_bytes, took, ram_left)) = figures else { return event };
    match event {
        SourceEvent::SetUp { .. } => SourceEvent::SetUp { devices },
        SourceEvent::Reached { barrier, .. } => SourceEvent::Reached { barrier, devices },
        SourceEvent::IterationSent(_) => {
            let took = Duration::from_nanos(took.into());
            SourceEvent::IterationSent(IterationReport { wire_bytes, took, ram_left, ram_again: 0, devices })
        }
        SourceEvent::Paused { .. } => SourceEvent::Paused { guest_ran: took % 2 == 0, identity: [0; 32] },
        other => other,
    }
}

type Figures = (Vec<DeviceProgress>, u64, u32, u64);

fn figures() -> impl Strategy<Value = Option<Figures>> {
    prop::option::weighted(0.1, (progress(), any::<u64>(), any::<u32>(), any::<u64>()))
}

/// One step: an expected event, or any.
type Step<E> = (bool, E, u32);

fn steps<E: std::fmt::Debug + Clone + 'static>(
    event: impl Strategy<Value = E> + 'static,
    helpful: f64,
) -> impl Strategy<Value = Vec<Step<E>>> {
    prop::collection::vec((prop::bool::weighted(helpful), event, 0u32..400_000_000), 0..80)
}

/// The steps that mean well do lead to the end: the random sequences start from something that gets somewhere.
#[test]
fn left_to_the_helpers_a_migration_completes() {
    let mut source = source();
    let mut expected = std::collections::VecDeque::from([SourceEvent::Connected]);
    let mut now = Duration::ZERO;
    let mut outcome = None;
    for _ in 0..80 {
        let event = expected.pop_front().unwrap_or(SourceEvent::Tick);
        now += Duration::from_nanos(1000);
        if event == SourceEvent::Tick {
            now = now.max(source.deadline().unwrap_or(now));
        }
        source.handle(event, now);
        while let Some(action) = source.poll_action() {
            expected.extend(helpful_source(&action));
            if let SourceAction::Finish(end) = action {
                outcome = Some(end);
            }
        }
    }
    assert!(matches!(outcome, Some(vfio_migration_engine::SourceOutcome::Completed(_))), "{outcome:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_source_survives_anything(
        steps in prop_oneof![steps(source_event(), 1.0), steps(source_event(), 0.97), steps(source_event(), 0.7)],
        figures in prop::collection::vec(figures(), 80),
    ) {
        let mut source = source();
        let (mut seen, mut asked) = (Seen::default(), None);
        let mut expected = std::collections::VecDeque::from([SourceEvent::Connected]);
        let mut now = Duration::ZERO;
        for ((helpful, random, pass), figures) in steps.into_iter().zip(figures) {
            let event = match helpful {
                true => with_figures(expected.pop_front().unwrap_or(SourceEvent::Tick), figures),
                false => random,
            };
            now += Duration::from_nanos(if helpful { 1000 } else { pass.into() });
            if event == SourceEvent::Tick {
                now = now.max(source.deadline().unwrap_or(now));
            }
            seen.event(&event, asked);
            source.handle(event, now);
            while let Some(action) = source.poll_action() {
                seen.action(&action)?;
                if let SourceAction::Journal(state) = action {
                    asked = Some(state);
                }
                expected.extend(helpful_source(&action));
            }
            if !seen.finished {
                source.progress(now);
            }
        }
    }

    #[test]
    fn a_destination_survives_anything(steps in prop_oneof![steps(destination_event(), 0.97), steps(destination_event(), 0.7)]) {
        let config = DestinationConfig {
            versions: VERSIONS,
            features: FEATURES,
            lease: [5; 16],
            lease_time: Duration::from_secs(60),
            peer_timeout: Duration::from_secs(5),
            offer_timeout: Duration::from_secs(5),
            suspend: false,
        };
        let mut destination = DestinationEngine::new(config, Duration::ZERO);
        let hello = Hello { versions: VERSIONS, features: 0, vm: VM, attempt: ATTEMPT, epoch: EPOCH };
        let mut expected = std::collections::VecDeque::from([DestinationEvent::Peer(Message::Hello(hello))]);
        let (mut confirmed, mut asked, mut committed, mut finished) = (None, None, false, false);
        let mut started = false;
        let mut now = Duration::ZERO;
        for (helpful, random, pass) in steps {
            let event = match helpful {
                true => expected.pop_front().unwrap_or(DestinationEvent::Tick),
                false => random,
            };
            now += Duration::from_nanos(if helpful { 1000 } else { pass.into() });
            if event == DestinationEvent::Tick {
                now = now.max(destination.deadline().unwrap_or(now));
            }
            match &event {
                DestinationEvent::Journaled(state) if asked == Some(*state) => confirmed = asked,
                DestinationEvent::Peer(Message::Commit(commit)) => {
                    committed |= commit.attempt == ATTEMPT && commit.epoch == EPOCH.next();
                }
                _ => {}
            }
            destination.handle(event, now);
            while let Some(action) = destination.poll_action() {
                match &action {
                    DestinationAction::Start { epoch, .. } => {
                        prop_assert_eq!(confirmed, Some(DestinationState::Owner));
                        prop_assert!(committed);
                        started = true;
                        prop_assert_eq!(*epoch, EPOCH.next());
                    }
                    DestinationAction::Send(Message::Ready(_)) => {
                        prop_assert_eq!(confirmed, Some(DestinationState::Ready));
                    }
                    DestinationAction::Send(Message::Declined(_)) | DestinationAction::Answer(Message::Declined(_)) => {
                        prop_assert_eq!(confirmed, Some(DestinationState::Aborted));
                    }
                    DestinationAction::Send(Message::Running(_)) | DestinationAction::Answer(Message::Running(_)) => {
                        prop_assert_eq!(confirmed, Some(DestinationState::Owner));
                    }
                    DestinationAction::Journal(state) => {
                        prop_assert!(!started, "{state:?} after the start");
                        prop_assert!(*state != DestinationState::Owner || committed);
                        asked = Some(*state);
                    }
                    DestinationAction::Finish(_) => {
                        prop_assert!(!finished, "finished twice");
                        finished = true;
                    }
                    _ => {}
                }
                expected.extend(helpful_destination(&action));
            }
        }
    }
}

fn helpful_destination(action: &DestinationAction) -> Vec<DestinationEvent> {
    let peer = |message| vec![DestinationEvent::Peer(message)];
    match action {
        DestinationAction::Send(Message::HelloReply(_)) => peer(Message::Offer(Offer::default())),
        DestinationAction::Send(Message::Accept(_)) => peer(Message::Begin { lease: [5; 16] }),
        DestinationAction::Send(Message::Begun) => vec![
            DestinationEvent::Peer(Message::EndIteration { iteration: 1 }),
            DestinationEvent::Peer(Message::Final(Final {
                guest_ran: true,
                suspend: false,
                identity: [0; 32],
            })),
            DestinationEvent::Peer(Message::LocksFree),
            DestinationEvent::Peer(Message::FinalEnd(totals())),
        ],
        DestinationAction::Send(Message::Ready(_)) => {
            peer(Message::Commit(Commit { epoch: EPOCH.next(), attempt: ATTEMPT }))
        }
        DestinationAction::Reserve(_) => vec![reserved()],
        DestinationAction::BeginResuming => vec![DestinationEvent::ResumingBegun],
        DestinationAction::TakeLocks => vec![DestinationEvent::LocksTaken],
        DestinationAction::Load { .. } => vec![DestinationEvent::Loaded(ready(1))],
        DestinationAction::Journal(state) => vec![DestinationEvent::Journaled(*state)],
        DestinationAction::Start { epoch, .. } => vec![DestinationEvent::Started(running(*epoch))],
        DestinationAction::Release => vec![DestinationEvent::Released],
        _ => vec![],
    }
}
