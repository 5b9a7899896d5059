//! P8 and P9: RUNNING came, so the guest is the destination's; RELEASED is journaled, and what is left here released.

use vfio_migration_types::{GuestOutcome, PauseCause, Phase};
use vfio_migration_wire::Running;

use super::state::{SourceEngine, State};
use crate::api::{SourceAction, SourceOutcome, SourceSummary, Time};
use crate::ownership::{SourceState, SourceStep};

impl SourceEngine {
    pub(super) fn on_running(&mut self, running: Running, now: Time) {
        self.timer = None;
        self.commit.ask_at = None;
        self.commit.running = Some(running);
        self.commit.running_at = Some(now);
        self.enter(Phase::Clean, now);
        self.journal_step(State::JournalReleased, SourceStep::Running);
    }

    pub(super) fn on_released(&mut self) {
        if self.commit.left_undone.is_empty() {
            self.journal = SourceState::Released;
        }
        self.act(State::CleaningUp, SourceAction::CleanUp);
    }

    pub(super) fn complete(&mut self) {
        let (Some(ready), Some(running)) = (self.commit.ready.take(), self.commit.running.take()) else {
            return;
        };
        // One that runs is not paused; one that was not asked to be paused by this side was by the other.
        let paused = (running.guest == GuestOutcome::Paused)
            .then(|| PauseCause::of(self.pause.guest_ran, self.config.suspend, true))
            .flatten();
        let summary = SourceSummary {
            paused,
            iterations: self.rounds.iteration,
            paused_at: self.pause.paused_at.unwrap_or_default(),
            ready_at: self.commit.ready_at.unwrap_or_default(),
            running_at: self.commit.running_at.unwrap_or_default(),
            running,
            ready,
            verify: self.pause.verify,
            left_undone: std::mem::take(&mut self.commit.left_undone),
            predicted: self.pause.predicted,
            phases: self.phases.clone(),
        };
        self.finish(SourceOutcome::Completed(summary));
    }
}
