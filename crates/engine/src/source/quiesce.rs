//! P4: the guest is paused; devices to P2P together, one last look at their initial bytes, STOP_COPY. And the watchdog
//! that keeps the downtime below its limit, to the end of P6.

use std::time::Duration;

use vfio_migration_types::{Failure, Phase, Side, milliseconds};

use super::state::{AbortNotice, Pause, SourceEngine, State};
use crate::api::{Barrier, DeviceProgress, Rehearse, SourceAction, Time};
use crate::failure::failure;

/// The number of times that P4 may go back to P3 because a device has declared new initial bytes.
const RETREATS: u32 = 3;

impl SourceEngine {
    /// P3 has decided to switch over. The guest is paused from here on.
    pub(super) fn begin_switchover(&mut self, predicted: Duration, now: Time) {
        if self.config.rehearse.is_some_and(|rehearse| rehearse < Rehearse::Switchover) {
            return self.end_rehearsal(None, now);
        }
        self.enter(Phase::Quiesce, now);
        let retreats = self.pause.retreats;
        self.pause = Pause { asked_at: Some(now), predicted, guest_ran: true, retreats, ..Pause::default() };
        self.act(State::Pausing, SourceAction::Pause);
    }

    pub(super) fn on_paused(&mut self, guest_ran: bool, identity: [u8; 32], now: Time) {
        self.pause.identity = identity;
        self.pause.paused_at = Some(now);
        self.pause.guest_ran = guest_ran;
        self.act(State::ToP2p, SourceAction::Devices(Barrier::P2p));
    }

    pub(super) fn on_p2p(&mut self, devices: &[DeviceProgress], now: Time) {
        if let Some(asked_at) = self.pause.asked_at {
            self.model.quiesced(now.saturating_sub(asked_at));
        }
        // uAPI: a saving session cannot go back from STOP_COPY to PRE_COPY, so this is the last chance to load new initial
        // bytes with the guest running.
        let Some(index) = self.rounds.new_initial_bytes(devices) else {
            self.rounds.update_progress(devices);
            return self.act(State::ToStopCopy, SourceAction::Devices(Barrier::StopCopy));
        };
        if self.pause.retreats >= RETREATS {
            let text = format!(
                "the device has declared new initial pre-copy data at {} switchovers in a row",
                self.pause.retreats + 1
            );
            let remedy = "migrate when the guest uses the device less, or disable its pre-copy";
            let cause = self.with_device(index, failure(Side::Source, Phase::Quiesce, text, remedy));
            return self.abort(cause, AbortNotice::Send);
        }
        self.pause.retreats += 1;
        self.rounds.update_progress(devices);
        self.act(State::Retreating, SourceAction::Devices(Barrier::Running));
    }

    pub(super) fn on_retreated(&mut self, devices: &[DeviceProgress]) {
        self.rounds.update_progress(devices);
        self.act(State::Resuming, SourceAction::Resume);
    }

    pub(super) fn on_resumed(&mut self, now: Time) {
        self.pause.asked_at = None;
        self.pause.paused_at = None;
        self.enter(Phase::Iterate, now);
        self.begin_iterating(now);
    }

    pub(super) fn on_stop_copy(&mut self, devices: &[DeviceProgress], now: Time) {
        if let Some(index) = self.rounds.new_generation(devices) {
            let text = "the device declared new initial pre-copy data on its way to STOP_COPY";
            let cause = self.with_device(index, failure(Side::Source, Phase::Quiesce, text, "try again"));
            return self.abort(cause, AbortNotice::Send);
        }
        self.begin_final_pass(now);
    }

    /// Whether the guest has been paused too long for what is still to come.
    pub(super) fn watchdog_expired(&self, now: Time) -> bool {
        self.watchdog_deadline().is_some_and(|deadline| now >= deadline)
    }

    /// The first moment at which `paused + reserve > limit`.
    pub(super) fn watchdog_deadline(&self) -> Option<Time> {
        let watched = match self.state {
            State::Pausing
            | State::ToP2p
            | State::Retreating
            | State::Resuming
            | State::ToStopCopy
            | State::ReleasingLocks => true,
            State::SendingFinal => !self.verify() || self.pause.source_digested,
            State::AwaitingReady => !self.verify() || self.pause.destination_digested,
            _ => false,
        };
        // A guest that its operator had paused loses nothing by staying so.
        if !watched || !self.pause.guest_ran {
            return None;
        }
        let since = self.pause.paused_at.or(self.pause.asked_at)?;
        let budget = self.config.downtime_limit.saturating_sub(self.config.commit_reserve);
        Some(
            since
                .saturating_add(self.pause.verify)
                .saturating_add(budget)
                .saturating_add(Duration::from_nanos(1)),
        )
    }

    /// The limit had passed while a device was at work, and now the device says why it took so long: that is the cause.
    pub(super) fn explain_over_limit(&mut self, cause: Failure, now: Time) {
        let over = self.over_limit_by(now);
        let Some(rollback) = self.rollback.as_mut().filter(|_| self.pause.over_limit) else { return };
        if cause.device.is_none() || rollback.outcome.cause.device.is_some() {
            return;
        }
        rollback.outcome.cause = Failure { text: format!("{}; by then {over}", cause.text), ..cause };
    }

    pub(super) fn abort_over_limit(&mut self, now: Time) {
        let predicted = milliseconds(self.pause.predicted);
        let text = format!("{} ({predicted} ms were predicted)", self.over_limit());
        self.pause.over_limit = true;
        let remedy = "raise the downtime limit, or see why this phase took so long";
        let cause = match self.pause.awaited.take() {
            // Told with the limit, so that both sides have one cause.
            Some(awaited) => {
                let text = format!("{text}: {}", awaited.text);
                Failure { phase: self.phase, text, remedy: remedy.into(), ..awaited }
            }
            None => failure(Side::Source, self.phase, text, remedy),
        };
        self.conclude(cause, now);
    }

    /// What the watchdog has found. How long the guest stood in all is known when it runs again, and told then.
    fn over_limit(&self) -> String {
        let limit = milliseconds(self.config.downtime_limit);
        let (is, what) = match self.pause.paused_at {
            Some(_) => ("would stay", "above"),
            None => ("could not be", "within"),
        };
        format!("the guest {is} paused {what} the downtime limit of {limit} ms")
    }

    /// The same as told later, `now`: the limit itself may have passed since.
    fn over_limit_by(&self, now: Time) -> String {
        let limit = self.config.downtime_limit;
        let passed = |paused: Time| now.saturating_sub(paused.saturating_add(self.pause.verify)) > limit;
        if !self.pause.paused_at.is_some_and(passed) {
            return self.over_limit();
        }
        format!("the guest had been paused for longer than the downtime limit of {} ms", milliseconds(limit))
    }
}
