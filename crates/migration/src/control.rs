//! Handles by which other threads watch and steer a session that blocks its caller.

use std::fmt;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vfio_migration_engine::SourceEvent;
use vfio_migration_types::{CancelCause, DEVICES_MAX, DeviceId, Failure, Phase, RateLimit, Side, Told};

use crate::channel::limiter::Limiter;
use crate::error::{MigrateError, cancelled};
use crate::options::SourceOptions;
use crate::refused::{RefusedConnection, RefusedConnections};
use crate::report::{PhaseTime, Progress};
use crate::session::awaited::{AwaitedAnswer, AwaitedAnswers, AwaitedNote, Request};
use crate::session::lock::lock;

/// Steers an outgoing migration from any thread. Outlives the session without harm: it then does nothing.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    limiter: Limiter,
    progress: Mutex<Progress>,
    inbox: Mutex<Inbox>,
    left: Mutex<Option<LeftBehind>>,
    /// What the session waits for.
    answers: AwaitedAnswers,
    begun: OnceLock<Instant>,
}

/// The worker of a session whose end did not wait for it.
#[derive(Debug)]
pub(crate) struct LeftBehind {
    pub(crate) thread: JoinHandle<()>,
    pub(crate) answers: AwaitedAnswers,
    /// What came of it, once it has ended.
    pub(crate) undone: Arc<Mutex<Undone>>,
}

/// What came of a way back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Undone {
    /// Whether the guest is as it was: one that the attempt had paused goes on.
    pub(crate) restored: bool,
    /// What could not be undone.
    pub(crate) failures: Vec<Failure>,
}

/// What is being undone behind the end of a session: no session waits without end for a device that does not answer, nor a cancel
/// for one that is late while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PendingRollback {
    /// Nothing was left to be undone.
    None,
    /// It is under way: with the answers that it waits for, the longest first. No other attempt may begin with this machine.
    UnderWay(Vec<AwaitedAnswer>),
    /// It is over.
    Ended {
        /// Whether the guest is as it was before the attempt. If it was [not](crate::Aborted::restored) when the session ended, it
        /// has been let go on since.
        restored: bool,
        /// What could not be undone.
        failures: Vec<Failure>,
    },
}

/// Requests that were made before the session could take them: of each kind the latest, but the first cancel, and one loss of each
/// device.
#[derive(Default)]
struct Inbox {
    session: Option<Sender<SourceEvent>>,
    waiting: Vec<SourceEvent>,
}

/// Losses of devices that are kept: one alone ends the attempt, and a machine has no more devices.
const LOSSES_KEPT: usize = DEVICES_MAX as usize;

impl Inbox {
    /// Keeps a request. However often a VMM asks before the session begins, nothing that it asked for is forgotten, and no more is
    /// kept than there are kinds and devices.
    fn keep(&mut self, event: SourceEvent) {
        let same = |kept: &SourceEvent| match (kept, &event) {
            (SourceEvent::DeviceLost(kept), SourceEvent::DeviceLost(lost)) => kept.device == lost.device,
            (kept, event) => std::mem::discriminant(kept) == std::mem::discriminant(event),
        };
        let lost = |event: &SourceEvent| matches!(event, SourceEvent::DeviceLost(_));
        let losses = self.waiting.iter().filter(|kept| lost(kept)).count();
        match self.waiting.iter_mut().find(|kept| same(kept)) {
            // The first is what it is given up for, and what it was lost by.
            Some(SourceEvent::Cancel(_) | SourceEvent::DeviceLost(_)) => {}
            Some(kept) => *kept = event,
            None if lost(&event) && losses >= LOSSES_KEPT => {}
            None => self.waiting.push(event),
        }
    }
}

