//! The session's loop: what happens becomes the engine's events, the engine's actions become jobs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime};

use vfio_migration_engine::ownership::DestinationState;
use vfio_migration_engine::{
    self as engine, Attempt, DestinationAction, DestinationConfig, DestinationEvent, DestinationOutcome,
};
use vfio_migration_types::{Failure, GuestOutcome, Phase, Side, error_chain, rfc3339};
use vfio_migration_wire::{
    FEATURE_ASK, FEATURE_RAM_CRC, FEATURE_REHEARSE, FEATURES, Message, Running, VERSIONS,
};

use crate::admission::{Admission, Admitted, NoTurn};
use crate::channel::binding::SessionKey;
use crate::channel::greeting::{Accepted, FIRST_MESSAGE, Greeting, PendingConnections, Question};
use crate::channel::link::Link;
use crate::channel::listener::Listener;
use crate::channel::liveness::{self, GRACE, TICK};
use crate::channel::source_host::SourceHost;
use crate::control::IncomingControl;
use crate::destination::attempt::DestinationShared;
use crate::destination::commit::{KnownOutcome, SessionSource, refuse_stranger};
use crate::destination::progress::{Ended, bytes, into_result, statuses};
use crate::destination::reader::read_loop;
use crate::destination::worker::{Job, Worker};
use crate::error::IncomingError;
use crate::expectation::Right;
use crate::incoming_machine::IncomingMachine;
use crate::offer::{IncomingOffer, NotBuilt};
use crate::options::DestinationOptions;
use crate::refused::who;
use crate::report::{AttemptInfo, AttemptKind, PhaseTime, Progress};
use crate::session::awaited::{Request, Wait};
use crate::session::events::Events;
use crate::session::host::nonce;
use crate::session::lock::lock;
use crate::session::rate::RateMeter;
use crate::session::threads::{no_thread, spawn, spawn_free};
use crate::snapshot::file_peer;
use crate::tls::config::Security;
use crate::waiting_sources::WaitingSources;

/// Time after which the loop looks again for connections, and while one has sent nothing yet, at it.
const POLL_LISTENER: Duration = Duration::from_millis(50);
const POLL_PENDING: Duration = Duration::from_millis(10);
/// Longest time between HELLO_REPLY and OFFER: a source has made its offer before it connects, and sends it at once. Whoever does not
/// has a place that others want.
const OFFER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time after which a question makes way for one of another host, if that is not more than two thirds of that one's patience.
const LONGEST_QUESTION: Duration = Duration::from_secs(20);
/// Longest time that one look at connections takes, however many come: a guest may stand still meanwhile.
const LOOK: Duration = Duration::from_millis(2);
/// Jobs that may wait for the worker. More wait only when a source asks and asks and reads no answer.
const MOST_JOBS: u64 = 4096;

/// The place where the guest arrives, as far as a session needs it.
pub(super) struct Place<'a> {
    pub(super) listener: &'a mut Listener,
    pub(super) pending: &'a mut PendingConnections,
    pub(super) options: &'a DestinationOptions,
    pub(super) control: &'a IncomingControl,
    pub(super) admission: &'a Admission,
    pub(super) waiting: &'a mut WaitingSources,
}

