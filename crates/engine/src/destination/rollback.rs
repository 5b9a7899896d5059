//! The way back, before OWNER: ABORTED to the journal, then the message to the source, then everything released. The
//! end of a rehearsal is the same way, without the journal.

use std::time::Duration;

use vfio_migration_types::{CancelCause, Failure, Phase, Side};
use vfio_migration_wire::{Message, Reason};

use super::state::{DestinationEngine, State};
use crate::api::{DestinationAction, DestinationOutcome, Time};
use crate::expected::ExpectedAnswer;
use crate::failure::failure;
use crate::ownership::{DestinationState, DestinationStep};

/// The multiple of `peer_timeout` for which an attempt that was given up after READY stays answerable. The source
/// notices a lost link within one, and asks at once.
const LINGER: u32 = 4;
/// The same when it was cancelled, by somebody who waits for the end. The journal answers whoever asks later.
const LINGER_CANCELLED: Duration = Duration::from_millis(500);

/// Time for which a source may owe OFFER or BEGIN while another waits: it sends the one at once, and the other when it has compared two
/// manifests and written its journal.
const WAITED_FOR_WORD: Duration = Duration::from_secs(3);
/// The same of the first of its guest: its devices have to begin before.
const WAITED_FOR_GUEST: Duration = Duration::from_secs(10);

impl DestinationEngine {
    /// Gives the attempt up. Does nothing once the guest is ours, or the abort is under way.
    pub(super) fn abort(&mut self, cause: Failure, now: Time) {
        if self.can_abort() {
            self.roll_back(cause, now);
        }
    }

    /// Whether the attempt can still be given up. `false`: it is too late, or already under way.
    fn can_abort(&self) -> bool {
        !matches!(
            self.state,
            State::JournalOwner
                | State::Starting
                | State::Owner
                | State::JournalAborted
                | State::Releasing
                | State::Lingering
                | State::Done
        )
    }

    /// Gives the attempt up, which is cancelled. One that is being given up already ends sooner, for its own cause.
    pub(super) fn on_cancel(&mut self, why: &CancelCause, now: Time) {
        match self.state {
            State::JournalAborted | State::Releasing => self.rollback.cancelled_late = true,
            State::Lingering => {
                self.rollback.cancelled_late = true;
                self.linger_or_finish(now);
            }
            _ if self.can_abort() => {
                self.rollback.cancelled = true;
                self.roll_back(why.failure(Side::Destination, self.phase), now);
            }
            _ => {}
        }
    }

    /// Whether the attempt keeps no migration out, so that [`DestinationEvent::Superseded`] ends it: it is a rehearsal; it is undone and
    /// written down, and its source may ask on any connection what became of it; or its source has brought nothing, though it could
    /// for some seconds.
    ///
    /// [`DestinationEvent::Superseded`]: crate::DestinationEvent::Superseded
    pub fn gives_way(&self, now: Time) -> bool {
        self.state == State::Lingering
            || (self.is_rehearsal() && self.can_abort())
            || self.owes_beginning(now).is_some_and(|(owed, limit)| owed >= limit)
    }

    /// Whether the attempt is being undone, or is over without a guest.
    pub fn is_undone(&self) -> bool {
        matches!(self.state, State::JournalAborted | State::Releasing | State::Lingering | State::Done)
    }

    /// Why the attempt is being undone, if it is, and no rehearsal came to its end.
    pub fn failing(&self) -> Option<Failure> {
        let undoing = matches!(self.state, State::JournalAborted | State::Releasing | State::Lingering);
        (undoing && !self.rollback.rehearsed).then(|| match (&self.rollback.cause, &self.rollback.refused) {
            (None, Some(_)) => self.error("it was refused"),
            _ => self.cause(),
        })
    }

    /// Whether nothing of a guest has come yet, nor can have: another source may wait to see whether this one brings one.
    pub fn has_brought_nothing(&self) -> bool {
        match self.state {
            State::AwaitingHello
            | State::AwaitingOffer
            | State::Reserving
            | State::JournalReserved
            | State::AwaitingBegin
            | State::JournalLoading
            | State::Opening => true,
            State::Loading => !self.beginning.has_come && self.iterations.ended == 0,
            _ => false,
        }
    }

