//! Device servers that are late, not gone: nothing of a guest's is reset for that, and what was begun is undone when they answer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::proxy::{self, Act};
use crate::support::{Process, Setup, Vm, run, until};

/// Time that the arc of a device takes whose server is late.
const HANGS: Duration = Duration::from_secs(9);

/// A `vm` whose device takes so long for its `arc`-th change of state, and has two seconds.
fn late_in(dir: &std::path::Path, arc: u32) -> Vm {
    let fault = format!("hang-arc:{arc}:{}s", HANGS.as_secs());
    let device_arguments = &["--state-size", "4M", "--fault", &fault];
    let vm = Setup { device_arguments, device_options: ",timeout=2s", ..Setup::new(dir, "a") }.start();
    vm.warm();
    vm
}

/// What is left undone names the device and the arc, and no device was reset or lost.
fn assert_late(vm: &Vm, info: &Value, from: &str, to: &str) {
    let error = info["error"].as_str().unwrap();
    assert_eq!(info["status"], "failed", "{info}");
    assert!(!error.contains("reset") && !error.contains("without") && !error.contains("restart"), "{error}");
    let late = &info["left-undone"][0];
    assert_eq!((&late["device"], &late["arc"]), (&json!("dev0"), &json!({"from": from, "to": to})), "{info}");
    let now = vm.info();
    assert_eq!((&now["reset-devices"], &now["lost-devices"]), (&json!([]), &json!([])), "{now}");
    assert_eq!(now["pending-rollback"][0]["device"], "dev0", "{now}");
}

/// When the device has answered all is as it was, and the next session comes to its end.
fn assert_taken_back(vm: &Vm, dir: &std::path::Path) {
    until("the device to be taken back", || vm.info()["pending-rollback"].is_null().then_some(()));
    assert_eq!((vm.status().as_str(), &vm.info()["reset-devices"]), ("running", &json!([])));
    vm.assert_whole();
    vm.call("save", json!({"path": dir.join("saved")})).unwrap();
    assert_eq!(vm.ended()["status"], "completed", "{}", vm.migration());
    vm.assert_whole();
}

#[test]
fn a_server_that_is_late_while_the_guest_runs_is_left_behind_and_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let vm = late_in(dir.path(), 1);
    let begun = Instant::now();
    vm.call("save", json!({"path": dir.path().join("late")})).unwrap();
    let info = vm.ended();
    assert!(begun.elapsed() < HANGS, "it was waited for: {:?}", begun.elapsed());
    assert!(info["error"].as_str().unwrap().starts_with("the save was aborted"), "{info}");
    assert_late(&vm, &info, "RUNNING", "PRE_COPY");
    assert_eq!(vm.status(), "running");
    let again = vm.call("save", json!({"path": dir.path().join("again")})).unwrap_err();
    assert!(again.contains("still being undone: dev0 has not answered RUNNING to PRE_COPY"), "{again}");
    assert_taken_back(&vm, dir.path());
}

#[test]
fn a_server_that_is_late_while_the_guest_is_paused_is_waited_for_and_the_guest_goes_on_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let vm = late_in(dir.path(), 2);
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    let begun = Instant::now();
    vm.begin(&there.incoming(), json!({"downtime-limit": 60_000}));
    let waits = until("the wait for it", || {
        let info = vm.migration();
        let waits = info["waits-for"].as_array()?.first()?.clone();
        // Once more as long as an arc may take.
        (waits["limit-ms"].as_u64()? > 3_000).then_some(waits)
    });
    assert_eq!(waits["arc"], json!({"from": "PRE_COPY", "to": "PRE_COPY_P2P"}), "{waits}");
    let info = vm.ended();
    assert!(begun.elapsed() < HANGS, "it was waited for: {:?}", begun.elapsed());
    assert_late(&vm, &info, "PRE_COPY", "PRE_COPY_P2P");
    assert!(info["error"].as_str().unwrap().contains("not resumed here before what is late has answered"));
    assert_eq!(vm.status(), "paused");
    for verb in ["cont", "stop", "save"] {
        let arguments = if verb == "save" { json!({"path": dir.path().join("no")}) } else { Value::Null };
        let refused = vm.call(verb, arguments).unwrap_err();
        assert!(refused.contains("dev0 has not answered PRE_COPY to PRE_COPY_P2P"), "{verb}: {refused}");
        assert!(refused.contains("`quit --force`"), "{verb}: {refused}");
    }
    let events = vm.events();
    assert_taken_back(&vm, dir.path());
    let resumed = std::iter::from_fn(|| events.try_recv().ok()).any(|event| event["event"] == "RESUME");
    assert!(resumed, "nobody was told that the guest goes on");
}

