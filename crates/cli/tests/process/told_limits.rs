//! A destination whose attempt is undone: what is told of it is what is so, for as long as it takes, and whoever comes meanwhile is answered.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::late::{behind_with, connects_msix};
use crate::proxy::{self, Act};
use crate::support::{PATIENCE, Process, Setup, Vm, until};

/// How much later than it is told an end may be seen, on a host that does other things too.
const SLACK: u64 = 2000;
const INCOMING: [&str; 2] = ["--incoming", "tcp:127.0.0.1:0"];

fn source(dir: &Path) -> Vm {
    let vm = Setup::new(dir, "a").start();
    vm.warm();
    vm
}

/// A receiver whose device takes so long for RESUMING to STOP, and has two seconds.
fn late_to_stop(dir: &Path, time: &str) -> Vm {
    let fault = format!("hang-arc:RESUMING:STOP:{time}");
    let device_arguments = &["--state-size", "4M", "--fault", &fault];
    let device_options = ",timeout=2s";
    Setup { device_arguments, device_options, vm_arguments: &INCOMING, ..Setup::new(dir, "b") }.start()
}

/// Looks at `there` until its session is over: it is under way or the last one, and no answer is waited for longer than is told.
fn watch_end(there: &Vm) -> Value {
    let (begun, mut seen, mut waited) = (Instant::now(), false, false);
    while begun.elapsed() < PATIENCE {
        let report = there.query("query");
        seen |= !report["migration"].is_null();
        let both = [&report["migration"], &report["last"]];
        assert!(!seen || both.iter().any(|info| !info.is_null()), "neither under way nor ended: {report}");
        for answer in report["migration"]["waits-for"].as_array().into_iter().flatten() {
            waited |= answer["device"] == "dev0";
            let (since, limit) = (answer["waited-ms"].as_u64().unwrap(), answer["limit-ms"].as_u64());
            assert!(limit.is_none_or(|limit| since <= limit + SLACK), "longer than is told: {answer}");
        }
        if seen && report["migration"].is_null() {
            assert!(waited, "its device was never waited for: {report}");
            return report;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("it does not end: {}", there.query("query"));
}

#[test]
fn no_answer_is_waited_for_longer_than_is_told_while_a_destination_is_undone() {
    let interrupts = |dir: &Path| {
        let once = AtomicBool::new(true);
        behind_with(dir, ",timeout=3s", &INCOMING, move |command, body| {
            let is_late = connects_msix(command, body) && once.swap(false, Ordering::AcqRel);
            if is_late { Act::Late(Duration::from_secs(25)) } else { Act::Pass }
        })
    };
    let stop = |dir: &Path| late_to_stop(dir, "14s");
    // Side by side: they mostly wait.
    std::thread::scope(|scope| {
        for receiver in [&interrupts as &(dyn Fn(&Path) -> Vm + Sync), &stop] {
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                let (vm, there) = (source(dir.path()), receiver(dir.path()));
                vm.begin(&there.incoming(), json!({"downtime-limit": 60_000}));
                let report = watch_end(&there);
                let error = report["last"]["error"].as_str().unwrap();
                assert!(error.contains("dev0") && error.contains("and was not reset"), "{report}");
                assert_eq!(vm.ended()["status"], "failed");
            });
        }
    });
}

/// Its device is in no hurry to be opened again: sources that come hear that at once, and what it waits for.
#[test]
fn a_receiver_that_builds_its_machine_anew_answers_whoever_comes() {
    let dir = tempfile::tempdir().unwrap();
    let vm = source(dir.path());
    let there = late_to_stop(dir.path(), "20s");
    let at = there.incoming();
    vm.begin(&at, json!({"downtime-limit": 60_000}));
    let report = watch_end(&there);
    assert_eq!(report["last"]["status"], "failed", "{report}");
    assert_eq!(vm.ended()["status"], "failed");
    let why = until("the machine to be built anew", || {
        let info = there.info();
        let why = info["not-ready"].as_str()?.to_owned();
        assert_eq!((&info["status"], &info["incoming"]), (&json!("inmigrate"), &json!(at)), "{info}");
        why.contains("dev0 has not answered a request to open it").then_some(why)
    });
    assert!(why.starts_with("its machine is being built anew"), "{why}");
    let begun = Instant::now();
    let info = vm.migrate(&at, json!({"downtime-limit": 60_000}));
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}: {info}", begun.elapsed());
    let error = info["error"].as_str().unwrap();
    assert!(error.contains("no migration is taken in here now: its machine is being built anew"), "{info}");
    assert!(error.contains("dev0 has not answered a request to open it"), "{info}");
    let failure = &info["failure"];
    assert_eq!((&failure["side"], &info["incompatible"]), (&json!("destination"), &json!(false)), "{info}");
    assert!(failure["remedy"].as_str().unwrap().starts_with("try again"), "{info}");
    // It is no session, and the last one stays what it was.
    assert_eq!(there.query("query")["last"]["attempt"], report["last"]["attempt"]);
    // It is ready again, for all but that change of state.
    vm.call("rehearse", json!({"uri": there.incoming(), "downtime-limit": 60_000})).unwrap();
    assert_eq!(vm.ended()["status"], "rehearsed", "{}", vm.migration());
}

