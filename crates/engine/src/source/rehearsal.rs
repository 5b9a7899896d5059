//! A rehearsal: everything up to a point for real, then all of it undone. Nothing is journaled, and there is no COMMIT.

use std::time::Duration;

use vfio_migration_types::{Failure, Phase, Side};
use vfio_migration_wire::Message;

use super::state::{AbortNotice, SourceEngine, State};
use crate::api::{
    Abort, Part, PartBasis, PartName, RehearsalResult, Rehearse, SourceAction, SourceOutcome, Time,
};
use crate::failure::link_lost;

impl SourceEngine {
    /// The migration would not come to its end. A rehearsal has found that out; a migration is undone.
    pub(super) fn conclude(&mut self, cause: Failure, now: Time) {
        self.concluded_at = Some(now);
        if self.config.rehearse.is_some() {
            self.end_rehearsal(Some(cause), now);
        } else {
            // Later the guest has been paused for it, which another attempt may do faster.
            let unmet = self.phase == Phase::Iterate;
            self.abort(cause, if unmet { AbortNotice::SendUnmet } else { AbortNotice::Send });
        }
    }

    /// Keeps what was found, and has both sides undone.
    pub(super) fn end_rehearsal(&mut self, obstacle: Option<Failure>, now: Time) {
        self.timer = None;
        self.concluded_at = Some(now);
        let (wire, load, ram_dirty, devices_dirty) = self.model.rates();
        self.rehearsal.result = RehearsalResult {
            obstacle,
            iterations: self.rounds.iteration,
            wire,
            load,
            ram_dirty,
            devices_dirty,
            parts: self.parts(now),
            left_undone: None,
            phases: self.phases.clone(),
        };
        let obstacle = self.rehearsal.result.obstacle.clone();
        self.send(Message::EndRehearsal { obstacle });
        if self.config.rehearse == Some(Rehearse::Ask) {
            return self.await_rehearsed(now);
        }
        self.act(State::Undoing, SourceAction::RollBack);
    }

    pub(super) fn await_rehearsed(&mut self, now: Time) {
        if let Some(cause) = self.rehearsal.cancelled.take() {
            return self.finish_cancelled(cause);
        }
        self.phase = Phase::Clean;
        self.state = State::AwaitingRehearsed;
        if let Some(left_undone) = self.rehearsal.rehearsed.take() {
            return self.on_rehearsed(left_undone);
        }
        if !self.link {
            let lost = link_lost(
                Side::Source,
                self.phase,
                "before the destination said that it has released everything",
            );
            return self.on_rehearsed(Some(lost));
        }
        self.expect_work("REHEARSED", now);
    }

    /// The destination may have released everything before this side is undone.
    pub(super) fn on_peer_rehearsed(&mut self, message: Message) {
        let left_undone = match message {
            Message::Rehearsed { left_undone } => left_undone,
            Message::Abort(cause) => Some(cause),
            // On their way before END_REHEARSAL was received.
            _ => return,
        };
        match self.state {
            State::AwaitingRehearsed => self.on_rehearsed(left_undone),
            _ => self.rehearsal.rehearsed = Some(left_undone),
        }
    }

    /// The operator does not wait for the destination, which releases everything whoever listens. Here all is undone.
    pub(super) fn finish_cancelled(&mut self, cause: Failure) {
        self.finish(SourceOutcome::Aborted(Abort {
            cause,
            cancelled: true,
            obstacle: false,
            reset: Vec::new(),
            lost: Vec::new(),
            locks_lost: Vec::new(),
            restored: true,
            left_undone: Vec::new(),
        }));
    }

    pub(super) fn on_rehearsed(&mut self, left_undone: Option<Failure>) {
        let mut result = std::mem::take(&mut self.rehearsal.result);
        result.left_undone = self.rehearsal.late.take().or(left_undone);
        self.finish(SourceOutcome::Rehearsed(Box::new(result)));
    }

    /// Parts of the downtime: as measured, if the guest was paused for it; else as predicted.
    fn parts(&self, now: Time) -> Vec<Part> {
        let start = Part { name: PartName::Start, took: Duration::ZERO, basis: PartBasis::Unknown };
        let mut parts = match self.commit.ready_at {
            Some(ready_at) => self.measured_parts(ready_at),
            None => match self.model.predict(now) {
                Some(prediction) => self.model.parts(&prediction, &self.config.devices),
                None => return Vec::new(),
            },
        };
        parts.push(start);
        parts
    }

    fn measured_parts(&self, ready_at: Time) -> Vec<Part> {
        let entered =
            |phase| self.phases.iter().rev().find(|(entered, _)| *entered == phase).map(|(_, at)| *at);
        let (Some(quiesce), Some(last), Some(ready)) =
            (entered(Phase::Quiesce), entered(Phase::Final), entered(Phase::Ready))
        else {
            return Vec::new();
        };
        // Digests are no downtime; they are in the last two.
        let paused = ready_at.saturating_sub(last).saturating_sub(self.pause.verify);
        let sending = ready.saturating_sub(last).min(paused);
        [
            (PartName::Quiesce, last.saturating_sub(quiesce)),
            (PartName::Final, sending),
            (PartName::Load, paused.saturating_sub(sending)),
            (PartName::RoundTrips, self.model.known_round_trip()),
        ]
        .map(|(name, took)| Part { name, took, basis: PartBasis::Measured })
        .into()
    }
}