/// The guest is the destination's, and its state in that device: nobody is told to end the device's server.
#[test]
fn a_guest_whose_device_is_late_when_it_is_to_run_is_started_when_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup::new(dir.path(), "a").start();
    vm.warm();
    let device_arguments = &["--state-size", "4M", "--fault", "hang-arc:STOP:RUNNING_P2P:6s"];
    let vm_arguments = &["--incoming", "tcp:127.0.0.1:0"];
    let there = Setup {
        device_arguments,
        vm_arguments,
        device_options: ",timeout=2s",
        ..Setup::new(dir.path(), "b")
    };
    let there = there.start();
    let info = vm.migrate(&there.incoming(), json!({"downtime-limit": 60_000}));
    assert_eq!(info["status"], "not-started", "{info}");
    let remedy = info["failure"]["remedy"].as_str().unwrap();
    assert!(remedy.contains("wait until it answers, then `cont`"), "{info}");
    until("the device to answer", || there.call("cont", Value::Null).ok());
    there.assert_whole();
}

/// A `vm` whose device is behind a proxy.
pub(crate) fn behind(
    dir: &std::path::Path,
    options: &str,
    act: impl Fn(u16, &[u8]) -> Act + Send + Sync + 'static,
) -> Vm {
    behind_with(dir, options, &[], act)
}

pub(crate) fn behind_with(
    dir: &std::path::Path,
    options: &str,
    more: &[&str],
    act: impl Fn(u16, &[u8]) -> Act + Send + Sync + 'static,
) -> Vm {
    let (server, path) = (dir.join("server"), dir.join("proxy"));
    let device = Process::start(&["device", "--state-size", "4M", "--socket", server.to_str().unwrap()]);
    until("the server", || server.exists().then_some(()));
    proxy::start(&path, &server, act);
    let word = format!("vfio-user:{},id=dev0{options}", path.display());
    let vm_arguments = &[&["--device", &word], more].concat();
    let name = if more.is_empty() { "a" } else { "b" };
    let mut vm = Setup { devices: 0, vm_arguments, ..Setup::new(dir, name) }.start();
    vm.devices.push(device);
    vm
}

/// Whether a SET_IRQS gives the device eventfds of MSI-X.
pub(crate) fn connects_msix(command: u16, body: &[u8]) -> bool {
    let word = |at: usize| u32::from_le_bytes(body[at..at + 4].try_into().unwrap());
    command == proxy::SET_IRQS && word(4) & 4 != 0 && word(8) == 2 && word(16) > 0
}

/// The guest has all interrupts when a device that refused them once, or was late with its answer, gives them.
#[test]
fn interrupts_that_a_device_did_not_take_are_asked_for_again() {
    for late in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let once = AtomicBool::new(true);
        let vm = behind(dir.path(), "", move |command, body| {
            match connects_msix(command, body) && once.swap(false, Ordering::AcqRel) {
                true if late => Act::Late(Duration::from_secs(13)),
                true => Act::Refuse(16),
                false => Act::Pass,
            }
        });
        let named = || vm.info()["unconnected-interrupts"] == json!(["dev0"]);
        if late {
            until("the device to be named", || named().then_some(()));
        }
        until("the interrupts", || (vm.counter("interrupts") > 20).then_some(()));
        until("all to be connected", || (!named()).then_some(()));
        vm.assert_runs();
        assert_eq!(vm.info()["lost-devices"], json!([]));
    }
}

