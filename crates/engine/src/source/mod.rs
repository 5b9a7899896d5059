//! The source's side of a migration.
//!
//! One concern per file: `hello` (P1, P2), `iterate` (P3), `quiesce` (P4, P5 and the watchdog), `commit` (P6 to P9),
//! `rollback` (the way back from everywhere), `rehearsal` (going so far, and back).

mod commit;
mod hello;
mod iterate;
mod quiesce;
mod rehearsal;
mod rollback;

use std::collections::VecDeque;

use vfio_migration_types::{Epoch, Phase};
use vfio_migration_wire::{FEATURE_REHEARSE, HelloReply, Lease, Message};

use crate::api::{
    Barrier, Failure, Progress, SourceAction, SourceConfig, SourceEvent, SourceOutcome, Time, Waiting,
};
use crate::convergence::Model;
use crate::failure::{blame, failure, link_lost, protocol, work_timeout};
use crate::ownership::{SourceState, SourceStep};

/// The source of a migration: told events, it says actions. See the [crate's documentation](crate).
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    state: State,
    /// What the journal on disk says, as far as it has been confirmed.
    journal: SourceState,
    phase: Phase,
    phases: Vec<(Phase, Time)>,
    actions: VecDeque<SourceAction>,
    /// The connection stands.
    link: bool,
    negotiated: Option<HelloReply>,
    /// What the destination has reserved for this attempt.
    lease: Lease,
    /// The peer owes an answer until then.
    timer: Option<Owed>,
    model: Model,
    rounds: iterate::Rounds,
    pause: quiesce::Pause,
    end: commit::End,
    abort: Option<rollback::Undo>,
    rehearsal: rehearsal::Found,
}

/// Where the source is. Each state waits for exactly one thing, but for [`State::SettingUp`], which waits for two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Hello,
    Offered,
    Judging,
    JournalSending,
    SettingUp {
        set_up: bool,
        begun: bool,
    },
    Sending,
    Resting,
    Pausing,
    ToP2p,
    Retreating,
    Resuming,
    ToStopCopy,
    SendingFinal,
    ReleasingLocks,
    AwaitingReady,
    JournalCommitting,
    AwaitingRunning,
    Asking,
    AskingLater,
    JournalReleased,
    CleaningUp,
    /// DECLINED after COMMIT: the journal says OWNER before anything runs.
    JournalDeclined,
    RollingBack,
    JournalOwner,
    /// A rehearsal is at its end, and is being undone.
    Undoing,
    /// It is undone here; the destination has not said so yet.
    AwaitingRehearsed,
    Done,
}

/// What the peer owes.
#[derive(Clone, Copy, Debug)]
struct Owed {
    what: &'static str,
    since: Time,
    until: Time,
}

impl Source {
    /// A source that has not begun. A machine that cannot be migrated is refused at once: [`Source::poll_action`] is then
    /// [`SourceAction::Finish`] before anything has moved.
    pub fn new(mut config: SourceConfig) -> Self {
        // A destination that selects it takes no COMMIT: it is offered exactly when none is to come.
        match config.rehearse {
            Some(_) => config.features |= FEATURE_REHEARSE,
            None => config.features &= !FEATURE_REHEARSE,
        }
        let devices = config.devices.len();
        let mut source = Self {
            config,
            state: State::Idle,
            journal: SourceState::Owner,
            phase: Phase::Plan,
            phases: Vec::new(),
            actions: VecDeque::new(),
            link: false,
            negotiated: None,
            lease: Lease::default(),
            timer: None,
            model: Model::default(),
            rounds: iterate::Rounds::new(devices),
            pause: quiesce::Pause::default(),
            end: commit::End::default(),
            abort: None,
            rehearsal: rehearsal::Found::default(),
        };
        source.refuse_devices_without_p2p();
        source
    }

