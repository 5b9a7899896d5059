//! What is said and done after a session's end: verbs that come later agree with what the session told, and with what is.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use vfio_migration::VmOwnership;
use vfio_migration_types::Epoch;

use super::sides::{PATIENCE, Side, Told, migrate_between, pair, wait_for};
use crate::control::protocol::{ControlVerb, MigrationInfo, MigrationStatus, VmStatus};
use crate::follow::text;
use crate::history::{History, SessionKind};

const NONE: &[&str] = &[];

/// A migration between devices that have a second for a transition.
fn migrate(
    dir: &Path,
    here: &[&str],
    there: &[&str],
    options: &Value,
    meanwhile: impl FnOnce(&Side, &Side),
) -> Told {
    let (source, destination) = pair(dir, here, there, "1s");
    migrate_between(source, destination, options, meanwhile)
}

/// The last record of the only VM in the state directory.
fn last_record(side: &Side) -> crate::history::HistoryRecord {
    History::read(&side.state).unwrap().records.pop().unwrap()
}

/// Proof that the guest runs and its device works: blocks come.
fn prove_whole(side: &Side) {
    let posted = || {
        let guest = side.client().call(ControlVerb::QueryGuest, Value::Null).unwrap();
        guest["least-posted"].as_u64().unwrap()
    };
    let before = posted();
    wait_for("blocks of the device", || posted() > before + 20);
}

fn cont(side: &Side) -> Result<(), String> {
    side.client().call(ControlVerb::Cont, Value::Null).map(drop).map_err(|error| error.to_string())
}

/// `cont` of a guest that a session left paused started it, and all that was told says so.
fn check_started(side: &Side, case: &str) {
    let mut listener = side.client();
    // A device that was late comes to its end in time.
    let mut refused = String::new();
    wait_for("`cont` to be taken", || cont(side).map_err(|why| refused = why).is_ok());
    assert_eq!(side.report().vm.status, VmStatus::Running, "{case} {refused}");
    prove_whole(side);
    let report = side.report();
    let last = report.last.as_ref().unwrap();
    assert!(last.started.is_some() && text(&report).contains("`cont` started"), "{case}: {last:?}");
    let record = last_record(side);
    assert_eq!((record.kind, record.migration.status), (SessionKind::Start, MigrationStatus::Completed));
    let resumed = std::iter::from_fn(|| listener.next_event(PATIENCE).unwrap());
    assert!({ resumed }.any(|event| event.event == "RESUME"), "{case}");
}

/// It could not, and the refusal says why; nothing else has changed.
fn check_refused(side: &Side, case: &str, says: &[&str]) {
    let refused = cont(side).unwrap_err();
    for part in says {
        assert!(refused.contains(part), "{case}: no {part} in {refused}");
    }
    assert_eq!(side.report().vm.status, VmStatus::Paused, "{case}: {refused}");
    let loops = side.loops();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(side.loops(), loops, "{case}: it runs");
    let record = last_record(side);
    assert_eq!((record.kind, record.migration.status), (SessionKind::Start, MigrationStatus::Failed));
}

#[test]
fn cont_starts_the_devices_of_a_guest_that_could_not_be_started() {
    const P2P: &str = "STOP to RUNNING_P2P";
    let reset = ["dev0", "ERROR to RUNNING_P2P", "only a reset helps, which loses", "os error 5"];
    let cases: &[(&str, &[&str])] = &[
        ("fail-arc:STOP:RUNNING_P2P:EIO:1", &[]),
        ("fail-arc:RUNNING_P2P:RUNNING:EIO:1", &[]),
        ("hang-arc:RUNNING_P2P:RUNNING:1500", &[]),
        ("fail-arc:STOP:RUNNING_P2P:EIO", &["dev0", P2P, "os error 5"]),
        ("error-arc:STOP:RUNNING_P2P", &reset),
        ("error-arc:RUNNING_P2P:RUNNING", &reset),
    ];
    for (fault, refusal) in cases {
        let dir = tempfile::tempdir().unwrap();
        let told = migrate(dir.path(), NONE, &[fault], &json!({}), |_, _| {});
        told.check(fault);
        assert_eq!(told.printed.migration.status, MigrationStatus::NotStarted, "{fault}");
        match refusal {
            [] => check_started(&told.destination, fault),
            says => check_refused(&told.destination, fault, says),
        }
    }
}

