//! The session's loop: what happens becomes the engine's events, the engine's actions become the worker's jobs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use vfio_migration_engine::{self as engine, SourceAction, SourceEvent, SourceOutcome};
use vfio_migration_types::{Failure, Phase, Side, error_chain};
use vfio_migration_wire::{FEATURE_RAM_CRC, Message};

use crate::channel::link::Link;
use crate::channel::liveness::{self, GRACE, TICK, UNANSWERED, close_gracefully};
use crate::channel::reader::Reader;
use crate::channel::transport::Transport;
use crate::control::{Control, LeftBehind};
use crate::error::{MigrateError, refused_here};
use crate::report::Progress;
use crate::session::abandon::{NoThread, Unanswered, answer_unless};
use crate::session::awaited::AwaitedAnswer;
use crate::session::events::Events;
use crate::session::lock::lock;
use crate::session::threads::{no_thread, spawn, spawn_free};
use crate::source::attempt::{SourceCounters, SourceEnd, SourceShared};
use crate::source::plan::PlannedMigration;
use crate::source::progress::{ProgressReporter, Waits, into_result};
use crate::source::reader::read_loop;
use crate::source::worker::Worker;
use crate::tls::security::SecurityKind;

/// Nobody is there to do what the engine asks for.
const GONE: &str = "the session's own threads are gone: a defect of this program";

/// Runs a planned migration over a connected socket, to its end.
pub(super) fn run(
    mut plan: PlannedMigration,
    mut engine: engine::SourceEngine,
    socket: Box<dyn Transport>,
    mut observer: impl FnMut(&Progress),
) -> Result<SourceEnd, MigrateError> {
    let link = connected(socket, &plan.control)?;
    let security = link.security();
    // Only now is it known what a descriptor that was handed over is.
    if plan.options.ram_crc.unwrap_or(security.kind == SecurityKind::PlainText) {
        engine.offer(FEATURE_RAM_CRC);
    }
    plan.info.security = (!plan.options.to_file).then_some(security);
    let plan = Arc::new(plan);
    let counters = Arc::new(SourceCounters {
        devices: plan.devices.iter().map(|_| Arc::default()).collect(),
        ..SourceCounters::default()
    });
    // Until the logs run and the first pass is known, all that was ever written is left.
    let written = plan.machine.ram().data_extents().unwrap_or_default();
    let left = written.iter().map(|extent| extent.len()).fold(0, u64::saturating_add);
    counters.ram.left.store(left, Ordering::Relaxed);
    let credits = plan.devices.iter().map(|_| Arc::default()).collect();
    let shared = Arc::new(SourceShared { credits, ..SourceShared::default() });
    let (sender, queue) = mpsc::channel();
    let events = Events::new(sender.clone());
    plan.control.attach(sender);
    let worker = Worker::new(&plan, &link, &shared, &counters);
    let mut reporter = ProgressReporter::new(&plan);
    let (keep, kept) = mpsc::channel();
    let ended = std::thread::scope(|scope| {
        let (jobs, submitted) = mpsc::channel();
        let reader = Reader::new(&link, Side::Destination);
        let (shared, link, reader_events) = (&shared, &link, events.clone());
        let reading = spawn(scope, "reader", move || read_loop(reader, link, &reader_events, shared));
        // Free, because a device that does not answer holds it up: a cancel leaves it behind.
        let (of_worker, keep) = (Arc::clone(shared), keep);
        let working = spawn_free("worker", move || {
            let worker = worker.run(&submitted, &events);
            if of_worker.unresolved.load(Ordering::Acquire) {
                // It is asked for, by whoever has the other end.
                drop(keep.send(worker));
            }
        });
        let (reading, working) = match (reading, working) {
            (Ok(reading), Ok(working)) => (reading, working),
            (Err(error), _) | (_, Err(error)) => {
                link.shutdown();
                return Err(refused_here(no_thread(Side::Source, Phase::Hello, "session", &error)));
            }
        };
        let session = Session {
            engine,
            link,
            shared,
            counters: &counters,
            jobs,
            events: queue,
            plan: &plan,
            begun: plan.begun,
            submitted: 0,
            interrupted: None,
            interrupted_at: plan.begun,
            abort: None,
            cancelled: None,
            rolling_back: None,
            link_lost: false,
        };
        let outcome = session.run(&mut reporter, &mut observer);
        let left_behind = shared.left_behind.load(Ordering::Acquire);
        close_gracefully(link, || left_behind || working.is_finished(), &shared.abort, &reading);
        Ok((outcome, working))
    });
    plan.control.detach();
    let (outcome, working) = ended?;
    if shared.left_behind.load(Ordering::Acquire) {
        let (answers, undone) = (plan.answers.clone(), Arc::clone(&shared.undone));
        plan.control.leave_behind(LeftBehind { thread: working, answers, undone });
    } else if let Err(panic) = working.join() {
        std::panic::resume_unwind(panic);
    }
    into_result(outcome, &reporter, &counters, &link, &plan).map_err(|error| match (error, kept.try_recv()) {
        (MigrateError::Unresolved(unresolved), Ok(worker)) => {
            MigrateError::Unresolved(Box::new(unresolved.that_can_ask(Box::new(worker))))
        }
        (error, _) => error,
    })
}

