//! P2: dirty logging on, and the devices' sessions open on both sides.

use vfio_migration_types::Phase;
use vfio_migration_wire::{Lease, Message};

use super::state::{SourceEngine, State};
use crate::api::{DeviceProgress, SourceAction, Time};
use crate::ownership::{SourceState, SourceStep};

impl SourceEngine {
    pub(super) fn begin_setup(&mut self, now: Time) {
        self.enter(Phase::Setup, now);
        match self.config.rehearse {
            Some(_) => self.begin(now),
            None => self.journal_step(State::JournalSending, SourceStep::Begin),
        }
    }

    pub(super) fn on_sending(&mut self, now: Time) {
        self.journal = SourceState::Sending;
        self.begin(now);
    }

    fn begin(&mut self, now: Time) {
        let Lease { id, .. } = self.lease;
        self.send(Message::Begin { lease: id });
        self.act(State::SettingUp { set_up: false, begun: false }, SourceAction::SetUp);
        self.expect_work("BEGUN", now);
    }

    pub(super) fn on_begun(&mut self, set_up: bool, now: Time) {
        self.state = State::SettingUp { set_up, begun: true };
        self.timer = None;
        self.iterate_when_set_up(now);
    }

    pub(super) fn on_set_up(&mut self, begun: bool, devices: &[DeviceProgress], now: Time) {
        self.state = State::SettingUp { set_up: true, begun };
        self.rounds.update_progress(devices);
        self.iterate_when_set_up(now);
    }

    fn iterate_when_set_up(&mut self, now: Time) {
        if self.state == (State::SettingUp { set_up: true, begun: true }) {
            self.enter(Phase::Iterate, now);
            self.begin_iterating(now);
        }
    }
}