/// Runs one session to its end. What builds the machine is left where none was asked for.
pub(super) fn run<F>(
    place: Place<'_>,
    accepted: Accepted,
    admitted: &Admitted,
    build: &mut Option<F>,
) -> Ended
where
    F: FnOnce(&IncomingOffer) -> Result<Arc<dyn IncomingMachine>, NotBuilt> + Send,
{
    let begun = Instant::now();
    let Accepted { link, reader, hello } = accepted;
    let Place { listener, pending, options, control, admission, waiting } = place;
    let lease = match nonce() {
        Ok(lease) => lease,
        Err(errno) => {
            let failure = Failure::new(
                Side::Destination,
                Phase::Hello,
                format!("no random number for the lease: {errno}"),
            );
            return IncomingError::NotBegun(failure).into();
        }
    };
    let peer = options.from_file.as_deref().map_or_else(|| link.peer(), file_peer);
    // Now, since a connection that has failed gives none.
    let session_key = SessionKey::of(&link, hello.attempt);
    let source = SessionSource::of(&link, session_key.as_ref());
    let shared = DestinationShared {
        peer,
        began: rfc3339(SystemTime::now()),
        answers: control.answers().clone(),
        session_key,
        expectation: admitted.expectation.clone(),
        told_expectation: admission.names(&link, &admitted.expectation),
        ..DestinationShared::default()
    };
    let build = move |offer: &IncomingOffer| {
        let taken = build.take().ok_or_else(|| {
            NotBuilt::Failed("a second machine was asked for: a defect of this program".into())
        })?;
        taken(offer)
    };
    let (sender, queue) = mpsc::channel();
    let events = Events::new(sender);
    let config = DestinationConfig {
        versions: VERSIONS,
        features: FEATURES,
        peer_timeout: options.peer_timeout,
        // A file is on a disk, which takes its time.
        offer_timeout: match options.from_file {
            Some(_) => options.peer_timeout,
            None => options.peer_timeout.min(OFFER_TIMEOUT),
        },
        suspend: options.suspend,
        lease,
        lease_time: options.lease,
    };
    link.begin_to_listen();
    let SessionEnd { outcome, running, attempt, took, offered, gave_way } = std::thread::scope(|scope| {
        let (jobs, submitted) = mpsc::channel::<Job>();
        let shared = &shared;
        let worker = Worker::new(scope, options, Box::new(build), Arc::clone(&link), shared, events.clone());
        let working = spawn(scope, "worker", move || worker.run(&submitted));
        let (reader_link, reader_events) = (Arc::clone(&link), events.clone());
        let reading = spawn(scope, "reader", move || {
            read_loop(reader, &reader_link, &reader_events, &shared.sink, &shared.received);
        });
        let (working, reading) = match (working, reading) {
            (Ok(working), Ok(reading)) => (working, reading),
            (Err(error), _) | (_, Err(error)) => {
                let cause = no_thread(Side::Destination, Phase::Hello, "session", &error);
                let _ = link.send(&Message::Abort(cause.clone()));
                link.shutdown();
                let (outcome, took) = (DestinationOutcome::Aborted(cause), begun.elapsed());
                return SessionEnd {
                    outcome,
                    running: None,
                    attempt: None,
                    took,
                    offered: true,
                    gave_way: false,
                };
            }
        };
        events.send(DestinationEvent::Peer(Message::Hello(hello)));
        let session = Session {
            engine: engine::DestinationEngine::new(config, Duration::ZERO),
            link: &link,
            shared,
            jobs,
            events: queue,
            listener,
            pending,
            asking: None,
            control,
            admission,
            begun,
            peer_timeout: options.peer_timeout,
            security: options.security.as_ref(),
            source: &source,
            waiting,
            running: None,
            offered: false,
            guest_comes: false,
            gave_way: false,
            question: None,
            link_lost: false,
            cancelled: false,
            giving_up: None,
            done_for_worker: false,
            submitted: 0,
            polled: begun,
            from_file: options.from_file.is_some(),
            peer: shared.peer.clone(),
            began: shared.began.clone(),
            phases: Vec::new(),
            entered: Duration::ZERO,
            rate: RateMeter::default(),
        };
        let ended = session.run();
        liveness::close_gracefully(&link, || working.is_finished(), &shared.abort, &reading);
        for device in shared.sink.get().iter().flat_map(|sink| &sink.devices) {
            device.close();
        }
        ended
    });
    let known = lock(&shared.record).clone().map(|record| KnownOutcome { record, running, source });
    let machine = lock(&shared.finished).take();
    let arrived = match into_result(outcome, machine, attempt, &shared, took) {
        Err(IncomingError::Aborted(cause)) if gave_way => Err(IncomingError::GaveWay(cause)),
        arrived => arrived,
    };
    let offered_nothing = match &arrived {
        Err(IncomingError::Aborted(cause) | IncomingError::GaveWay(cause)) if !offered => {
            Some(cause.text.clone())
        }
        _ => None,
    };
    Ended { arrived, known, unexpected: shared.unexpected.into_inner(), offered_nothing }
}

