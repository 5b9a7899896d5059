//! P1 to P3: who comes, whether there is room for it, and what it sends while its guest runs.

use vfio_migration_types::Phase;
use vfio_migration_wire::{Applied, Hello, HelloReply, Message, Refusal, negotiate};

use super::{Destination, State};
use crate::failure::failure;
use crate::ownership::{DestinationState, DestinationStep};
use crate::{Attempt, DestinationAction, Time};

/// What P3 remembers.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// The last iteration whose end has come.
    ended: u32,
    /// The last iteration that was applied.
    applied: u32,
}

impl Destination {
    pub(super) fn on_hello(&mut self, hello: &Hello, now: Time) {
        self.timer = None;
        if let Some(expected) = self.config.expect.filter(|expected| *expected != hello.vm) {
            let text = format!("VM {} is expected here, not VM {}", expected, hello.vm);
            return self.refuse(vec![Refusal { code: "other-vm".to_owned(), text }], now);
        }
        let ours = self.config.versions;
        let Some(version) = negotiate(hello.versions, ours) else {
            let text = format!(
                "the source speaks protocol versions {} to {}, the destination {} to {}",
                hello.versions.min, hello.versions.max, ours.min, ours.max
            );
            return self.refuse(vec![Refusal { code: "protocol-version".to_owned(), text }], now);
        };
        self.attempt = Some(Attempt { vm: hello.vm, attempt: hello.attempt, epoch: hello.epoch });
        let reply = HelloReply { version, features: hello.features & self.config.features };
        self.negotiated = Some(reply);
        self.send(Message::HelloReply(reply));
        self.state = State::AwaitingOffer;
        self.owe("OFFER", now);
    }

    pub(super) fn on_offer(&mut self, manifest: Vec<u8>) {
        self.timer = None;
        self.teardown.something_reserved = true;
        self.act(State::Reserving, DestinationAction::Reserve { manifest });
    }

    pub(super) fn on_reserved(&mut self, _now: Time) {
        self.act(State::JournalReserved, DestinationAction::Journal(DestinationState::Reserved));
    }

    pub(super) fn on_reserved_journaled(&mut self, now: Time) {
        self.busy = false;
        self.journal = Some(DestinationState::Reserved);
        self.send(Message::Accept);
        self.state = State::AwaitingBegin;
        self.owe("BEGIN", now);
    }

    pub(super) fn on_begin(&mut self, now: Time) {
        self.timer = None;
        self.phase = Phase::Setup;
        self.journal_step(State::JournalLoading, DestinationStep::Load, now);
    }

    pub(super) fn on_loading_journaled(&mut self) {
        self.journal = Some(DestinationState::Loading);
        self.act(State::Opening, DestinationAction::BeginResuming);
    }

    pub(super) fn on_resuming_begun(&mut self) {
        self.busy = false;
        self.send(Message::Begun);
        self.phase = Phase::Iterate;
        self.state = State::Loading;
    }

    pub(super) fn on_end_iteration(&mut self, iteration: u32, now: Time) {
        if iteration != self.incoming.ended.saturating_add(1) {
            let text = format!(
                "iteration {iteration} ended after iteration {}: protocol error",
                self.incoming.ended
            );
            return self.abort(failure(self.phase, text, ""), now);
        }
        self.incoming.ended = iteration;
    }

    pub(super) fn on_applied(&mut self, applied: Applied, now: Time) {
        if applied.iteration <= self.incoming.applied || applied.iteration > self.incoming.ended {
            let text = format!(
                "the session applied iteration {} of {}: a defect of this program",
                applied.iteration, self.incoming.ended
            );
            return self.abort(failure(self.phase, text, ""), now);
        }
        self.incoming.applied = applied.iteration;
        self.send(Message::Applied(applied));
    }

    /// Journals the state that `step` leads to; what cannot be journaled is not done.
    pub(super) fn journal_step(&mut self, state: State, step: DestinationStep, now: Time) {
        let Some(journal) = self.journal else {
            return self.abort(self.error("nothing was journaled: a defect of this program"), now);
        };
        match journal.next(step) {
            Ok(next) => self.act(state, DestinationAction::Journal(next)),
            Err(error) => self.abort(self.error(&error.to_string()), now),
        }
    }
}
