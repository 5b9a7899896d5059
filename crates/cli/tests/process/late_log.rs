//! Device servers that are late with what they are asked about their DMA log.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::late::behind;
use crate::proxy::{self, Act};
use crate::support::{Setup, Vm, run, until};

fn receiver(dir: &Path) -> Vm {
    Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir, "b") }.start()
}

/// A late answer about the DMA log fails the session that asked, and says nothing of the device: the next one is as any other.
#[test]
fn a_device_that_was_late_with_its_dma_log_is_not_one_without() {
    let late = [proxy::LOGGING_START, proxy::LOGGING_REPORT, proxy::LOGGING_STOP];
    std::thread::scope(|scope| {
        // Side by side: they mostly wait.
        for late in late {
            scope.spawn(move || late_with_its_log(late));
        }
    });
}

fn late_with_its_log(late: u32) {
    let dir = tempfile::tempdir().unwrap();
    let (once, asked) = (AtomicBool::new(true), Arc::new(Mutex::new(Vec::new())));
    let seen = asked.clone();
    let vm = behind(dir.path(), "", move |command, body| {
        let Some(feature) = proxy::feature(command, body) else { return Act::Pass };
        if [proxy::LOGGING_START, proxy::LOGGING_STOP].contains(&feature) {
            seen.lock().unwrap().push(feature);
        }
        // Longer than any request may take.
        let is_late = feature == late && once.swap(false, Ordering::AcqRel);
        if is_late { Act::Late(Duration::from_secs(12)) } else { Act::Pass }
    });
    vm.warm();
    let there = receiver(dir.path());
    let info = vm.migrate(&there.incoming(), json!({"downtime-limit": 60_000}));
    let failure = &info["failure"];
    assert_eq!((&info["status"], &failure["device"]), (&json!("failed"), &json!("dev0")), "{info}");
    assert!(info["error"].as_str().unwrap().contains("did not answer"), "{info}");
    assert!(failure["remedy"].as_str().unwrap().contains("wait until the device answers"), "{info}");
    let sides = [&vm, &there].map(|side| format!("vm:{}", side.control.display()));
    let able = until("a `check` that is answered", || {
        let output = run(&["check", &sides[0], &sides[1]]);
        (output.status.code() != Some(1)).then_some(output)
    });
    assert_eq!(able.status.code(), Some(0), "{}", String::from_utf8_lossy(&able.stdout));
    let info = vm.migrate(&there.incoming(), json!({"downtime-limit": 60_000}));
    assert_eq!(info["status"], "completed", "{info}");
    there.assert_whole();
    let mut log = asked.lock().unwrap().clone();
    // Of a STOP that was late nobody knows that it was heard.
    log.dedup();
    assert!(log.chunks(2).all(|pair| pair == [proxy::LOGGING_START, proxy::LOGGING_STOP]), "{log:?}");
}

/// What a rehearsal found stands, and both sides say so, though the log it leaves behind is not stopped yet.
#[test]
fn a_rehearsal_whose_log_is_late_to_stop_has_its_findings() {
    let dir = tempfile::tempdir().unwrap();
    let stops = AtomicU32::new(0);
    let vm = behind(dir.path(), "", move |command, body| {
        let stops = || stops.fetch_add(1, Ordering::AcqRel);
        let is_late = proxy::feature(command, body) == Some(proxy::LOGGING_STOP) && stops() == 1;
        if is_late { Act::Late(Duration::from_secs(14)) } else { Act::Pass }
    });
    vm.warm();
    let there = receiver(dir.path());
    let control = vm.control.to_str().unwrap();
    let output = run(&[
        "rehearse",
        "--json",
        "--control",
        control,
        "--downtime-limit",
        "60s",
        "--to",
        &there.incoming(),
    ]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&document["verdict"], &document["left-undone"][0]["device"]),
        (&json!("live"), &json!("dev0"))
    );
    let info = vm.ended();
    assert_eq!((&info["status"], &info["incompatible"]), (&json!("rehearsed"), &json!(false)), "{info}");
    assert_eq!(info["rehearsal"]["verdict"], "live", "{info}");
    assert_eq!(info["left-undone"][0]["device"], "dev0", "{info}");
    assert_eq!(vm.info()["pending-rollback"][0]["device"], "dev0");
    until("the other side's end", || (there.migration()["status"] == "rehearsed").then_some(()));
    until("the log to be stopped", || vm.info()["pending-rollback"].is_null().then_some(()));
    // Nothing is said to be left then.
    until("the end of that", || (vm.migration()["left-undone"] == json!([])).then_some(()));
    assert_eq!(vm.migration()["error"], Value::Null, "{}", vm.migration());
}

/// A log that a session leaves behind is stopped when its server answers: until then, the session is being undone.
#[test]
fn a_log_whose_stop_is_late_at_the_end_of_a_session_is_being_undone_until_it_is_stopped() {
    const LATE: Duration = Duration::from_secs(14);
    let dir = tempfile::tempdir().unwrap();
    // The first is the trial's.
    let stops = AtomicU32::new(0);
    let vm = behind(dir.path(), "", move |command, body| {
        let stops = || stops.fetch_add(1, Ordering::AcqRel);
        let is_late = proxy::feature(command, body) == Some(proxy::LOGGING_STOP) && stops() == 1;
        if is_late { Act::Late(LATE) } else { Act::Pass }
    });
    vm.warm();
    let there = receiver(dir.path());
    vm.begin(&there.incoming(), json!({"pause-before-switchover": true}));
    until("the end of pre-copy", || (vm.migration()["status"] == "pre-switchover").then_some(()));
    let begun = Instant::now();
    vm.call("migrate-cancel", Value::Null).unwrap();
    let info = vm.ended();
    assert!(begun.elapsed() < LATE, "it was waited for: {:?}", begun.elapsed());
    assert_eq!(
        (&info["status"], &info["left-undone"][0]["device"]),
        (&json!("cancelled"), &json!("dev0")),
        "{info}"
    );
    let pending = vm.info()["pending-rollback"][0].take();
    assert_eq!(pending["device"], "dev0", "{pending}");
    assert!(pending["text"].as_str().unwrap().contains("a request to its dirty log"), "{pending}");
    assert_eq!(vm.status(), "running");
    until("the log to be stopped", || vm.info()["pending-rollback"].is_null().then_some(()));
    assert!(begun.elapsed() > LATE, "{:?}", begun.elapsed());
    let info = vm.migrate(&there.incoming(), json!({"downtime-limit": 60_000}));
    assert_eq!(info["status"], "completed", "{info}");
    there.assert_whole();
}
