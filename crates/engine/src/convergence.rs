//! The downtime model: how long the guest would be paused, were the switchover begun now, and whether waiting makes it less.
//!
//! ```text
//! downtime = fixed                                  pausing, transitions, round trips: measured where known
//!          + (RAM left + device bytes left) / measured bandwidth
//!          + device bytes left × the destination's measured time per device byte
//! ```
//!
//! A device's bytes left are its initial, dirty and STOP_COPY bytes, as far as it can say. All arithmetic is in whole
//! nanoseconds and bytes: the same input gives the same decision on every host.

use std::time::Duration;

use vfio_migration_wire::Applied;

use crate::api::{DeviceFacts, DeviceProgress, IterationReport, Part, PartBasis, PartName, Time};

/// A sample shorter than this measures latency, not bandwidth.
const SHORTEST_SAMPLE: Duration = Duration::from_millis(10);
/// Assumed cost of pausing and of the transitions, before any has been measured.
const ASSUMED_FIXED: Duration = Duration::from_millis(5);
/// The same, for each device.
const ASSUMED_PER_DEVICE: Duration = Duration::from_millis(3);
/// No improvement for this long, and for [`STALL_ROUNDS`], is a stall.
const STALL_TIME: Duration = Duration::from_secs(5);
/// No improvement for so many iterations, and for [`STALL_TIME`], is a stall.
const STALL_ROUNDS: u32 = 8;
/// Another round, although the downtime fits already, at most for so long.
const REFINE_FOR: Duration = Duration::from_secs(1);

/// The measured rates of a migration, and the downtime that they predict.
#[derive(Clone, Debug, Default)]
pub(crate) struct DowntimeModel {
    bandwidth: Rate,
    load: Rate,
    applied: Option<Applied>,
    round_trip: Duration,
    quiesce: Option<Duration>,
    last: Option<LastIteration>,
    refine_since: Option<Time>,
    stall: Stall,
    initial: Stall,
}

/// The iteration that ended last: its report, and the rates during it.
#[derive(Clone, Debug)]
struct LastIteration {
    report: IterationReport,
    at: Time,
    /// RAM bytes that became dirty, and the time in which they did.
    ram_dirtied: Rate,
    devices_dirtied: Vec<Rate>,
}

/// A prediction, taken apart so that a failure can name what is too big.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prediction {
    pub(crate) fixed: Duration,
    pub(crate) ram: Duration,
    pub(crate) devices: Vec<Duration>,
}

impl Prediction {
    pub(crate) fn total(&self) -> Duration {
        self.devices
            .iter()
            .fold(self.fixed.saturating_add(self.ram), |sum, device| sum.saturating_add(*device))
    }
}

impl DowntimeModel {
    /// A round trip, measured at the hello. A destination that was not yet waiting for anybody makes it too long.
    pub(crate) fn round_trip(&mut self, took: Duration) {
        self.round_trip = took;
    }

    /// An exchange took so long, with some work in it: no round trip is longer.
    pub(crate) fn round_trip_at_most(&mut self, took: Duration) {
        self.round_trip = self.round_trip.min(took);
    }

    /// From the order to pause until every device was in its P2P position.
    pub(crate) fn quiesced(&mut self, took: Duration) {
        self.quiesce = Some(took);
    }

    /// The destination reports how it keeps up.
    pub(crate) fn applied(&mut self, applied: Applied) {
        let before = self.applied.map_or((0, 0), |last| (last.device_bytes, last.device_ns));
        let bytes = applied.device_bytes.saturating_sub(before.0);
        self.load.add(bytes, Duration::from_nanos(applied.device_ns.saturating_sub(before.1)));
        self.applied = Some(applied);
    }

    /// An iteration ended. `interval` is the time since it began, pauses included: what is dirty now became so in it.
    pub(crate) fn iterated(&mut self, report: IterationReport, interval: Duration, now: Time) {
        if report.took >= SHORTEST_SAMPLE || self.bandwidth.is_unknown() {
            self.bandwidth.add(report.wire_bytes, report.took);
        }
        let ram_dirtied = Rate::new(report.ram_left, interval);
        let devices_dirtied =
            report.devices.iter().map(|device| Rate::new(device.dirty_left.unwrap_or(0), interval)).collect();
        self.last = Some(LastIteration { report, at: now, ram_dirtied, devices_dirtied });
    }

