//! The documents that the control socket has of a VM, its guest and its migration. [`MigrationInfo`] is made here alone, from the
//! whole of the library's reports: they are destructured, so that a field that is new does not compile until it is told or said
//! to be told elsewhere.

use std::time::Duration;

use vfio_migration::{
    Aborted, ArrivalReport, AttemptKind, Bytes, Completed, DeviceStatus, Failure, GuestOutcome,
    IncomingControl, IncomingError, MigrateError, OwnedNotStarted, PhaseTime, Progress, Rehearsal,
    RehearsedHere, SaveError, Uri,
};
use vfio_migration_compat::Report as CheckReport;
use vfio_migration_types::{CancelCause, Phase, Side, error_chain, printable};
use vfio_migration_vmm::guest::{Report, Stage};
use vfio_migration_vmm::machine::Accelerator;

use super::rollback;
use super::running::RunningVm;
use super::slot::{Slot, Steering};
use crate::address::Address;
use crate::control::awaited::{AwaitedInfo, sentence};
use crate::control::expected::RefusalsInfo;
use crate::control::failure::FailureInfo;
use crate::control::guest::GuestInfo;
use crate::control::protocol::{
    ArrivedGuest, DeviceInfo, MigrationInfo, MigrationStatus, PausedBy, PhaseInfo, StatusInfo, StatusReport,
    TransferInfo, VmStatus,
};
use crate::control::rehearsal::RehearsalInfo;
use crate::control::security::SecurityInfo;
use crate::units::milliseconds;

/// The VM and its migration at one moment: the two never contradict each other.
pub(super) fn report(vm: &RunningVm) -> StatusReport {
    let pending_rollback = rollback::awaited(&vm.state.pending_rollback());
    // Before the lock: it is a file as a rule.
    let expected = vm.wait().expected(vm.options.uuid);
    let refused = match vm.state.last_steering() {
        Some(Steering::Incoming(control)) => Some(RefusalsInfo::from(&control.refused())),
        Some(Steering::Outgoing(_)) | None => None,
    };
    vm.state.read(|slot, steering, last| {
        let expected = expected.filter(|_| matches!(slot, Slot::Preparing | Slot::Awaited { .. }));
        StatusReport {
            vm: StatusInfo { pending_rollback, expected, refused, ..status(vm, slot, steering) },
            migration: steering.and_then(|steering| of_steering(steering, last)),
            last: last.cloned(),
        }
    })
}

