//! P3: rounds of RAM and device data while the guest runs, until the downtime fits; or giving up, by name.

use std::time::Duration;

use vfio_migration_types::{Failure, Phase, Side, milliseconds};
use vfio_migration_wire::Applied;

use super::state::{AbortNotice, Rounds, SourceEngine, State, WaitKind};
use crate::api::{DeviceProgress, IterationReport, SourceAction, Time};
use crate::convergence::Prediction;
use crate::expected::work_timeout;
use crate::failure::{failure, silence};

/// Iterations do not begin closer to each other: reading every dirty log has its price, and so has each for the guest.
const PACE: Duration = Duration::from_millis(10);
/// The same while P3 only waits for the destination's devices.
const WAITING_PACE: Duration = Duration::from_millis(50);
/// The same while P3 only waits for the operator, who may take hours: unless the guest dirties more than the downtime limit
/// allows before that.
const OPERATOR_PACE: Duration = Duration::from_secs(1);

/// An acknowledgement of the destination in P3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Acknowledged {
    Iteration,
    InitialBytes,
}

impl Rounds {
    pub(super) fn new(devices: usize) -> Self {
        Self {
            iteration: 0,
            wire_bytes: 0,
            began: Time::ZERO,
            round_began: Time::ZERO,
            next: None,
            waiting: None,
            operator_asked: false,
            operator_waited: Duration::ZERO,
            operator_since: None,
            continued: false,
            progress: vec![DeviceProgress::default(); devices],
            acknowledged: vec![None; devices],
            applied: 0,
            probe: None,
            applied_expected: None,
            initial_expected: None,
        }
    }

    /// Takes in the devices' progress. Devices that a session does not mention are as they were.
    pub(super) fn update_progress(&mut self, devices: &[DeviceProgress]) {
        for (known, seen) in self.progress.iter_mut().zip(devices) {
            *known = *seen;
        }
    }

    /// The first device that has declared a later generation than known, or has initial bytes left.
    pub(super) fn new_initial_bytes(&self, devices: &[DeviceProgress]) -> Option<usize> {
        self.progress.iter().zip(devices).position(|(known, seen)| {
            seen.generation > known.generation || seen.initial_left.is_some_and(|left| left > 0)
        })
    }

    /// The first device that has declared a later generation than known.
    pub(super) fn new_generation(&self, devices: &[DeviceProgress]) -> Option<usize> {
        self.progress.iter().zip(devices).position(|(known, seen)| seen.generation > known.generation)
    }
}

impl SourceEngine {
    /// From P2, or back from P4.
    pub(super) fn begin_iterating(&mut self, now: Time) {
        if self.rounds.iteration == 0 {
            self.rounds.began = now;
        }
        self.model.forget_stall();
        self.next_round(now);
    }

    fn next_round(&mut self, now: Time) {
        self.rounds.iteration = self.rounds.iteration.saturating_add(1);
        self.rounds.round_began = now;
        self.rounds.next = None;
        self.act(State::Sending, SourceAction::SendIteration { iteration: self.rounds.iteration });
    }

    pub(super) fn on_iteration_sent(&mut self, report: IterationReport, now: Time) {
        self.state = State::Waiting;
        self.rounds.wire_bytes = self.rounds.wire_bytes.saturating_add(report.wire_bytes);
        self.rounds.update_progress(&report.devices);
        let interval = now.saturating_sub(self.rounds.round_began).max(report.took);
        self.model.iterated(report, interval, now);
        if self.rounds.applied < self.rounds.iteration {
            self.rounds.probe.get_or_insert((self.rounds.iteration, now));
        }
        self.update_expected(None, now);
        self.decide(now);
    }

    pub(super) fn on_initial_loaded(&mut self, device: u16, generation: u32, now: Time) {
        let Some(acknowledged) = self.rounds.acknowledged.get_mut(usize::from(device)) else {
            let text = format!(
                "the destination acknowledged initial bytes of device number {device}, which is none"
            );
            return self.abort(failure(Side::Source, self.phase, text, ""), AbortNotice::Send);
        };
        *acknowledged = Some(generation);
        self.update_expected(Some(Acknowledged::InitialBytes), now);
        if self.state == State::Waiting {
            self.decide(now);
        }
    }

