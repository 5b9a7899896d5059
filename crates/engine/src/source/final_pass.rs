//! P5: the last dirty pages, the machine state and the devices' data to their end; then the storage locks go.

use vfio_migration_types::Phase;
use vfio_migration_wire::{Final, FinalEnd, Message};

use super::state::{Pause, SourceEngine, State};
use crate::api::{SourceAction, Time};

impl SourceEngine {
    pub(super) fn begin_final_pass(&mut self, now: Time) {
        self.enter(Phase::Final, now);
        let Pause { guest_ran, identity, .. } = self.pause;
        // On the way back the guest runs if it ran, whatever was asked for there.
        self.send(Message::Final(Final { guest_ran, suspend: self.config.suspend, identity }));
        self.act(State::SendingFinal, SourceAction::SendFinal { verify: self.verify() });
    }

    pub(super) fn on_final_sent(&mut self, totals: FinalEnd, now: Time) {
        self.pause.totals = Some(totals.clone());
        if self.config.rehearse.is_none() {
            return self.act(State::ReleasingLocks, SourceAction::ReleaseLocks);
        }
        self.end_final(totals, now);
    }

    pub(super) fn on_locks_released(&mut self, now: Time) {
        let Some(totals) = self.pause.totals.clone() else { return };
        self.send(Message::LocksFree);
        self.end_final(totals, now);
    }

    fn end_final(&mut self, totals: FinalEnd, now: Time) {
        self.send(Message::FinalEnd(totals));
        self.enter(Phase::Ready, now);
        self.state = State::AwaitingReady;
        if self.verify() { self.expect_work("READY", now) } else { self.expect_by("READY", now) }
    }
}