    /// Bytes per second, once measured.
    pub(crate) fn bandwidth(&self) -> Option<u64> {
        self.bandwidth.per_second()
    }

    /// A round trip, as far as it has been measured.
    pub(crate) fn known_round_trip(&self) -> Duration {
        self.round_trip
    }

    /// Bytes per second: on the wire, loaded at the destination, dirtied in RAM, dirtied per device.
    pub(crate) fn rates(&self) -> (Option<u64>, Option<u64>, Option<u64>, Vec<Option<u64>>) {
        let Some(last) = &self.last else { return (None, None, None, Vec::new()) };
        let second = |rate: &Rate| (rate.ns > 0).then(|| rate.bytes_in(Duration::from_secs(1)));
        let devices = last.report.devices.iter().zip(&last.devices_dirtied);
        let devices = devices.map(|(device, rate)| device.dirty_left.and_then(|_| second(rate))).collect();
        (self.bandwidth.per_second(), self.load.per_second(), second(&last.ram_dirtied), devices)
    }

    /// The parts of `prediction`, each with the ground on which it is known.
    pub(crate) fn parts(&self, prediction: &Prediction, devices: &[DeviceFacts]) -> Vec<Part> {
        let round_trips = self.round_trip.saturating_mul(2);
        let known = |yes: bool| if yes { PartBasis::Measured } else { PartBasis::Unknown };
        let mut parts = vec![
            Part {
                name: PartName::Quiesce,
                took: prediction.fixed.saturating_sub(round_trips),
                basis: known(self.quiesce.is_some()),
            },
            Part { name: PartName::RoundTrips, took: round_trips, basis: PartBasis::Measured },
            Part { name: PartName::Ram, took: prediction.ram, basis: known(!self.bandwidth.is_unknown()) },
        ];
        let progress = self.last.iter().flat_map(|last| &last.report.devices);
        for ((facts, took), progress) in devices.iter().zip(&prediction.devices).zip(progress) {
            let says = progress.stop_copy.is_some() && !self.bandwidth.is_unknown();
            parts.push(Part {
                name: PartName::Device(facts.id.clone()),
                took: *took,
                basis: if says { PartBasis::Declared } else { PartBasis::Unknown },
            });
        }
        parts
    }

    /// Bytes that the last iteration left: of RAM, and of devices.
    pub(crate) fn left(&self) -> (u64, u64) {
        let Some(last) = &self.last else { return (0, 0) };
        let devices = last.report.devices.iter().map(device_left).fold(0, u64::saturating_add);
        (last.report.ram_left.max(last.report.ram_again), devices)
    }

    /// The downtime, were the guest paused now; `None` before the first iteration.
    pub(crate) fn predict(&self, now: Time) -> Option<Prediction> {
        let last = self.last.as_ref()?;
        let age = now.saturating_sub(last.at);
        let ram = last.report.ram_left.saturating_add(last.ram_dirtied.bytes_in(age));
        // What is dirty is among what is sent again.
        let ram = ram.max(last.report.ram_again);
        let devices = last
            .report
            .devices
            .iter()
            .zip(&last.devices_dirtied)
            .map(|(device, rate)| device_left(device).saturating_add(rate.bytes_in(age)));
        Some(self.price(ram, devices))
    }

    /// Whether one more iteration is worth its time although the downtime fits already: it is predicted to cut it by a
    /// third, and such refining has not gone on for a second.
    pub(crate) fn worth_another_round(&mut self, now: Time) -> bool {
        let (Some(current), Some(next)) = (self.predict(now), self.predict_next()) else { return false };
        let since = *self.refine_since.get_or_insert(now);
        let ends = now.saturating_add(next.0).saturating_sub(since);
        ends <= REFINE_FOR && next.1.total() <= current.total().saturating_mul(2) / 3
    }

    /// Whether the downtime, which does not fit, has stopped getting less.
    pub(crate) fn stalled(&mut self, predicted: Duration, now: Time) -> bool {
        let predicted = u64::try_from(predicted.as_nanos()).unwrap_or(u64::MAX);
        self.refine_since = None;
        // A twentieth less counts as progress.
        self.stall.sample(predicted, |best| best - best / 20, now)
    }

    /// Whether a device's unsent initial bytes, which forbid the switchover, have stopped getting less.
    pub(crate) fn initial_stalled(&mut self, initial_left: u64, now: Time) -> bool {
        self.initial.sample(initial_left, |best| best, now)
    }