/// The link over `socket`, with our preamble sent: whoever handed the socket over may have left it full.
fn connected(socket: Box<dyn Transport>, control: &Control) -> Result<Arc<Link>, MigrateError> {
    let link = Link::accepted(socket);
    let failed = |text| refused_here(Failure::new(Side::Source, Phase::Hello, text));
    let of_thread = Arc::clone(&link);
    match answer_unless(|| control.waiting_cancel().is_some(), None, move || of_thread.welcome()) {
        Ok(Ok(())) => Ok(link),
        Ok(Err(error)) => Err(failed(error_chain(&error))),
        Err(Unanswered::NoThread(NoThread(error))) => {
            Err(refused_here(no_thread(Side::Source, Phase::Hello, "connection", &error)))
        }
        Err(Unanswered::GivenUp | Unanswered::Late) => {
            link.shutdown();
            Err(control.cancelled(Phase::Hello))
        }
    }
}

/// The loop, on the caller's thread.
struct Session<'a> {
    engine: engine::SourceEngine,
    link: &'a Arc<Link>,
    shared: &'a Arc<SourceShared>,
    counters: &'a SourceCounters,
    jobs: Sender<SourceAction>,
    events: Receiver<SourceEvent>,
    plan: &'a PlannedMigration,
    begun: Instant,
    submitted: u64,
    /// Actions were interrupted, up to the job of this number: a link that holds them up is cut.
    interrupted: Option<u64>,
    interrupted_at: Instant,
    /// ABORT, once the engine has asked for it, until it is sent.
    abort: Option<Message>,
    /// Time at which the operator cancelled, if that was first heard then.
    cancelled: Option<Instant>,
    /// Time at which the way back was first seen to be under way.
    rolling_back: Option<Instant>,
    link_lost: bool,
}