/// The same guest at its source: it was left paused, since a device neither went back nor was reset in time.
#[test]
fn cont_takes_the_devices_of_a_guest_back_that_was_not_let_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let fault = "hang-arc:PRE_COPY_P2P:STOP_COPY:6000";
    let told = migrate(dir.path(), &[fault], NONE, &json!({}), |_, _| {});
    told.check(fault);
    assert_eq!(told.source.report().vm.status, VmStatus::Paused, "{fault}");
    check_started(&told.source, fault);
}

/// Neither the text nor the status hides that a device is not what it was.
#[test]
fn a_guest_whose_device_was_reset_is_not_said_to_be_as_it_was() {
    for fault in
        ["error-arc:RUNNING:PRE_COPY", "error-arc:PRE_COPY:PRE_COPY_P2P", "error-arc:PRE_COPY_P2P:STOP_COPY"]
    {
        let dir = tempfile::tempdir().unwrap();
        let told = migrate(dir.path(), &[fault], NONE, &json!({}), |_, _| {});
        told.check(fault);
        let error = told.printed.migration.error.as_ref().unwrap();
        assert!(
            error.contains("; the guest is here; device dev0 had to be reset and lost its state"),
            "{error}"
        );
        assert_eq!(told.source.report().vm.reset_devices, ["dev0"], "{fault}");
        // The next session does not wipe it out.
        let arguments = json!({"uri": "tcp:127.0.0.1:1"});
        told.source.client().call(ControlVerb::Migrate, arguments).unwrap();
        wait_for("the next session's end", || told.source.report().migration.is_none());
        assert_eq!(told.source.report().vm.reset_devices, ["dev0"], "{fault}");
    }
}

#[test]
fn a_guest_whose_device_does_not_answer_a_cancel_is_not_said_to_be_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let fault = "hang-arc:RUNNING:PRE_COPY:4000";
    let told = migrate(dir.path(), &[fault], NONE, &json!({}), |source, _| {
        let waits = |info: &MigrationInfo| info.phase.as_deref() == Some("P2");
        wait_for("the device to be asked", || source.report().migration.as_ref().is_some_and(waits));
        source.client().call(ControlVerb::MigrateCancel, Value::Null).unwrap();
    });
    told.check(fault);
    let info = &told.printed.migration;
    assert_eq!(info.status, MigrationStatus::Cancelled, "{info:?}");
    assert!(info.error.as_ref().unwrap().contains("; the guest is here"), "{info:?}");
}

/// From the commit on the receiver says what its journal says, and takes no cancel.
#[test]
fn a_receiver_that_owns_the_guest_takes_no_cancel_and_says_whose_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let fault = "hang-arc:RUNNING_P2P:RUNNING:900";
    let told = migrate(dir.path(), NONE, &[fault], &json!({}), |_, destination| {
        let mut seen = None;
        wait_for("the start", || {
            let report = destination.report();
            let starts = |info: &MigrationInfo| info.phase.as_deref() == Some("P8");
            seen = Some(report.vm).filter(|_| report.migration.as_ref().is_some_and(starts));
            seen.is_some() || report.last.is_some()
        });
        let vm = seen.expect("the start takes long");
        assert_ne!(vm.status, VmStatus::Inmigrate, "{vm:?}");
        assert_eq!((vm.epoch, &vm.incoming), (1, &None), "{vm:?}");
        assert_eq!(destination.owner(), VmOwnership::Ours(Epoch(1)));
        let cancelled = destination.client().call(ControlVerb::MigrateCancel, Value::Null);
        let refused = cancelled.unwrap_err().to_string();
        // It may have come to its end meanwhile.
        assert!(
            refused.contains("can no longer be cancelled") || refused.contains("no migration"),
            "{refused}"
        );
    });
    told.check(fault);
    assert_eq!(told.printed.migration.status, MigrationStatus::Completed);
}
