//! P5: the last pages, machine state and device data come, and the storage locks are taken.

use vfio_migration_types::{PauseCause, Phase, Side};
use vfio_migration_wire::{Final, FinalEnd};

use super::state::{DestinationEngine, LockHandover, State};
use crate::api::{DestinationAction, Time};
use crate::failure::failure;

impl DestinationEngine {
    pub(super) fn on_final(&mut self, message: &Final, now: Time) {
        if message.identity != self.reservation.identity {
            let text = "the source's machine is not what was compared any more: its manifest has changed since the offer";
            let remedy = "try again, so that what it is now is compared";
            return self.abort(failure(Side::Destination, Phase::Quiesce, text, remedy), now);
        }
        self.final_pass.paused = PauseCause::of(message.guest_ran, message.suspend, self.config.suspend);
        self.phase = Phase::Final;
        self.state = State::FinalPass;
    }

    pub(super) fn on_locks_free(&mut self, now: Time) {
        if self.final_pass.locks != LockHandover::Theirs {
            return self.abort(
                failure(
                    Side::Destination,
                    self.phase,
                    "the source freed its locks twice: protocol error",
                    "",
                ),
                now,
            );
        }
        self.final_pass.locks = LockHandover::Taking;
        self.act(State::FinalPass, DestinationAction::TakeLocks);
    }

    pub(super) fn on_locks_taken(&mut self, now: Time) {
        if self.final_pass.locks != LockHandover::Taking {
            return self.abort(self.error("the session took locks unasked: a defect of this program"), now);
        }
        self.busy = false;
        self.final_pass.locks = LockHandover::Ours;
        self.load_when_complete();
    }

    pub(super) fn on_final_end(&mut self, totals: FinalEnd, now: Time) {
        // A rehearsal leaves the locks where they are.
        let locked = self.final_pass.locks != LockHandover::Theirs || self.is_rehearsal();
        if self.final_pass.totals.is_some() || !locked {
            let text = "the source ended the final pass twice, or before it freed its locks: protocol error";
            return self.abort(failure(Side::Destination, self.phase, text, ""), now);
        }
        self.final_pass.totals = Some(totals);
        self.load_when_complete();
    }

    fn load_when_complete(&mut self) {
        let locked = self.final_pass.locks == LockHandover::Ours || self.is_rehearsal();
        let Some(totals) = self.final_pass.totals.clone().filter(|_| locked) else { return };
        self.phase = Phase::Ready;
        self.act(State::Verifying, DestinationAction::Load { totals });
    }
}
