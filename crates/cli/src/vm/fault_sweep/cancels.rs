//! A cancel in every phase, by the operator of either side.

use std::sync::PoisonError;

use serde_json::{Value, json};
use vfio_migration::HeldFile;

use super::sides::{PATIENT, Side, UUID, migrate, migrate_between, pair, wait_for};
use crate::control::protocol::{ControlVerb, MigrationStatus};

/// How a migration is made to stand in a phase.
struct Stand {
    phase: &'static str,
    here: &'static [&'static str],
    there: &'static [&'static str],
    options: &'static str,
}

const fn stand(phase: &'static str, here: &'static [&'static str], there: &'static [&'static str]) -> Stand {
    Stand { phase, here, there, options: "{}" }
}

const CANCELLED: [Stand; 7] = [
    stand("P2", &["hang-arc:RUNNING:PRE_COPY:700"], &[]),
    stand("P2", &[], &["hang-arc:STOP:RESUMING:700"]),
    Stand { options: "{\"pause-before-switchover\": true}", ..stand("P3", &[], &[]) },
    stand("P4", &["hang-arc:PRE_COPY:PRE_COPY_P2P:700"], &[]),
    stand("P4", &["hang-arc:PRE_COPY_P2P:STOP_COPY:700"], &[]),
    stand("P5", &["hang-read:700"], &[]),
    stand("P6", &[], &["hang-arc:RESUMING:STOP:700"]),
];

/// Once COMMIT is sent.
const TOO_LATE: [Stand; 3] = [
    stand("P8", &[], &["hang-arc:STOP:RUNNING_P2P:700"]),
    stand("P8", &[], &["hang-arc:RUNNING_P2P:RUNNING:700"]),
    stand("P9", &["hang-arc:STOP_COPY:STOP:700"], &[]),
];

fn in_phase(side: &Side, phase: &str) -> bool {
    side.report().migration.is_some_and(|info| info.phase.as_deref() == Some(phase))
}

fn cancel(side: &Side) -> Result<Value, String> {
    side.client().call(ControlVerb::MigrateCancel, Value::Null).map_err(|error| error.to_string())
}

#[test]
fn a_cancel_at_either_side_is_one_at_both() {
    for Stand { phase, here, there, options } in &CANCELLED {
        for at_source in [true, false] {
            let case = format!(
                "{phase} {here:?} {there:?} at the {}",
                if at_source { "source" } else { "destination" }
            );
            let dir = tempfile::tempdir().unwrap();
            let options = serde_json::from_str(options).unwrap();
            let told = migrate(dir.path(), here, there, &options, |source, destination| {
                wait_for(&case, || in_phase(source, phase));
                cancel(if at_source { source } else { destination }).unwrap();
            });
            let arrived = told.destination.report().last.unwrap();
            let ends = (told.printed.migration.status, arrived.status);
            assert_eq!(
                ends,
                (MigrationStatus::Cancelled, MigrationStatus::Cancelled),
                "{case}: {:?}",
                told.printed.migration
            );
            told.check(&case);
        }
    }
}

#[test]
fn a_cancel_that_comes_too_late_is_refused_at_both_sides() {
    for Stand { phase, here, there, .. } in &TOO_LATE {
        for at_source in [true, false] {
            let case = format!(
                "{phase} {here:?} {there:?} at the {}",
                if at_source { "source" } else { "destination" }
            );
            let dir = tempfile::tempdir().unwrap();
            let told = migrate(dir.path(), here, there, &json!({}), |source, destination| {
                wait_for(&case, || in_phase(source, phase));
                let side = if at_source { source } else { destination };
                // A destination that the guest has reached has nothing under way.
                if at_source || *phase == "P8" {
                    let refused = cancel(side).expect_err(&case);
                    assert!(refused.contains("no longer be cancelled"), "{case}: {refused}");
                }
            });
            assert_eq!(
                told.printed.migration.status,
                MigrationStatus::Completed,
                "{case}: {:?}",
                told.printed.migration
            );
            told.check(&case);
        }
    }
}

/// The disk with the journal hangs.
#[test]
fn a_cancel_before_anybody_is_talked_to() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = pair(dir.path(), &[], &[], PATIENT);
    let held = HeldFile::at(&source.state.join(format!("{UUID}.json")));
    let told = migrate_between(source, destination, &json!({}), |source, _| {
        wait_for("the journal to be opened", || held.is_waited_for());
        assert!(in_phase(source, "P0"));
        cancel(source).unwrap();
        wait_for("the end", || source.report().migration.is_none());
        drop(held);
    });
    assert_eq!(told.printed.migration.status, MigrationStatus::Cancelled);
    told.check("in the plan");
}

/// The destination's machine is being looked at by somebody else.
#[test]
fn a_cancel_while_the_destination_reserves() {
    for at_source in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (source, destination) = pair(dir.path(), &[], &[], PATIENT);
        let vm = destination.started.vm.clone();
        let held = vm.building.lock().unwrap_or_else(PoisonError::into_inner);
        let told = migrate_between(source, destination, &json!({}), |source, destination| {
            wait_for("both sides to talk", || [source, destination].iter().all(|side| in_phase(side, "P1")));
            cancel(if at_source { source } else { destination }).unwrap();
            if at_source {
                wait_for("the end", || source.report().migration.is_none());
            }
            drop(held);
        });
        let case = format!("in hello, at the source: {at_source}");
        assert_eq!(told.printed.migration.status, MigrationStatus::Cancelled, "{case}");
        told.check(&case);
    }
}
