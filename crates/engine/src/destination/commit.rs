//! P7: COMMIT makes the guest ours, and from then on it is, whatever fails. And the answer to a source that lost ours.

use vfio_migration_types::{Failure, Phase, Side};
use vfio_migration_wire::{Commit, Message};

use super::state::{DestinationEngine, State};
use crate::api::{Attempt, DestinationEvent, Time};
use crate::failure::failure;
use crate::ownership::{DestinationRecord, DestinationStep, QueryAnswer, answer_query};

impl DestinationEngine {
    pub(super) fn on_commit(&mut self, commit: Commit, now: Time) {
        self.timer = None;
        let Some(attempt) = self.attempt else { return };
        if commit.attempt != attempt.attempt || Some(commit.epoch) != self.next_epoch() {
            let text = format!(
                "COMMIT names attempt {} and epoch {}, but this is attempt {}, and epoch {} would begin",
                commit.attempt,
                commit.epoch.0,
                attempt.attempt,
                attempt.epoch.next().0
            );
            return self.abort(failure(Side::Destination, Phase::Commit, text, ""), now);
        }
        self.phase = Phase::Commit;
        self.journal_step(State::JournalOwner, DestinationStep::Commit, now);
    }

    /// Nothing has been started, and nobody was sent RUNNING: the attempt can still be declined, if the journal takes
    /// that.
    pub(super) fn owner_not_journaled(&mut self, cause: Failure, now: Time) {
        self.busy = false;
        self.roll_back(cause, now);
    }

    /// A source lost the answer to its COMMIT. If we do not own the guest, we never will: ABORTED goes to the journal, then
    /// DECLINED to the source.
    pub(super) fn on_query(&mut self, query: Attempt, now: Time) {
        let record = self.record();
        match answer_query(record.as_ref(), query.vm, query.attempt, query.epoch) {
            QueryAnswer::Running { .. } => match self.commit.running.clone() {
                Some(running) => self.answer(Message::Running(running)),
                None => self.commit.asked = true,
            },
            QueryAnswer::Decline(cause) => self.answer(Message::Declined(cause)),
            // OWNER is on its way to the disk: the answer is known when it is there.
            QueryAnswer::AbortThenDecline(_) if self.state == State::JournalOwner => self.commit.asked = true,
            QueryAnswer::AbortThenDecline(cause) => {
                self.rollback.source_may_have_committed = true;
                self.commit.asked = true;
                match self.state {
                    // Under way already, or its journal failed: then nothing is known to be on disk.
                    State::JournalAborted => {}
                    State::Releasing | State::Lingering | State::Done => {
                        self.commit.asked = false;
                        self.answer(Message::Abort(cause));
                    }
                    _ => self.abort(cause, now),
                }
            }
            QueryAnswer::Unknown(cause) => self.answer(Message::Abort(cause)),
        }
    }

    /// A COMMIT that comes twice is answered twice; nothing else matters any more.
    pub(super) fn after_the_end(&mut self, event: &DestinationEvent) {
        match event {
            DestinationEvent::LinkLost(_) => self.link = false,
            DestinationEvent::Peer(Message::Commit(commit)) if Some(commit.epoch) == self.next_epoch() => {
                if let Some(running) = self.commit.running.clone().filter(|_| self.state == State::Owner) {
                    self.send(Message::Running(running));
                }
            }
            _ => {}
        }
    }

    fn record(&self) -> Option<DestinationRecord> {
        let (attempt, state) = (self.attempt?, self.journal?);
        Some(DestinationRecord {
            vm: attempt.vm,
            attempt: attempt.attempt,
            epoch: attempt.epoch,
            state,
            peer: String::new(),
        })
    }
}
