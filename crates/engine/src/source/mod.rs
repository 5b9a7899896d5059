//! The source's side of a migration.
//!
//! A file is a phase, from `hello` (P1) to `clean` (P9); `rollback` is the way back from each of them, `rehearsal` a
//! migration that goes so far and back. They share `state`. Here events are dispatched to the phases' methods.

mod clean;
mod commit;
mod final_pass;
mod hello;
mod iterate;
mod quiesce;
mod ready;
mod rehearsal;
mod rollback;
mod setup;
mod state;

use std::collections::VecDeque;
use std::time::Duration;

use vfio_migration_types::{CancelCause, Failure, Phase, Side};
use vfio_migration_wire::{FEATURE_ASK, FEATURE_REHEARSE, HelloReply, Lease, Message};

pub use self::state::SourceEngine;
use self::state::{AbortNotice, Pause, RehearsalState, Rounds, SourceCommit, State, WaitKind};
use crate::api::{
    Barrier, EngineProgress, ExpectedWord, Rehearse, SourceAction, SourceConfig, SourceEvent, SourceOutcome,
    SwitchoverWait, Time,
};
use crate::convergence::DowntimeModel;
use crate::expected::ExpectedAnswer;
use crate::failure::{failure, link_lost, protocol, silence};
use crate::ownership::SourceState;

impl SourceEngine {
    /// A source that has not begun. Whether its machine can move at all was judged before: the rules are not known here.
    pub fn new(mut config: SourceConfig) -> Self {
        // A destination that selects the first takes no COMMIT, and with the second no BEGIN: they are offered exactly when
        // none is to come.
        config.features &= !(FEATURE_REHEARSE | FEATURE_ASK);
        config.features |= match config.rehearse {
            Some(Rehearse::Ask) => FEATURE_REHEARSE | FEATURE_ASK,
            Some(Rehearse::Precopy | Rehearse::Switchover) => FEATURE_REHEARSE,
            None => 0,
        };
        let devices = config.devices.len();
        Self {
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
            model: DowntimeModel::default(),
            rounds: Rounds::new(devices),
            pause: Pause::default(),
            commit: SourceCommit::default(),
            rollback: None,
            concluded_at: None,
            rehearsal: RehearsalState::default(),
        }
    }

    /// Takes note of the device whose answer the pause is spent on, if it is one: what is told, should the limit pass for it.
    pub fn awaits(&mut self, device: Option<Failure>) {
        self.pause.awaited = device;
    }

    /// The longest pause that is allowed: who has taken most of it is [told](Self::awaits).
    pub fn downtime_limit(&self) -> Duration {
        self.config.downtime_limit
    }

    /// Offers the destination these features too, which depend on the connection. To be called before
    /// [`SourceEvent::Connected`].
    pub fn offer(&mut self, features: u64) {
        self.config.features |= features & !FEATURE_REHEARSE;
    }

    /// Takes an event that came at `now`. Never blocks. Call [`SourceEngine::poll_action`] until it is `None`
    /// afterwards.
    pub fn handle(&mut self, event: SourceEvent, now: Time) {
        if self.state == State::Done {
            return;
        }
        self.note_verify(&event);
        if self.watchdog_expired(now) {
            self.abort_over_limit(now);
        }
        match event {
            SourceEvent::Connected => self.on_connected(now),
            SourceEvent::Peer(message) => self.on_peer(message, now),
            SourceEvent::Failed(cause) => self.on_failed(cause, now),
            SourceEvent::Damaged(cause) => self.on_damaged(cause),
            SourceEvent::LinkLost(why) => self.on_link_lost(&why, now),
            SourceEvent::DeviceLost(cause) => self.on_device_lost(cause),
            SourceEvent::Cancel(why) => self.on_cancel(&why, now),
            SourceEvent::SetDowntimeLimit(limit) => self.on_limit(limit, now),
            SourceEvent::ContinueSwitchover => self.on_continue(now),
            SourceEvent::Tick => self.on_tick(now),
            answer => self.on_answer(answer, now),
        }
    }

