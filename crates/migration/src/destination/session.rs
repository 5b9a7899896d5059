//! The session's loop: what happens becomes the engine's events, the engine's actions become jobs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use vfio_migration_compat::Reason;
use vfio_migration_engine::ownership::{DestinationRecord, DestinationState};
use vfio_migration_engine::{
    self as engine, Attempt, DestinationAction, DestinationConfig, DestinationEvent, DestinationOutcome,
};
use vfio_migration_types::Phase;
use vfio_migration_wire as wire;
use vfio_migration_wire::{
    FEATURE_RAM_CRC, FEATURE_REHEARSE, FEATURES, Message, PeerError, Running, VERSIONS,
};

use crate::channel::connect::Listener;
use crate::channel::link::Link;
use crate::channel::liveness::{self, GRACE, TICK};
use crate::control::{IncomingControl, lock};
use crate::error::{Held, IncomingError, RehearsedHere};
use crate::machine::Machine;
use crate::offer::{Arrived, Offer};
use crate::reasons;
use crate::report::{ArrivalReport, Bytes, DeviceStatus, Progress, StepTime};
use crate::session::fail;
use crate::session::host::nonce;
use crate::session::interrupt::Interrupt;

use super::{Destination, FIRST_WORD};
use crate::channel::greeting::{Doorstep, Greeted, Greeting};
use crate::destination::commit::Known;
use crate::destination::reader::{self, Received, Sink};
use crate::destination::worker::{Job, Worker};

/// How often the loop looks who has connected, and how often while somebody has and says nothing yet.
const LOOK: Duration = Duration::from_millis(50);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Jobs that may wait for the worker. More wait only when a source asks and asks and reads no answer.
const MOST_JOBS: u64 = 4096;

/// What the threads of a session share.
#[derive(Debug, Default)]
pub(crate) struct Wires {
    pub(crate) interrupt: Interrupt,
    pub(crate) sink: OnceLock<Sink>,
    pub(crate) received: Received,
    /// Nothing is to stay, and nothing is journaled.
    pub(crate) rehearsal: AtomicBool,
    pub(crate) ram_total: AtomicU64,
    pub(crate) jobs_done: AtomicU64,
    pub(crate) steps: Mutex<Vec<StepTime>>,
    /// What the journal says, as far as it is on disk.
    pub(crate) record: Mutex<Option<DestinationRecord>>,
}

/// Where a session's threads put what happened.
#[derive(Clone, Debug)]
pub(crate) struct Events(Sender<DestinationEvent>);

impl Events {
    pub(crate) fn tell(&self, event: DestinationEvent) {
        // Nobody listens any more: the session is at its end.
        let _ = self.0.send(event);
    }
}

impl Destination {
    /// Runs one session to its end.
    pub(crate) fn session(
        &mut self,
        greeted: Greeted,
        build: impl FnOnce(&Offer) -> Result<Arc<dyn Machine>, Box<Reason>> + Send,
    ) -> Result<Arrived, IncomingError> {
        let begun = Instant::now();
        let Greeted { link, reader, hello } = greeted;
        let wires = Wires::default();
        let machine: Mutex<Option<Arc<dyn Machine>>> = Mutex::new(None);
        let kept = &machine;
        let build = move |offer: &Offer| {
            let built = build(offer)?;
            *lock(kept) = Some(Arc::clone(&built));
            Ok(built)
        };
        let (sender, events) = mpsc::channel();
        let events_in = Events(sender);
        let lease = nonce().map_err(|errno| {
            let text = format!("no random number for the lease: {errno}");
            IncomingError::NotBegun(fail::plain(Phase::Hello, text).into())
        })?;
        let config = DestinationConfig {
            versions: VERSIONS,
            features: FEATURES,
            peer_timeout: self.options.peer_timeout,
            expect: self.options.expect,
            lease,
            lease_time: self.options.lease,
        };
        let (listener, doorstep) = (&mut self.listener, &mut self.doorstep);
        let (options, control) = (&self.options, &self.control);
        let local = self.local.to_string();
        let (outcome, running, attempt) = std::thread::scope(|scope| {
            let (jobs, queue) = mpsc::channel::<Job>();
            let wires = &wires;
            let worker = Worker {
                scope,
                options,
                build: Some(Box::new(build)),
                link: Arc::clone(&link),
                wires,
                events: events_in.clone(),
                local,
                journal: None,
                machine: None,
                pinned: false,
                devices: Vec::new(),
                locked: false,
            };
            let working = scope.spawn(move || worker.run(&queue));
            let heard = (Arc::clone(&link), events_in.clone());
            let hearing =
                scope.spawn(move || reader::hear(reader, &heard.0, &heard.1, &wires.sink, &wires.received));
            events_in.tell(DestinationEvent::Peer(hello));
            let session = Session {
                engine: engine::Destination::new(config, Duration::ZERO),
                link: &link,
                wires,
                jobs,
                events,
                listener,
                doorstep,
                asking: None,
                control,
                begun,
                peer_timeout: options.peer_timeout,
                running: None,
                link_lost: false,
                cancelled: false,
                giving_up: false,
                submitted: 0,
                looked: begun,
            };
            let ended = session.run();
            liveness::farewell(&link, &working, &hearing);
            for queue in wires.sink.get().iter().flat_map(|sink| &sink.queues) {
                queue.close();
            }
            ended
        });
        self.known = lock(&wires.record).clone().map(|record| Known { record, running });
        let machine = lock(&machine).take();
        tell(outcome, machine, attempt, running, &wires, begun)
    }
}