impl Control {
    pub(crate) fn new(options: &SourceOptions) -> Self {
        let progress = Progress { downtime_limit: options.downtime_limit, ..Progress::default() };
        let shared = Shared {
            limiter: Limiter::new(options.bandwidth),
            progress: Mutex::new(progress),
            inbox: Mutex::default(),
            left: Mutex::default(),
            answers: AwaitedAnswers::default(),
            begun: OnceLock::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Gives the migration up: the guest goes on at the source. The session ends within a second while the guest runs, whatever
    /// it waits for: what does not answer is undone behind its end, as [`pending_rollback`](Self::pending_rollback) tells. A guest
    /// that is paused goes on when its devices have answered: until then [`Progress::cancelling`] is set, and
    /// [`Progress::awaited`] says what is waited for, and how long at most before the session ends without it, and the guest goes
    /// on behind its end. Too late once COMMIT has been sent; then nothing happens. May be called at
    /// any time, any number of times.
    pub fn cancel(&self) {
        self.send(SourceEvent::Cancel(CancelCause::Operator));
    }

    /// The same, of a process that ends `by` something, such as `SIGTERM`, and its guest with it: both sides are told that. Once COMMIT
    /// has been sent its answer is waited for half a second more, and the session ends as [`MigrateError::Unresolved`] without it.
    pub fn process_ends(&self, by: &str) {
        self.send(SourceEvent::Cancel(CancelCause::ProcessEnds(by.to_owned())));
    }

    /// Changes the downtime limit, in force at the next decision.
    pub fn set_downtime_limit(&self, limit: Duration) {
        self.send(SourceEvent::SetDowntimeLimit(limit));
    }

    /// Changes the bandwidth cap (bytes per second), in force at once; `None` lifts it.
    pub fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.shared.limiter.set_rate(bytes_per_second);
    }

    /// Lets a migration that waits before its switchover
    /// ([`SourceOptions::pause_before_switchover`]) go on. Does nothing before it has waited
    /// ([`Progress::waiting`]).
    pub fn continue_switchover(&self) {
        self.send(SourceEvent::ContinueSwitchover);
    }

    /// Reports that a device lost its migration session by itself (the guest reset it, its server died): the attempt
    /// cannot go on, and is undone.
    pub fn device_lost(&self, device: &DeviceId, why: &str) {
        let phase = self.progress().phase;
        let failure = Failure::new(Side::Source, phase, why).of_device(device);
        let remedy = "see why the device is gone: its server's or driver's log; a guest that runs does not get it back";
        self.send(SourceEvent::DeviceLost(failure.with_remedy(remedy)));
    }

    /// The migration's progress now, or at its end.
    pub fn progress(&self) -> Progress {
        lock(&self.shared.progress).clone()
    }

    /// What is being undone behind the end of the session, or could not be.
    pub fn pending_rollback(&self) -> PendingRollback {
        match &*lock(&self.shared.left) {
            None => PendingRollback::None,
            Some(left) if left.thread.is_finished() => {
                let Undone { restored, failures } = lock(&left.undone).clone();
                PendingRollback::Ended { restored, failures }
            }
            Some(left) => PendingRollback::UnderWay(left.answers.longer_than(Duration::ZERO)),
        }
    }

    /// The session ends, and its worker goes on.
    pub(crate) fn leave_behind(&self, left: LeftBehind) {
        *lock(&self.shared.left) = Some(left);
    }

    pub(crate) fn limiter(&self) -> &Limiter {
        &self.shared.limiter
    }

    pub(crate) fn set_progress(&self, progress: Progress) {
        *lock(&self.shared.progress) = progress;
    }

    /// Connects the handle to its session, which gets what was asked for before.
    pub(crate) fn attach(&self, session: Sender<SourceEvent>) {
        let mut inbox = lock(&self.shared.inbox);
        for event in inbox.waiting.drain(..) {
            let _ = session.send(event);
        }
        inbox.session = Some(session);
    }

    pub(crate) fn detach(&self) {
        lock(&self.shared.inbox).session = None;
    }

    /// When the session began; it does so now, if it had not.
    pub(crate) fn begun(&self) -> Instant {
        *self.shared.begun.get_or_init(Instant::now)
    }

    pub(crate) fn answers(&self) -> &AwaitedAnswers {
        &self.shared.answers
    }

    /// Keeps the progress up while something is waited for in `phase` and the session has no loop of its own; `before`: the phases
    /// that came before it. The cancel that waits, if one does.
    pub(crate) fn look_around(&self, phase: Phase, before: &[PhaseTime]) -> Option<CancelCause> {
        let awaited = self.shared.answers.to_tell(false);
        let elapsed = self.begun().elapsed();
        let took = elapsed.saturating_sub(before.iter().map(|before| before.took).sum());
        let phases = [before, &[PhaseTime { phase, took }]].concat();
        self.set_progress(Progress { phase, elapsed, phases, awaited, ..self.progress() });
        self.waiting_cancel()
    }

    /// The cancel that waits for a session that has not begun to listen, if one does.
    pub(crate) fn waiting_cancel(&self) -> Option<CancelCause> {
        lock(&self.shared.inbox).waiting.iter().find_map(|event| match event {
            SourceEvent::Cancel(why) => Some(why.clone()),
            _ => None,
        })
    }

    /// The end of a session that was given up before it listened, in `phase`.
    pub(crate) fn cancelled(&self, phase: Phase) -> MigrateError {
        cancelled(&self.waiting_cancel().unwrap_or(CancelCause::Operator), phase)
    }

    fn send(&self, event: SourceEvent) {
        let mut inbox = lock(&self.shared.inbox);
        match &inbox.session {
            Some(session) => drop(session.send(event)),
            None => inbox.keep(event),
        }
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("progress", &self.progress()).finish_non_exhaustive()
    }
}

/// Steers an incoming migration from any thread.
#[derive(Clone, Debug)]
pub struct IncomingControl {
    shared: Arc<Incoming>,
}

#[derive(Debug)]
struct Incoming {
    /// What cancelled it, once something has.
    cancelled: OnceLock<CancelCause>,
    sessions: Mutex<Sessions>,
    refusals: Mutex<Refusals>,
    /// What the session under way waits for, and the VMM for it.
    answers: AwaitedAnswers,
    not_ready: Mutex<NotReadyReasons>,
    /// Devices that were lost since the session under way looked, and how; `None` while none is.
    lost: Mutex<Option<Vec<(DeviceId, String)>>>,
}

/// Why no guest can be taken in now: of each that says so.
#[derive(Debug, Default)]
struct NotReadyReasons {
    next: u64,
    reasons: Vec<(u64, String)>,
}

/// The VMM cannot take a guest in as long as this is kept.
#[derive(Debug)]
pub struct NotReady {
    shared: Arc<Incoming>,
    number: u64,
}

impl Drop for NotReady {
    fn drop(&mut self) {
        lock(&self.shared.not_ready).reasons.retain(|(number, _)| *number != self.number);
    }
}

/// The session that is under way, and the one before it.
#[derive(Debug, Default)]
struct Sessions {
    present: Option<Progress>,
    last: Option<Progress>,
}

/// Connections that were refused, and whoever wants to hear of them.
struct Refusals {
    so_far: RefusedConnections,
    listener: Option<Arc<RefusalListener>>,
    /// Those that are told one by one: of peers that have proved who they are, and, so that no stranger keeps these from being told, of
    /// others.
    of_known: RateLimit<RefusedConnection>,
    of_strangers: RateLimit<RefusedConnection>,
}

/// Refused connections that are told one by one, at most, and in what time.
const REFUSALS_TOLD: (u32, Duration) = (20, Duration::from_secs(60));

impl Default for Refusals {
    fn default() -> Self {
        let limit = || RateLimit::new(REFUSALS_TOLD.0, REFUSALS_TOLD.1);
        let so_far = RefusedConnections::default();
        Self { so_far, listener: None, of_known: limit(), of_strangers: limit() }
    }
}

type RefusalListener = dyn Fn(&RefusedConnection) + Send + Sync;

impl fmt::Debug for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Refusals").field("so_far", &self.so_far).finish_non_exhaustive()
    }
}

