//! What is said of a migration and of the guest, as the control socket has it.

use std::time::Duration;

use vfio_migration::{Completed, Progress};
use vfio_migration_types::Phase;
use vfio_migration_vmm::guest::{Report, Stage};

use crate::control::guest::GuestInfo;
use crate::control::protocol::{MigrationInfo, MigrationState, PhaseInfo, TransferInfo};

/// How a session that goes on stands.
pub(super) fn info(progress: &Progress, direction: &str) -> MigrationInfo {
    MigrationInfo {
        status: if progress.waiting { MigrationState::PreSwitchover } else { MigrationState::Active },
        direction: Some(direction.into()),
        phase: Some(progress.phase.code().into()),
        total_ms: ms(progress.elapsed),
        downtime_ms: None,
        verify_ms: 0.0,
        expected_downtime_ms: progress.predicted_downtime.map(ms),
        iterations: progress.iteration,
        transferred: TransferInfo {
            ram: progress.bytes.ram,
            device_precopy: progress.bytes.device_precopy,
            device_stopcopy: progress.bytes.device_stopcopy,
        },
        remaining: progress.remaining,
        rate: progress.rate,
        ..MigrationInfo::none()
    }
}

pub(super) fn completed_info(completed: &Completed) -> MigrationInfo {
    MigrationInfo {
        status: MigrationState::Completed,
        direction: Some("outgoing".into()),
        total_ms: ms(completed.total),
        downtime_ms: Some(ms(completed.downtime)),
        verify_ms: ms(completed.verify),
        expected_downtime_ms: Some(ms(completed.predicted)),
        iterations: completed.iterations,
        transferred: TransferInfo {
            ram: completed.bytes.ram,
            device_precopy: completed.bytes.device_precopy,
            device_stopcopy: completed.bytes.device_stopcopy,
        },
        phases: completed
            .phases
            .iter()
            .filter(|time| time.phase != Phase::Plan)
            .map(|time| PhaseInfo { name: time.phase.code().into(), ms: ms(time.took) })
            .collect(),
        ram_digest_match: completed.ram_digest_match,
        device_digest_match: Some(completed.device_digest_match),
        reasons: completed.report.reasons.clone(),
        ..MigrationInfo::none()
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

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
