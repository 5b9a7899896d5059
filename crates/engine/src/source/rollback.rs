//! The way back: from P1 to P6 by our own decision, from P7 only on the destination's DECLINED.

use vfio_migration_types::{DeviceId, Failure, Phase, Side};
use vfio_migration_wire::Message;

use super::state::{AbortNotice, SourceEngine, SourceRollback, State};
use crate::api::{Abort, SourceAction, SourceOutcome, Time};
use crate::failure::failure;
use crate::ownership::{SourceState, SourceStep};

impl SourceEngine {
    /// Gives the attempt up. Does nothing once it is too late, or under way.
    pub(super) fn abort(&mut self, cause: Failure, notice: AbortNotice) {
        if self.can_cancel() {
            self.roll_back(cause, notice);
        }
    }

    /// Undoes what was done, and no more.
    pub(super) fn roll_back(&mut self, cause: Failure, notice: AbortNotice) {
        match notice {
            AbortNotice::Send | AbortNotice::SendCancelled => self.send(Message::Abort(cause.clone())),
            AbortNotice::SendUnmet => self.send(Message::LimitsUnmet(cause.clone())),
            AbortNotice::Omit => {}
        }
        self.timer = None;
        let outcome = Abort {
            cause,
            cancelled: notice == AbortNotice::SendCancelled,
            obstacle: notice == AbortNotice::SendUnmet,
            reset: Vec::new(),
            lost: Vec::new(),
            locks_lost: Vec::new(),
            restored: true,
            left_undone: Vec::new(),
        };
        let state = self.state;
        self.rollback = Some(SourceRollback { outcome, journaled: false });
        match state {
            State::Idle | State::Hello | State::Offered | State::Judging => self.finish_aborted(),
            State::JournalSending => self.journal_owner(),
            _ => self.act(State::RollingBack, SourceAction::RollBack),
        }
    }

    /// DECLINED: the destination will never run this attempt, and has that in its journal. Ours says OWNER before anything runs.
    pub(super) fn on_declined(&mut self, cause: Failure) {
        self.timer = None;
        let outcome = Abort {
            cause,
            cancelled: false,
            obstacle: false,
            reset: vec![],
            lost: vec![],
            locks_lost: vec![],
            restored: true,
            left_undone: vec![],
        };
        self.rollback = Some(SourceRollback { outcome, journaled: false });
        self.journal_step(State::JournalDeclined, SourceStep::Declined);
    }

    pub(super) fn on_declined_journaled(&mut self) {
        self.journal = SourceState::Owner;
        if let Some(rollback) = &mut self.rollback {
            rollback.journaled = true;
            // The destination need not wait for the question any more.
            let heard = Message::Abort(rollback.outcome.cause.clone());
            self.send(heard);
        }
        self.act(State::RollingBack, SourceAction::RollBack);
    }

    /// Ours again, but not on disk: nothing runs, and a person must see to the disk. Asking again later gives the same DECLINED.
    pub(super) fn declined_not_journaled(&mut self, cause: &Failure) {
        self.unresolved(format!(
            "the destination declined, so the guest is still ours, but the journal cannot say so: {}",
            cause.text
        ));
    }

    pub(super) fn on_rolled_back(
        &mut self,
        reset: Vec<DeviceId>,
        not_reset: &[DeviceId],
        locks_lost: Vec<String>,
        restored: bool,
    ) {
        let Some(rollback) = &mut self.rollback else { return };
        rollback.outcome.reset = reset;
        rollback.outcome.lost = not_reset.to_vec();
        for device in not_reset {
            let text = &rollback.outcome.cause.text;
            rollback.outcome.cause.text = append_not_reset(text, device);
        }
        rollback.outcome.locks_lost = locks_lost;
        rollback.outcome.restored = restored;
        self.after_rollback();
    }

    pub(super) fn on_owner_journaled(&mut self) {
        self.journal = SourceState::Owner;
        self.finish_aborted();
    }

