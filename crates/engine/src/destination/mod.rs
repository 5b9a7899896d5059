//! The destination's side of a migration.
//!
//! A file is a phase, from `hello` (P1) to `run` (P8); `rollback` is the way back from each of them before P8. They share
//! `state`. Here events are dispatched to the phases' methods. The guest never runs here but after COMMIT, with OWNER in
//! the journal.

mod commit;
mod final_pass;
mod hello;
mod iterate;
mod ready;
mod rollback;
mod run;
mod setup;
mod state;

use std::collections::VecDeque;

use vfio_migration_types::{Epoch, Failure, Phase, Side};
use vfio_migration_wire::Message;

pub use self::state::DestinationEngine;
use self::state::{
    Beginning, DestinationCommit, DestinationRollback, FinalPass, IterationCounts, Reservation, State,
};
use crate::api::{Attempt, DestinationAction, DestinationConfig, DestinationEvent, Time};
use crate::failure::{failure, link_lost, protocol, silence};
use crate::ownership::DestinationState;

impl DestinationEngine {
    /// A destination on whose connection nothing has come yet; `now` is the present, on the session's clock.
    pub fn new(config: DestinationConfig, now: Time) -> Self {
        let mut destination = Self {
            config,
            state: State::AwaitingHello,
            journal: None,
            phase: Phase::Hello,
            actions: VecDeque::new(),
            busy: false,
            link: true,
            attempt: None,
            negotiated: None,
            timer: None,
            reservation: Reservation::default(),
            iterations: IterationCounts::default(),
            beginning: Beginning::default(),
            final_pass: FinalPass::default(),
            commit: DestinationCommit::default(),
            rollback: DestinationRollback::default(),
        };
        destination.expect_by("HELLO", now);
        destination
    }

    /// Takes an event that came at `now`. Never blocks. Call [`DestinationEngine::poll_action`] until it is `None`
    /// afterwards.
    ///
    /// After [`DestinationAction::Finish`], a [`Message::Query`] is still answered; everything else is ignored.
    pub fn handle(&mut self, event: DestinationEvent, now: Time) {
        match event {
            DestinationEvent::Peer(Message::Query { vm, attempt, epoch, .. }) => {
                self.on_query(Attempt { vm, attempt, epoch }, now);
            }
            _ if matches!(self.state, State::Done | State::Owner) => self.after_the_end(&event),
            DestinationEvent::Peer(message) => self.on_peer(message, now),
            DestinationEvent::Failed(cause) => self.on_failed(cause, now),
            // Not the failure of the action, whose answer may still come. Once the guest is ours it is its start that fails.
            DestinationEvent::Damaged(cause) | DestinationEvent::DeviceLost(cause) => self.abort(cause, now),
            DestinationEvent::LinkLost(why) => self.on_link_lost(&why, now),
            DestinationEvent::Cancel(why) => self.on_cancel(&why, now),
            DestinationEvent::Superseded => self.on_superseded(now),
            DestinationEvent::GuestComes => self.beginning.has_come = true,
            DestinationEvent::Tick => self.on_tick(now),
            answer => self.on_answer(answer, now),
        }
    }