impl Session<'_> {
    /// Runs until the engine has finished. The job queue closes with it, and the worker ends.
    fn run(mut self, reporter: &mut ProgressReporter, observer: &mut impl FnMut(&Progress)) -> SourceOutcome {
        self.engine.handle(SourceEvent::Connected, self.now());
        self.shared.note(&self.engine);
        loop {
            if let Some(outcome) = self.act() {
                self.report(reporter, observer, true);
                return outcome;
            }
            self.report(reporter, observer, false);
            let now = self.now();
            let due = self.engine.deadline().map_or(TICK, |due| due.saturating_sub(now).min(TICK));
            let event = self.events.recv_timeout(due);
            self.name_awaited();
            match event {
                Ok(event) => {
                    self.link_lost |= matches!(event, SourceEvent::LinkLost(_));
                    if matches!(event, SourceEvent::Cancel(_)) {
                        self.cancelled.get_or_insert_with(Instant::now);
                    }
                    self.engine.handle(event, self.now());
                    self.shared.note(&self.engine);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return SourceOutcome::Unresolved(GONE.into());
                }
            }
            let now = self.now();
            if self.engine.deadline().is_some_and(|due| due <= now) {
                self.engine.handle(SourceEvent::Tick, now);
            }
            self.watch();
            self.leave_unanswered();
        }
    }

    /// Tells the engine of the device that has been waited for most of the pause.
    fn name_awaited(&mut self) {
        let most = self.engine.downtime_limit() / 2;
        let awaited = match *lock(&self.shared.pausing) {
            true => self.plan.answers.longer_than(most).into_iter().find(|answer| answer.device.is_some()),
            false => None,
        };
        let phase = self.engine.phase();
        self.engine.awaits(awaited.map(|answer| answer.left_undone(Side::Source, phase, false)));
    }

    /// Hands the engine's actions to the worker; gives the outcome when there is one.
    fn act(&mut self) -> Option<SourceOutcome> {
        while let Some(action) = self.engine.poll_action() {
            tracing::debug!(?action, "action");
            match &action {
                SourceAction::Finish(outcome) => {
                    let unresolved = matches!(outcome, SourceOutcome::Unresolved(_));
                    self.shared.unresolved.store(unresolved, Ordering::Release);
                    self.shared.ended.store(true, Ordering::Release);
                    return Some(outcome.clone());
                }
                // The way back must not wait for what is being sent, the abort itself included.
                SourceAction::RollBack => {
                    self.note_reason();
                    self.interrupt(self.submitted);
                }
                SourceAction::Send(message @ (Message::Abort(_) | Message::LimitsUnmet(_))) => {
                    self.abort = Some(message.clone());
                    self.interrupt(self.submitted + 1);
                }
                SourceAction::AskAgain => self.shared.interrupt.raise(),
                SourceAction::Journal(_) => self.note_reason(),
                _ => {}
            }
            self.submitted += 1;
            if self.jobs.send(action).is_err() {
                // The worker lives as long as the queue, whatever the VMM's code does in it.
                return Some(SourceOutcome::Unresolved(GONE.into()));
            }
        }
        None
    }

    /// Has the journal's next record say why the attempt is given up, if it is: also one that is written behind the attempt's end.
    fn note_reason(&self) {
        if let Some(cause) = self.engine.abort_cause() {
            *lock(&self.shared.journal_reason) = Some(cause.to_string());
        }
    }

    /// Ends an attempt that is given up, when something does not answer: what is left to be undone is the worker's, behind the end.
    /// While the guest runs, a cancel waits for nothing, and a failure not for a device that has been late already. A guest that is
    /// paused waits, since a device that may be on its way from one state to another must not run: until the limit that is told.
    fn leave_unanswered(&mut self) {
        let cleans_up = self.engine.is_cleaning_up();
        if !(cleans_up || self.engine.is_rolling_back()) || self.shared.left_behind.load(Ordering::Acquire) {
            return;
        }
        let rolling_back = self.rolling_back.get_or_insert_with(Instant::now).elapsed();
        // No guest runs with a device that moves alone.
        let paused = *lock(&self.shared.pausing) && !self.plan.options.device_alone;
        let late = self.plan.answers.late();
        let over = |answer: &AwaitedAnswer| answer.limit.is_some_and(|limit| answer.waited >= limit);
        let unanswered = if cleans_up && self.cancelled.is_none() {
            // The guest runs elsewhere, and nobody waits for anything but the end.
            let awaited = self.plan.answers.longer_than(UNANSWERED).into_iter();
            awaited.filter(|answer| over(answer) || late.contains(answer)).collect()
        } else if paused && !cleans_up {
            if late.iter().any(over) { late } else { return }
        } else if self.cancelled.is_some_and(|at| at.elapsed() >= UNANSWERED) {
            self.plan.answers.longer_than(UNANSWERED)
        } else if rolling_back >= UNANSWERED {
            late
        } else {
            return;
        };
        if unanswered.is_empty() {
            return;
        }
        for answer in &unanswered {
            tracing::warn!(%answer, "the end of the session does not wait for it");
        }
        let phase = self.engine.phase();
        let left_undone =
            unanswered.iter().map(|answer| answer.left_undone(Side::Source, phase, cleans_up)).collect();
        self.shared.left_behind.store(true, Ordering::Release);
        self.plan.answers.wait_without_limit();
        let now = self.now();
        self.engine.handle(SourceEvent::RollBackLate { left_undone, restored: !paused }, now);
    }

    /// Sends ABORT while the worker, whose job that is, waits for a device: the destination need not wait for that too.
    fn send_abort(&mut self) {
        let Some(abort) = self.abort.take() else { return };
        if !self.shared.abort.take() {
            return;
        }
        let link = Arc::clone(self.link);
        // On a thread of its own: the connection may take nothing. It is cut then, and the thread ends.
        let sending = spawn_free("abort", move || {
            if let Err(error) = link.send(&abort) {
                tracing::debug!(error = %error_chain(&error), "the destination does not hear of the abort");
            }
        });
        match sending {
            Ok(thread) => self.shared.abort.sent_by(thread),
            Err(error) => tracing::warn!(%error, "no thread to say that the attempt is given up"),
        }
    }

    /// Interrupts the action under way. If the jobs up to number `job` are not done soon, and it is the link that holds
    /// them up, the link is cut.
    fn interrupt(&mut self, job: u64) {
        self.shared.interrupt.raise();
        self.interrupted = Some(job);
        self.interrupted_at = Instant::now();
    }

    /// Watches for what no event reports: an action that does not notice its interrupt, a peer that went silent.
    fn watch(&mut self) {
        if let Some(job) = self.interrupted {
            if self.counters.jobs_done.load(Ordering::Acquire) >= job {
                self.interrupted = None;
            } else if self.link.blocked() > GRACE {
                // Not so while a device holds them up: the peer is yet to be sent why.
                self.link.give_up(
                    "the connection did not take what was being sent when the migration was given up",
                );
                self.interrupted = None;
            } else if self.interrupted_at.elapsed() > GRACE {
                self.send_abort();
            }
        }
        if self.link_lost {
            return;
        }
        liveness::keep_alive(self.link, "the destination", self.plan.options.peer_timeout);
    }

    fn report(&self, reporter: &mut ProgressReporter, observer: &mut impl FnMut(&Progress), last: bool) {
        let progress = self.engine.progress(self.now());
        // Not where it came too late.
        let cancelling = self.cancelled.is_some() && self.engine.is_rolling_back();
        let peer = self.engine.expects_word(self.now());
        let failing = self.engine.abort_cause().filter(|_| self.engine.is_rolling_back());
        let waits = Waits { answers: &self.plan.answers, cancelling, failing, peer };
        let wire_bytes = self.link.wire_bytes();
        if let Some(progress) =
            reporter.update(&progress, self.engine.phases(), self.counters, wire_bytes, waits, last)
        {
            self.plan.control.set_progress(progress.clone());
            observer(&progress);
        }
    }

    fn now(&self) -> Duration {
        self.begun.elapsed()
    }
}

impl Drop for Session<'_> {
    /// An observer that panics must not leave the other threads waiting: the queue closes with the session, and the
    /// link ends here. The worker then undoes what was done.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.interrupt.raise();
            self.link.shutdown();
        }
    }
}