    /// The guest is ours and runs; a journal left at SENDING says the same. It is reported all the same.
    pub(super) fn owner_not_journaled(&mut self, cause: &Failure) {
        if let Some(rollback) = &mut self.rollback {
            rollback.outcome.cause.text = append_not_journaled(&rollback.outcome.cause.text, &cause.text);
        }
        self.finish_aborted();
    }

    /// A rehearsal has been undone; what was not is a failure like any other.
    pub(super) fn on_undone(
        &mut self,
        reset: Vec<DeviceId>,
        not_reset: &[DeviceId],
        locks_lost: Vec<String>,
        restored: bool,
        now: Time,
    ) {
        if reset.is_empty() && not_reset.is_empty() && locks_lost.is_empty() && restored {
            return self.await_rehearsed(now);
        }
        let text = not_reset.iter().fold("the rehearsal could not be undone".to_owned(), |text, device| {
            append_not_reset(&text, device)
        });
        let cause = failure(Side::Source, Phase::Clean, text, "see the source's log");
        let lost = not_reset.to_vec();
        self.finish(SourceOutcome::Aborted(Abort {
            cause,
            cancelled: false,
            obstacle: false,
            reset,
            lost,
            locks_lost,
            restored,
            left_undone: Vec::new(),
        }));
    }

    /// Something does not answer, and nobody waits for it: what is left to be undone is the session's, behind this end.
    pub(super) fn on_rollback_late(&mut self, left_undone: Vec<Failure>, restored: bool, now: Time) {
        if let Some(rollback) = &mut self.rollback {
            rollback.outcome.left_undone = left_undone;
            // A rollback that has ended, and whose journal is late, knows.
            rollback.outcome.restored &= restored;
            let to_journal = self.state == State::RollingBack && !rollback.journaled;
            if to_journal && self.config.rehearse.is_none() {
                self.journal_owner();
            }
            if self.state != State::Done {
                self.finish_aborted();
            }
        } else if restored && self.rehearsal.cancelled.is_none() {
            // What was found stands, whatever is late to be undone.
            self.rehearsal.late = left_undone.into_iter().next();
            self.await_rehearsed(now);
        } else {
            let text = "the rehearsal could not be undone by its end";
            let remedy = "what is left is undone when what does not answer does";
            let (cause, cancelled) = match self.rehearsal.cancelled.take() {
                Some(cause) => (cause, true),
                None => (failure(Side::Source, Phase::Clean, text, remedy), false),
            };
            self.finish(SourceOutcome::Aborted(Abort {
                cause,
                cancelled,
                reset: Vec::new(),
                lost: Vec::new(),
                locks_lost: Vec::new(),
                restored,
                left_undone,
                obstacle: false,
            }));
        }
    }

    fn after_rollback(&mut self) {
        // A rehearsal has journaled nothing.
        if self.config.rehearse.is_some() || self.rollback.as_ref().is_some_and(|rollback| rollback.journaled)
        {
            return self.finish_aborted();
        }
        self.journal_owner();
    }

    fn journal_owner(&mut self) {
        // SENDING may be on its way to the disk and not yet confirmed; OWNER is written over it all the same.
        let next = match self.journal {
            SourceState::Owner => Ok(SourceState::Owner),
            other => other.next(SourceStep::Abort),
        };
        match next {
            Ok(next) => self.act(State::JournalOwner, SourceAction::Journal(next)),
            Err(error) => self.unresolved(error.to_string()),
        }
    }

    fn finish_aborted(&mut self) {
        if let Some(rollback) = self.rollback.take() {
            self.finish(SourceOutcome::Aborted(rollback.outcome));
        }
    }
}

/// A disk that fails fails twice; once is enough to read.
fn append_not_journaled(text: &str, why: &str) -> String {
    if text.contains(why) {
        return text.to_owned();
    }
    format!("{text}; then the journal could not be written: {why}")
}

fn append_not_reset(text: &str, device: &DeviceId) -> String {
    format!("{text}; then device {device} could neither go back nor be reset")
}
