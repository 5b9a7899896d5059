//! P7 and P8: COMMIT makes the guest ours, and from then on it is, whatever fails. And the answer to a source that lost ours.

use vfio_migration_types::Phase;
use vfio_migration_wire::{Commit, Message, Running};

use super::{Destination, State};
use crate::api::{Attempt, DestinationAction, DestinationEvent, DestinationOutcome, Failure, Time};
use crate::failure::failure;
use crate::ownership::{Answer, DestinationRecord, DestinationState, DestinationStep, answer_query};

/// What P7 and P8 remember.
#[derive(Debug, Default)]
pub(super) struct End {
    /// What was said, to be said again to whoever asks.
    running: Option<Running>,
    /// A question came while the answer was being decided.
    pub(super) asked: bool,
}

impl Destination {
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
            return self.abort(failure(Phase::Commit, text, ""), now);
        }
        self.phase = Phase::Commit;
        self.journal_step(State::JournalOwner, DestinationStep::Commit, now);
    }

    pub(super) fn on_owner_journaled(&mut self) {
        self.journal = Some(DestinationState::Owner);
        self.phase = Phase::Run;
        let Some(epoch) = self.next_epoch() else { return };
        self.act(State::Starting, DestinationAction::Start { epoch, run_guest: self.last.guest_ran });
    }

    /// Nothing has been started, and nobody has been told: the attempt can still be declined, if the journal takes that.
    pub(super) fn owner_not_journaled(&mut self, cause: Failure, now: Time) {
        self.busy = false;
        self.tear_down(cause, now);
    }

    pub(super) fn on_started(&mut self, running: Running) {
        self.busy = false;
        self.say_running(running);
        let (Some(epoch), Some(ready)) = (self.next_epoch(), self.last.ready.clone()) else { return };
        self.state = State::Owner;
        self.finish(DestinationOutcome::Owner { epoch, ready, guest_runs: running.guest_runs });
    }

    /// The guest is ours and stands. The source is told whose it is; it must not take back what we may have touched.
    pub(super) fn start_failed(&mut self, cause: Failure) {
        self.busy = false;
        let Some(epoch) = self.next_epoch() else { return };
        self.say_running(Running { epoch, guest_runs: false, boot_id: [0; 16], at_ns: 0 });
        self.state = State::Owner;
        self.finish(DestinationOutcome::OwnerHeld { epoch, cause });
    }

    fn say_running(&mut self, running: Running) {
        self.end.running = Some(running);
        self.send(Message::Running(running));
        if std::mem::take(&mut self.end.asked) {
            self.answer(Message::Running(running));
        }
    }

    /// A source lost the answer to its COMMIT. If we do not own the guest, we never will: ABORTED goes to the journal, then
    /// DECLINED to the source.
    pub(super) fn on_query(&mut self, query: Attempt, now: Time) {
        let record = self.record();
        match answer_query(record.as_ref(), query.vm, query.attempt, query.epoch) {
            Answer::Running { .. } => match self.end.running {
                Some(running) => self.answer(Message::Running(running)),
                None => self.end.asked = true,
            },
            Answer::Decline(cause) => self.answer(Message::Declined(cause)),
            // OWNER is on its way to the disk: the answer is known when it is there.
            Answer::AbortThenDecline(_) if self.state == State::JournalOwner => self.end.asked = true,
            Answer::AbortThenDecline(cause) => {
                self.teardown.source_may_have_committed = true;
                self.end.asked = true;
                match self.state {
                    // Under way already, or its journal failed: then nothing is known to be on disk.
                    State::JournalAborted => {}
                    State::Releasing | State::Lingering | State::Done => {
                        self.end.asked = false;
                        self.answer(Message::Abort(cause));
                    }
                    _ => self.abort(cause, now),
                }
            }
            Answer::Unknown(cause) => self.answer(Message::Abort(cause)),
        }
    }

    pub(super) fn answer(&mut self, message: Message) {
        self.actions.push_back(DestinationAction::Answer(message));
    }

    /// A COMMIT that comes twice is answered twice; nothing else matters any more.
    pub(super) fn after_the_end(&mut self, event: &DestinationEvent) {
        match event {
            DestinationEvent::LinkLost(_) => self.link = false,
            DestinationEvent::Peer(Message::Commit(commit)) if Some(commit.epoch) == self.next_epoch() => {
                if let Some(running) = self.end.running.filter(|_| self.state == State::Owner) {
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