fn status(vm: &RunningVm, slot: &Slot, steering: Option<&Steering>) -> StatusInfo {
    let (config, insecure_plaintext) = (&vm.config, vm.wait().is_plain_text());
    // The RAM that the operator wants it to have.
    let wanted = vm.options.memory;
    // A guest that has come, and whose start is under way, is not awaited any more.
    let owned = match (slot, steering) {
        (Slot::Awaited { .. }, Some(Steering::Incoming(control))) => {
            control.progress().and_then(|progress| progress.owned)
        }
        _ => None,
    };
    let status = match slot {
        Slot::Awaited { machine: Some(machine), .. } if owned.is_some() && machine.is_running() => {
            VmStatus::Running
        }
        Slot::Awaited { .. } if owned.is_some() => VmStatus::Paused,
        Slot::Here { machine, .. } if machine.failure().is_some() => VmStatus::Failed,
        Slot::Here { machine, .. } if machine.is_running() => VmStatus::Running,
        Slot::Here { .. } | Slot::OwnedNotStarted { .. } | Slot::Leaving(_) => VmStatus::Paused,
        Slot::Preparing | Slot::Awaited { .. } => VmStatus::Inmigrate,
        Slot::Left { .. } => VmStatus::Postmigrate,
        Slot::Empty => VmStatus::Idle,
        Slot::Unresolved { .. } => VmStatus::Unresolved,
        Slot::Failed => VmStatus::Failed,
        Slot::Ended => VmStatus::Shutdown,
    };
    let machine = slot.machine();
    let left = match slot {
        Slot::Leaving(left) | Slot::Left { left, .. } => Some(left),
        _ => None,
    };
    let awaited = match slot {
        Slot::Awaited { at, not_ready, .. } if owned.is_none() => Some((at, not_ready)),
        _ => None,
    };
    // What keeps the machine from it is then told by the session.
    let under_way = matches!(steering, Some(Steering::Incoming(control)) if control.progress().is_some());
    // Its machine is built anew for a guest that wants another size.
    let arriving = matches!(
        steering,
        Some(Steering::Incoming(control)) if control.progress().is_some_and(|progress| progress.ram_total > 0)
    );
    StatusInfo {
        uuid: left
            .map_or_else(|| machine.map_or(config.id, |machine| machine.id()), |left| left.vm)
            .to_string(),
        status,
        guest: match config.accelerator {
            Accelerator::Kvm => "kvm".into(),
            Accelerator::Software => "software".into(),
        },
        pid: std::process::id(),
        incoming: awaited.map(|(at, _)| at.to_string()),
        incoming_plaintext: insecure_plaintext
            && awaited.is_some_and(|(at, _)| matches!(at, Address::Uri(Uri::Tcp { .. }))),
        not_ready: awaited.filter(|_| !under_way).and_then(|(_, not_ready)| not_ready.clone()).map(|why| {
            match steering {
                // What keeps the machine from being built, if it is being built just now.
                Some(Steering::Incoming(control)) => {
                    control.awaited().iter().fold(why, |why, answer| format!("{why}; {answer}"))
                }
                _ => why,
            }
        }),
        failure: match slot {
            Slot::Here { machine, .. } => machine.failure(),
            _ => None,
        },
        moved_to: match slot {
            Slot::Left { to, .. } => Some(to.clone()),
            _ => None,
        },
        memory: left
            .map(|left| left.memory)
            .or_else(|| machine.filter(|_| awaited.is_none() || arriving).map(|machine| machine.memory()))
            .or(wanted),
        devices: config.devices.iter().map(|device| device.id.to_string()).collect(),
        lost_devices: machine
            .map(|machine| machine.lost_devices())
            .unwrap_or_default()
            .iter()
            .map(|(device, _)| device.to_string())
            .collect(),
        reset_devices: machine
            .filter(|_| awaited.is_none())
            .map(|machine| machine.reset_devices())
            .unwrap_or_default()
            .iter()
            .map(ToString::to_string)
            .collect(),
        unconnected_interrupts: machine
            .map(|machine| machine.unsettled_devices())
            .unwrap_or_default()
            .iter()
            .map(ToString::to_string)
            .collect(),
        pending_rollback: None,
        expected: None,
        refused: None,
        epoch: owned.unwrap_or_else(|| slot.epoch()).0,
    }
}

fn of_steering(steering: &Steering, last: Option<&MigrationInfo>) -> Option<MigrationInfo> {
    match steering {
        Steering::Outgoing(control) => Some(outgoing(&control.progress())),
        Steering::Incoming(control) => {
            let told = last.and_then(|last| last.attempt.as_deref());
            // One that is over is under way until it is told as the last.
            let over = || control.last_progress().map(|progress| incoming(&progress));
            let untold = || over().filter(|over| over.attempt.is_some() && over.attempt.as_deref() != told);
            control.progress().map(|progress| incoming(&progress)).or_else(untold)
        }
    }
}

/// The migration of a source whose session is under way.
pub(super) fn outgoing(progress: &Progress) -> MigrationInfo {
    under_way(progress, "outgoing")
}

/// The migration of a destination whose session is under way.
pub(super) fn incoming(progress: &Progress) -> MigrationInfo {
    under_way(progress, "incoming")
}

