//! P1: who comes, and whether there is room for it.

use vfio_migration_wire::{Accept, Hello, HelloReply, Lease, Message, Offer, Reason, negotiate};

use super::state::{DestinationEngine, State, only_asks};
use crate::api::{Attempt, DestinationAction, Time};
use crate::expected::ExpectedAnswer;
use crate::ownership::DestinationState;

impl DestinationEngine {
    pub(super) fn on_hello(&mut self, hello: &Hello, now: Time) {
        self.timer = None;
        // Who came is told of one that is refused at once, too.
        self.attempt = Some(Attempt { vm: hello.vm, attempt: hello.attempt, epoch: hello.epoch });
        if !hello.vm.names_a_vm() && !only_asks(hello.features & self.config.features) {
            return self.refuse(vec![refusal("vm-id", "no VM is named".into())], now);
        }
        let ours = self.config.versions;
        let Some(version) = negotiate(hello.versions, ours) else {
            let text = format!(
                "the source speaks protocol versions {} to {}, the destination {} to {}",
                hello.versions.min, hello.versions.max, ours.min, ours.max
            );
            return self.refuse(vec![refusal("protocol-version", text)], now);
        };
        let reply = HelloReply { version, features: hello.features & self.config.features };
        self.negotiated = Some(reply);
        self.send(Message::HelloReply(reply));
        self.state = State::AwaitingOffer;
        self.timer = Some(ExpectedAnswer::within(self.config.offer_timeout, "OFFER", now));
    }

    pub(super) fn on_offer(&mut self, offer: Offer) {
        self.timer = None;
        self.rollback.something_reserved = true;
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
        self.reservation.accept = Accept { lease, reasons, manifest };
        self.reservation.identity = identity;
        if self.is_rehearsal() {
            return self.accept(now);
        }
        self.act(State::JournalReserved, DestinationAction::Journal(DestinationState::Reserved));
    }

    pub(super) fn on_reserved_journaled(&mut self, now: Time) {
        self.journal = Some(DestinationState::Reserved);
        self.accept(now);
    }

    /// Accepts the offer: what was reserved is this source's for as long as the lease says.
    fn accept(&mut self, now: Time) {
        self.busy = false;
        let accept = std::mem::take(&mut self.reservation.accept);
        self.send(Message::Accept(accept));
        self.state = State::AwaitingBegin;
        let what = "BEGIN, and its lease has ended";
        self.timer = Some(ExpectedAnswer::within(self.config.lease_time, what, now));
    }
}

fn refusal(code: &str, text: String) -> Reason {
    let (severity, fix) = ("no".to_owned(), "configuration".to_owned());
    Reason { code: code.to_owned(), text, severity, fix, ..Reason::default() }
}