    /// The limit has changed, or the guest has run again: what was a stall may not be one.
    pub(crate) fn forget_stall(&mut self) {
        self.stall = Stall::default();
        self.initial = Stall::default();
        self.refine_since = None;
    }

    /// The predicted duration of the next iteration, and the downtime predicted for its end.
    fn predict_next(&self) -> Option<(Duration, Prediction)> {
        let last = self.last.as_ref()?;
        let precopy = |device: &DeviceProgress| {
            device.initial_left.unwrap_or(0).saturating_add(device.dirty_left.unwrap_or(0))
        };
        let bytes = last.report.devices.iter().map(precopy).fold(last.report.ram_left, u64::saturating_add);
        let took =
            self.bandwidth.time_for(bytes).saturating_add(self.round_trip).max(Duration::from_millis(1));
        let devices = last
            .report
            .devices
            .iter()
            .zip(&last.devices_dirtied)
            .map(|(device, rate)| rate.bytes_in(took).saturating_add(device.stop_copy.unwrap_or(0)));
        let ram = last.ram_dirtied.bytes_in(took).max(last.report.ram_again);
        Some((took, self.price(ram, devices)))
    }

    fn price(&self, ram: u64, devices: impl Iterator<Item = u64>) -> Prediction {
        let devices: Vec<Duration> = devices
            .map(|bytes| self.bandwidth.time_for(bytes).saturating_add(self.load.time_for(bytes)))
            .collect();
        let count = u32::try_from(devices.len()).unwrap_or(u32::MAX);
        let assumed = ASSUMED_FIXED.saturating_add(ASSUMED_PER_DEVICE.saturating_mul(count));
        // One round trip from the last byte to READY, one more of slack for the first byte on an idle connection.
        let fixed =
            self.quiesce.unwrap_or(assumed).max(assumed).saturating_add(self.round_trip.saturating_mul(2));
        Prediction { fixed, ram: self.bandwidth.time_for(ram), devices }
    }
}

fn device_left(device: &DeviceProgress) -> u64 {
    [device.initial_left, device.dirty_left, device.stop_copy]
        .into_iter()
        .flatten()
        .fold(0, u64::saturating_add)
}

/// Bytes over time, older samples counting half each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rate {
    bytes: u128,
    ns: u128,
}

impl Rate {
    fn new(bytes: u64, took: Duration) -> Self {
        Self { bytes: bytes.into(), ns: took.as_nanos() }
    }

    fn add(&mut self, bytes: u64, took: Duration) {
        if bytes > 0 {
            self.bytes = self.bytes / 2 + u128::from(bytes);
            self.ns = self.ns / 2 + took.as_nanos();
        }
    }

    fn is_unknown(&self) -> bool {
        self.bytes == 0
    }

