//! The documents that the control socket has of a VM, its guest and its migration. [`MigrationInfo`] is made here alone.

use std::time::Duration;

use vfio_migration::{
    Arrived, Bytes, Completed, IncomingError, MigrateError, Progress, Rehearsal, SaveError,
};
use vfio_migration_types::{Phase, error_chain};
use vfio_migration_vmm::guest::{Report, Stage};
use vfio_migration_vmm::machine::{Accelerator, MachineConfig};

use super::running::RunningVm;
use super::slot::{Slot, Steering};
use crate::control::guest::GuestInfo;
use crate::control::protocol::{
    MigrationInfo, MigrationStatus, PhaseInfo, StatusInfo, StatusReport, TransferInfo,
};
use crate::control::rehearsal::RehearsalInfo;

/// The VM and its migration at one moment: the two never contradict each other.
pub(super) fn report(vm: &RunningVm) -> StatusReport {
    vm.state.read(|slot, steering, ended| StatusReport {
        vm: status(&vm.config, slot),
        migration: match (steering, ended) {
            (Some(steering), _) => of_steering(steering),
            (None, Some(ended)) => ended.clone(),
            (None, None) => MigrationInfo::default(),
        },
    })
}

fn status(config: &MachineConfig, slot: &Slot) -> StatusInfo {
    let word = match slot {
        Slot::Here { machine, .. } if machine.failure().is_some() => "failed",
        Slot::Here { machine, .. } if machine.is_running() => "running",
        Slot::Here { .. } | Slot::OwnedNotStarted { .. } | Slot::Leaving { .. } => "paused",
        Slot::Preparing | Slot::Awaited { .. } => "inmigrate",
        Slot::Left => "postmigrate",
        Slot::Unresolved { .. } => "unresolved",
        Slot::Failed => "failed",
    };
    let machine = slot.machine();
    StatusInfo {
        uuid: machine.map_or(config.id, |machine| machine.id()).to_string(),
        status: word.into(),
        guest: match config.accelerator {
            Accelerator::Kvm => "kvm".into(),
            Accelerator::Software => "software".into(),
        },
        pid: std::process::id(),
        incoming: match slot {
            Slot::Awaited { at, .. } => Some(at.to_string()),
            _ => None,
        },
        memory: config.memory,
        devices: config.devices.iter().map(|device| device.id.to_string()).collect(),
        lost_devices: machine
            .map(|machine| machine.lost_devices())
            .unwrap_or_default()
            .iter()
            .map(ToString::to_string)
            .collect(),
        epoch: slot.epoch().0,
    }
}

fn of_steering(steering: &Steering) -> MigrationInfo {
    match steering {
        Steering::Outgoing(control) => outgoing(&control.progress()),
        Steering::Incoming(control) => under_way(&control.progress(), "incoming"),
    }
}

/// The migration of a source whose session is under way.
pub(super) fn outgoing(progress: &Progress) -> MigrationInfo {
    under_way(progress, "outgoing")
}

fn under_way(progress: &Progress, direction: &str) -> MigrationInfo {
    MigrationInfo {
        status: if progress.waiting { MigrationStatus::PreSwitchover } else { MigrationStatus::Active },
        direction: Some(direction.into()),
        phase: Some(progress.phase.code().into()),
        total_ms: ms(progress.elapsed),
        expected_downtime_ms: progress.predicted_downtime.map(ms),
        iterations: progress.iteration,
        transferred: transferred(progress.bytes),
        remaining: progress.remaining,
        rate: progress.rate,
        ..MigrationInfo::default()
    }
}

/// The migration as its session leaves it: the functions below add how it ended.
fn at_end(vm: &RunningVm) -> MigrationInfo {
    let last = vm.state.steering().map_or_else(MigrationInfo::default, |steering| of_steering(&steering));
    MigrationInfo { remaining: 0, rate: 0, expected_downtime_ms: None, ..last }
}

