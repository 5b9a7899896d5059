//! P3: iterations come while the guest runs at the source, and each is acknowledged when it is applied.

use vfio_migration_types::Side;
use vfio_migration_wire::{Applied, Message};

use super::state::DestinationEngine;
use crate::api::Time;
use crate::failure::failure;

impl DestinationEngine {
    pub(super) fn on_end_iteration(&mut self, iteration: u32, now: Time) {
        if iteration != self.iterations.ended.saturating_add(1) {
            let text = format!(
                "iteration {iteration} ended after iteration {}: protocol error",
                self.iterations.ended
            );
            return self.abort(failure(Side::Destination, self.phase, text, ""), now);
        }
        self.iterations.ended = iteration;
    }

    pub(super) fn on_applied(&mut self, applied: Applied, now: Time) {
        if applied.iteration <= self.iterations.applied || applied.iteration > self.iterations.ended {
            let text = format!(
                "the session applied iteration {} of {}: a defect of this program",
                applied.iteration, self.iterations.ended
            );
            return self.abort(failure(Side::Destination, self.phase, text, ""), now);
        }
        self.iterations.applied = applied.iteration;
        self.send(Message::Applied(applied));
    }
}
