//! Progress while a session runs, for the caller's observer, and the caller's result.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vfio_migration_engine::{self as engine, SourceOutcome, SourceSummary};
use vfio_migration_types::{DeviceId, Failure, Phase};

use crate::channel::link::Link;
use crate::error::{Aborted, MigrateError};
use crate::rehearsal::Rehearsal;
use crate::report::{AttemptInfo, Bytes, Completed, DeviceStatus, PhaseTime, Progress};
use crate::session::awaited::{AwaitedAnswer, AwaitedAnswers};
use crate::session::host::boot_id;
use crate::session::lock::lock;
use crate::session::rate::RateMeter;
use crate::source::attempt::{SourceCounters, SourceEnd};
use crate::source::plan::PlannedMigration;
use crate::unresolved::UnresolvedMigration;
use crate::uri::Uri;

/// Time after which the observer is called again while nothing but counts changes.
const EVERY: Duration = Duration::from_millis(200);

/// What a session waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waits<'a> {
    pub(crate) answers: &'a AwaitedAnswers,
    /// It was cancelled.
    pub(crate) cancelling: bool,
    /// What it was given up for.
    pub(crate) failing: Option<&'a Failure>,
    /// What the destination is to say, how long it has had for it, and how long it may have.
    pub(crate) peer: Option<(engine::ExpectedWord, Duration, Duration)>,
}

impl Waits<'_> {
    /// Answers that are to be told.
    pub(crate) fn awaited(self) -> Vec<AwaitedAnswer> {
        let mut told = self.answers.to_tell(self.cancelling);
        if told.is_empty()
            && let Some((word, waited, limit)) = self.peer.filter(|_| !self.cancelling)
        {
            told.extend(AwaitedAnswer::of_peer(word, waited, limit));
        }
        told
    }
}

/// Turns the engine's progress and the workers' counts into what the caller sees, a few times a second.
#[derive(Debug)]
pub(crate) struct ProgressReporter {
    begun: Instant,
    /// Time that the plan took, before the engine began.
    planned: Duration,
    ram_total: u64,
    names: Vec<DeviceId>,
    /// Which of them have pre-copy, in the same order.
    precopy: Vec<bool>,
    last: Option<(Instant, Phase, u32)>,
    rate: RateMeter,
    attempt: AttemptInfo,
}

impl ProgressReporter {
    pub(crate) fn new(plan: &PlannedMigration) -> Self {
        let devices = plan.devices.iter();
        Self {
            begun: plan.begun,
            planned: plan.took,
            ram_total: plan.machine.ram().size(),
            names: devices.clone().map(|(moved, _)| moved.device.id().clone()).collect(),
            precopy: devices.map(|(_, capabilities)| capabilities.flags.pre_copy).collect(),
            last: None,
            rate: RateMeter::default(),
            attempt: plan.info.clone(),
        }
    }

    /// A new picture, if it is time for one.
    pub(crate) fn update(
        &mut self,
        engine: &engine::EngineProgress,
        entered: &[(Phase, Duration)],
        counters: &SourceCounters,
        wire_bytes: u64,
        waits: Waits<'_>,
        now_or_never: bool,
    ) -> Option<Progress> {
        let now = Instant::now();
        let due = self.last.is_none_or(|(at, phase, iteration)| {
            now.duration_since(at) >= EVERY || phase != engine.phase || iteration != engine.iteration
        });
        if !due && !now_or_never {
            return None;
        }
        if self.last.is_some_and(|(_, phase, _)| phase != engine.phase) {
            // What came before was another kind of traffic.
            self.rate.restart();
        }
        self.last = Some((now, engine.phase, engine.iteration));
        let ram_left = counters.ram.left.load(Ordering::Relaxed);
        let devices = self.devices(counters);
        let elapsed = self.begun.elapsed();
        Some(Progress {
            phase: engine.phase,
            iteration: engine.iteration,
            elapsed,
            paused: counters.paused_ns.load(Ordering::Relaxed) != 0,
            waiting: engine.waiting == Some(engine::SwitchoverWait::Operator),
            ram_total: self.ram_total,
            bytes: bytes(counters),
            ram_left,
            remaining: ram_left.saturating_add(devices_left(counters)),
            rate: self.rate.at(now, wire_bytes),
            predicted_downtime: engine.predicted,
            downtime_limit: engine.limit,
            devices,
            phases: self.phases(entered, elapsed),
            attempt: Some(self.attempt.clone()),
            cancelling: waits.cancelling,
            failing: waits.failing.cloned(),
            owned: None,
            awaited: waits.awaited(),
        })
    }