/// `timeout=` is for changes of state: nothing else that the server is asked has less time for it.
#[test]
fn a_short_limit_on_arcs_is_none_on_other_requests() {
    let dir = tempfile::tempdir().unwrap();
    let (regions, writes) = (AtomicBool::new(true), AtomicBool::new(true));
    let vm = behind(dir.path(), ",timeout=1s", move |command, _| {
        let once = match command {
            proxy::GET_REGION_INFO => &regions,
            proxy::REGION_WRITE => &writes,
            _ => return Act::Pass,
        };
        if once.swap(false, Ordering::AcqRel) { Act::Late(Duration::from_secs(3)) } else { Act::Pass }
    });
    vm.warm();
    vm.assert_whole();
}

/// A question that is many requests has one time for all of them.
#[test]
fn a_server_that_is_slow_with_each_answer_is_given_up_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let (server, path) = (dir.path().join("server"), dir.path().join("proxy"));
    let _device = Process::start(&["device", "--state-size", "4M", "--socket", server.to_str().unwrap()]);
    until("the server", || server.exists().then_some(()));
    proxy::start(&path, &server, |command, _| match command {
        proxy::GET_REGION_INFO => Act::Late(Duration::from_millis(1400)),
        _ => Act::Pass,
    });
    for verb in ["describe", "devices", "check"] {
        let begun = Instant::now();
        let path = path.to_str().unwrap();
        let sides: &[&str] = if verb == "check" { &[path, path] } else { &[path] };
        let output = run(&[&[verb, "--timeout", "2s"], sides].concat());
        let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        // The nine regions take much longer.
        assert!(begun.elapsed() < Duration::from_secs(14), "{verb}: {:?}: {told}", begun.elapsed());
        assert!(told.contains("not answered all that it was asked within 10s"), "{verb}: {told}");
        assert!(told.contains("`--timeout`, a fifth of that, gives it longer"), "{verb}: {told}");
    }
}

/// A server that greets, and says nothing more, has the time for one answer, not for two.
#[test]
fn a_server_that_only_greets_is_given_up_after_one_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (server, path) = (dir.path().join("server"), dir.path().join("proxy"));
    let _device = Process::start(&["device", "--state-size", "4M", "--socket", server.to_str().unwrap()]);
    until("the server", || server.exists().then_some(()));
    proxy::start(&path, &server, |command, _| match command {
        proxy::VERSION => Act::Pass,
        _ => Act::Late(Duration::from_secs(60)),
    });
    let begun = Instant::now();
    let output = run(&["describe", "--timeout", "4s", path.to_str().unwrap()]);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("does not answer within 4 s"), "{told}");
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}: {told}", begun.elapsed());
}

/// The device of a destination is late with the guest's interrupts: both sides name it, and say what helps.
#[test]
fn a_device_of_the_destination_that_is_late_with_interrupts_is_named_until_it_answers() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup::new(dir.path(), "a").start();
    vm.warm();
    let once = AtomicBool::new(true);
    let late = move |command: u16, body: &[u8]| {
        let is_late = connects_msix(command, body) && once.swap(false, Ordering::AcqRel);
        if is_late { Act::Late(Duration::from_secs(20)) } else { Act::Pass }
    };
    let there = behind_with(dir.path(), "", &["--incoming", "tcp:127.0.0.1:0"], late);
    let at = there.incoming();
    vm.begin(&at, json!({"downtime-limit": 60_000}));
    let waits = until("the source to say what it waits for", || {
        let text = vm.migration()["waits-for"].as_array()?.first()?["text"].as_str()?.to_owned();
        text.contains("the destination").then_some(text)
    });
    assert!(waits.contains("the end of the guest's state, which it loads"), "{waits}");
    let info = vm.ended();
    let failure = &info["failure"];
    assert_eq!((&info["status"], &failure["device"]), (&json!("failed"), &json!("dev0")), "{info}");
    assert_eq!(failure["remedy"], "wait until the device answers, then try again", "{info}");
    assert_eq!(failure["errno"], 110, "{info}");
    // It is being undone there for as long as the device is late, as whoever asks is told, and then has its machine to build anew.
    let there_now = there.query("query");
    let undone = &there_now["migration"];
    assert_eq!(
        (&undone["status"], &undone["failure"]["device"]),
        (&json!("failing"), &json!("dev0")),
        "{there_now}"
    );
    assert!(undone["error"].as_str().unwrap().contains("dev0"), "{there_now}");
    assert!(there_now["vm"]["not-ready"].is_null(), "a session has the machine: {there_now}");
    let status = run(&["status", "--control", crate::support::control(&there)]);
    let text = String::from_utf8_lossy(&status.stdout);
    assert!(text.contains("failed, and being undone") && text.contains("why: "), "{text}");
    assert!(text.contains("waits: dev0 has not answered") && !text.contains("under way"), "{text}");
    assert_eq!(status.status.code(), Some(0), "{text}");
    let info = vm.migrate(&at, json!({"downtime-limit": 60_000}));
    let error = info["error"].as_str().unwrap();
    let says = ["still being undone; dev0 has not answered", "its machine is being built anew"];
    assert!(says.iter().any(|says| error.contains(says)), "{info}");
    let at = there.incoming();
    let info = until("a guest to be taken in again", || {
        let info = vm.migrate(&at, json!({"downtime-limit": 60_000}));
        (info["status"] == "completed").then_some(info)
    });
    assert_eq!(info["status"], "completed", "{info}");
    there.assert_whole();
}