    pub(super) fn on_applied(&mut self, applied: Applied, now: Time) {
        // The end of an iteration is on the wire before its report is here, so the one under way may be applied already.
        if applied.iteration <= self.rounds.applied || applied.iteration > self.rounds.iteration {
            let text = format!(
                "the destination says it applied iteration {} after {}, of {} begun: protocol error",
                applied.iteration, self.rounds.applied, self.rounds.iteration
            );
            return self.abort(failure(Side::Source, self.phase, text, ""), AbortNotice::Send);
        }
        let first = self.rounds.applied == 0;
        self.rounds.applied = applied.iteration;
        if let Some((_, sent)) = self.rounds.probe.take_if(|(iteration, _)| *iteration <= applied.iteration) {
            self.model.round_trip_at_most(now.saturating_sub(sent));
        }
        self.update_expected(Some(Acknowledged::Iteration), now);
        self.model.applied(applied);
        if first && self.config.rehearse.is_some() && self.state == State::Waiting {
            self.decide(now);
        }
    }

    pub(super) fn on_limit(&mut self, limit: Duration, now: Time) {
        self.config.downtime_limit = limit;
        self.model.forget_stall();
        if self.state == State::Waiting {
            self.decide(now);
        }
    }

    /// Dropped if the operator was never waited for: it may have been meant for another migration. Kept if a round in between
    /// waits for something else: the operator was asked, and has answered.
    pub(super) fn on_continue(&mut self, now: Time) {
        if !self.rounds.operator_asked {
            return;
        }
        self.rounds.continued = true;
        if self.state == State::Waiting {
            self.decide(now);
        }
    }

    pub(super) fn iterate_deadline(&self) -> Option<Time> {
        if !matches!(self.state, State::Sending | State::Waiting) {
            return None;
        }
        [self.rounds.next, self.give_up_at(), self.acknowledgement_deadline()].into_iter().flatten().min()
    }

    pub(super) fn iterate_tick(&mut self, now: Time) {
        if !matches!(self.state, State::Sending | State::Waiting) {
            return;
        }
        if self.give_up_at().is_some_and(|at| now >= at) {
            return self.give_up("was not met in the time given", now);
        }
        if self.acknowledgement_deadline().is_some_and(|at| now >= at) {
            let waited = work_timeout(self.config.peer_timeout);
            let initial_is_late = self.rounds.initial_expected.is_some()
                && (self.rounds.applied_expected.is_none()
                    || self.rounds.initial_expected < self.rounds.applied_expected);
            let late = self.unacknowledged().first().copied().filter(|_| initial_is_late);
            let what = if late.is_some() { "INITIAL_LOADED" } else { "APPLIED" };
            let cause = silence(Side::Source, self.phase, what, waited);
            let cause = late.map_or(cause.clone(), |index| self.with_device(index, cause));
            return self.abort(cause, AbortNotice::Send);
        }
        if self.state == State::Waiting && self.rounds.next.is_some_and(|at| now >= at) {
            self.next_round(now);
        }
    }

    /// Devices whose initial bytes of this generation are not known to be loaded.
    pub(super) fn unacknowledged(&self) -> Vec<usize> {
        let missing = |index: &usize| {
            let (Some(facts), Some(progress), Some(acknowledged)) = (
                self.config.devices.get(*index),
                self.rounds.progress.get(*index),
                self.rounds.acknowledged.get(*index),
            ) else {
                return false;
            };
            // A device that cannot say when its initial bytes end is waited for only if the session found an end.
            let has_initial = facts.flags.pre_copy && (facts.precopy_info || progress.initial_sent);
            let complete = progress.initial_sent && progress.initial_left.unwrap_or(0) == 0;
            has_initial && !(complete && *acknowledged == Some(progress.generation))
        };
        (0..self.config.devices.len()).filter(missing).collect()
    }