    /// What the engine `entered`, and before it the plan and the connecting, which is part of the first phase with the other side.
    fn phases(&self, entered: &[(Phase, Duration)], total: Duration) -> Vec<PhaseTime> {
        let before = [(Phase::Plan, Duration::ZERO), (Phase::Hello, self.planned)];
        phases(&[&before, entered].concat(), total)
    }

    /// Devices without pre-copy, where only pre-copy was tried.
    fn not_rehearsed(&self, found: &engine::RehearsalResult) -> Vec<DeviceId> {
        let stood = found.parts.iter().any(|part| part.name == engine::PartName::Final);
        let untried = self.names.iter().zip(&self.precopy).filter(|(_, precopy)| !stood && !**precopy);
        if found.iterations == 0 { Vec::new() } else { untried.map(|(name, _)| name.clone()).collect() }
    }

    fn devices(&self, counters: &SourceCounters) -> Vec<DeviceStatus> {
        let said = lock(&counters.device_progress);
        self.names
            .iter()
            .zip(&counters.devices)
            .enumerate()
            .map(|(index, (id, moved))| {
                let said = said.get(index).map(|(said, _)| *said).unwrap_or_default();
                DeviceStatus {
                    id: id.clone(),
                    precopy: moved.precopy.load(Ordering::Relaxed),
                    stopcopy: moved.stopcopy.load(Ordering::Relaxed),
                    initial_left: said.initial_left,
                    dirty_left: said.dirty_left,
                    stop_copy_estimate: said.stop_copy,
                }
            })
            .collect()
    }
}

/// The caller's result, from the end of the attempt.
pub(crate) fn into_result(
    outcome: SourceOutcome,
    reporter: &ProgressReporter,
    counters: &SourceCounters,
    link: &Link,
    plan: &PlannedMigration,
) -> Result<SourceEnd, MigrateError> {
    let (vm, attempt) = (plan.machine.id(), plan.attempt);
    let unresolved = |why| {
        let (epoch, peer) = (plan.epoch.next(), plan.info.peer.clone());
        let unresolved = UnresolvedMigration::of_journal(vm, attempt, epoch, peer, why);
        Err(MigrateError::Unresolved(Box::new(unresolved)))
    };
    match outcome {
        SourceOutcome::Completed(summary) => {
            let paused_ns = counters.paused_ns.load(Ordering::Acquire);
            let total = reporter.begun.elapsed();
            let (downtime, one_clock) = downtime(&summary, paused_ns);
            Ok(SourceEnd::Completed(Completed {
                vm,
                attempt,
                epoch: summary.running.epoch,
                transport: match &plan.uri {
                    Uri::Tcp { .. } => "tcp",
                    Uri::Unix(_) => "unix",
                    Uri::Fd(_) => "fd",
                }
                .into(),
                total,
                guest: summary.running.guest,
                paused: summary.paused,
                downtime,
                one_clock,
                predicted: summary.predicted,
                verify: summary.verify,
                iterations: summary.iterations,
                bytes: bytes(counters),
                wire_bytes: link.wire_bytes(),
                phases: reporter.phases(&summary.phases, total),
                // The engine compared both with what was sent before it committed.
                ram_digest_match: summary.ready.ram_digest.map(|_| true),
                device_digest_match: true,
                vectors: summary.ready.vectors,
                devices: reporter.devices(counters),
                left_undone: summary.left_undone.into_iter().collect(),
                report: lock(&counters.report).clone(),
            }))
        }
        SourceOutcome::Rehearsed(found) => {
            let (total, report) = (reporter.begun.elapsed(), lock(&counters.report).clone());
            let phases = reporter.phases(&found.phases, total);
            let not_rehearsed = reporter.not_rehearsed(&found);
            Ok(SourceEnd::Rehearsed(Rehearsal::new(
                *found,
                report,
                &reporter.names,
                not_rehearsed,
                bytes(counters),
                phases,
                total,
            )))
        }
        SourceOutcome::Aborted(abort) => Err(MigrateError::Aborted(Box::new(Aborted {
            cause: abort.cause,
            cancelled: abort.cancelled,
            obstacle: abort.obstacle,
            reset: abort.reset,
            lost: abort.lost,
            locks_lost: abort.locks_lost,
            restored: abort.restored,
            stood: Duration::from_nanos(counters.stood_ns.load(Ordering::Acquire)),
            left_undone: abort.left_undone,
        }))),
        SourceOutcome::Refused(reasons) => Err(MigrateError::Refused(crate::reasons::from_wire(reasons))),
        SourceOutcome::Unresolved(why) => unresolved(why),
        other => unresolved(format!("an outcome that this version does not know: {other:?}")),
    }
}

