//! What is said and done after a session's end: verbs that come later agree with what the session told, and with what is.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use vfio_migration::{MigrateError, UnresolvedMigration, VmOwnership};
use vfio_migration_types::{AttemptId, Epoch, Phase};

use super::super::outgoing;
use super::sides::{PATIENCE, PATIENT, Side, Told, migrate_between, pair, wait_for};
use crate::control::protocol::{
    ArrivedGuest, ControlVerb, MigrationInfo, MigrationStatus, PausedBy, VmStatus,
};
use crate::follow::text;
use crate::history::{History, HistoryRecord, SessionKind, ending};

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
fn last_record(side: &Side) -> HistoryRecord {
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

/// The same guest at its source: it was left paused, since its device was late. `cont` says so, and the guest goes on with it.
#[test]
fn a_guest_whose_device_is_late_on_the_way_back_goes_on_when_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let fault = "hang-arc:PRE_COPY_P2P:STOP_COPY:9000";
    let (source, destination) = pair(dir.path(), &[fault], NONE, "2s");
    let told = migrate_between(source, destination, &json!({}), |_, _| {});
    told.check(fault);
    assert_eq!(told.source.report().vm.status, VmStatus::Paused, "{fault}");
    let refused = cont(&told.source).unwrap_err();
    assert!(refused.contains("dev0 has not answered PRE_COPY_P2P to STOP_COPY"), "{refused}");
    wait_for("the device", || told.source.report().vm.status == VmStatus::Running);
    let vm = told.source.report().vm;
    assert!(vm.reset_devices.is_empty() && vm.pending_rollback.is_none(), "{vm:?}");
    assert!(told.source.progresses());
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
        let (_, guest) = error.split_once("; the guest is here").expect(error);
        assert!(guest.ends_with("; device dev0 had to be reset and lost its state"), "{error}");
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

/// What is told of a guest that is paused although all went well.
fn check_paused(info: &MigrationInfo, by: PausedBy, says: &str) {
    assert_eq!(
        (info.status, info.guest),
        (MigrationStatus::Completed, Some(ArrivedGuest::Paused)),
        "{info:?}"
    );
    assert_eq!((info.paused_by, info.downtime_ms), (Some(by), None), "{info:?}");
    assert!(info.status_text().ends_with(says) && ending(info).contains(says), "{}", ending(info));
}

#[test]
fn why_a_guest_is_paused_is_told_as_it_is() {
    let receiver: &[&str] = &["--incoming", "tcp:127.0.0.1:0"];
    let receiver_paused = &[receiver, &["--paused"]].concat()[..];
    let cases = [
        (true, json!({}), receiver, PausedBy::Operator, ", paused as it was before"),
        (false, json!({"suspend": true}), receiver, PausedBy::Source, ", paused as its source asked"),
        (false, json!({}), receiver_paused, PausedBy::Destination, ", paused as its receiver was started"),
    ];
    for (stopped, mut arguments, receiver, by, says) in cases {
        let dir = tempfile::tempdir().unwrap();
        let source = Side::start(dir.path(), "source", NONE, PATIENT, &[]);
        let destination = Side::start(dir.path(), "destination", NONE, PATIENT, receiver);
        wait_for("the guest's work", || source.loops() > 20);
        if stopped {
            source.client().call(ControlVerb::Stop, Value::Null).unwrap();
        }
        arguments["uri"] = destination.report().vm.incoming.unwrap().into();
        arguments["downtime-limit"] = 8000.into();
        source.client().call(ControlVerb::Migrate, arguments).unwrap();
        for side in [&source, &destination] {
            wait_for("the end", || side.report().migration.is_none() && side.report().last.is_some());
            let report = side.report();
            check_paused(report.last.as_ref().unwrap(), by, says);
            assert!(text(&report).contains(says), "{}", text(&report));
            assert_eq!(last_record(side).migration.paused_by, Some(by));
        }
        assert_eq!(destination.report().vm.status, VmStatus::Paused);
    }
}

fn save_and_stop(side: &Side, file: &std::path::Path) {
    let arguments = json!({"path": file, "stop": true});
    side.client().call(ControlVerb::Save, arguments).unwrap();
    wait_for("the file", || side.report().migration.is_none() && side.report().last.is_some());
    check_paused(side.report().last.as_ref().unwrap(), PausedBy::File, ", in the file");
}

/// A guest that ran when it was saved is in the file, and `--paused` holds the one guest that it was said of.
#[test]
fn a_file_is_no_pause_and_a_later_guest_is_not_held() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let origin = Side::start(dir.path(), "origin", NONE, PATIENT, &[]);
    wait_for("the guest's work", || origin.loops() > 20);
    save_and_stop(&origin, &first);
    let there =
        Side::start(dir.path(), "there", NONE, PATIENT, &["--restore", first.to_str().unwrap(), "--paused"]);
    assert_eq!(there.report().vm.status, VmStatus::Paused);
    assert_eq!(last_record(&there).migration.paused_by, Some(PausedBy::Destination));
    save_and_stop(&there, &second);
    let here = Side::start(dir.path(), "here", NONE, PATIENT, &["--restore", second.to_str().unwrap()]);
    cont(&here).unwrap();
    there.client().call(ControlVerb::MigrateIncoming, json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    let to = there.report().vm.incoming.unwrap();
    let arguments = json!({"uri": to, "downtime-limit": 8000});
    here.client().call(ControlVerb::Migrate, arguments).unwrap();
    wait_for("the end", || here.report().migration.is_none() && here.report().last.is_some());
    let last = here.report().last.unwrap();
    assert_eq!(
        (last.status, last.guest),
        (MigrationStatus::Completed, Some(ArrivedGuest::Running)),
        "{last:?}"
    );
    wait_for("the guest to run there", || there.report().vm.status == VmStatus::Running);
}

/// A source that was told to wait no longer for the answer to its COMMIT, with this fault of the destination's device.
fn unresolved(dir: &Path, fault: &str) -> (Side, Side) {
    let (source, destination) = pair(dir, NONE, &[fault], PATIENT);
    let to = destination.report().vm.incoming.unwrap();
    source.client().call(ControlVerb::Migrate, json!({"uri": to, "downtime-limit": 8000})).unwrap();
    let phase = || source.report().migration.and_then(|info| info.phase);
    wait_for("COMMIT to be sent", || phase().is_some_and(|phase| phase == Phase::Run.code()));
    source.started.vm.state.cancel_at_end("the test");
    wait_for("the session's end", || source.report().vm.status == VmStatus::Unresolved);
    (source, destination)
}

/// `cont` asks, and what it hears is what status, event and history say from then on.
#[test]
fn a_guest_whose_owner_is_not_known_is_asked_for_by_cont() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = unresolved(dir.path(), "hang-arc:STOP:RUNNING_P2P:1500");
    let last = source.report().last.unwrap();
    assert_eq!(last.status, MigrationStatus::Unresolved);
    assert!(last.error.as_ref().unwrap().contains("`cont` asks again"), "{last:?}");
    wait_for("the guest to run there", || destination.report().vm.status == VmStatus::Running);
    let mut listener = source.client();
    let refused = cont(&source).unwrap_err();
    assert!(refused.contains("the guest has moved to tcp:") && refused.contains("completed"), "{refused}");
    let report = source.report();
    let last = report.last.as_ref().unwrap();
    assert_eq!(report.vm.status, VmStatus::Postmigrate);
    assert_eq!((last.status, last.guest), (MigrationStatus::Completed, Some(ArrivedGuest::Running)));
    assert!(last.error.is_none() && last.failure.is_none(), "{last:?}");
    assert!(matches!(source.owner(), VmOwnership::Elsewhere { .. }), "{:?}", source.owner());
    let record = last_record(&source);
    assert_eq!((record.kind, record.migration.status), (SessionKind::Migration, MigrationStatus::Completed));
    let mut told = std::iter::from_fn(|| listener.next_event(PATIENCE).unwrap());
    assert!(told.any(|event| event.event == "MIGRATION" && event.data["status"] == "completed"));
    assert!(destination.progresses());
}

