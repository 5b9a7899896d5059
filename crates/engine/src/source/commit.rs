//! P7: COMMIT is said, ownership moves, and a lost answer is asked for until somebody knows.

use std::time::Duration;

use vfio_migration_types::Phase;
use vfio_migration_wire::{Commit, Message};

use super::state::{Early, SourceEngine, State, Told};
use crate::api::{Failure, SourceAction, Time};
use crate::ownership::SourceState;

/// First pause between two questions; doubled each time, up to `peer_timeout`.
const ASK_BACKOFF: Duration = Duration::from_millis(100);
/// How many `peer_timeout`s a lost answer is asked for before a person is.
const ASK_FOR: u32 = 8;

impl SourceEngine {
    /// COMMIT has not been said and will not be: the abort is still ours, whatever the disk holds. (If it holds COMMITTING and
    /// this process dies before it holds OWNER, the one that restarts asks, and is told DECLINED.)
    pub(super) fn commit_not_journaled(&mut self, cause: Failure) {
        self.undo(cause, Told::Tell);
    }

    pub(super) fn on_committing(&mut self, now: Time) {
        self.journal = SourceState::Committing;
        self.end.committed_at = Some(now);
        self.enter(Phase::Run, now);
        match self.end.early.take() {
            Some(Early::Declined(cause)) => self.on_declined(cause),
            Some(Early::Doubt) => self.ask(now),
            None if !self.link => self.ask(now),
            None => {
                self.state = State::AwaitingRunning;
                self.send(Message::Commit(Commit { epoch: self.next_epoch(), attempt: self.config.attempt }));
                self.owe("RUNNING", now);
            }
        }
    }

    /// From the decision on, three things matter: RUNNING, DECLINED, and everything else, which decides nothing.
    pub(super) fn on_peer_committing(&mut self, message: Message, now: Time) {
        match (self.state, message) {
            (State::JournalReleased | State::CleaningUp, _) => {}
            (State::JournalCommitting, Message::Declined(cause)) => {
                self.end.early = Some(Early::Declined(cause))
            }
            (State::JournalCommitting, Message::InitialLoaded { .. } | Message::Applied(_)) => {}
            (State::JournalCommitting, _) => self.doubt(),
            (_, Message::Declined(cause)) => self.on_declined(cause),
            (_, Message::Running(running)) if running.epoch == self.next_epoch() => {
                self.on_running(running, now)
            }
            (State::Asking, _) => self.ask_later(now),
            // It has given up, and could not write that down; or it talks nonsense. It knows, so it is asked.
            (State::AwaitingRunning, Message::Abort(_)) => self.ask(now),
            (_, _) => {}
        }
    }

    /// While COMMITTING is on its way to the disk: the destination will be asked, unless it has declined already.
    pub(super) fn doubt(&mut self) {
        self.end.early.get_or_insert(Early::Doubt);
    }

    /// Asks anew what became of COMMIT, unless it has been asked long enough.
    pub(super) fn ask(&mut self, now: Time) {
        if self.ask_bound().is_some_and(|bound| now >= bound) {
            return self.unresolved(
                "the destination's answer to COMMIT was lost, and asking again brought none: it may run the guest".to_owned(),
            );
        }
        self.end.ask_at = None;
        self.end.backoff =
            self.end.backoff.saturating_mul(2).clamp(ASK_BACKOFF, self.config.peer_timeout.max(ASK_BACKOFF));
        self.act(State::Asking, SourceAction::AskAgain);
        self.owe("what became of COMMIT", now);
    }

    pub(super) fn ask_later(&mut self, now: Time) {
        self.timer = None;
        self.state = State::AskingLater;
        self.end.ask_at = Some(now.saturating_add(self.end.backoff));
    }

    pub(super) fn ask_deadline(&self) -> Option<Time> {
        match self.state {
            State::AskingLater => [self.end.ask_at, self.ask_bound()].into_iter().flatten().min(),
            State::Asking => self.ask_bound(),
            _ => None,
        }
    }

    pub(super) fn ask_tick(&mut self, now: Time) {
        if self.ask_deadline().is_some_and(|deadline| now >= deadline) {
            self.ask(now);
        }
    }

    fn ask_bound(&self) -> Option<Time> {
        let asked_for = self.config.peer_timeout.saturating_mul(ASK_FOR);
        self.end.committed_at.map(|at| at.saturating_add(asked_for))
    }
}
