//! P2: the devices' resuming sessions are opened.

use vfio_migration_types::{Phase, Side};
use vfio_migration_wire::Message;

use super::state::{DestinationEngine, State};
use crate::api::{DestinationAction, Time};
use crate::failure::failure;
use crate::ownership::{DestinationState, DestinationStep};

impl DestinationEngine {
    pub(super) fn on_begin(&mut self, lease: [u8; 16], now: Time) {
        self.timer = None;
        self.phase = Phase::Setup;
        if lease != self.config.lease {
            let text = "the source begins on a lease that was not granted to it: protocol error";
            return self.abort(failure(Side::Destination, self.phase, text, ""), now);
        }
        if self.is_rehearsal() {
            return self.act(State::Opening, DestinationAction::BeginResuming);
        }
        self.journal_step(State::JournalLoading, DestinationStep::Load, now);
    }

    pub(super) fn on_loading_journaled(&mut self) {
        self.journal = Some(DestinationState::Loading);
        self.act(State::Opening, DestinationAction::BeginResuming);
    }

    pub(super) fn on_resuming_begun(&mut self, now: Time) {
        self.busy = false;
        self.beginning.open_since = Some(now);
        self.send(Message::Begun);
        self.phase = Phase::Iterate;
        self.state = State::Loading;
    }
}
