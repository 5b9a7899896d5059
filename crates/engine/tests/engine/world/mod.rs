//! A simulated world around a [`SourceEngine`] and a [`DestinationEngine`]: a clock, a link, two machines, two disks with a journal each.
//!
//! Discrete events; nothing waits. Every rule of ownership is checked after every event, from the outside: by what runs and by
//! what is on the disks, not by what the engines say.
#![expect(unreachable_pub, reason = "only the files of this program reach it")]

mod destination;
mod link;
pub mod script;
mod source;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use script::{Fault, Script};
use vfio_migration_engine::ownership::{DestinationState, SourceState};
use vfio_migration_engine::{
    DestinationConfig, DestinationEngine, DestinationEvent, DestinationOutcome, SourceConfig, SourceEngine,
    SourceEvent, SourceOutcome, Time,
};
use vfio_migration_types::{AttemptId, Epoch, Failure, Phase, Side, VmId};
use vfio_migration_wire::{FEATURES, Message, Offer};

pub const VM: VmId = VmId([7; 16]);
pub const ATTEMPT: AttemptId = AttemptId([9; 16]);
pub const EPOCH: Epoch = Epoch(41);

/// Nonce of the lease.
const LEASE: [u8; 16] = [5; 16];

/// Nothing may take longer, in simulated time.
const FOREVER: Duration = Duration::from_secs(900);
/// Nothing may need more events: a tick that changes nothing would be called for ever.
const EVENTS: usize = 200_000;

/// Something that will happen.
#[derive(Clone, Debug)]
enum Happening {
    Source(SourceEvent),
    Destination(DestinationEvent),
    /// The answer of an action; dropped if the action was interrupted, unless answers come late.
    SourceAnswer(u64, SourceEvent),
    DestinationAnswer(u64, DestinationEvent),
    /// A message arrives over the connection of the migration.
    Arrives(script::Direction, usize, Message),
    /// A connection's end arrives.
    Closed(script::Direction, String),
    /// A question arrives, and its answer.
    Asked(u64, Message),
    Answered(u64, Message),
    SourceRestarts,
    DestinationRestarts,
    /// A restarted source in COMMITTING asks.
    RestartedAsks(u32),
}

/// A guest, on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// There is none.
    None,
    Runs,
    Paused,
}

pub struct World {
    pub script: Script,
    pub now: Time,
    queue: BinaryHeap<Reverse<(Time, u64)>>,
    happenings: HashMap<u64, Happening>,
    counter: u64,
    pub source: Option<SourceEngine>,
    pub destination: Option<DestinationEngine>,
    pub side: source::Side,
    pub other: destination::Side,
    pub link: link::Link,
    /// Everything said, for failures to print.
    pub log: Vec<String>,
    pub violations: Vec<String>,
}

/// What came of it.
#[derive(Debug)]
pub struct End {
    pub source: Option<SourceOutcome>,
    pub destination: Option<DestinationOutcome>,
    pub at: Time,
}

impl World {
    pub fn new(script: Script) -> Self {
        let source = SourceEngine::new(SourceConfig {
            vm: VM,
            attempt: ATTEMPT,
            epoch: EPOCH,
            versions: script.source_versions,
            features: FEATURES,
            offer: Offer { manifest: b"{}".to_vec(), ..Offer::default() },
            devices: script.devices.iter().map(script::Device::facts).collect(),
            downtime_limit: script.limit,
            commit_reserve: script.reserve,
            give_up_after: script.give_up_after,
            pause_before_switchover: script.pause_before_switchover,
            suspend: script.suspend,
            verify: script.verify,
            peer_timeout: script.peer_timeout,
            rehearse: script.rehearse,
        });
        let destination = DestinationEngine::new(
            DestinationConfig {
                versions: script.destination_versions,
                features: script.destination_features,
                peer_timeout: script.peer_timeout,
                offer_timeout: script.peer_timeout,
                suspend: script.suspend_there,
                lease: LEASE,
                lease_time: script.lease_time,
            },
            Time::ZERO,
        );
        let mut world = Self {
            now: Time::ZERO,
            queue: BinaryHeap::new(),
            happenings: HashMap::new(),
            counter: 0,
            source: Some(source),
            destination: Some(destination),
            side: source::Side::new(&script),
            other: destination::Side::default(),
            link: link::Link::default(),
            log: Vec::new(),
            violations: Vec::new(),
            script,
        };
        world.at(Time::ZERO, Happening::Source(SourceEvent::Connected));
        for (at, event) in world.script.source_events.clone() {
            world.at(at, Happening::Source(event));
        }
        for (at, event) in world.script.destination_events.clone() {
            world.at(at, Happening::Destination(event));
        }
        world
    }