    /// The next action; `None`: wait for an event.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        self.actions.pop_front()
    }

    /// Time at which a [`SourceEvent::Tick`] is due at the latest, if nothing else happens.
    pub fn deadline(&self) -> Option<Time> {
        let own = [
            self.timer.map(|expected| expected.until),
            self.watchdog_deadline(),
            self.iterate_deadline(),
            self.ask_deadline(),
        ];
        if self.state == State::Done { None } else { own.into_iter().flatten().min() }
    }

    /// The phase under way.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The phases so far, in order, each with the time at which it was entered.
    pub fn phases(&self) -> &[(Phase, Time)] {
        &self.phases
    }

    /// Why the attempt is being given up, if it is.
    pub fn abort_cause(&self) -> Option<&Failure> {
        self.rollback.as_ref().map(|rollback| &rollback.outcome.cause)
    }

    /// Whether the attempt, or a rehearsal at its end, is being undone: the events that answer it, or
    /// [`SourceEvent::RollBackLate`], end it.
    pub fn is_rolling_back(&self) -> bool {
        matches!(self.state, State::RollingBack | State::JournalOwner | State::Undoing)
    }

    /// Whether the guest has moved, and what was held here is being released.
    pub fn is_cleaning_up(&self) -> bool {
        self.state == State::CleaningUp
    }

    /// Version and features in force, once the destination has answered.
    pub fn negotiated(&self) -> Option<HelloReply> {
        self.negotiated
    }

    /// While nothing is left to do but to hear a word of the destination: which, how long it has had for that, and how long it may
    /// have at most.
    pub fn expects_word(&self, now: Time) -> Option<(ExpectedWord, Duration, Duration)> {
        let word = match self.state {
            State::Hello | State::Offered => ExpectedWord::Offer,
            State::AwaitingReady | State::DigestingRam => ExpectedWord::Ready,
            State::AwaitingRunning => ExpectedWord::Running,
            State::Asking | State::AskingLater => {
                return self.asks(now).map(|(waited, limit)| (ExpectedWord::Outcome, waited, limit));
            }
            _ => return None,
        };
        let expected = self.timer?;
        Some((word, expected.waited(now), expected.limit()))
    }

    /// The downtime, were the guest paused now. While it is paused, what was predicted of that pause; of an attempt that was given up
    /// for it, what was predicted then: what its cause says.
    fn predicted(&self, now: Time) -> Option<Duration> {
        if self.pause.asked_at.is_some() {
            return Some(self.pause.predicted);
        }
        let at = self.concluded_at.unwrap_or(now);
        self.model.predict(at).map(|prediction| prediction.total())
    }

    /// The migration's progress, for a person to see.
    pub fn progress(&self, now: Time) -> EngineProgress {
        let (ram_left, device_left) = self.model.left();
        let waiting = match self.state {
            State::Sending | State::Waiting => self.rounds.waiting,
            _ => None,
        };
        EngineProgress {
            phase: self.phase,
            iteration: self.rounds.iteration,
            wire_bytes: self.rounds.wire_bytes,
            ram_left,
            device_left,
            bandwidth: self.model.bandwidth(),
            predicted: self.predicted(now),
            limit: self.config.downtime_limit,
            waiting: waiting.map(|waiting| match waiting {
                WaitKind::Initial => SwitchoverWait::InitialBytes(
                    self.unacknowledged()
                        .into_iter()
                        .filter_map(|index| self.config.devices.get(index))
                        .map(|device| device.id.clone())
                        .collect(),
                ),
                WaitKind::Convergence => SwitchoverWait::Convergence,
                WaitKind::Operator => SwitchoverWait::Operator,
            }),
        }
    }

    fn on_peer(&mut self, message: Message, now: Time) {
        // The session's own; harmless if it passes them on.
        if matches!(message, Message::Credit { .. } | Message::Ping { .. } | Message::Pong { .. }) {
            return;
        }
        match self.state {
            State::Idle => self.abort(protocol(Side::Source, self.phase, &message), AbortNotice::Send),
            State::JournalCommitting
            | State::AwaitingRunning
            | State::Asking
            | State::AskingLater
            | State::JournalReleased
            | State::CleaningUp => self.on_peer_committing(message, now),
            // The way back does not depend on what the peer sends.
            State::JournalDeclined | State::RollingBack | State::JournalOwner | State::Done => {}
            State::Undoing | State::AwaitingRehearsed => self.on_peer_rehearsed(message),
            _ => self.on_peer_before_commit(message, now),
        }
    }

    fn on_peer_before_commit(&mut self, message: Message, now: Time) {
        match (self.state, message) {
            (_, Message::Abort(cause)) => self.abort(cause, AbortNotice::Omit),
            // It waits for a source that may have committed; this one reports that it has not.
            (_, Message::Declined(cause)) => self.abort(cause, AbortNotice::Send),
            (State::Hello, Message::HelloReply(reply)) => self.on_hello_reply(reply, now),
            (State::Hello | State::Offered, Message::Refuse(reasons)) => {
                self.finish(SourceOutcome::Refused(reasons));
            }
            (State::Offered, Message::Accept(accept)) => self.on_accept(accept),
            (State::SettingUp { set_up, begun: false }, Message::Begun) => self.on_begun(set_up, now),
            (state, Message::InitialLoaded { device, generation }) if state.has_iterated() => {
                self.on_initial_loaded(device, generation, now);
            }
            (state, Message::Applied(applied)) if state.has_iterated() => self.on_applied(applied, now),
            (State::AwaitingReady, Message::Ready(ready)) => self.on_ready(ready, now),
            (State::AwaitingReady, Message::DigestRam { first, count }) if self.verify() => {
                self.act(State::DigestingRam, SourceAction::DigestRam { first, count });
            }
            (_, message) => self.abort(protocol(Side::Source, self.phase, &message), AbortNotice::Send),
        }
    }

    fn on_answer(&mut self, event: SourceEvent, now: Time) {
        match (self.state, event) {
            (State::Judging, SourceEvent::Judged) => self.on_judged(now),
            (State::Judging, SourceEvent::Refused(reasons)) => self.refuse(reasons),
            (State::JournalSending, SourceEvent::Journaled(SourceState::Sending)) => self.on_sending(now),
            (State::SettingUp { set_up: false, begun }, SourceEvent::SetUp { devices }) => {
                self.on_set_up(begun, &devices, now);
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
            (State::DigestingRam, SourceEvent::RamDigested(digests)) => {
                self.state = State::AwaitingReady;
                self.send(Message::RamDigests(digests));
            }
            (State::JournalCommitting, SourceEvent::Journaled(SourceState::Committing)) => {
                self.on_committing(now);
            }
            (State::JournalReleased, SourceEvent::Journaled(SourceState::Released)) => self.on_released(),
            (State::CleaningUp, SourceEvent::CleanedUp) => self.complete(),
            (State::CleaningUp, SourceEvent::RollBackLate { left_undone, .. }) => {
                self.commit.left_undone.extend(left_undone);
                self.complete();
            }
            (State::JournalDeclined, SourceEvent::Journaled(SourceState::Owner)) => {
                self.on_declined_journaled()
            }
            (State::JournalOwner, SourceEvent::Journaled(SourceState::Owner)) => self.on_owner_journaled(),
            (State::RollingBack, SourceEvent::RolledBack { reset, not_reset, locks_lost, restored }) => {
                self.on_rolled_back(reset, &not_reset, locks_lost, restored);
            }
            (
                State::RollingBack | State::JournalOwner | State::Undoing,
                SourceEvent::RollBackLate { left_undone, restored },
            ) => self.on_rollback_late(left_undone, restored, now),
            (State::Undoing, SourceEvent::RolledBack { reset, not_reset, locks_lost, restored }) => {
                self.on_undone(reset, &not_reset, locks_lost, restored, now);
            }
            // After the decision, and while an abort is under way, nothing sent out of turn changes the outcome.
            (_, _) if !self.can_cancel() => {}
            (state, event) => {
                let text =
                    format!("the session reported {event:?} in state {state:?}: a defect of this program");
                self.abort(failure(Side::Source, self.phase, text, ""), AbortNotice::Send);
            }
        }
    }

    fn on_failed(&mut self, cause: Failure, now: Time) {
        match self.state {
            State::Asking => self.ask_later(now),
            State::AwaitingRunning | State::AskingLater => {}
            State::JournalCommitting => self.commit_not_journaled(cause),
            State::JournalReleased => {
                self.commit.left_undone.push(cause);
                self.on_released();
            }
            State::CleaningUp => {
                self.commit.left_undone.push(cause);
                self.complete();
            }
            State::JournalDeclined => self.declined_not_journaled(&cause),
            // What the rollback interrupted. The rollback itself reports `RolledBack`, whatever came of it.
            State::RollingBack => self.explain_over_limit(cause, now),
            State::Undoing | State::AwaitingRehearsed => {}
            State::JournalOwner => self.owner_not_journaled(&cause),
            State::Done => {}
            _ => {
                self.abort(cause, AbortNotice::Send);
            }
        }
    }

    /// The reader's failure, not the action's: COMMITTING may still reach the disk, and a rollback must not run behind it.
    fn on_damaged(&mut self, cause: Failure) {
        if self.state == State::JournalCommitting {
            return self.ask_when_journaled();
        }
        self.abort(cause, AbortNotice::Send);
    }

    fn on_link_lost(&mut self, why: &str, now: Time) {
        self.link = false;
        match self.state {
            State::AwaitingRunning => self.ask(now),
            State::Asking => self.ask_later(now),
            State::AwaitingRehearsed => self.on_rehearsed(Some(link_lost(Side::Source, self.phase, why))),
            _ if self.can_cancel() => self.abort(link_lost(Side::Source, self.phase, why), AbortNotice::Omit),
            _ => {}
        }
    }

    fn on_device_lost(&mut self, cause: Failure) {
        if self.can_cancel() {
            self.abort(cause, AbortNotice::Send);
        }
    }

    fn on_cancel(&mut self, why: &CancelCause, now: Time) {
        let cause = why.failure(Side::Source, self.phase);
        match self.state {
            State::JournalCommitting | State::AwaitingRunning | State::Asking | State::AskingLater => {
                if let CancelCause::ProcessEnds(by) = why {
                    self.process_ends(by, now);
                }
            }
            State::Undoing => self.rehearsal.cancelled = Some(cause),
            State::AwaitingRehearsed => self.finish_cancelled(cause),
            _ => self.abort(cause, AbortNotice::SendCancelled),
        }
    }

    fn on_tick(&mut self, now: Time) {
        if let Some(expected) = self.timer.filter(|expected| now >= expected.until) {
            self.timer = None;
            self.on_overdue(expected, now);
        }
        self.iterate_tick(now);
        self.ask_tick(now);
    }

    /// The peer did not answer in time.
    fn on_overdue(&mut self, expected: ExpectedAnswer, now: Time) {
        match self.state {
            State::AwaitingRunning | State::Asking => self.ask(now),
            State::AwaitingRehearsed => {
                let waited = expected.waited(now);
                self.on_rehearsed(Some(silence(Side::Source, self.phase, expected.what, waited)));
            }
            _ if self.can_cancel() => {
                let waited = expected.waited(now);
                self.abort(silence(Side::Source, self.phase, expected.what, waited), AbortNotice::Send);
            }
            _ => {}
        }
    }
}