/// Nobody answers: it says so, nothing has changed, and it can be tried again.
#[test]
fn a_guest_whose_owner_does_not_answer_stays_unresolved() {
    let dir = tempfile::tempdir().unwrap();
    let (source, destination) = unresolved(dir.path(), "hang-arc:STOP:RUNNING_P2P:1500");
    wait_for("the guest to run there", || destination.report().vm.status == VmStatus::Running);
    drop(destination);
    for _ in 0..2 {
        let refused = cont(&source).unwrap_err();
        assert!(refused.contains("asked again: ") && refused.contains("refused"), "{refused}");
        assert_eq!(source.report().vm.status, VmStatus::Unresolved);
        assert!(matches!(source.owner(), VmOwnership::Undecided { .. }));
    }
    let loops = source.loops();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(source.loops(), loops, "it runs");
}

/// Whoever asks gets one text, which says what can be done.
#[test]
fn a_guest_whose_owner_is_not_known_is_told_in_one_text() {
    let dir = tempfile::tempdir().unwrap();
    let side = Side::start(dir.path(), "source", NONE, PATIENT, &[]);
    let machine = side.started.vm.state.slot().machine().unwrap().clone();
    let lost = UnresolvedMigration::of_journal(
        machine.id(),
        AttemptId([1; 16]),
        Epoch(1),
        "tcp:192.0.2.1:7000".into(),
        "its answer was lost".into(),
    );
    let lost = MigrateError::Unresolved(Box::new(lost));
    outgoing::finish(&side.started.vm, machine, Err(lost), "tcp:192.0.2.1:7000", "the migration");
    let report = side.report();
    let last = report.last.as_ref().unwrap();
    let told = last.error.clone().unwrap();
    assert_eq!((report.vm.status, last.status), (VmStatus::Unresolved, MigrationStatus::Unresolved));
    let journal = format!("remove {}", side.state.display());
    for part in ["its answer was lost", "Look at tcp:192.0.2.1:7000", "`quit --force`", &journal] {
        assert!(told.contains(part), "no {part} in {told}");
    }
    assert!(text(&report).contains(&told));
    for (verb, arguments) in [
        (ControlVerb::Cont, Value::Null),
        (ControlVerb::Stop, Value::Null),
        (ControlVerb::Quit, Value::Null),
        (ControlVerb::Migrate, json!({"uri": "tcp:127.0.0.1:1"})),
        (ControlVerb::Rehearse, json!({"uri": "tcp:127.0.0.1:1"})),
        (ControlVerb::Save, json!({"path": dir.path().join("file")})),
    ] {
        let refused = side.client().call(verb, arguments).unwrap_err().to_string();
        assert!(refused.contains(&told), "{verb:?}: {refused}");
    }
}