impl IncomingControl {
    pub(crate) fn new() -> Self {
        let incoming = Incoming {
            cancelled: OnceLock::new(),
            sessions: Mutex::default(),
            refusals: Mutex::default(),
            answers: AwaitedAnswers::default(),
            not_ready: Mutex::default(),
            lost: Mutex::default(),
        };
        Self { shared: Arc::new(incoming) }
    }

    /// Gives the incoming migration, or the wait for one, up. The source is told within a second; the session ends when all is
    /// released, which takes as long as its devices: [`Progress::awaited`] says what is waited for. Too late once COMMIT has
    /// arrived; then nothing happens.
    pub fn cancel(&self) {
        self.cancel_by(CancelCause::Operator);
    }

    /// The same, of a process that ends `by` something, such as `SIGTERM`: both sides are told that.
    pub fn process_ends(&self, by: &str) {
        self.cancel_by(CancelCause::ProcessEnds(by.to_owned()));
    }

    fn cancel_by(&self, why: CancelCause) {
        // What came first is what it is given up for.
        let _ = self.shared.cancelled.set(why);
    }

    /// Reports that a device of the machine that a guest is being received into is gone by itself (its server died, its host took it):
    /// the attempt cannot go on, and is undone, at once and not with the next that is written to the device, which may be never. Behind
    /// COMMIT nothing happens: the guest is ours, and what its device does when it is to start is told as that. Says whether there is a
    /// session that hears it; while there is none, the VMM makes the next one its machine anew.
    pub fn device_lost(&self, device: &DeviceId, why: &str) -> bool {
        let mut lost = lock(&self.shared.lost);
        let Some(lost) = lost.as_mut() else { return false };
        // One alone ends the attempt, and a machine has no more devices.
        if lost.len() < LOSSES_KEPT && !lost.iter().any(|(known, _)| known == device) {
            lost.push((device.clone(), why.to_owned()));
        }
        true
    }

