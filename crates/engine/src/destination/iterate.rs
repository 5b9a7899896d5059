//! P3: iterations come while the guest runs at the source, and each is acknowledged when it is applied.

use vfio_migration_wire::{Applied, Message};

use super::state::DestinationEngine;
use crate::api::Time;
use crate::failure::failure;

impl DestinationEngine {
    pub(super) fn on_end_iteration(&mut self, iteration: u32, now: Time) {
        if iteration != self.counts.ended.saturating_add(1) {
            let text =
                format!("iteration {iteration} ended after iteration {}: protocol error", self.counts.ended);
            return self.abort(failure(self.phase, text, ""), now);
        }
        self.counts.ended = iteration;
    }

    pub(super) fn on_applied(&mut self, applied: Applied, now: Time) {
        if applied.iteration <= self.counts.applied || applied.iteration > self.counts.ended {
            let text = format!(
                "the session applied iteration {} of {}: a defect of this program",
                applied.iteration, self.counts.ended
            );
            return self.abort(failure(self.phase, text, ""), now);
        }
        self.counts.applied = applied.iteration;
        self.send(Message::Applied(applied));
    }
}