fn under_way(progress: &Progress, direction: &str) -> MigrationInfo {
    let status = match progress {
        Progress { cancelling: true, .. } => MigrationStatus::Cancelling,
        Progress { failing: Some(_), .. } => MigrationStatus::Failing,
        Progress { waiting: true, .. } => MigrationStatus::PreSwitchover,
        _ => MigrationStatus::Active,
    };
    // While a file is written, the guest is paused for as long as the disk takes.
    let to_file = progress.attempt.as_ref().is_some_and(|attempt| attempt.kind == AttemptKind::Save);
    let limited = direction == "outgoing" && !to_file;
    let failing = progress.failing.as_ref().filter(|_| status == MigrationStatus::Failing);
    MigrationInfo {
        direction: Some(direction.into()),
        phase: Some(progress.phase.code().into()),
        phase_name: Some(progress.phase.name().into()),
        attempt: progress.attempt.as_ref().map(|attempt| attempt.attempt.to_string()),
        security: progress
            .attempt
            .as_ref()
            .and_then(|attempt| attempt.security.as_ref())
            .map(SecurityInfo::from),
        total_ms: milliseconds(progress.elapsed),
        expected_downtime_ms: progress.predicted_downtime.map(milliseconds),
        downtime_limit_ms: limited.then(|| milliseconds(progress.downtime_limit)),
        phases: phases(&progress.phases),
        iterations: progress.iteration,
        transferred: transferred(progress.bytes),
        devices: devices(&progress.devices),
        // A source knows it once it has looked at its RAM.
        remaining: (direction == "outgoing" && progress.ram_total > 0).then_some(progress.remaining),
        rate: progress.rate,
        waits_for: progress.awaited.iter().map(AwaitedInfo::from).collect(),
        error: failing.map(ToString::to_string),
        failure: failing.map(FailureInfo::from),
        ..MigrationInfo::new(status)
    }
}

/// The migration as its session leaves it: the functions below add how it ended.
fn at_end(vm: &RunningVm, status: MigrationStatus) -> MigrationInfo {
    let last = match vm.state.steering() {
        Some(Steering::Outgoing(control)) => Some(outgoing(&control.progress())),
        Some(Steering::Incoming(control)) => {
            control.progress().or(control.last_progress()).map(|progress| incoming(&progress))
        }
        None => None,
    };
    let last = last.unwrap_or_else(|| MigrationInfo::new(status));
    // Of one that was being undone: what is told of its end is for whoever knows it.
    let last = MigrationInfo { waits_for: Vec::new(), error: None, failure: None, ..last };
    MigrationInfo { status, remaining: None, rate: 0, expected_downtime_ms: None, ..last }
}

/// A session that ends with the process, `by` this, before what does not answer is undone.
pub(super) fn ended_with_process(vm: &RunningVm, by: &str, awaited: &[AwaitedInfo]) -> MigrationInfo {
    let (side, progress) = match vm.state.steering() {
        Some(Steering::Outgoing(control)) => (Side::Source, Some(control.progress())),
        Some(Steering::Incoming(control)) => (Side::Destination, control.progress()),
        None => (Side::Source, None),
    };
    let phase = progress.map_or(Phase::Plan, |progress| progress.phase);
    let cause = CancelCause::ProcessEnds(by.to_owned()).failure(side, phase);
    let error = format!("the session was cancelled {cause}; it is not waited for: {}", sentence(awaited));
    failed_in(Some(&cause), MigrationInfo { error: Some(error), ..at_end(vm, MigrationStatus::Cancelled) })
}

/// The same of one that failed, in the phase of its failure: the session may have been in another when it heard of it.
fn failed_in(failure: Option<&Failure>, ended: MigrationInfo) -> MigrationInfo {
    let Some(failure) = failure else { return ended };
    MigrationInfo {
        phase: Some(failure.phase.code().into()),
        phase_name: Some(failure.phase.name().into()),
        failure: Some(FailureInfo::from(failure)),
        ..ended
    }
}

/// What became of the guest, as the state of its migration.
fn ended(guest: &GuestOutcome) -> (MigrationStatus, ArrivedGuest) {
    match guest {
        GuestOutcome::Running => (MigrationStatus::Completed, ArrivedGuest::Running),
        GuestOutcome::Paused => (MigrationStatus::Completed, ArrivedGuest::Paused),
        GuestOutcome::NotStarted(_) => (MigrationStatus::NotStarted, ArrivedGuest::NotStarted),
        GuestOutcome::Unknown => (MigrationStatus::Unknown, ArrivedGuest::Unknown),
    }
}

/// `last`, of a source that has learned only now what became of its guest at the destination.
pub(super) fn of_outcome(guest: &GuestOutcome, last: MigrationInfo) -> MigrationInfo {
    let (status, arrived) = ended(guest);
    MigrationInfo { status, guest: Some(arrived), error: not_running(guest), ..last }
}