    /// The devices that were lost since this was last asked, each with its failure in this phase.
    pub(crate) fn take_lost(&self, phase: Phase) -> Vec<Failure> {
        let lost = lock(&self.shared.lost).as_mut().map(std::mem::take).unwrap_or_default();
        let remedy = "see why the device is gone: its server's or driver's log";
        let failure = |(device, why): (DeviceId, String)| {
            Failure::new(Side::Destination, phase, why).of_device(&device).with_remedy(remedy)
        };
        lost.into_iter().map(failure).collect()
    }

    /// Progress of the session that is under way; `None` while none is.
    pub fn progress(&self) -> Option<Progress> {
        lock(&self.shared.sessions).present.clone()
    }

    /// Progress of the session that ended last, as it ended.
    pub fn last_progress(&self) -> Option<Progress> {
        lock(&self.shared.sessions).last.clone()
    }

    /// Connections that were refused since the destination was made.
    pub fn refused(&self) -> RefusedConnections {
        lock(&self.shared.refusals).so_far.clone()
    }

    /// Calls `listener` for connections that are refused from now on, on a thread of the destination's: it must not block. Strangers come
    /// as often as they like, so not for each: for 20 in a minute, and for the last of those beyond when the minute is over, with
    /// [the number of the others](RefusedConnection::left_out). Peers that have proved who they are have such a minute of their own.
    pub fn on_refused(&self, listener: impl Fn(&RefusedConnection) + Send + Sync + 'static) {
        lock(&self.shared.refusals).listener = Some(Arc::new(listener));
    }

    pub(crate) fn refused_one(&self, refused: RefusedConnection) {
        self.tell_refusals(|refusals| {
            refusals.so_far.count += 1;
            refusals.so_far.last = Some(refused.clone());
            let known = refused.security.peer.is_some();
            let limit = if known { &mut refusals.of_known } else { &mut refusals.of_strangers };
            [limit.take(refused, Instant::now()), None]
        });
    }

    /// Tells of those that were not told at once, when their time has come.
    pub(crate) fn tell_overdue_refusals(&self) {
        let now = Instant::now();
        self.tell_refusals(|refusals| [refusals.of_known.overdue(now), refusals.of_strangers.overdue(now)]);
    }

    /// The same, whether it has come or not.
    pub(crate) fn tell_remaining_refusals(&self) {
        self.tell_refusals(|refusals| [refusals.of_known.rest(), refusals.of_strangers.rest()]);
    }

    fn tell_refusals(&self, of: impl FnOnce(&mut Refusals) -> [Option<Told<RefusedConnection>>; 2]) {
        let (told, listener) = {
            let mut refusals = lock(&self.shared.refusals);
            (of(&mut refusals), refusals.listener.clone())
        };
        for Told { what, left_out } in told.into_iter().flatten() {
            let refused = RefusedConnection { left_out, ..what };
            tracing::warn!("a connection was refused: {refused}");
            if let Some(listener) = &listener {
                listener(&refused);
            }
        }
    }

    /// What it was cancelled by, if it was.
    pub fn cancelled(&self) -> Option<&CancelCause> {
        self.shared.cancelled.get()
    }