/// What the loop came to.
struct SessionEnd {
    outcome: DestinationOutcome,
    running: Option<Running>,
    attempt: Option<Attempt>,
    took: Duration,
    offered: bool,
    gave_way: bool,
}

/// The loop, on the caller's thread.
struct Session<'a> {
    engine: engine::DestinationEngine,
    link: &'a Arc<Link>,
    shared: &'a DestinationShared,
    jobs: Sender<Job>,
    events: Receiver<DestinationEvent>,
    listener: &'a mut Listener,
    pending: &'a mut PendingConnections,
    /// The connection of the latest question.
    asking: Option<Arc<Link>>,
    control: &'a IncomingControl,
    admission: &'a Admission,
    /// The sources that are next, when all of this is undone or if it gives way.
    waiting: &'a mut WaitingSources,
    begun: Instant,
    peer_timeout: Duration,
    security: Option<&'a Security>,
    source: &'a SessionSource,
    /// RUNNING, as it was sent, for a source that lost it.
    running: Option<Running>,
    /// OFFER has come.
    offered: bool,
    /// The engine knows that the guest comes.
    guest_comes: bool,
    /// It was no rehearsal, and made way for another source.
    gave_way: bool,
    /// Kept while a question may come.
    question: Option<Wait>,
    link_lost: bool,
    cancelled: bool,
    /// The attempt is being undone, up to the job of this number, since then.
    giving_up: Option<(u64, Instant)>,
    /// What the worker cannot do while something does not answer was done for it.
    done_for_worker: bool,
    submitted: u64,
    polled: Instant,
    from_file: bool,
    /// The other end, as the journal and the progress name it.
    peer: String,
    /// By the wall clock.
    began: String,
    phases: Vec<PhaseTime>,
    /// When the last of them was entered.
    entered: Duration,
    rate: RateMeter,
}