fn not_running(guest: &GuestOutcome) -> Option<String> {
    match guest {
        GuestOutcome::Running | GuestOutcome::Paused => None,
        GuestOutcome::NotStarted(failure) => Some(format!(
            "the guest is the destination's, which could not start it and holds it paused: {failure}"
        )),
        GuestOutcome::Unknown => Some(
            "the guest is the destination's, and whether it runs there is not known: ask its `vm`".into(),
        ),
    }
}

/// The migration of a source whose guest is the destination's.
pub(super) fn completed(completed: &Completed) -> MigrationInfo {
    let Completed {
        // The VM's own document has these.
        vm: _,
        epoch: _,
        attempt,
        transport,
        total,
        guest,
        paused,
        downtime,
        one_clock,
        predicted,
        verify,
        iterations,
        bytes,
        wire_bytes,
        phases: entered,
        ram_digest_match,
        device_digest_match,
        vectors,
        devices: moved,
        left_undone,
        // The map of names was asked for, and the verdict is that it moved.
        report: CheckReport { reasons, verdict: _, strict: _, map: _ },
    } = completed;
    let (status, arrived) = ended(guest);
    let error = not_running(guest);
    MigrationInfo {
        direction: Some("outgoing".into()),
        total_ms: milliseconds(*total),
        attempt: Some(attempt.to_string()),
        transport: Some(transport.clone()),
        guest: Some(arrived),
        paused_by: paused.map(PausedBy::from),
        downtime_ms: downtime.map(milliseconds),
        one_clock: *one_clock,
        verify_ms: milliseconds(*verify),
        expected_downtime_ms: Some(milliseconds(*predicted)),
        iterations: *iterations,
        transferred: transferred(*bytes),
        wire_bytes: Some(*wire_bytes),
        devices: devices(moved),
        vectors: *vectors,
        phases: phases(entered),
        ram_digest_match: *ram_digest_match,
        device_digest_match: Some(*device_digest_match),
        error,
        failure: guest.failure().map(FailureInfo::from),
        left_undone: left_undone.iter().map(FailureInfo::from).collect(),
        reasons: reasons.clone(),
        ..MigrationInfo::new(status)
    }
}

/// The migration of a source whose guest has not moved, or of which nobody knows; `what` it is called, as it may have been to a file, or back.
pub(super) fn not_completed(vm: &RunningVm, error: &MigrateError, what: &str) -> MigrationInfo {
    let (mut downtime_ms, mut left_undone) = (None, Vec::new());
    let (status, failure) = match error {
        MigrateError::Unresolved { .. } => (MigrationStatus::Unresolved, None),
        MigrateError::Aborted(aborted) => {
            let Aborted {
                cause,
                cancelled,
                stood,
                left_undone: undone_later,
                // Asked for below.
                obstacle: _,
                // In the text of the error, and the devices in the VM's own document.
                reset: _,
                lost: _,
                locks_lost: _,
                restored: _,
            } = aborted.as_ref();
            downtime_ms = (!stood.is_zero()).then(|| milliseconds(*stood));
            left_undone = undone_later.iter().map(FailureInfo::from).collect();
            // Whichever side's operator it was.
            let cancelled = *cancelled || cause.is_cancelled();
            let status = if cancelled { MigrationStatus::Cancelled } else { MigrationStatus::Failed };
            (status, Some(cause))
        }
        MigrateError::NotBegun(failure) => (MigrationStatus::Failed, Some(failure)),
        MigrateError::Refused(_) => (MigrationStatus::Failed, None),
    };
    MigrationInfo {
        incompatible: error.is_refusal(),
        reasons: error.report().map(|report| report.reasons).unwrap_or_default(),
        error: Some(match error {
            // Nothing is here as it was before.
            MigrateError::Aborted(aborted) if vm.is_ending() && aborted.cause.is_cancelled() => {
                format!("the session was cancelled {}", aborted.cause)
            }
            error => printable(&error.sentence_of(what)).into_owned(),
        }),
        downtime_ms,
        left_undone,
        ..failed_in(failure, at_end(vm, status))
    }
}

