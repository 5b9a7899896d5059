//! P6: everything is loaded and verified, and READY sent.

use vfio_migration_types::Side;
use vfio_migration_wire::{Message, Ready};

use super::state::{DestinationEngine, State};
use crate::api::Time;
use crate::failure::compare;
use crate::ownership::{DestinationState, DestinationStep};

impl DestinationEngine {
    pub(super) fn on_loaded(&mut self, ready: Ready, now: Time) {
        self.busy = false;
        let Some(totals) = &self.final_pass.totals else { return };
        // The source compares too. Here it is caught before READY is in the journal.
        if let Err(cause) = compare(Side::Destination, totals, &ready, &[]) {
            return self.abort(cause, now);
        }
        if self.is_rehearsal() {
            self.send(Message::Ready(ready));
            self.state = State::Ready;
            return self.expect_by("END_REHEARSAL", now);
        }
        self.final_pass.ready = Some(ready);
        self.journal_step(State::JournalReady, DestinationStep::Ready, now);
    }

    pub(super) fn on_ready_journaled(&mut self, now: Time) {
        self.busy = false;
        self.journal = Some(DestinationState::Ready);
        let Some(ready) = self.final_pass.ready.clone() else { return };
        self.rollback.source_may_have_committed = true;
        self.send(Message::Ready(ready));
        self.state = State::Ready;
        self.expect_by("COMMIT", now);
    }
}