/// A device that refuses its state has answered: its reset, which takes longer, is told as such, and only by the receiver.
#[test]
fn what_a_device_of_the_destination_refuses_is_told_before_its_reset() {
    const RESETS: Duration = Duration::from_secs(9);
    let dir = tempfile::tempdir().unwrap();
    let vm = source(dir.path());
    let (refused, late) = (AtomicBool::new(false), AtomicBool::new(false));
    let there = behind_with(dir.path(), "", &INCOMING, move |command, body| {
        if proxy::sets_stop(command, body) {
            refused.store(true, Ordering::Release);
            return Act::Refuse(5);
        }
        let resets = command == proxy::DEVICE_RESET && refused.load(Ordering::Acquire);
        if resets && !late.swap(true, Ordering::AcqRel) { Act::Late(RESETS) } else { Act::Pass }
    });
    vm.begin(&there.incoming(), json!({"downtime-limit": 60_000}));
    let told = until("its reset to be waited for", || {
        let told = there.migration()["waits-for"].as_array()?.first()?.clone();
        // The source has not to wait with it.
        let ended = vm.migration();
        (told["device"] == "dev0" && ended["status"] == "failed").then_some((told, ended))
    });
    let (told, ended) = told;
    assert!(told["text"].as_str().unwrap().starts_with("dev0 has not answered its reset for"), "{told}");
    assert_eq!(told["limit-ms"], 30_000, "{told}");
    let failure = &ended["failure"];
    assert_eq!((&failure["errno"], &failure["device"]), (&json!(5), &json!("dev0")), "{ended}");
    assert_eq!(failure["arc"], json!({"from": "RESUMING", "to": "STOP"}), "{ended}");
    let paused = ended["downtime-ms"].as_u64().unwrap();
    assert!(u128::from(paused) < RESETS.as_millis() / 2, "it was waited for, paused: {ended}");
    let report = watch_end(&there);
    assert_eq!(report["last"]["failure"]["errno"], 5, "{report}");
}

/// A machine that is made for the guest that comes, of a device that is late as it is reset then: for no longer than is told, and named.
#[test]
fn a_device_that_is_late_as_its_machine_is_built_is_named_and_waited_for_as_long_as_is_told() {
    const RESETS: Duration = Duration::from_secs(20);
    let dir = tempfile::tempdir().unwrap();
    let vm = source(dir.path());
    let (server, path) = (dir.path().join("server"), dir.path().join("proxy"));
    let device = Process::start(&["device", "--state-size", "4M", "--socket", server.to_str().unwrap()]);
    until("the server", || server.exists().then_some(()));
    let resets = AtomicU32::new(0);
    proxy::start(&path, &server, move |command, _| {
        // The first is of the machine that waits.
        let is_late = command == proxy::DEVICE_RESET && resets.fetch_add(1, Ordering::AcqRel) == 1;
        if is_late { Act::Late(RESETS) } else { Act::Pass }
    });
    let word = format!("vfio-user:{},id=dev0,timeout=4s", path.display());
    let vm_arguments = &[&INCOMING[..], &["--device", &word]].concat();
    let setup = Setup { devices: 0, memory: "", vm_arguments, ..Setup::new(dir.path(), "b") };
    let mut there = setup.start();
    there.devices.push(device);
    let begun = Instant::now();
    vm.begin(&there.incoming(), json!({"downtime-limit": 60_000}));
    let told = until("its reset to be waited for", || {
        let told = there.migration()["waits-for"].as_array()?.first()?.clone();
        (told["device"] == "dev0").then_some(told)
    });
    assert!(told["text"].as_str().unwrap().starts_with("dev0 has not answered its reset for"), "{told}");
    assert_eq!(told["limit-ms"], 4_000, "{told}");
    let info = vm.ended();
    assert!(begun.elapsed() < RESETS / 2, "longer than is told: {:?}: {info}", begun.elapsed());
    let failure = &info["failure"];
    assert_eq!((&failure["device"], &failure["errno"]), (&json!("dev0"), &json!(110)), "{info}");
    assert!(failure["text"].as_str().unwrap().starts_with("cannot build the VM: device dev0"), "{info}");
    assert_eq!(failure["remedy"], "wait until the device answers, then try again", "{info}");
    until("its machine", || there.info()["not-ready"].is_null().then_some(()));
}

/// A server that is gone is not late.
#[test]
fn a_receiver_whose_server_is_gone_says_that_nobody_listens() {
    let dir = tempfile::tempdir().unwrap();
    let mut there = Setup { vm_arguments: &INCOMING, ..Setup::new(dir.path(), "b") }.start();
    let at = there.incoming();
    there.devices[0].kill();
    let socket = dir.path().join("b-dev0.sock");
    for (told, removes) in [
        ("nobody has listened at the socket of dev0 for", false),
        ("the socket of dev0 has not been there for", true),
    ] {
        if removes {
            std::fs::remove_file(&socket).unwrap();
        }
        until(told, || {
            let why = there.info()["not-ready"].as_str()?.to_owned();
            assert!(!why.contains("has not answered"), "it does not hang: {why}");
            why.contains(told).then_some(())
        });
    }
    there.devices[0] =
        Process::start(&["device", "--socket", socket.to_str().unwrap(), "--state-size", "4M"]);
    until("its machine", || there.info()["not-ready"].is_null().then_some(()));
    let vm = source(dir.path());
    assert_eq!(vm.migrate(&at, json!({"downtime-limit": 60_000}))["status"], "completed");
}