/// A save after which the guest runs on here, which it had `stood` for.
pub(super) fn saved(vm: &RunningVm, stood: Duration, late: &[Failure]) -> MigrationInfo {
    let downtime_ms = (!stood.is_zero()).then(|| milliseconds(stood));
    let left_undone = late.iter().map(FailureInfo::from).collect();
    MigrationInfo { downtime_ms, left_undone, ..at_end(vm, MigrationStatus::Completed) }
}

/// A save whose file could not be written.
pub(super) fn not_saved(vm: &RunningVm, error: &SaveError) -> MigrationInfo {
    MigrationInfo { error: Some(error_chain(error)), ..at_end(vm, MigrationStatus::Failed) }
}

/// The migration of a destination whose guest has arrived.
pub(super) fn arrived(vm: &RunningVm, report: &ArrivalReport) -> MigrationInfo {
    let ArrivalReport {
        // The VM's own document has these.
        vm: _,
        epoch: _,
        attempt,
        guest,
        paused,
        total,
        // Counts and times of loading, for who embeds the library.
        ram_pages: _,
        sections: _,
        steps: _,
        bytes,
        vectors,
        verify,
        devices: moved,
    } = report;
    let (status, arrived) = ended(guest);
    MigrationInfo {
        attempt: Some(attempt.to_string()),
        guest: Some(arrived),
        paused_by: paused.map(PausedBy::from),
        verify_ms: milliseconds(*verify),
        total_ms: milliseconds(*total),
        transferred: transferred(*bytes),
        devices: devices(moved),
        vectors: *vectors,
        ..at_end(vm, status)
    }
}

/// The migration of a destination whose guest has not arrived, or could not be started.
pub(super) fn not_arrived(
    vm: &RunningVm,
    error: &IncomingError,
    cancelled: bool,
    kind: AttemptKind,
) -> MigrationInfo {
    let failed = if cancelled { MigrationStatus::Cancelled } else { MigrationStatus::Failed };
    let mut left_undone = Vec::new();
    let (reasons, incompatible) = (error.reasons(), error.is_refusal());
    let (status, failure) = match error {
        IncomingError::OwnedNotStarted(held) => {
            let OwnedNotStarted { cause, .. } = held.as_ref();
            (MigrationStatus::NotStarted, Some(cause))
        }
        IncomingError::Refused(_) => (failed, None),
        IncomingError::Aborted(failure) if failure.is_cancelled() => {
            (MigrationStatus::Cancelled, Some(failure))
        }
        IncomingError::NotBegun(failure)
        | IncomingError::Aborted(failure)
        | IncomingError::GaveWay(failure)
        | IncomingError::LimitsUnmet(failure) => (failed, Some(failure)),
        IncomingError::Cancelled(failure) => (MigrationStatus::Cancelled, Some(failure)),
        IncomingError::Rehearsed(rehearsed) => {
            // Which of the two it was is the kind of the attempt.
            let RehearsedHere { only_asked: _, refused: _, obstacle: _, cause, left_undone: kept } =
                rehearsed.as_ref();
            left_undone = kept.iter().map(FailureInfo::from).collect();
            let status = match cause {
                None => MigrationStatus::Rehearsed,
                Some(cause) if cause.is_cancelled() => MigrationStatus::Cancelled,
                // That is what it was to find out.
                Some(_) if incompatible => MigrationStatus::Rehearsed,
                Some(_) => MigrationStatus::Failed,
            };
            (status, cause.as_ref())
        }
    };
    MigrationInfo {
        guest: (status == MigrationStatus::NotStarted).then_some(ArrivedGuest::NotStarted),
        incompatible,
        error: (status != MigrationStatus::Rehearsed || incompatible || !left_undone.is_empty()).then(|| {
            match kind {
                AttemptKind::Restore => error.sentence_of("the restore"),
                AttemptKind::Rehearsal => error.sentence_of("the incoming rehearsal"),
                AttemptKind::Check => error.sentence_of("the check"),
                _ => error_chain(error),
            }
        }),
        reasons,
        left_undone,
        ..failed_in(failure, at_end(vm, status))
    }
}