    /// After each report, and after each event that may have changed the answer.
    fn decide(&mut self, now: Time) {
        if self.give_up_at().is_some_and(|at| now >= at) {
            return self.give_up("was not met in the time given", now);
        }
        let Some(prediction) = self.model.predict(now) else { return };
        let missing = self.unacknowledged();
        if let Some(first) = missing.first() {
            let unsent = self
                .rounds
                .progress
                .iter()
                .filter_map(|device| device.initial_left)
                .fold(0, u64::saturating_add);
            if self.rounds.progress.iter().any(|device| device.initial_left.is_some_and(|left| left > 0))
                && self.model.initial_stalled(unsent, now)
            {
                let text = "the device does not come to the end of its initial pre-copy data";
                let cause = self.with_device(
                    *first,
                    failure(Side::Source, Phase::Iterate, text, "see the device's own log"),
                );
                return self.conclude(cause, now);
            }
            let sending =
                self.rounds.progress.iter().any(|device| device.initial_left.is_some_and(|left| left > 0));
            return self.wait(WaitKind::Initial, if sending { PACE } else { WAITING_PACE }, now);
        }
        let budget = self.config.downtime_limit.saturating_sub(self.config.commit_reserve);
        if prediction.total() > budget {
            if self.model.stalled(prediction.total(), now) {
                return self.give_up("cannot be met: the downtime does not get shorter", now);
            }
            return self.wait(WaitKind::Convergence, PACE, now);
        }
        if self.config.pause_before_switchover && !self.rounds.continued {
            let pace = self.operator_pace(budget, now);
            return self.wait(WaitKind::Operator, pace, now);
        }
        // A rehearsal has the time to wait for the report of how fast the destination loads.
        let unheard = self.config.rehearse.is_some() && self.rounds.applied == 0;
        if unheard || self.model.worth_another_round(now) {
            return self.wait(WaitKind::Convergence, PACE, now);
        }
        self.note_waiting(None, now);
        self.rounds.next = None;
        self.begin_switchover(prediction.total(), now);
    }

    /// Lets `pace` pass since the last iteration began; an event may decide otherwise meanwhile.
    fn wait(&mut self, waiting: WaitKind, pace: Duration, now: Time) {
        let next = self.rounds.round_began.saturating_add(pace);
        self.note_waiting(Some(waiting), now);
        if next <= now {
            return self.next_round(now);
        }
        self.rounds.next = Some(next);
    }

    /// Takes note of what P3 waits for. The operator's own delay counts neither against the time given nor as a stall.
    fn note_waiting(&mut self, waiting: Option<WaitKind>, now: Time) {
        let operator = waiting == Some(WaitKind::Operator);
        self.rounds.waiting = waiting;
        self.rounds.operator_asked |= operator;
        match self.rounds.operator_since {
            None if operator => {
                self.rounds.operator_since = Some(now);
                self.model.forget_stall();
            }
            Some(since) if !operator => {
                let waited = now.saturating_sub(since);
                self.rounds.operator_waited = self.rounds.operator_waited.saturating_add(waited);
                self.rounds.operator_since = None;
            }
            _ => {}
        }
    }

    /// Time from one round to the next while the operator is waited for: as long as the downtime will still fit.
    fn operator_pace(&self, budget: Duration, now: Time) -> Duration {
        let age = now.saturating_sub(self.rounds.round_began);
        let fits = |pace: &Duration| {
            let at = now.saturating_add(pace.saturating_sub(age));
            self.model.predict(at).is_some_and(|prediction| prediction.total() <= budget)
        };
        let steps = (1..).map(|step: u32| WAITING_PACE.saturating_mul(step));
        let paces = steps.take_while(|pace| *pace <= OPERATOR_PACE);
        paces.take_while(fits).last().unwrap_or(WAITING_PACE)
    }