impl Session<'_> {
    /// Runs until the engine has finished. The job queue closes with it, and the worker ends.
    fn run(mut self) -> SessionEnd {
        loop {
            if let Some(outcome) = self.act() {
                self.question = None;
                self.report();
                self.outlast_worker();
                let took = self.report();
                if let DestinationOutcome::OwnedNotStarted { epoch, cause } = &outcome {
                    let guest = GuestOutcome::NotStarted(Box::new(cause.clone()));
                    self.running = Some(Running { epoch: *epoch, guest, boot_id: [0; 16], at_ns: 0 });
                }
                return self.ended(outcome, took);
            }
            self.report();
            let tick = if self.pending.is_empty() { TICK } else { POLL_PENDING };
            let due = self.engine.deadline().map_or(tick, |due| due.saturating_sub(self.now()).min(tick));
            match self.events.recv_timeout(due) {
                Ok(event) => {
                    match &event {
                        DestinationEvent::LinkLost(_) => self.link_lost = true,
                        // What is refused at once was a rehearsal, too.
                        DestinationEvent::Peer(Message::Hello(hello)) => {
                            let rehearsal = hello.features & FEATURES & FEATURE_REHEARSE != 0;
                            self.shared.rehearsal.store(rehearsal, Ordering::Release);
                            let asks = rehearsal && hello.features & FEATURES & FEATURE_ASK != 0;
                            self.shared.asks.store(asks, Ordering::Release);
                        }
                        DestinationEvent::Started(running) => self.running = Some(running.clone()),
                        _ => {}
                    }
                    self.engine.handle(event, self.now());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let gone = "the session's own threads are gone: a defect of this program";
                    let outcome =
                        DestinationOutcome::Aborted(Failure::new(Side::Destination, Phase::Hello, gone));
                    let took = self.now();
                    return self.ended(outcome, took);
                }
            }
            self.poll_listener();
            let now = self.now();
            if self.engine.deadline().is_some_and(|due| due <= now) {
                self.engine.handle(DestinationEvent::Tick, now);
            }
            self.watch();
        }
    }

    fn ended(self, outcome: DestinationOutcome, took: Duration) -> SessionEnd {
        let attempt = self.engine.attempt();
        let (offered, gave_way) = (self.offered, self.gave_way);
        SessionEnd { outcome, running: self.running, attempt, took, offered, gave_way }
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
                    let (_, since) = self.giving_up.unwrap_or((0, Instant::now()));
                    self.giving_up = Some((self.submitted + 1, since));
                    self.shared.interrupt.raise();
                }
                DestinationAction::Reserve(_) => self.offered = true,
                DestinationAction::Send(Message::HelloReply(reply)) => {
                    // Before the answer: pages that come later are held to it.
                    let crc = reply.features & FEATURE_RAM_CRC != 0;
                    self.shared.received.ram_crc.store(crc, Ordering::Release);
                }
                _ => {}
            }
            self.submitted += 1;
            let given_up = self.engine.abort_cause().map(ToString::to_string);
            let job = Job { action, attempt: self.engine.attempt(), given_up };
            if self.jobs.send(job).is_err() {
                return Some(self.worker_gone());
            }
            if self.submitted.saturating_sub(self.shared.jobs_done.load(Ordering::Acquire)) > MOST_JOBS {
                self.link.give_up("the source does not read what it is sent");
            }
        }
        None
    }

    /// Nobody does what the engine asks for any more. What the journal says decides whose the guest is.
    fn worker_gone(&self) -> DestinationOutcome {
        let cause = Failure::new(
            Side::Destination,
            Phase::Run,
            "the session's worker is gone: a defect of this program",
        );
        match &*lock(&self.shared.record) {
            Some(record) if record.state == DestinationState::Owner => {
                DestinationOutcome::OwnedNotStarted { epoch: record.epoch.next(), cause }
            }
            _ => DestinationOutcome::Aborted(cause),
        }
    }

    /// A source that lost our answer asks on a connection of its own, while this session may still be deciding.
    fn poll_listener(&mut self) {
        let due = if self.pending.is_empty() { POLL_LISTENER } else { POLL_PENDING };
        if self.polled.elapsed() < due {
            return;
        }
        self.polled = Instant::now();
        self.control.tell_overdue_refusals();
        while self.polled.elapsed() < LOOK && self.poll_connection() {}
    }

    /// Hears, drops or takes in one connection. `false`: nothing is left to do, or a question is to be answered first.
    fn poll_connection(&mut self) -> bool {
        match self.pending.poll() {
            Some(Ok(Greeting::Query(question))) if refuse_stranger(&question, self.source, self.security) => {
                self.admission.asked_for_another(&question.link);
            }
            Some(Ok(Greeting::Query(Question { link, about, proof }))) => {
                self.asking = Some(link);
                let Attempt { vm, attempt, epoch } = about;
                let query = Message::Query { vm, attempt, epoch, proof };
                let now = self.now();
                self.engine.handle(DestinationEvent::Peer(query), now);
                return false;
            }
            Some(Ok(Greeting::Session(session))) => self.another_source(session),
            Some(Err(dropped)) => self.admission.dropped(dropped),
            None => {
                let dropped = match self.pending.drop_one_too_many() {
                    Some(one) => Some(one),
                    None => {
                        // A guest's downtime does not wait for the disk that certificates are on.
                        let Some(socket) = self.listener.try_accept(false) else { return false };
                        self.pending.add(socket, self.peer_timeout.min(FIRST_MESSAGE))
                    }
                };
                if let Some(dropped) = dropped {
                    self.admission.dropped(dropped);
                }
            }
        }
        true
    }

    /// A source comes while there is a session. It waits for its turn while that has brought nothing, is a rehearsal, or is being undone.
    fn another_source(&mut self, session: Box<Accepted>) {
        let (now, undone) = (self.now(), self.engine.is_undone());
        let brought_nothing = !undone && self.engine.has_brought_nothing();
        let waits = match self.admission.wants(&session, !brought_nothing) {
            Some(wants) if undone => Some(wants).filter(|_| self.engine.gives_way(now) || self.answered()),
            Some(Right::Move) if brought_nothing || self.engine.gives_way(now) => Some(Right::Move),
            Some(Right::Ask) if self.hears_questions() && !self.is_own(&session.link) => Some(Right::Ask),
            _ => None,
        };
        let refused = match waits {
            Some(wants) => self.waiting.add(session, wants),
            None => Some(session),
        };
        if let Some(session) = refused {
            self.turn_away(&session);
        }
        self.tend_waiting();
    }

    /// Ends a session that gives way to those who wait, and turns them away where it does not.
    fn tend_waiting(&mut self) {
        self.waiting.forget_ended();
        if self.waiting.is_empty() {
            return;
        }
        let (now, undone) = (self.now(), self.engine.is_undone());
        let hears_questions = self.hears_questions();
        let longest = LONGEST_QUESTION.min(self.peer_timeout * 2 / 3);
        let outstayed = hears_questions && self.begun.elapsed() >= longest;
        if self.engine.gives_way(now) && (undone || outstayed || self.waiting.has_migration()) {
            tracing::info!(holder = %self.peer, "a source comes, and what keeps no migration out ends");
            self.gave_way = !undone && !self.shared.rehearsal.load(Ordering::Acquire);
            self.engine.handle(DestinationEvent::Superseded, now);
        } else if if undone {
            !self.answered()
        } else {
            !hears_questions && !self.engine.has_brought_nothing()
        } {
            for waiting in self.waiting.take() {
                self.turn_away(&waiting);
            }
        }
    }

    /// Whether it makes way for a question: it is one, or a rehearsal that has brought nothing, or whose source may move nothing.
    fn hears_questions(&self) -> bool {
        let rehearsal = self.shared.rehearsal.load(Ordering::Acquire) && !self.engine.is_undone();
        rehearsal && (self.engine.has_brought_nothing() || !self.admission.may_move(self.link))
    }

    fn is_own(&self, link: &Link) -> bool {
        SourceHost::of(link) == SourceHost::of(self.link)
    }

    /// Whether nothing that is waited for is late, beside a question that may come.
    fn answered(&self) -> bool {
        self.shared.answers.to_tell(true).iter().all(|answer| answer.request == Request::Question)
    }

    fn turn_away(&self, session: &Accepted) {
        let no_turn = match self.engine.is_undone() {
            true => NoTurn::because(&self.still_undone()),
            false => NoTurn {
                why: "another source is being received".into(),
                holder: Some(who(&self.peer, &self.link.security())),
                under_way: true,
            },
        };
        self.admission.turn_away(session, &no_turn);
    }

    /// What the source of an attempt that is undone may still ask is told as waited for.
    fn note_question(&mut self) {
        match self.engine.awaits_question() {
            Some(limit) if self.question.is_none() => {
                tracing::info!(
                    peer = %self.peer, limit = ?limit,
                    "the attempt is undone; its source, whose connection is lost, may ask what became of it"
                );
                self.question = Some(self.shared.answers.wait(None, Request::Question, Some(limit)));
            }
            Some(_) => {}
            None => self.question = None,
        }
    }

    fn watch(&mut self) {
        self.note_question();
        self.tend_waiting();
        if let Some(why) = self.control.cancelled()
            && !std::mem::replace(&mut self.cancelled, true)
        {
            let now = self.now();
            self.engine.handle(DestinationEvent::Cancel(why.clone()), now);
        }
        for failure in self.control.take_lost(self.engine.phase()) {
            self.engine.handle(DestinationEvent::DeviceLost(failure), self.begun.elapsed());
        }
        if self.giving_up.is_some() && self.link.blocked() > GRACE {
            self.link.give_up("the source did not take what was being sent when the migration was given up");
        }
        self.relieve_worker();
        if self.link_lost {
            return;
        }
        liveness::keep_alive(self.link, "the source", self.peer_timeout);
    }

    /// Whether the worker is still at what is to be undone.
    fn is_undoing(&self) -> bool {
        let done = self.shared.jobs_done.load(Ordering::Acquire);
        self.giving_up.is_some_and(|(job, _)| done < job)
    }

    /// Does for a worker that waits for a device what the source cannot wait for: the storage locks go back, without which its guest
    /// does not, and it is told that the attempt is given up. No device that does not answer writes any storage: it is not running.
    fn relieve_worker(&mut self) {
        let due = self.giving_up.is_some_and(|(_, since)| since.elapsed() > GRACE);
        if !due || self.done_for_worker || !self.is_undoing() {
            return;
        }
        self.done_for_worker = true;
        let told = self.engine.source_gave_up();
        let abort = self.engine.owed_abort().filter(|_| self.shared.abort.take());
        let (link, locks) = (Arc::clone(self.link), Arc::clone(&self.shared.locks));
        // On a thread of its own: neither the VMM nor the connection need be quick.
        let relieving = spawn_free("abort", move || {
            if let Err(error) = locks.release() {
                tracing::warn!(error = %error_chain(&error), "a storage lock could not be released yet");
            }
            if let Some(Err(error)) = abort.map(|abort| link.send(&abort)) {
                tracing::debug!(error = %error_chain(&error), "the source does not hear of the abort");
            }
            if told {
                // It waits for the end of the connection alone.
                link.shutdown_write();
            }
        });
        match relieving {
            Ok(thread) => self.shared.abort.sent_by(thread),
            Err(error) => tracing::warn!(%error, "no thread to tell the source what it waits for"),
        }
    }

    /// Waits on for a worker that is held up by what does not answer, and tells whoever asks why no other guest is taken in.
    fn outlast_worker(&mut self) {
        while self.is_undoing() && !self.shared.answers.longer_than(Duration::ZERO).is_empty() {
            self.report();
            self.poll_listener();
            std::thread::sleep(POLL_PENDING);
        }
    }

    /// Why no other guest is taken in.
    fn still_undone(&self) -> String {
        let awaited = self.shared.answers.to_tell(true);
        let awaited: Vec<_> = awaited.iter().map(|answer| format!("; {answer}")).collect();
        format!("the last attempt is still being undone{}", awaited.concat())
    }

    /// Tells how the session stands, and since when it does.
    fn report(&mut self) -> Duration {
        let devices = statuses(self.shared);
        let (phase, now, elapsed) = (self.engine.phase(), Instant::now(), self.begun.elapsed());
        // Up to now it was in the phase before: together they are what has elapsed.
        if let Some(last) = self.phases.last_mut() {
            last.took = elapsed.saturating_sub(self.entered);
        }
        if self.phases.last().is_none_or(|last| last.phase != phase) {
            let took = if self.phases.is_empty() { elapsed } else { Duration::ZERO };
            self.entered = elapsed.saturating_sub(took);
            self.phases.push(PhaseTime { phase, took });
            self.rate.restart();
        }
        let bytes = bytes(self.shared, &devices);
        let came = bytes.ram + bytes.device_precopy + bytes.device_stopcopy;
        if came > 0 && !std::mem::replace(&mut self.guest_comes, true) {
            self.engine.handle(DestinationEvent::GuestComes, elapsed);
        }
        // Whichever side's operator it was.
        let by_source = self.engine.abort_cause().is_some_and(Failure::is_cancelled);
        let cancelling = self.giving_up.is_some() && (self.cancelled || by_source);
        self.control.set_progress(Progress {
            phase,
            iteration: u32::try_from(self.shared.received.iteration.load(Ordering::Relaxed))
                .unwrap_or(u32::MAX),
            elapsed,
            paused: self.shared.received.stopped.load(Ordering::Relaxed),
            ram_total: self.shared.ram_total.load(Ordering::Relaxed),
            bytes,
            rate: self.rate.at(now, came),
            devices,
            phases: self.phases.clone(),
            attempt: self.attempt_info(),
            owned: self.engine.owned(),
            cancelling,
            failing: self.engine.failing(),
            awaited: self.shared.answers.to_tell(cancelling),
            ..Progress::default()
        });
        elapsed
    }

    /// What the session is about, once the source has said so.
    fn attempt_info(&self) -> Option<AttemptInfo> {
        let Attempt { vm, attempt, epoch } = self.engine.attempt()?;
        let kind = if self.from_file {
            AttemptKind::Restore
        } else if self.shared.asks.load(Ordering::Acquire) {
            AttemptKind::Check
        } else if self.shared.rehearsal.load(Ordering::Acquire) {
            AttemptKind::Rehearsal
        } else {
            AttemptKind::Migration
        };
        let (peer, began) = (self.peer.clone(), self.began.clone());
        let security = (!self.from_file).then(|| self.link.security());
        Some(AttemptInfo { vm, attempt, epoch, kind, peer, began, security })
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }
}
