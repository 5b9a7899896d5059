//! P8: the guest is ours; devices and vCPUs start, and RUNNING is sent.

use vfio_migration_types::{Failure, GuestOutcome, Phase};
use vfio_migration_wire::{Message, Running};

use super::state::{DestinationEngine, State};
use crate::api::{DestinationAction, DestinationOutcome};
use crate::ownership::DestinationState;

impl DestinationEngine {
    pub(super) fn on_owner_journaled(&mut self) {
        self.journal = Some(DestinationState::Owner);
        self.phase = Phase::Run;
        let Some(epoch) = self.next_epoch() else { return };
        let run_guest = self.final_pass.paused.is_none();
        self.act(State::Starting, DestinationAction::Start { epoch, run_guest });
    }

    pub(super) fn on_started(&mut self, running: Running) {
        self.busy = false;
        self.send_running(running.clone());
        let (Some(epoch), Some(ready)) = (self.next_epoch(), self.final_pass.ready.clone()) else { return };
        self.state = State::Owner;
        let paused = self.final_pass.paused;
        self.finish(DestinationOutcome::Owner { epoch, ready, guest: running.guest, paused });
    }

    /// The guest is ours and stays paused. The source is sent whose it is, and why it does not run; it must not take back
    /// what we may have touched.
    pub(super) fn start_failed(&mut self, cause: Failure) {
        self.busy = false;
        let Some(epoch) = self.next_epoch() else { return };
        let guest = GuestOutcome::NotStarted(Box::new(cause.clone()));
        self.send_running(Running { epoch, guest, boot_id: [0; 16], at_ns: 0 });
        self.state = State::Owner;
        self.finish(DestinationOutcome::OwnedNotStarted { epoch, cause });
    }

    fn send_running(&mut self, running: Running) {
        self.commit.running = Some(running.clone());
        self.send(Message::Running(running.clone()));
        if std::mem::take(&mut self.commit.asked) {
            self.answer(Message::Running(running));
        }
    }
}