/// The loop, on the caller's thread.
struct Session<'a> {
    engine: engine::Destination,
    link: &'a Link,
    wires: &'a Wires,
    jobs: Sender<Job>,
    events: Receiver<DestinationEvent>,
    listener: &'a mut Listener,
    doorstep: &'a mut Doorstep,
    /// The connection of the latest question.
    asking: Option<Arc<Link>>,
    control: &'a IncomingControl,
    begun: Instant,
    peer_timeout: Duration,
    running: Option<Running>,
    link_lost: bool,
    cancelled: bool,
    /// The attempt is being undone.
    giving_up: bool,
    submitted: u64,
    looked: Instant,
}

impl Session<'_> {
    /// Runs until the engine has finished. The job queue closes with it, and the worker ends.
    fn run(mut self) -> (DestinationOutcome, Option<Running>, Option<Attempt>) {
        loop {
            if let Some(outcome) = self.act() {
                self.show();
                return (outcome, self.running, self.engine.attempt());
            }
            self.show();
            let tick = if self.doorstep.is_empty() { TICK } else { LOOK_AGAIN };
            let due = self.engine.deadline().map_or(tick, |due| due.saturating_sub(self.now()).min(tick));
            match self.events.recv_timeout(due) {
                Ok(event) => {
                    match &event {
                        DestinationEvent::LinkLost(_) => self.link_lost = true,
                        DestinationEvent::Started(running) => self.running = Some(*running),
                        _ => {}
                    }
                    self.engine.handle(event, self.now());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let gone = "the session's own threads are gone: a defect of this program";
                    let outcome = DestinationOutcome::Aborted(fail::plain(Phase::Hello, gone));
                    return (outcome, None, self.engine.attempt());
                }
            }
            self.look_around();
            let now = self.now();
            if self.engine.deadline().is_some_and(|due| due <= now) {
                self.engine.handle(DestinationEvent::Tick, now);
            }
            self.watch();
        }
    }

    fn act(&mut self) -> Option<DestinationOutcome> {
        while let Some(action) = self.engine.poll_action() {
            tracing::debug!(?action, "action");
            match action {
                DestinationAction::Finish(outcome) => return Some(outcome),
                DestinationAction::Answer(message) => {
                    if let Some(asking) = self.asking.take() {
                        let _ = asking.send(&message);
                        asking.shutdown_write();
                    }
                    continue;
                }
                DestinationAction::Journal(DestinationState::Aborted) | DestinationAction::Release => {
                    self.giving_up = true;
                    self.wires.interrupt.raise();
                }
                DestinationAction::Send(Message::HelloReply(reply)) => {
                    // Before the answer: pages that come later are held to it.
                    let crc = reply.features & FEATURE_RAM_CRC != 0;
                    self.wires.received.ram_crc.store(crc, Ordering::Release);
                    let rehearsal = reply.features & FEATURE_REHEARSE != 0;
                    self.wires.rehearsal.store(rehearsal, Ordering::Release);
                }
                _ => {}
            }
            self.submitted += 1;
            if self.jobs.send((action, self.engine.attempt())).is_err() {
                return Some(self.worker_gone());
            }
            if self.submitted.saturating_sub(self.wires.jobs_done.load(Ordering::Acquire)) > MOST_JOBS {
                self.link.give_up("the source does not read what it is sent");
            }
        }
        None
    }

    /// Nobody does what the engine asks for any more. What the journal says decides whose the guest is.
    fn worker_gone(&self) -> DestinationOutcome {
        let cause = fail::plain(Phase::Run, "the session's worker is gone: a defect of this program");
        match &*lock(&self.wires.record) {
            Some(record) if record.state == DestinationState::Owner => {
                DestinationOutcome::OwnerHeld { epoch: record.epoch.next(), cause }
            }
            _ => DestinationOutcome::Aborted(cause),
        }
    }

    /// A source that lost our answer asks on a connection of its own, while this session may still be deciding.
    fn look_around(&mut self) {
        let due = if self.doorstep.is_empty() { LOOK } else { LOOK_AGAIN };
        if self.looked.elapsed() < due {
            return;
        }
        self.looked = Instant::now();
        if let Ok(Some(socket)) = self.listener.try_accept() {
            self.doorstep.add(socket, self.peer_timeout.min(FIRST_WORD));
        }
        match self.doorstep.look() {
            Some(Ok(Greeting::Query(link, Attempt { vm, attempt, epoch }))) => {
                self.asking = Some(link);
                let now = self.now();
                self.engine.handle(DestinationEvent::Peer(Message::Query { vm, attempt, epoch }), now);
            }
            Some(Ok(Greeting::Session(session))) => session.turn_away(),
            Some(Err(why)) => tracing::debug!(%why, "a connection was dropped"),
            None => {}
        }
    }

    fn watch(&mut self) {
        if self.control.cancelled() && !std::mem::replace(&mut self.cancelled, true) {
            let now = self.now();
            self.engine.handle(DestinationEvent::Cancel, now);
        }
        if self.giving_up && self.link.blocked() > GRACE {
            self.link.give_up("the source did not take what was being sent when the migration was given up");
        }
        if self.link_lost {
            return;
        }
        liveness::keep(self.link, "the source", self.peer_timeout);
    }

    fn show(&self) {
        let devices = statuses(self.wires);
        self.control.set_progress(Progress {
            phase: self.engine.phase(),
            iteration: u32::try_from(self.wires.received.iteration.load(Ordering::Relaxed))
                .unwrap_or(u32::MAX),
            elapsed: self.begun.elapsed(),
            paused: self.wires.received.stopped.load(Ordering::Relaxed),
            ram_total: self.wires.ram_total.load(Ordering::Relaxed),
            bytes: bytes(self.wires, &devices),
            devices,
            ..Progress::default()
        });
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }
}