/// What the session of a receiver is for that is under way, or was the last.
pub(super) fn kind_of_session(control: &IncomingControl) -> AttemptKind {
    let progress = control.progress().or(control.last_progress());
    progress.and_then(|progress| progress.attempt).map_or(AttemptKind::Migration, |attempt| attempt.kind)
}

/// A rehearsal that came to its end.
pub(super) fn rehearsed(vm: &RunningVm, found: Rehearsal) -> MigrationInfo {
    let reasons = found.reasons();
    MigrationInfo {
        incompatible: !reasons.is_empty(),
        reasons,
        total_ms: milliseconds(found.total),
        expected_downtime_ms: found.predicted_downtime.map(milliseconds),
        error: found.left_undone.as_ref().map(|failure: &Failure| failure.to_string()),
        left_undone: found.left_undone.iter().map(FailureInfo::from).collect(),
        phases: phases(&found.phases),
        rehearsal: Some(RehearsalInfo::of(found)),
        ..at_end(vm, MigrationStatus::Rehearsed)
    }
}

/// A rehearsal that ended early, be it because it found that nothing would move.
pub(super) fn not_rehearsed(vm: &RunningVm, error: &MigrateError) -> MigrationInfo {
    // By whichever side's operator.
    let cancelled =
        matches!(error, MigrateError::Aborted(aborted) if aborted.cancelled || aborted.cause.is_cancelled());
    let rehearsal = RehearsalInfo::of_error(error).filter(|_| !cancelled);
    let status = match (&rehearsal, cancelled) {
        (Some(_), _) => MigrationStatus::Rehearsed,
        (None, true) => MigrationStatus::Cancelled,
        (None, false) => MigrationStatus::Failed,
    };
    let incompatible = rehearsal.is_some();
    MigrationInfo { incompatible, rehearsal, status, ..not_completed(vm, error, "the rehearsal") }
}

fn transferred(bytes: Bytes) -> TransferInfo {
    let Bytes { ram, device_precopy, device_stopcopy } = bytes;
    TransferInfo { ram, device_precopy, device_stopcopy }
}

fn devices(devices: &[DeviceStatus]) -> Vec<DeviceInfo> {
    let device = |device: &DeviceStatus| DeviceInfo {
        id: device.id.to_string(),
        precopy: device.precopy,
        stopcopy: device.stopcopy,
    };
    devices.iter().map(device).collect()
}

fn phases(times: &[PhaseTime]) -> Vec<PhaseInfo> {
    let phase = |time: &PhaseTime| PhaseInfo {
        phase: time.phase.code().into(),
        name: time.phase.name().into(),
        ms: milliseconds(time.took),
    };
    times.iter().map(phase).collect()
}

/// The report page of the guest as `query-guest` returns it.
pub(super) fn guest_info(report: &Report) -> GuestInfo {
    GuestInfo {
        stage: match report.stage {
            Stage::Off => 0,
            Stage::Booting => 1,
            Stage::DriverReady => 2,
            Stage::Running => 3,
            Stage::Failed => 0xDEAD,
            Stage::Unknown(other) => other,
            _ => u64::MAX,
        },
        loops: report.loops,
        pages_written: report.pages_written,
        pages_checked: report.pages_checked,
        pages_lost: report.pages_lost,
        page_passes: report.page_passes,
        dma_blocks: report.dma_blocks,
        p2p_blocks: report.p2p_blocks,
        blocks_checked: report.blocks_checked,
        blocks_lost: report.blocks_lost,
        block_passes: report.block_passes,
        least_posted: report.least_posted,
        interrupts: report.interrupts,
        interrupts_lost: report.interrupts_lost,
        spurious: report.spurious,
        longest_gap_ns: report.longest_gap_ns,
        last_clock_ns: report.last_clock_ns,
        integrity_failures: report.integrity_failures,
        serial_bytes: report.serial_bytes,
        serial_bytes_lost: report.serial_bytes_lost,
        serial_interrupts: report.serial_interrupts,
        serial_interrupts_lost: report.serial_interrupts_lost,
        failure: report.failure_code,
        failure_detail: report.failure_detail,
    }
}