    /// Time at which P3 has lasted too long. Only the operator being waited for, there is none.
    fn give_up_at(&self) -> Option<Time> {
        if self.rounds.operator_since.is_some() {
            return None;
        }
        let began = self.rounds.began.saturating_add(self.rounds.operator_waited);
        self.config.give_up_after.map(|after| began.saturating_add(after))
    }

    fn acknowledgement_deadline(&self) -> Option<Time> {
        let since = [self.rounds.applied_expected, self.rounds.initial_expected].into_iter().flatten().min();
        since.map(|since| since.saturating_add(work_timeout(self.config.peer_timeout)))
    }

    /// Keeps the times since which acknowledgements have been due; the one that came just now starts its time anew.
    fn update_expected(&mut self, came: Option<Acknowledged>, now: Time) {
        // The acknowledgement of the iteration under way is not due yet.
        let sent = self.rounds.iteration.saturating_sub(u32::from(self.state == State::Sending));
        let missing = |(device, acknowledged): (&DeviceProgress, &Option<u32>)| {
            device.initial_sent && *acknowledged != Some(device.generation)
        };
        let initial = self.rounds.progress.iter().zip(&self.rounds.acknowledged).any(missing);
        let since = |due: bool, before: Option<Time>, progressed: bool| match before {
            _ if !due => None,
            Some(since) if !progressed => Some(since),
            _ => Some(now),
        };
        let applied = self.rounds.applied < sent;
        let applied_came = came == Some(Acknowledged::Iteration);
        self.rounds.applied_expected = since(applied, self.rounds.applied_expected, applied_came);
        let initial_came = came == Some(Acknowledged::InitialBytes);
        self.rounds.initial_expected = since(initial, self.rounds.initial_expected, initial_came);
    }

    fn give_up(&mut self, why: &str, now: Time) {
        let Some(prediction) = self.model.predict(now) else {
            let text = "the first iteration did not end in the time given";
            let cause = failure(
                Side::Source,
                Phase::Iterate,
                text,
                "allow more time, or migrate over a faster network",
            );
            return self.conclude(cause, now);
        };
        let missing = self.unacknowledged();
        let budget = self.config.downtime_limit.saturating_sub(self.config.commit_reserve);
        let cause = match missing.first() {
            Some(first) if prediction.total() <= budget => {
                let text =
                    "the destination has not loaded the device's initial pre-copy data in the time given";
                self.with_device(*first, failure(Side::Source, Phase::Iterate, text, "allow more time"))
            }
            _ => self.too_big(why, &prediction),
        };
        self.conclude(cause, now);
    }

    /// Names what needs most of the downtime.
    pub(super) fn too_big(&self, why: &str, prediction: &Prediction) -> Failure {
        let limit = milliseconds(self.config.downtime_limit);
        let largest =
            (0..prediction.devices.len()).max_by_key(|index| prediction.devices.get(*index).copied());
        let largest = largest.and_then(|index| Some((index, *prediction.devices.get(index)?)));
        let (index, what, needs) = match largest {
            Some((index, needs)) if needs >= prediction.ram && needs >= prediction.fixed => {
                let name =
                    self.config.devices.get(index).map(|device| device.id.to_string()).unwrap_or_default();
                (Some(index), format!("device {name}"), needs)
            }
            _ if prediction.ram >= prediction.fixed => (None, "RAM".to_owned(), prediction.ram),
            _ => (None, "pausing and the transitions".to_owned(), prediction.fixed),
        };
        let text = format!(
            "{what} needs {} ms of the {limit} ms of the downtime limit, which {why}",
            milliseconds(needs)
        );
        let enough = milliseconds(prediction.total().saturating_add(self.config.commit_reserve));
        let raise = format!("raise the downtime limit above {enough} ms");
        let remedy = match (index, what.as_str()) {
            (None, "RAM") => format!("{raise}, use a faster network, or let the guest write less"),
            _ => raise,
        };
        let cause = failure(Side::Source, Phase::Iterate, text, &remedy);
        match index {
            Some(index) => self.with_device(index, cause),
            None => cause,
        }
    }
}