    /// Tells what happened, at `now`. Never blocks. Call [`Source::poll_action`] until it is `None` afterwards.
    pub fn handle(&mut self, event: SourceEvent, now: Time) {
        if self.state == State::Done {
            return;
        }
        self.note_verify(&event);
        if self.watchdog_bites(now) {
            self.abort_over_limit(now);
        }
        match event {
            SourceEvent::Connected => self.on_connected(now),
            SourceEvent::Peer(message) => self.on_peer(message, now),
            SourceEvent::Failed(cause) => self.on_failed(cause, now),
            SourceEvent::Damaged(cause) => self.on_damaged(cause),
            SourceEvent::LinkLost(why) => self.on_link_lost(&why, now),
            SourceEvent::DeviceLost(cause) => self.on_device_lost(cause),
            SourceEvent::Cancel => self.on_cancel(),
            SourceEvent::SetDowntimeLimit(limit) => self.on_limit(limit, now),
            SourceEvent::Continue => self.on_continue(now),
            SourceEvent::Tick => self.on_tick(now),
            answer => self.on_answer(answer, now),
        }
    }

    /// What to do next; `None`: wait for an event.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// When a [`SourceEvent::Tick`] is due at the latest, if nothing else happens.
    pub fn deadline(&self) -> Option<Time> {
        let own = [
            self.timer.map(|owed| owed.until),
            self.watchdog_deadline(),
            self.iterate_deadline(),
            self.ask_deadline(),
        ];
        if self.state == State::Done { None } else { own.into_iter().flatten().min() }
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// What the journal says, as far as it has been confirmed.
    pub fn journal(&self) -> SourceState {
        self.journal
    }

    /// Version and features in force, once the destination has answered.
    pub fn negotiated(&self) -> Option<HelloReply> {
        self.negotiated
    }

    /// Whether a [`SourceEvent::Cancel`] would still be obeyed. `false`: it is too late, or already under way.
    pub fn can_cancel(&self) -> bool {
        !matches!(
            self.state,
            State::JournalCommitting
                | State::AwaitingRunning
                | State::Asking
                | State::AskingLater
                | State::JournalReleased
                | State::CleaningUp
                | State::JournalDeclined
                | State::RollingBack
                | State::JournalOwner
                | State::Undoing
                | State::AwaitingRehearsed
                | State::Done
        )
    }

    /// How far it is.
    pub fn progress(&self, now: Time) -> Progress {
        let (ram_left, device_left) = self.model.left();
        let waiting = match self.state {
            State::Sending | State::Resting => self.rounds.waiting(),
            _ => None,
        };
        Progress {
            phase: self.phase,
            iteration: self.rounds.iteration(),
            wire_bytes: self.rounds.wire_bytes(),
            ram_left,
            device_left,
            bandwidth: self.model.bandwidth(),
            predicted: self.model.predict(now).map(|prediction| prediction.total()),
            limit: self.config.downtime_limit,
            waiting: waiting.map(|waiting| match waiting {
                iterate::Wait::Initial => Waiting::InitialBytes(
                    self.unacknowledged()
                        .into_iter()
                        .filter_map(|index| self.config.devices.get(index))
                        .map(|device| device.id.clone())
                        .collect(),
                ),
                iterate::Wait::Convergence => Waiting::Convergence,
                iterate::Wait::Operator => Waiting::Operator,
            }),
        }
    }

    fn on_peer(&mut self, message: Message, now: Time) {
        // The session's own; harmless if it passes them on.
        if matches!(message, Message::Credit { .. } | Message::Ping { .. } | Message::Pong { .. }) {
            return;
        }
        match self.state {
            State::Idle => self.abort(protocol(self.phase, "destination", &message), Told::Tell),
            State::JournalCommitting
            | State::AwaitingRunning
            | State::Asking
            | State::AskingLater
            | State::JournalReleased
            | State::CleaningUp => self.on_peer_committing(message, now),
            // The way back does not depend on what the peer says.
            State::JournalDeclined | State::RollingBack | State::JournalOwner | State::Done => {}
            State::Undoing | State::AwaitingRehearsed => self.on_peer_rehearsed(message),
            _ => self.on_peer_before_commit(message, now),
        }
    }

    fn on_peer_before_commit(&mut self, message: Message, now: Time) {
        match (self.state, message) {
            (_, Message::Abort(cause)) => self.abort(cause, Told::Knows),
            // It waits for a source that may have committed; this one says that it has not.
            (_, Message::Declined(cause)) => self.abort(cause, Told::Tell),
            (State::Hello, Message::HelloReply(reply)) => self.on_hello_reply(reply, now),
            (State::Hello | State::Offered, Message::Refuse(reasons)) => {
                self.finish(SourceOutcome::Refused(reasons));
            }
            (State::Offered, Message::Accept(accept)) => self.on_accept(accept),
            (State::SettingUp { set_up, begun: false }, Message::Begun) => {
                self.state = State::SettingUp { set_up, begun: true };
                self.timer = None;
                self.iterate_when_set_up(now);
            }
            (state, Message::InitialLoaded { device, generation }) if state.has_iterated() => {
                self.on_initial_loaded(device, generation, now);
            }
            (state, Message::Applied(applied)) if state.has_iterated() => self.on_applied(applied, now),
            (State::AwaitingReady, Message::Ready(ready)) => self.on_ready(ready, now),
            (_, message) => self.abort(protocol(self.phase, "destination", &message), Told::Tell),
        }
    }

    fn on_answer(&mut self, event: SourceEvent, now: Time) {
        match (self.state, event) {
            (State::Judging, SourceEvent::Judged) => self.on_judged(now),
            (State::Judging, SourceEvent::Refused(reasons)) => self.refuse(reasons),
            (State::JournalSending, SourceEvent::Journaled(SourceState::Sending)) => self.on_sending(now),
            (State::SettingUp { set_up: false, begun }, SourceEvent::SetUp { devices }) => {
                self.state = State::SettingUp { set_up: true, begun };
                self.rounds.look(&devices);
                self.iterate_when_set_up(now);
            }
            (State::Sending, SourceEvent::IterationSent(report)) => self.on_iteration_sent(report, now),
            (State::Pausing, SourceEvent::Paused { guest_ran, identity }) => {
                self.on_paused(guest_ran, identity, now);
            }
            (State::ToP2p, SourceEvent::Reached { barrier: Barrier::P2p, devices }) => {
                self.on_p2p(&devices, now);
            }
            (State::Retreating, SourceEvent::Reached { barrier: Barrier::Running, devices }) => {
                self.on_retreated(&devices);
            }
            (State::Resuming, SourceEvent::Resumed) => self.on_resumed(now),
            (State::ToStopCopy, SourceEvent::Reached { barrier: Barrier::StopCopy, devices }) => {
                self.on_stop_copy(&devices, now);
            }
            (State::SendingFinal, SourceEvent::FinalSent { totals, .. }) => self.on_final_sent(totals, now),
            (State::ReleasingLocks, SourceEvent::LocksReleased) => self.on_locks_released(now),
            (State::JournalCommitting, SourceEvent::Journaled(SourceState::Committing)) => {
                self.on_committing(now);
            }
            (State::JournalReleased, SourceEvent::Journaled(SourceState::Released)) => self.on_released(),
            (State::CleaningUp, SourceEvent::CleanedUp) => self.complete(),
            (State::JournalDeclined, SourceEvent::Journaled(SourceState::Owner)) => {
                self.on_declined_journaled()
            }
            (State::JournalOwner, SourceEvent::Journaled(SourceState::Owner)) => self.on_owner_journaled(),
            (State::RollingBack, SourceEvent::RolledBack { reset, not_reset, locks_lost, restored }) => {
                self.on_rolled_back(reset, &not_reset, locks_lost, restored);
            }
            (State::Undoing, SourceEvent::RolledBack { reset, not_reset, locks_lost, restored }) => {
                self.on_undone(reset, &not_reset, locks_lost, restored, now);
            }
            // After the decision, and while an abort is under way, nothing said out of turn changes the outcome.
            (_, _) if !self.can_cancel() => {}
            (state, event) => {
                let text =
                    format!("the session reported {event:?} in state {state:?}: a defect of this program");
                self.abort(failure(self.phase, text, ""), Told::Tell);
            }
        }
    }

    fn on_failed(&mut self, cause: Failure, now: Time) {
        match self.state {
            State::Asking => self.ask_later(now),
            State::AwaitingRunning | State::AskingLater => {}
            State::JournalCommitting => self.commit_not_journaled(cause),
            State::JournalReleased => {
                self.end.left_undone(cause);
                self.on_released();
            }
            State::CleaningUp => {
                self.end.left_undone(cause);
                self.complete();
            }
            State::JournalDeclined => self.declined_not_journaled(&cause),
            // What the rollback interrupted. The rollback itself says `RolledBack`, whatever came of it.
            State::RollingBack | State::Undoing | State::AwaitingRehearsed => {}
            State::JournalOwner => self.owner_not_journaled(&cause),
            State::Done => {}
            _ => {
                self.abort(cause, Told::Tell);
            }
        }
    }

    /// The reader's failure, not the action's: COMMITTING may still reach the disk, and an undo must not run behind it.
    fn on_damaged(&mut self, cause: Failure) {
        if self.state == State::JournalCommitting {
            return self.doubt();
        }
        self.abort(cause, Told::Tell);
    }

    fn on_link_lost(&mut self, why: &str, now: Time) {
        self.link = false;
        match self.state {
            State::AwaitingRunning => self.ask(now),
            State::Asking => self.ask_later(now),
            State::AwaitingRehearsed => self.on_rehearsed(Some(link_lost(self.phase, why))),
            _ if self.can_cancel() => self.abort(link_lost(self.phase, why), Told::Knows),
            _ => {}
        }
    }

    fn on_device_lost(&mut self, cause: Failure) {
        if self.can_cancel() {
            self.abort(cause, Told::Tell);
        }
    }

    fn on_cancel(&mut self) {
        if self.can_cancel() {
            self.abort(failure(self.phase, "cancelled by the operator", ""), Told::Cancelled);
        }
    }

    fn on_tick(&mut self, now: Time) {
        if let Some(owed) = self.timer.filter(|owed| now >= owed.until) {
            self.timer = None;
            self.on_owed(owed, now);
        }
        self.iterate_tick(now);
        self.ask_tick(now);
    }

    /// Asks for something that is answered.
    fn act(&mut self, state: State, action: SourceAction) {
        self.state = state;
        self.actions.push_back(action);
    }

    /// Journals the state that `step` leads to; what cannot be journaled is not done.
    fn journal_step(&mut self, state: State, step: SourceStep) {
        match self.journal.next(step) {
            Ok(next) => self.act(state, SourceAction::Journal(next)),
            Err(error) => self.abort(failure(self.phase, error.to_string(), ""), Told::Tell),
        }
    }

    fn send(&mut self, message: Message) {
        if self.link {
            self.actions.push_back(SourceAction::Send(message));
        }
    }

    /// The peer owes `what`, soon.
    fn owe(&mut self, what: &'static str, now: Time) {
        let until = now.saturating_add(self.config.peer_timeout);
        self.timer = Some(Owed { what, since: now, until });
    }

    /// The peer owes `what`, for which it has work to do.
    fn owe_work(&mut self, what: &'static str, now: Time) {
        let until = now.saturating_add(work_timeout(self.config.peer_timeout));
        self.timer = Some(Owed { what, since: now, until });
    }

    fn enter(&mut self, phase: Phase, now: Time) {
        self.phase = phase;
        self.phases.push((phase, now));
    }

    fn finish(&mut self, outcome: SourceOutcome) {
        self.state = State::Done;
        self.timer = None;
        self.actions.push_back(SourceAction::Finish(outcome));
    }

    fn blame(&self, index: usize, failure: Failure) -> Failure {
        blame(&self.config.devices, index, failure)
    }

    fn next_epoch(&self) -> Epoch {
        self.config.epoch.next()
    }
}

impl State {
    /// Iterations have been sent, so their acknowledgements may come.
    fn has_iterated(self) -> bool {
        matches!(
            self,
            Self::Sending
                | Self::Resting
                | Self::Pausing
                | Self::ToP2p
                | Self::Retreating
                | Self::Resuming
                | Self::ToStopCopy
                | Self::SendingFinal
                | Self::ReleasingLocks
                | Self::AwaitingReady
        )
    }
}

/// Whether the peer is told of an abort.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// It is told.
    Tell,
    /// It is told, and the operator wanted it.
    Cancelled,
    /// It knows, or cannot be reached.
    Knows,
}