    /// For how long the source has owed what an attempt begins with, and for how long it may while another waits. `None` while it is
    /// this side's turn, or once there is something to lose.
    fn owes_beginning(&self, now: Time) -> Option<(Duration, Duration)> {
        match self.state {
            State::AwaitingOffer | State::AwaitingBegin => {
                self.timer.map(|expected| (expected.waited(now), WAITED_FOR_WORD))
            }
            State::Loading if self.has_brought_nothing() => {
                let since = self.beginning.open_since?;
                Some((now.saturating_sub(since), WAITED_FOR_GUEST))
            }
            _ => None,
        }
    }

    /// How long its source may still ask what became of an attempt that is undone; `None` while it is not, or if it knows.
    pub fn awaits_question(&self) -> Option<Duration> {
        let timer = self.timer.filter(|_| self.state == State::Lingering);
        timer.map(|expected| expected.limit())
    }

    pub(super) fn on_superseded(&mut self, now: Time) {
        if self.state == State::Lingering {
            self.finish_aborted();
        } else if self.gives_way(now) {
            let cause = if self.is_rehearsal() {
                "another source came, which a rehearsal does not keep out"
            } else {
                "another source waits, and this one brought nothing in time"
            };
            self.roll_back(failure(Side::Destination, self.phase, cause, "try again when it is over"), now);
        }
    }

    pub(super) fn aborted_by_source(&mut self, cause: Failure, now: Time) {
        self.rollback.source_gave_up = true;
        self.abort(cause, now);
    }

    pub(super) fn roll_back(&mut self, cause: Failure, now: Time) {
        self.timer = None;
        self.rollback.cause = Some(cause);
        self.rollback.interrupted = self.busy;
        // RESERVED may be on its way to the disk and not yet confirmed; ABORTED is written over it all the same.
        let reserved = (self.state == State::JournalReserved).then_some(DestinationState::Reserved);
        let next = self.journal.or(reserved).map(|journal| journal.next(DestinationStep::Abort));
        match next {
            Some(Ok(aborted)) => {
                self.rollback.journal_asked = true;
                self.act(State::JournalAborted, DestinationAction::Journal(aborted));
                self.expect_by("the journal", now);
            }
            Some(Err(_)) => self.send_abort_and_release(now),
            None => self.send_abort_and_release(now),
        }
    }

    pub(super) fn refuse(&mut self, reasons: Vec<Reason>, now: Time) {
        self.busy = false;
        self.send(Message::Refuse(reasons.clone()));
        self.rollback.source_notified = true;
        self.rollback.refused = Some(reasons);
        self.send_abort_and_release(now);
    }

    /// The source's own rules forbid it.
    pub(super) fn refused_by_source(&mut self, reasons: Vec<Reason>, now: Time) {
        self.rollback.source_gave_up = true;
        self.rollback.refused = Some(reasons);
        self.roll_back(failure(Side::Destination, self.phase, "refused by the source", ""), now);
    }

    pub(super) fn on_aborted_journaled(&mut self, now: Time) {
        self.journal = Some(DestinationState::Aborted);
        // Actions are done one after another: what the abort interrupted has ended too.
        self.rollback.interrupted = false;
        let cause = self.cause();
        if self.rollback.source_may_have_committed && !self.rollback.source_gave_up {
            self.send(Message::Declined(cause.clone()));
            self.rollback.source_notified = true;
        }
        if std::mem::take(&mut self.commit.asked) {
            self.answer(Message::Declined(cause));
        }
        self.send_abort_and_release(now);
    }

    /// Without ABORTED on disk DECLINED must not be sent: a source that has committed goes on asking.
    pub(super) fn aborted_not_journaled(&mut self, cause: &Failure, now: Time) {
        if std::mem::take(&mut self.rollback.interrupted) {
            return;
        }
        if let Some(first) = &mut self.rollback.cause {
            // A disk that fails fails twice; once is enough to read.
            if !first.text.contains(&cause.text) {
                first.text = format!("{}; then the journal could not be written: {}", first.text, cause.text);
            }
        }
        if std::mem::take(&mut self.commit.asked) {
            self.answer(Message::Abort(self.cause()));
        }
        self.send_abort_and_release(now);
    }

