//! A rehearsal: what was done is undone when the source says so. Nothing is journaled.

use vfio_migration_wire::{FEATURE_REHEARSE, Message};

use super::Destination;
use crate::api::{DestinationOutcome, Time};

impl Destination {
    /// Whether nothing is to move.
    pub(super) fn rehearses(&self) -> bool {
        self.negotiated.is_some_and(|negotiated| negotiated.features & FEATURE_REHEARSE != 0)
    }

    pub(super) fn on_end_rehearsal(&mut self, now: Time) {
        self.timer = None;
        self.teardown.rehearsed = true;
        self.teardown.source_gave_up = true;
        self.teardown.interrupted = self.busy;
        self.say_abort_and_release(now);
    }

    pub(super) fn finish_rehearsed(&mut self) {
        let left_undone = self.teardown.cause.take();
        self.send(Message::Rehearsed { left_undone: left_undone.clone() });
        self.finish(DestinationOutcome::Rehearsed(left_undone));
    }
}