/// The migration of a source whose guest has moved.
pub(super) fn completed(completed: &Completed) -> MigrationInfo {
    let phases = completed.phases.iter().filter(|time| time.phase != Phase::Plan);
    MigrationInfo {
        status: MigrationStatus::Completed,
        direction: Some("outgoing".into()),
        total_ms: ms(completed.total),
        downtime_ms: Some(ms(completed.downtime)),
        verify_ms: ms(completed.verify),
        expected_downtime_ms: Some(ms(completed.predicted)),
        iterations: completed.iterations,
        transferred: transferred(completed.bytes),
        phases: phases.map(|time| PhaseInfo { name: time.phase.code().into(), ms: ms(time.took) }).collect(),
        ram_digest_match: completed.ram_digest_match,
        device_digest_match: Some(completed.device_digest_match),
        reasons: completed.report.reasons.clone(),
        ..MigrationInfo::default()
    }
}

/// The migration of a source whose guest has not moved, or of which nobody knows.
pub(super) fn not_completed(vm: &RunningVm, error: &MigrateError) -> MigrationInfo {
    let status = match error {
        MigrateError::Unresolved { .. } => MigrationStatus::Unresolved,
        MigrateError::Aborted(aborted) if aborted.cancelled => MigrationStatus::Cancelled,
        _ => MigrationStatus::Failed,
    };
    MigrationInfo {
        status,
        incompatible: matches!(error, MigrateError::Refused(_)),
        reasons: error.report().map(|report| report.reasons).unwrap_or_default(),
        error: Some(error_chain(error)),
        ..at_end(vm)
    }
}

/// A save after which the guest runs on here.
pub(super) fn saved(vm: &RunningVm) -> MigrationInfo {
    MigrationInfo { status: MigrationStatus::Completed, ..at_end(vm) }
}

/// A save whose file could not be written.
pub(super) fn not_saved(vm: &RunningVm, error: &SaveError) -> MigrationInfo {
    MigrationInfo { status: MigrationStatus::Failed, error: Some(error_chain(error)), ..at_end(vm) }
}

/// The migration of a destination whose guest has arrived.
pub(super) fn arrived(vm: &RunningVm, arrived: &Arrived) -> MigrationInfo {
    MigrationInfo {
        status: MigrationStatus::Completed,
        verify_ms: ms(arrived.report.verify),
        total_ms: ms(arrived.report.total),
        transferred: transferred(arrived.report.bytes),
        ..at_end(vm)
    }
}

/// The migration of a destination whose guest has not arrived, or could not be started.
pub(super) fn not_arrived(vm: &RunningVm, error: &IncomingError) -> MigrationInfo {
    let refused = match error {
        IncomingError::Refused(reasons) => Some(reasons),
        _ => None,
    };
    MigrationInfo {
        status: MigrationStatus::Failed,
        incompatible: refused.is_some(),
        error: Some(error_chain(error)),
        reasons: refused.cloned().unwrap_or_default(),
        ..at_end(vm)
    }
}

/// A rehearsal that came to its end.
pub(super) fn rehearsed(vm: &RunningVm, found: Rehearsal) -> MigrationInfo {
    MigrationInfo {
        status: MigrationStatus::Rehearsed,
        total_ms: ms(found.total),
        error: found.left_undone.as_ref().map(ToString::to_string),
        rehearsal: Some(RehearsalInfo::of(found)),
        ..at_end(vm)
    }
}

/// A rehearsal that ended early, be it because it found that nothing would move.
pub(super) fn not_rehearsed(vm: &RunningVm, error: &MigrateError) -> MigrationInfo {
    let cancelled = matches!(error, MigrateError::Aborted(aborted) if aborted.cancelled);
    let rehearsal = RehearsalInfo::of_error(error).filter(|_| !cancelled);
    MigrationInfo {
        status: match (&rehearsal, cancelled) {
            (Some(_), _) => MigrationStatus::Rehearsed,
            (None, true) => MigrationStatus::Cancelled,
            (None, false) => MigrationStatus::Failed,
        },
        incompatible: rehearsal.is_some(),
        error: Some(error_chain(error)),
        rehearsal,
        ..at_end(vm)
    }
}

fn transferred(bytes: Bytes) -> TransferInfo {
    TransferInfo {
        ram: bytes.ram,
        device_precopy: bytes.device_precopy,
        device_stopcopy: bytes.device_stopcopy,
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
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
