//! P1 to P3: who comes, whether there is room for it, and what it sends while its guest runs.

use vfio_migration_types::Phase;
use vfio_migration_wire::{Accept, Applied, Hello, HelloReply, Lease, Message, Offer, Reason, negotiate};

use super::{Destination, State};
use crate::api::{Attempt, DestinationAction, Time};
use crate::failure::failure;
use crate::ownership::{DestinationState, DestinationStep};

use super::Owed;

/// What P3 remembers.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    /// The last iteration whose end has come.
    ended: u32,
    /// The last iteration that was applied.
    applied: u32,
    /// What ACCEPT will say.
    accept: Accept,
    /// Digest of the identity that was judged.
    pub(super) identity: [u8; 32],
}

impl Destination {
    pub(super) fn on_hello(&mut self, hello: &Hello, now: Time) {
        self.timer = None;
        if let Some(expected) = self.config.expect.filter(|expected| *expected != hello.vm) {
            let text = format!("VM {} is expected here, not VM {}", expected, hello.vm);
            return self.refuse(vec![refusal("other-vm", text)], now);
        }
        let ours = self.config.versions;
        let Some(version) = negotiate(hello.versions, ours) else {
            let text = format!(
                "the source speaks protocol versions {} to {}, the destination {} to {}",
                hello.versions.min, hello.versions.max, ours.min, ours.max
            );
            return self.refuse(vec![refusal("protocol-version", text)], now);
        };
        self.attempt = Some(Attempt { vm: hello.vm, attempt: hello.attempt, epoch: hello.epoch });
        let reply = HelloReply { version, features: hello.features & self.config.features };
        self.negotiated = Some(reply);
        self.send(Message::HelloReply(reply));
        self.state = State::AwaitingOffer;
        self.owe("OFFER", now);
    }

    pub(super) fn on_offer(&mut self, offer: Offer) {
        self.timer = None;
        self.teardown.something_reserved = true;
        self.act(State::Reserving, DestinationAction::Reserve(offer));
    }

    pub(super) fn on_reserved(
        &mut self,
        manifest: Vec<u8>,
        reasons: Vec<Reason>,
        identity: [u8; 32],
        now: Time,
    ) {
        let valid_ms = u32::try_from(self.config.lease_time.as_millis()).unwrap_or(u32::MAX);
        let lease = Lease { id: self.config.lease, valid_ms };
        self.incoming.accept = Accept { lease, reasons, manifest };
        self.incoming.identity = identity;
        if self.rehearses() {
            return self.accept(now);
        }
        self.act(State::JournalReserved, DestinationAction::Journal(DestinationState::Reserved));
    }

    pub(super) fn on_reserved_journaled(&mut self, now: Time) {
        self.journal = Some(DestinationState::Reserved);
        self.accept(now);
    }

    /// What was reserved is this source's for as long as the lease says.
    fn accept(&mut self, now: Time) {
        self.busy = false;
        let accept = std::mem::take(&mut self.incoming.accept);
        self.send(Message::Accept(accept));
        self.state = State::AwaitingBegin;
        let until = now.saturating_add(self.config.lease_time);
        self.timer = Some(Owed { what: "BEGIN, and its lease has ended", since: now, until });
    }

    pub(super) fn on_begin(&mut self, lease: [u8; 16], now: Time) {
        self.timer = None;
        self.phase = Phase::Setup;
        if lease != self.config.lease {
            let text = "the source begins on a lease that was not granted to it: protocol error";
            return self.abort(failure(self.phase, text, ""), now);
        }
        if self.rehearses() {
            return self.act(State::Opening, DestinationAction::BeginResuming);
        }
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

fn refusal(code: &str, text: String) -> Reason {
    let (severity, fix) = ("no".to_owned(), "configuration".to_owned());
    Reason { code: code.to_owned(), text, severity, fix, ..Reason::default() }
}