    /// The next action; `None`: wait for an event.
    pub fn poll_action(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// Time at which a [`DestinationEvent::Tick`] is due at the latest, if nothing else happens.
    pub fn deadline(&self) -> Option<Time> {
        self.timer.map(|expected| expected.until)
    }

    /// The phase under way.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The epoch under which the guest is this side's, by its journal; `None` while it is not.
    pub fn owned(&self) -> Option<Epoch> {
        matches!(self.state, State::Starting | State::Owner).then(|| self.next_epoch()).flatten()
    }

    /// Why the attempt is being given up, if it is.
    pub fn abort_cause(&self) -> Option<&Failure> {
        self.rollback.cause.as_ref()
    }

    /// The attempt's names and epoch, once the source has sent them: what the journal's record needs.
    pub fn attempt(&self) -> Option<Attempt> {
        self.attempt
    }

    fn on_peer(&mut self, message: Message, now: Time) {
        // The session's own; harmless if it passes them on.
        if matches!(message, Message::Credit { .. } | Message::Ping { .. } | Message::Pong { .. }) {
            return;
        }
        match (self.state, message) {
            // COMMIT was accepted: nothing that the source sends changes that.
            (State::JournalOwner | State::Starting, _) => {}
            (State::JournalAborted | State::Releasing | State::Lingering, message) => {
                self.on_peer_in_rollback(&message);
            }
            (_, Message::Abort(cause)) => self.aborted_by_source(cause, now),
            (_, Message::LimitsUnmet(cause)) => {
                self.rollback.limits_unmet = true;
                self.aborted_by_source(cause, now);
            }
            (State::AwaitingHello, Message::Hello(hello)) => self.on_hello(&hello, now),
            (_, Message::EndRehearsal { obstacle }) if self.is_rehearsal() => {
                self.on_end_rehearsal(obstacle, now);
            }
            (State::AwaitingOffer, Message::Offer(offer)) => self.on_offer(offer),
            (State::AwaitingBegin, Message::Refuse(reasons)) => self.refused_by_source(reasons, now),
            (State::AwaitingBegin, Message::Begin { lease }) if !self.only_asks() => {
                self.on_begin(lease, now)
            }
            (State::Loading, Message::InitialSent { .. }) => {}
            (State::Loading, Message::EndIteration { iteration }) => self.on_end_iteration(iteration, now),
            (State::Loading, Message::Final(message)) => self.on_final(&message, now),
            (State::FinalPass, Message::LocksFree) => self.on_locks_free(now),
            (State::FinalPass, Message::FinalEnd(totals)) => self.on_final_end(totals, now),
            (State::Ready, Message::Commit(commit)) if !self.is_rehearsal() => self.on_commit(commit, now),
            (_, message) => {
                // A source that sends COMMIT has it in its journal: only DECLINED sets it free.
                self.rollback.source_may_have_committed |= matches!(message, Message::Commit(_));
                self.abort(protocol(Side::Destination, self.phase, &message), now);
            }
        }
    }

    /// ABORT, while the source has yet to be told that the attempt is given up: for a session that cannot do so in turn, because
    /// something does not answer.
    pub fn owed_abort(&self) -> Option<Message> {
        let rolling_back = matches!(self.state, State::JournalAborted | State::Releasing);
        let told = self.rollback.source_gave_up || self.rollback.source_notified || !self.link;
        (rolling_back && !told).then(|| Message::Abort(self.cause()))
    }

    /// Whether the source gave the attempt up: nothing more is to be said to it.
    pub fn source_gave_up(&self) -> bool {
        self.rollback.source_gave_up && !self.rollback.rehearsed
    }

    fn on_answer(&mut self, event: DestinationEvent, now: Time) {
        match (self.state, event) {
            (State::Reserving, DestinationEvent::Reserved { manifest, reasons, identity }) => {
                self.on_reserved(manifest, reasons, identity, now);
            }
            (State::Reserving, DestinationEvent::Refused(reasons)) => self.refuse(reasons, now),
            (State::JournalReserved, DestinationEvent::Journaled(DestinationState::Reserved)) => {
                self.on_reserved_journaled(now);
            }
            (State::JournalLoading, DestinationEvent::Journaled(DestinationState::Loading)) => {
                self.on_loading_journaled();
            }
            (State::Opening, DestinationEvent::ResumingBegun) => self.on_resuming_begun(now),
            (State::Loading | State::FinalPass, DestinationEvent::InitialLoaded { device, generation }) => {
                self.send(Message::InitialLoaded { device, generation });
            }
            (State::Loading | State::FinalPass, DestinationEvent::Applied(applied)) => {
                self.on_applied(applied, now)
            }
            // What the last round brought may be in while the rest is verified; the source knows what it needs.
            (
                State::Verifying | State::JournalReady | State::Ready | State::JournalOwner,
                DestinationEvent::InitialLoaded { .. } | DestinationEvent::Applied(_),
            ) => {}
            (State::FinalPass, DestinationEvent::LocksTaken) => self.on_locks_taken(now),
            (State::Verifying, DestinationEvent::Loaded(ready)) => self.on_loaded(ready, now),
            (State::JournalReady, DestinationEvent::Journaled(DestinationState::Ready)) => {
                self.on_ready_journaled(now);
            }
            (State::JournalOwner, DestinationEvent::Journaled(DestinationState::Owner)) => {
                self.on_owner_journaled()
            }
            (State::Starting, DestinationEvent::Started(running)) => self.on_started(running),
            (State::JournalAborted, DestinationEvent::Journaled(DestinationState::Aborted)) => {
                self.on_aborted_journaled(now);
            }
            (State::Releasing, DestinationEvent::Released) => self.on_released(now),
            // It was overdue, and came all the same.
            (State::Releasing, DestinationEvent::Journaled(DestinationState::Aborted))
                if self.rollback.journal_asked =>
            {
                self.journal = Some(DestinationState::Aborted);
            }
            // A late answer of what the abort interrupted.
            (State::JournalAborted | State::Releasing, _) => self.rollback.interrupted = false,
            (State::JournalOwner | State::Starting | State::Lingering, _) => {}
            (state, event) => {
                let text =
                    format!("the session reported {event:?} in state {state:?}: a defect of this program");
                self.abort(failure(Side::Destination, self.phase, text, ""), now);
            }
        }
    }

    fn on_failed(&mut self, cause: Failure, now: Time) {
        match self.state {
            State::JournalOwner => self.owner_not_journaled(cause, now),
            State::Starting => self.start_failed(cause),
            State::JournalAborted => self.aborted_not_journaled(&cause, now),
            State::Releasing => self.release_failed(&cause, now),
            State::Lingering => {}
            _ => {
                self.busy = false;
                self.abort(cause, now);
            }
        }
    }

    fn on_link_lost(&mut self, why: &str, now: Time) {
        self.link = false;
        self.abort(link_lost(Side::Destination, self.phase, why), now);
    }

    fn on_tick(&mut self, now: Time) {
        let Some(expected) = self.timer.filter(|expected| now >= expected.until) else { return };
        self.timer = None;
        match self.state {
            State::JournalAborted => self.journal_overdue(now),
            State::Releasing => self.release_overdue(now),
            State::Lingering => self.finish_aborted(),
            _ => {
                let waited = expected.waited(now);
                self.abort(silence(Side::Destination, self.phase, expected.what, waited), now);
            }
        }
    }
}
