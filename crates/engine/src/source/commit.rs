//! P7: COMMIT is sent, ownership moves, and a lost answer is asked for until somebody knows.

use std::time::Duration;

use vfio_migration_types::{Failure, Phase};
use vfio_migration_wire::{Commit, Message};

use super::state::{AbortNotice, EarlyAnswer, SourceEngine, State};
use crate::api::{SourceAction, Time};
use crate::ownership::SourceState;

/// First pause between two questions; doubled each time, up to `peer_timeout`.
const ASK_BACKOFF: Duration = Duration::from_millis(100);
/// Time for which the answer is waited for by a process that ends: one that is on its way comes by then.
const ENDS_WITHIN: Duration = Duration::from_millis(500);
/// The multiple of `peer_timeout` for which a lost answer is asked for, before a person is.
const ASK_FOR: u32 = 8;

impl SourceEngine {
    /// COMMIT has not been sent and will not be: the abort is still ours, whatever the disk holds. (If it holds
    /// COMMITTING and this process dies before it holds OWNER, the one that restarts asks, and receives DECLINED.)
    pub(super) fn commit_not_journaled(&mut self, cause: Failure) {
        self.roll_back(cause, AbortNotice::Send);
    }

    pub(super) fn on_committing(&mut self, now: Time) {
        self.journal = SourceState::Committing;
        self.commit.committed_at = Some(now);
        self.enter(Phase::Run, now);
        if let Some((_, until)) = &mut self.commit.ends {
            *until = now.saturating_add(ENDS_WITHIN);
        }
        match self.commit.early.take() {
            Some(EarlyAnswer::Declined(cause)) => self.on_declined(cause),
            Some(EarlyAnswer::Unclear) => self.ask(now),
            None if !self.link => self.ask(now),
            None => {
                self.state = State::AwaitingRunning;
                self.send(Message::Commit(Commit { epoch: self.next_epoch(), attempt: self.config.attempt }));
                self.expect_by("RUNNING", now);
            }
        }
    }

    /// From the decision on, three things matter: RUNNING, DECLINED, and everything else, which decides nothing.
    pub(super) fn on_peer_committing(&mut self, message: Message, now: Time) {
        match (self.state, message) {
            (State::JournalReleased | State::CleaningUp, _) => {}
            (State::JournalCommitting, Message::Declined(cause)) => {
                self.commit.early = Some(EarlyAnswer::Declined(cause))
            }
            (State::JournalCommitting, Message::InitialLoaded { .. } | Message::Applied(_)) => {}
            (State::JournalCommitting, _) => self.ask_when_journaled(),
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
    pub(super) fn ask_when_journaled(&mut self) {
        self.commit.early.get_or_insert(EarlyAnswer::Unclear);
    }

    /// The process ends `by` this. It is too late to give the attempt up, and what became of it is not known before the destination
    /// says so: that is not waited for long, and the journal asks for it when the VM is to be started again.
    pub(super) fn process_ends(&mut self, by: &str, now: Time) {
        self.commit.ends.get_or_insert_with(|| (by.to_owned(), now.saturating_add(ENDS_WITHIN)));
    }

    /// Asks anew what became of COMMIT, unless it has been asked long enough.
    pub(super) fn ask(&mut self, now: Time) {
        if self.ask_bound().is_some_and(|bound| now >= bound) {
            return self.unresolved(match &self.commit.ends {
                Some((by, _)) => format!(
                    "the process of the source was ended by {by} before the destination had answered COMMIT: it may run the guest"
                ),
                None => {
                    "the destination's answer to COMMIT was lost, and asking again brought none: it may run the guest".to_owned()
                }
            });
        }
        self.commit.asked_since.get_or_insert(now);
        self.commit.ask_at = None;
        self.commit.backoff = self
            .commit
            .backoff
            .saturating_mul(2)
            .clamp(ASK_BACKOFF, self.config.peer_timeout.max(ASK_BACKOFF));
        self.act(State::Asking, SourceAction::AskAgain);
        self.expect_by("what became of COMMIT", now);
    }

    pub(super) fn ask_later(&mut self, now: Time) {
        self.timer = None;
        self.state = State::AskingLater;
        self.commit.ask_at = Some(now.saturating_add(self.commit.backoff));
    }

    pub(super) fn ask_deadline(&self) -> Option<Time> {
        match self.state {
            State::AskingLater => [self.commit.ask_at, self.ask_bound()].into_iter().flatten().min(),
            State::Asking | State::AwaitingRunning => self.ask_bound(),
            _ => None,
        }
    }

    pub(super) fn ask_tick(&mut self, now: Time) {
        if self.ask_deadline().is_some_and(|deadline| now >= deadline) {
            self.ask(now);
        }
    }

    /// While the answer to COMMIT is asked for anew: for how long it has been, and for how long it is at most.
    pub(super) fn asks(&self, now: Time) -> Option<(Duration, Duration)> {
        let (since, until) = (self.commit.asked_since?, self.ask_bound()?);
        Some((now.saturating_sub(since), until.saturating_sub(since)))
    }

    fn ask_bound(&self) -> Option<Time> {
        let asked_for = self.config.peer_timeout.saturating_mul(ASK_FOR);
        let bound = self.commit.committed_at?.saturating_add(asked_for);
        Some(self.commit.ends.as_ref().map_or(bound, |(_, until)| bound.min(*until)))
    }
}