    /// Time that `bytes` take; zero, when nothing is known.
    fn time_for(&self, bytes: u64) -> Duration {
        let ns = u128::from(bytes).saturating_mul(self.ns).checked_div(self.bytes).unwrap_or(0);
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// Bytes that come in `time`.
    fn bytes_in(&self, time: Duration) -> u64 {
        let bytes = self.bytes.saturating_mul(time.as_nanos()).checked_div(self.ns).unwrap_or(0);
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    fn per_second(&self) -> Option<u64> {
        (self.bytes > 0 && self.ns > 0).then(|| self.bytes_in(Duration::from_secs(1)))
    }
}

/// Notices that a figure has stopped falling.
#[derive(Clone, Debug, Default)]
struct Stall {
    best: Option<(u64, Time)>,
    rounds: u32,
}

impl Stall {
    /// `enough(best)`: what a new figure must be below to count as progress.
    fn sample(&mut self, figure: u64, enough: impl Fn(u64) -> u64, now: Time) -> bool {
        match self.best {
            Some((best, since)) if figure >= enough(best) => {
                self.rounds = self.rounds.saturating_add(1);
                self.rounds >= STALL_ROUNDS && now.saturating_sub(since) >= STALL_TIME
            }
            _ => {
                *self = Self { best: Some((figure, now)), rounds: 0 };
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn device(initial: u64, dirty: u64, stop_copy: u64) -> DeviceProgress {
        DeviceProgress {
            initial_left: Some(initial),
            dirty_left: Some(dirty),
            stop_copy: Some(stop_copy),
            generation: 0,
            initial_sent: initial == 0,
        }
    }

    fn report(wire: u64, took: Duration, ram: u64, devices: Vec<DeviceProgress>) -> IterationReport {
        IterationReport { wire_bytes: wire, took, ram_left: ram, ram_again: 0, devices }
    }

    #[test]
    fn a_slow_hello_does_not_count_for_ever() {
        let mut model = DowntimeModel::default();
        model.round_trip(Duration::from_millis(400));
        model.round_trip_at_most(Duration::from_millis(900));
        model.round_trip_at_most(Duration::from_millis(2));
        let report = IterationReport {
            wire_bytes: 1 << 20,
            took: Duration::from_millis(20),
            ..IterationReport::default()
        };
        model.iterated(report, Duration::from_millis(20), Duration::from_millis(30));
        let prediction = model.predict(Duration::from_millis(30)).unwrap();
        assert!(prediction.fixed <= ASSUMED_FIXED + Duration::from_millis(4), "{prediction:?}");
    }

    #[test]
    fn the_prediction_is_the_sum_of_its_parts() {
        let mut model = DowntimeModel::default();
        model.round_trip(MS);
        // 1 MB/ms; the destination takes 2 ns per byte.
        model.iterated(
            report(1_000_000_000, 1000 * MS, 20_000_000, vec![device(0, 0, 30_000_000)]),
            1000 * MS,
            1000 * MS,
        );
        model.applied(Applied { iteration: 1, device_bytes: 1_000_000, device_ns: 2_000_000 });
        let prediction = model.predict(1000 * MS).unwrap();
        assert_eq!(prediction.ram, 20 * MS);
        assert_eq!(prediction.devices, [90 * MS], "30 ms to send, 60 ms to load");
        assert_eq!(prediction.fixed, 10 * MS);
        assert_eq!(prediction.total(), 120 * MS);
        assert_eq!(model.bandwidth(), Some(1_000_000_000));
        // Time goes on, the guest writes on: 20 MB per second.
        assert_eq!(model.predict(2000 * MS).unwrap().ram, 40 * MS);
    }

    #[test]
    fn tiny_iterations_do_not_spoil_the_bandwidth() {
        let mut model = DowntimeModel::default();
        model.iterated(report(1_000_000_000, 1000 * MS, 0, vec![]), 1000 * MS, 1000 * MS);
        for _ in 0..20 {
            model.iterated(report(4096, MS, 0, vec![]), MS, 1000 * MS);
        }
        assert_eq!(model.bandwidth(), Some(1_000_000_000));
    }

    #[test]
    fn another_round_only_for_a_third_and_for_a_second() {
        let mut model = DowntimeModel::default();
        // 200 MB left that became dirty in 1 s: sending them takes 200 ms, in which 40 MB become dirty.
        model.iterated(report(1_000_000_000, 1000 * MS, 200_000_000, vec![]), 1000 * MS, Duration::ZERO);
        assert!(model.worth_another_round(Duration::ZERO));
        assert!(!model.worth_another_round(900 * MS), "it would end after more than a second");
        // The same left, but it became dirty in 250 ms: sending gains little.
        let mut model = DowntimeModel::default();
        model.iterated(report(1_000_000_000, 1000 * MS, 200_000_000, vec![]), 250 * MS, Duration::ZERO);
        assert!(!model.worth_another_round(Duration::ZERO));
    }

    #[test]
    fn a_stall_needs_time_and_rounds() {
        let mut model = DowntimeModel::default();
        for round in 0..100 {
            assert!(!model.stalled(900 * MS, round * MS), "100 quick rounds are no stall");
        }
        assert!(model.stalled(890 * MS, 5000 * MS), "a percent is no progress");
        assert!(!model.stalled(800 * MS, 5001 * MS));
        assert!(!model.stalled(800 * MS, 15_000 * MS), "one long round is no stall");
    }

    #[test]
    fn absurd_figures_do_not_overflow() {
        let mut model = DowntimeModel::default();
        let all = device(u64::MAX, u64::MAX, u64::MAX);
        model.applied(Applied { iteration: 1, device_bytes: 1, device_ns: u64::MAX });
        model.iterated(report(1, Duration::MAX, u64::MAX, vec![all; 3]), Duration::ZERO, Duration::MAX);
        model.round_trip(Duration::from_secs(u64::MAX / 4));
        assert!(model.predict(Duration::MAX).unwrap().total() > Duration::from_secs(1));
        model.worth_another_round(Duration::ZERO);
    }
}