fn statuses(wires: &Wires) -> Vec<DeviceStatus> {
    let queues = wires.sink.get().map(|sink| sink.queues.as_slice()).unwrap_or_default();
    let status = |queue: &Arc<crate::device::receive::DeviceQueue>| DeviceStatus {
        id: queue.id.clone(),
        precopy: queue.precopy.load(Ordering::Relaxed),
        stopcopy: queue.stopcopy.load(Ordering::Relaxed),
        initial_left: None,
        dirty_left: None,
        stop_copy_estimate: None,
    };
    queues.iter().map(status).collect()
}

fn bytes(wires: &Wires, devices: &[DeviceStatus]) -> Bytes {
    Bytes {
        ram: wires.received.ram_bytes.load(Ordering::Relaxed),
        device_precopy: devices.iter().map(|device| device.precopy).sum(),
        device_stopcopy: devices.iter().map(|device| device.stopcopy).sum(),
    }
}

/// The caller's result.
fn tell(
    outcome: DestinationOutcome,
    machine: Option<Arc<dyn Machine>>,
    attempt: Option<Attempt>,
    running: Option<Running>,
    wires: &Wires,
    begun: Instant,
) -> Result<Arrived, IncomingError> {
    let lost =
        || fail::plain(Phase::Run, "the session lost its own machine: a defect of this program").into();
    let rehearsal = wires.rehearsal.load(Ordering::Acquire);
    let rehearsed = |refused: Vec<wire::Reason>, cause: Option<PeerError>| {
        let refused = reasons::from_wire(refused);
        IncomingError::Rehearsed(Box::new(RehearsedHere { refused, cause: cause.map(Into::into) }))
    };
    match outcome {
        DestinationOutcome::Owner { epoch, ready, guest_runs } => {
            let (Some(machine), Some(attempt)) = (machine, attempt) else {
                return Err(IncomingError::Aborted(lost()));
            };
            let devices = statuses(wires);
            let report = ArrivalReport {
                vm: attempt.vm,
                attempt: attempt.attempt,
                epoch,
                guest_runs: running.map_or(guest_runs, |running| running.guest_runs),
                total: begun.elapsed(),
                ram_pages: ready.ram_pages,
                sections: ready.sections,
                bytes: bytes(wires, &devices),
                vectors: ready.vectors,
                verify: Duration::from_nanos(ready.verify_ns),
                steps: std::mem::take(&mut *lock(&wires.steps)),
                devices,
            };
            Ok(Arrived { machine, epoch, report })
        }
        DestinationOutcome::OwnerHeld { epoch, cause } => match machine {
            Some(machine) => Err(IncomingError::Held(Box::new(Held { machine, epoch, cause: cause.into() }))),
            None => Err(IncomingError::Aborted(lost())),
        },
        // However a rehearsal ends, nobody was to come.
        DestinationOutcome::Refused(reasons) if rehearsal => Err(rehearsed(reasons, None)),
        DestinationOutcome::Aborted(cause) if rehearsal => Err(rehearsed(Vec::new(), Some(cause))),
        DestinationOutcome::Rehearsed(left_undone) => Err(rehearsed(Vec::new(), left_undone)),
        DestinationOutcome::Refused(reasons) => Err(IncomingError::Refused(reasons::from_wire(reasons))),
        DestinationOutcome::Aborted(cause) => Err(IncomingError::Aborted(cause.into())),
        other => {
            let text = format!("an outcome that this version does not know: {other:?}");
            Err(IncomingError::Aborted(fail::plain(Phase::Run, text).into()))
        }
    }
}