    /// Takes note that the VMM waits for a device that it opens, by a `request` of its own, for at most `limit` (`None`: until it answers), as
    /// long as what is returned is kept: a session that waits for the machine says so in [`Progress::awaited`].
    pub fn opening(&self, device: &DeviceId, request: Request, limit: Option<Duration>) -> AwaitedNote {
        AwaitedNote { _wait: self.shared.answers.wait(Some(device), request, limit) }
    }

    /// What the session under way waits for, and the VMM also while there is none: what has not come at once.
    pub fn awaited(&self) -> Vec<AwaitedAnswer> {
        self.shared.answers.to_tell(true)
    }

    /// Turns sources away as long as what is returned is kept, for `why`, and with what is [awaited](Self::awaited): the VMM makes its machine
    /// anew. One that comes is told so within a second if something has been awaited for long, within eight if not, and let in if that is over by then. Does nothing to a session under way.
    pub fn not_ready(&self, why: impl Into<String>) -> NotReady {
        let mut not_ready = lock(&self.shared.not_ready);
        let number = not_ready.next;
        not_ready.next += 1;
        not_ready.reasons.push((number, why.into()));
        NotReady { shared: Arc::clone(&self.shared), number }
    }

    /// Why no guest can be taken in now, if that is so.
    pub(crate) fn why_not_ready(&self) -> Option<String> {
        let why = lock(&self.shared.not_ready).reasons.first().map(|(_, why)| why.clone())?;
        let awaited = self.awaited().into_iter().map(|answer| format!("; {answer}"));
        Some(awaited.fold(why, |text, answer| text + &answer))
    }

    pub(crate) fn answers(&self) -> &AwaitedAnswers {
        &self.shared.answers
    }

    pub(crate) fn begin_session(&self) {
        *lock(&self.shared.lost) = Some(Vec::new());
        self.set_progress(Progress::default());
    }

    pub(crate) fn end_session(&self) {
        *lock(&self.shared.lost) = None;
        self.shared.answers.give_up_late();
        let mut sessions = lock(&self.shared.sessions);
        sessions.last = sessions.present.take();
    }

    /// The session was none: its source was refused before anything was made for it.
    pub(crate) fn discard_session(&self) {
        *lock(&self.shared.lost) = None;
        lock(&self.shared.sessions).present = None;
    }

    pub(crate) fn set_progress(&self, progress: Progress) {
        lock(&self.shared.sessions).present = Some(progress);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn what_is_asked_for_before_the_session_is_kept_however_often() {
        let control = Control::new(&SourceOptions::default());
        for ms in 0..1000 {
            control.set_downtime_limit(Duration::from_millis(ms));
            control.continue_switchover();
            control.device_lost(&"net0".parse().unwrap(), "its server died");
        }
        control.device_lost(&"net0".parse().unwrap(), "and its host took it");
        control.process_ends("SIGTERM");
        control.cancel();
        for number in 0..1000 {
            control.device_lost(&format!("net{number}").parse().unwrap(), "its server died");
        }
        let (session, heard) = mpsc::channel();
        control.attach(session);
        let heard: Vec<_> = heard.try_iter().collect();
        assert!(heard.contains(&SourceEvent::SetDowntimeLimit(Duration::from_millis(999))), "{heard:?}");
        assert!(
            heard.contains(&SourceEvent::Cancel(CancelCause::ProcessEnds("SIGTERM".into()))),
            "{heard:?}"
        );
        let of_net0 = |event: &&SourceEvent| matches!(event, SourceEvent::DeviceLost(lost) if lost.device.as_deref() == Some("net0"));
        let lost: Vec<_> = heard.iter().filter(of_net0).collect();
        assert!(
            matches!(lost[..], [SourceEvent::DeviceLost(lost)] if lost.text == "its server died"),
            "the first is what it was lost by: {lost:?}"
        );
        let cancels = heard.iter().filter(|event| matches!(event, SourceEvent::Cancel(_))).count();
        let continues = heard.iter().filter(|event| **event == SourceEvent::ContinueSwitchover).count();
        assert_eq!((cancels, continues, heard.len()), (1, 1, 3 + LOSSES_KEPT));
    }
}