/// vCPUs paused here to vCPUs running there, less the digests, if they run; and whether both were read from one clock.
fn downtime(summary: &SourceSummary, paused_ns: u64) -> (Option<Duration>, bool) {
    if !summary.running.guest.runs() {
        return (None, false);
    }
    let here = boot_id();
    let one_clock = summary.running.boot_id == here && here != [0; 16] && summary.running.at_ns >= paused_ns;
    let stood = if one_clock {
        Duration::from_nanos(summary.running.at_ns - paused_ns)
    } else {
        summary.running_at.saturating_sub(summary.paused_at)
    };
    (Some(stood.saturating_sub(summary.verify)), one_clock)
}

/// Time of each phase, entered once or more. Together they are `total`.
fn phases(entered: &[(Phase, Duration)], total: Duration) -> Vec<PhaseTime> {
    Phase::ALL
        .into_iter()
        .filter_map(|phase| {
            let mut took = None;
            for (index, (entered_phase, at)) in entered.iter().enumerate() {
                if *entered_phase == phase {
                    let until = entered.get(index + 1).map_or(total, |(_, at)| *at);
                    *took.get_or_insert(Duration::ZERO) += until.saturating_sub(*at);
                }
            }
            took.map(|took| PhaseTime { phase, took })
        })
        .collect()
}

/// Bytes that the devices have left: what each said last, less what it has given since.
fn devices_left(counters: &SourceCounters) -> u64 {
    let said = lock(&counters.device_progress);
    let left = said.iter().zip(&counters.devices).filter_map(|((said, before), moved)| {
        let precopy = said.initial_left.zip(said.dirty_left).map(|(a, b)| a.saturating_add(b));
        let since = moved.moved().saturating_sub(*before);
        said.stop_copy.or(precopy).map(|left| left.saturating_sub(since))
    });
    left.fold(0, u64::saturating_add)
}

fn bytes(counters: &SourceCounters) -> Bytes {
    let sum = |count: fn(&crate::device_state::send::DeviceCounters) -> u64| {
        counters.devices.iter().map(|device| count(device)).sum()
    };
    Bytes {
        ram: counters.ram.bytes.load(Ordering::Relaxed),
        device_precopy: sum(|device| device.precopy.load(Ordering::Relaxed)),
        device_stopcopy: sum(|device| device.stopcopy.load(Ordering::Relaxed)),
    }
}