    pub(super) fn journal_overdue(&mut self, now: Time) {
        self.rollback.interrupted = false;
        self.aborted_not_journaled(&failure(Side::Destination, Phase::Clean, "no answer in time", ""), now);
    }

    pub(super) fn send_abort_and_release(&mut self, now: Time) {
        if !self.rollback.source_notified && !self.rollback.source_gave_up {
            self.send(Message::Abort(self.cause()));
        }
        if self.rollback.something_reserved {
            self.act(State::Releasing, DestinationAction::Release);
            self.expect_work("the release", now);
        } else {
            self.linger_or_finish(now);
        }
    }

    pub(super) fn on_released(&mut self, now: Time) {
        self.busy = false;
        self.linger_or_finish(now);
    }

    pub(super) fn release_failed(&mut self, cause: &Failure, now: Time) {
        if std::mem::take(&mut self.rollback.interrupted) {
            return;
        }
        match &mut self.rollback.cause {
            Some(first) => {
                first.text = format!("{}; then not all could be released: {}", first.text, cause.text)
            }
            // A rehearsal ends without a cause.
            None => self.rollback.cause = Some(cause.clone()),
        }
        self.on_released(now);
    }

    pub(super) fn release_overdue(&mut self, now: Time) {
        self.rollback.interrupted = false;
        self.release_failed(&failure(Side::Destination, Phase::Clean, "no answer in time", ""), now);
    }

    /// On the way back the source's words change nothing, but a COMMIT needs its answer.
    pub(super) fn on_peer_in_rollback(&mut self, message: &Message) {
        match message {
            Message::Abort(_) | Message::LimitsUnmet(_) => {
                self.rollback.source_gave_up = true;
                if self.state == State::Lingering {
                    self.finish_aborted();
                }
            }
            Message::Commit(_) => {
                self.rollback.source_may_have_committed = true;
                if self.journal == Some(DestinationState::Aborted) {
                    self.send(Message::Declined(self.cause()));
                }
            }
            _ => {}
        }
    }

    pub(super) fn finish_aborted(&mut self) {
        self.state = State::Done;
        if self.rollback.rehearsed {
            return self.finish_rehearsed();
        }
        match self.rollback.refused.take() {
            Some(reasons) => self.finish(DestinationOutcome::Refused(reasons)),
            None if self.rollback.limits_unmet => self.finish(DestinationOutcome::LimitsUnmet(self.cause())),
            None if self.rollback.cancelled => self.finish(DestinationOutcome::Cancelled(self.cause())),
            None => self.finish(DestinationOutcome::Aborted(self.cause())),
        }
    }

    pub(super) fn on_end_rehearsal(&mut self, obstacle: Option<Failure>, now: Time) {
        self.rollback.obstacle = obstacle;
        self.timer = None;
        self.rollback.rehearsed = true;
        self.rollback.source_gave_up = true;
        self.rollback.interrupted = self.busy;
        self.send_abort_and_release(now);
    }

    fn finish_rehearsed(&mut self) {
        let left_undone = self.rollback.cause.take();
        self.send(Message::Rehearsed { left_undone: left_undone.clone() });
        let obstacle = self.rollback.obstacle.take();
        self.finish(DestinationOutcome::Rehearsed { obstacle, left_undone });
    }

    fn linger_or_finish(&mut self, now: Time) {
        self.busy = false;
        let answerable = self.journal == Some(DestinationState::Aborted);
        // What was sent over the old connection may never have arrived.
        let asked = self.rollback.source_may_have_committed && !self.rollback.source_gave_up;
        if !(answerable && asked) {
            return self.finish_aborted();
        }
        self.state = State::Lingering;
        let timeout = match self.rollback.cancelled || self.rollback.cancelled_late {
            true => LINGER_CANCELLED,
            false => self.config.peer_timeout.saturating_mul(LINGER),
        };
        self.timer = Some(ExpectedAnswer::within(timeout, "a question", now));
    }

    pub(super) fn cause(&self) -> Failure {
        self.rollback.cause.clone().unwrap_or_else(|| self.error("given up"))
    }
}