/// The guest runs elsewhere: nobody waits for its old device, neither whoever moved it nor the end of the process.
#[test]
fn a_guest_that_has_moved_does_not_wait_for_its_old_device() {
    let dir = tempfile::tempdir().unwrap();
    let device_arguments = &["--state-size", "4M", "--fault", "hang-arc:STOP_COPY:STOP"];
    let mut vm =
        Setup { device_arguments, device_options: ",timeout=2s", ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    let info = vm.migrate(&there.incoming(), json!({"downtime-limit": 60_000}));
    assert_eq!(info["status"], "completed", "{info}");
    let left = &info["left-undone"][0];
    assert_eq!(
        (&left["device"], &left["arc"]),
        (&json!("dev0"), &json!({"from": "STOP_COPY", "to": "STOP"}))
    );
    there.assert_runs();
    assert_eq!(vm.info()["pending-rollback"][0]["device"], "dev0");
    vm.call("quit", Value::Null).unwrap();
    until("the end of the process", || vm.process.child.try_wait().unwrap());
}

/// A question that was not answered is no verdict.
#[test]
fn a_rehearsal_with_a_device_that_is_late_has_no_verdict() {
    let dir = tempfile::tempdir().unwrap();
    let vm = late_in(dir.path(), 1);
    let there = Setup { vm_arguments: &["--incoming", "tcp:127.0.0.1:0"], ..Setup::new(dir.path(), "b") };
    let there = there.start();
    let output = run(&[
        "rehearse",
        "--control",
        crate::support::control(&vm),
        "--to",
        &there.incoming(),
        "--downtime-limit",
        "10s",
    ]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("dev0") && !said.contains("device-failed"), "{said}");
    assert_eq!(vm.migration()["incompatible"], false, "{}", vm.migration());
}

/// The file is whole by then: that is what is told, with what is late.
#[test]
fn a_file_is_whole_though_a_device_is_late_on_its_way_back() {
    let dir = tempfile::tempdir().unwrap();
    let device_arguments = &["--state-size", "4M", "--fault", "hang-arc:STOP:RUNNING_P2P:9s"];
    let vm = Setup { device_arguments, device_options: ",timeout=2s", ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let file = dir.path().join("file");
    vm.call("save", json!({"path": file})).unwrap();
    let info = vm.ended();
    let error = info["error"].as_str().unwrap();
    assert!(error.contains("the file is whole") && error.contains("dev0 has not answered"), "{info}");
    assert_eq!(
        (&info["failure"]["side"], &info["failure"]["device"]),
        (&json!("source"), &json!("dev0")),
        "{info}"
    );
    assert!(file.exists());
    until("the guest to go on", || (vm.status() == "running").then_some(()));
    vm.assert_whole();
}
