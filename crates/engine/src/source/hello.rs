//! P1: version, manifest, reservation, and the judgement of both sides.

use vfio_migration_types::{Phase, Side};
use vfio_migration_wire::{Accept, FEATURE_ASK, FEATURE_REHEARSE, Hello, HelloReply, Message, Reason};

use super::state::{AbortNotice, SourceEngine, State};
use crate::api::{Rehearse, SourceAction, SourceOutcome, Time};
use crate::failure::failure;

impl SourceEngine {
    pub(super) fn on_connected(&mut self, now: Time) {
        if self.state != State::Idle {
            return;
        }
        self.link = true;
        self.enter(Phase::Hello, now);
        self.state = State::Hello;
        self.send(Message::Hello(Hello {
            versions: self.config.versions,
            features: self.config.features,
            vm: self.config.vm,
            attempt: self.config.attempt,
            epoch: self.config.epoch,
        }));
        self.expect_by("HELLO_REPLY", now);
    }

    pub(super) fn on_hello_reply(&mut self, reply: HelloReply, now: Time) {
        let versions = self.config.versions;
        if !(versions.min..=versions.max).contains(&reply.version) {
            let text = format!(
                "the destination selected protocol version {}, but {} to {} were offered",
                reply.version, versions.min, versions.max
            );
            return self.abort(failure(Side::Source, self.phase, text, ""), AbortNotice::Send);
        }
        if reply.features & !self.config.features != 0 {
            let text = format!(
                "the destination selected features {:#x}, but only {:#x} were offered",
                reply.features, self.config.features
            );
            return self.abort(failure(Side::Source, self.phase, text, ""), AbortNotice::Send);
        }
        if self.config.rehearse.is_some() && reply.features & FEATURE_REHEARSE == 0 {
            let text = "the destination does not know how to rehearse";
            let remedy = "run a release there that does, or compare manifests instead";
            return self.abort(failure(Side::Source, self.phase, text, remedy), AbortNotice::Send);
        }
        if !self.config.vm.names_a_vm() && reply.features & FEATURE_ASK == 0 {
            let text = "the destination answers no question that names no VM";
            let remedy = "ask for a running `vm`, or run a release there that does";
            return self.abort(failure(Side::Source, self.phase, text, remedy), AbortNotice::Send);
        }
        if let Some(expected) = self.timer {
            self.model.round_trip(expected.waited(now));
        }
        self.negotiated = Some(reply);
        self.state = State::Offered;
        self.send(Message::Offer(self.config.offer.clone()));
        self.expect_work("ACCEPT", now);
    }

    pub(super) fn on_accept(&mut self, accept: Accept) {
        self.timer = None;
        self.lease = accept.lease;
        self.act(State::Judging, SourceAction::Judge(accept));
    }

    pub(super) fn on_judged(&mut self, now: Time) {
        if self.config.rehearse == Some(Rehearse::Ask) {
            return self.end_rehearsal(None, now);
        }
        self.begin_setup(now);
    }

    /// Ends the attempt as one that this side's own rules forbid.
    pub(super) fn refuse(&mut self, reasons: Vec<Reason>) {
        self.send(Message::Refuse(reasons.clone()));
        self.finish(SourceOutcome::Refused(reasons));
    }
}