    /// Runs until nothing more can happen.
    pub fn run(&mut self) -> End {
        for _ in 0..EVENTS {
            self.poll();
            self.check();
            let happens = self.queue.peek().map(|Reverse((at, _))| *at);
            let source = self.source.as_ref().and_then(SourceEngine::deadline);
            let destination = self.destination.as_ref().and_then(DestinationEngine::deadline);
            let Some(next) = [happens, source, destination].into_iter().flatten().min() else { break };
            self.now = self.now.max(next);
            if self.now > FOREVER {
                self.violations.push(format!("not over after {FOREVER:?}"));
                break;
            }
            if happens.is_some_and(|at| at <= self.now) {
                self.happen();
            } else if source.is_some_and(|at| at <= self.now) {
                self.tell_source(SourceEvent::Tick);
            } else {
                self.tell_destination(DestinationEvent::Tick);
            }
        }
        if self.queue.peek().is_some() && self.violations.is_empty() {
            self.violations.push(format!("not over after {EVENTS} events"));
        }
        End { source: self.side.outcome.clone(), destination: self.other.outcome.clone(), at: self.now }
    }

    /// Runs a script and fails the test on any violation.
    pub fn play(script: Script) -> (Self, End) {
        let mut world = Self::new(script);
        let end = world.run();
        world.assert_sound();
        (world, end)
    }

    pub fn assert_sound(&self) {
        assert!(
            self.violations.is_empty(),
            "{:#?}\nfault {:?}\n{}",
            self.violations,
            self.script.fault,
            self.log.join("\n")
        );
    }

    fn happen(&mut self) {
        let Some(Reverse((_, id))) = self.queue.pop() else { return };
        let Some(happening) = self.happenings.remove(&id) else { return };
        match happening {
            Happening::Source(event) => self.tell_source(event),
            Happening::Destination(event) => self.tell_destination(event),
            Happening::SourceAnswer(action, event) => self.source_answer(action, event),
            Happening::DestinationAnswer(action, event) => self.destination_answer(action, event),
            Happening::Arrives(direction, index, message) => self.arrives(direction, index, message),
            Happening::Closed(direction, why) => self.closed(direction, why),
            Happening::Asked(question, message) => self.asked(question, message),
            Happening::Answered(question, message) => self.answered(question, message),
            Happening::SourceRestarts => self.source_restarts(),
            Happening::DestinationRestarts => self.destination_restarts(),
            Happening::RestartedAsks(times) => self.restarted_asks(times),
        }
    }

    fn at(&mut self, at: Time, happening: Happening) {
        self.counter += 1;
        self.queue.push(Reverse((at, self.counter)));
        self.happenings.insert(self.counter, happening);
    }

    fn after(&mut self, delay: Duration, happening: Happening) {
        self.at(self.now + delay, happening);
    }

    fn note(&mut self, text: String) {
        self.log.push(format!("{:>10.3} ms  {text}", self.now.as_secs_f64() * 1e3));
    }

    fn tell_source(&mut self, event: SourceEvent) {
        let now = self.now;
        if self.source.is_some() {
            self.note(format!("source ← {event:?}"));
        }
        if let Some(source) = &mut self.source {
            source.handle(event, now);
        }
        self.poll();
    }

    fn tell_destination(&mut self, event: DestinationEvent) {
        let now = self.now;
        if self.destination.is_some() {
            self.note(format!("destination ← {event:?}"));
        }
        if let Some(destination) = &mut self.destination {
            destination.handle(event, now);
        }
        self.poll();
    }

    fn poll(&mut self) {
        while let Some(action) = self.source.as_mut().and_then(SourceEngine::poll_action) {
            self.note(format!("source → {action:?}"));
            self.source_action(action);
        }
        while let Some(action) = self.destination.as_mut().and_then(DestinationEngine::poll_action) {
            self.note(format!("destination → {action:?}"));
            self.destination_action(action);
        }
    }

    /// The rules of ownership, from outside.
    fn check(&mut self) {
        let source_runs = self.side.guest == Guest::Runs;
        let mut broken = Vec::new();
        if source_runs && self.other.guest == Guest::Runs {
            broken.push("two guests run");
        }
        if source_runs && self.other.ever_started {
            broken.push("the source runs what the destination has run");
        }
        if source_runs && !self.side.disk.may_run() {
            // The disk may be ahead of the process: COMMITTING written, not yet confirmed, the guest is paused then anyway.
            broken.push("the source runs against its journal");
        }
        if self.other.guest == Guest::Runs && self.other.disk != Some(DestinationState::Owner) {
            broken.push("the destination runs against its journal");
        }
        if self.script.rehearse.is_some()
            && (self.side.disk != SourceState::Owner || self.other.disk.is_some())
        {
            broken.push("a rehearsal is in a journal");
        }
        for what in broken {
            if self.violations.len() < 10 {
                self.violations.push(format!("{what} at {:?}", self.now));
            }
        }
    }

    fn violated(&mut self, what: &str) {
        self.violations.push(format!("{what} at {:?}", self.now));
    }

    fn fault_at(&self, direction: script::Direction, index: usize) -> Option<script::What> {
        self.script
            .fault
            .filter(|fault: &Fault| fault.direction == direction && fault.index == index)
            .map(|fault| fault.what)
    }

    pub fn source_committed(&self) -> bool {
        matches!(self.side.disk, SourceState::Committing | SourceState::Released)
    }
}

/// A failure of the world.
pub fn failed(text: &str) -> Failure {
    Failure {
        side: Side::Source,
        phase: Phase::Iterate,
        device: Some("net0".to_owned()),
        arc: None,
        errno: Some(5),
        text: text.to_owned(),
        remedy: "try again".to_owned(),
    }
}
