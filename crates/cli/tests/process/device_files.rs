//! One device into a file and back, through the command.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::Value;

use crate::support::{Process, Setup, command, run, until};
use crate::targets::writes_in;

/// A device server, and how the command is told of it.
struct Server {
    _process: Process,
    name: String,
}

impl Server {
    fn start(dir: &Path, name: &str, arguments: &[&str]) -> Self {
        let socket = dir.join(name);
        let path = socket.to_str().unwrap();
        let process = Process::start(&[&["device", "--socket", path], arguments].concat());
        until("the socket", || socket.exists().then_some(()));
        Self { _process: process, name: format!("vfio-user:{path}") }
    }

    /// One whose state changes all the time.
    fn busy(dir: &Path, name: &str) -> Self {
        Self::start(dir, name, &["--state-size", "4M", "--state-dirty-rate", "64M"])
    }

    /// One that leaves its state alone.
    fn calm(dir: &Path, name: &str) -> Self {
        Self::start(dir, name, &["--state-size", "4M", "--state-dirty-rate", "0"])
    }

    fn save(&self, file: &Path, more: &[&str]) -> Value {
        report(&[&["save", "--device", &self.name, "-o", text(file), "--json"], more].concat())
    }

    fn restore(&self, file: &Path, more: &[&str]) -> Value {
        report(&[&["restore", "--device", &self.name, text(file), "--json"], more].concat())
    }

    fn refuses(&self, file: &Path, exit: i32, says: &str) {
        fails(&["restore", "--device", &self.name, text(file)], exit, says);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn report(arguments: &[&str]) -> Value {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn fails(arguments: &[&str], exit: i32, says: &str) {
    let output: Output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {stderr}");
    assert!(stderr.contains(says) && !stderr.contains("panicked"), "{arguments:?} says: {stderr}");
}

fn arcs(report: &Value) -> Vec<(&str, &str)> {
    let arcs = report["arcs"].as_array().unwrap().iter();
    arcs.map(|arc| (arc["from"].as_str().unwrap(), arc["to"].as_str().unwrap())).collect()
}

fn digest(report: &Value) -> &str {
    let digest = report["state-digest"].as_str().unwrap();
    assert_eq!(digest.len(), 64, "{report}");
    digest
}

#[test]
fn a_state_goes_through_files_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let (busy, other) = (Server::busy(dir.path(), "a.sock"), Server::busy(dir.path(), "b.sock"));
    let first = busy.save(&file("first"), &["--stop-copy-only"]);
    assert_eq!(first["left-in"], "RUNNING");
    assert_eq!((&first["precopy-bytes"], &first["state-bytes"]), (&0.into(), &first["stopcopy-bytes"]));
    assert!(first["state-bytes"].as_u64().unwrap() > 4 << 20, "{first}");
    assert_eq!(first["file-bytes"], file("first").metadata().unwrap().len());
    assert!(!arcs(&first).iter().any(|(_, to)| to.starts_with("PRE_COPY")), "{first}");
    let loaded = other.restore(&file("first"), &["--leave-stopped"]);
    assert_eq!((digest(&loaded), &loaded["left-in"]), (digest(&first), &"STOP".into()));
    assert_eq!(arcs(&loaded), [("RUNNING", "RESUMING"), ("RESUMING", "STOP")]);
    // A device that stands is saved as it stands.
    let again = other.save(&file("again"), &[]);
    assert_eq!((digest(&again), &again["left-in"]), (digest(&first), &"STOP".into()));
    assert_eq!(arcs(&again), [("STOP", "STOP_COPY"), ("STOP_COPY", "STOP")]);
    // In one go, for a device that is reset when it is closed.
    let at_once = other.restore(&file("first"), &["--save-again", text(&file("once"))]);
    assert_eq!((digest(&at_once["again"]), &at_once["same-state"]), (digest(&first), &true.into()));
    assert_eq!(arcs(&at_once["again"]), [("STOP", "STOP_COPY"), ("STOP_COPY", "STOP")]);
    assert_eq!((&at_once["again"]["left-in"], &at_once["left-in"]), (&"STOP".into(), &"RUNNING".into()));
    // The controls: a byte that is altered on its way out is noticed, and a state that went on is another one.
    let altering = Server::start(dir.path(), "c.sock", &["--state-size", "4M", "--fault", "corrupt-tail"]);
    let altered = altering.restore(&file("first"), &["--save-again", text(&file("altered"))]);
    assert_eq!(altered["same-state"], false, "{altered}");
    let went_on = other.restore(&file("again"), &[]);
    assert_eq!((digest(&went_on), &went_on["left-in"]), (digest(&first), &"RUNNING".into()));
    let changed = until("the state to change", || {
        let now = other.save(&file("changed"), &["--stop-copy-only", "--force"]);
        (digest(&now) != digest(&first)).then_some(now)
    });
    assert_eq!(changed["state-bytes"], first["state-bytes"]);
}

#[test]
fn pre_copy_and_stop_copy_move_the_same_state() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let (busy, one, two) = (
        Server::busy(dir.path(), "a.sock"),
        Server::calm(dir.path(), "b.sock"),
        Server::calm(dir.path(), "c.sock"),
    );
    let fresh = one.save(&file("fresh"), &["--stop-copy-only"]);
    let live = busy.save(&file("live"), &[]);
    assert!(live["precopy-bytes"].as_u64().unwrap() > 4 << 20, "{live}");
    assert!(live["stopcopy-bytes"].as_u64().unwrap() > 0, "{live}");
    assert!(arcs(&live).contains(&("RUNNING", "PRE_COPY")), "{live}");
    one.restore(&file("live"), &[]);
    let stopped = one.save(&file("stopped"), &["--stop-copy-only"]);
    let running = one.save(&file("running"), &[]);
    assert_eq!(running["left-in"], "RUNNING");
    two.restore(&file("running"), &["--leave-stopped"]);
    let again = two.save(&file("again"), &[]);
    assert_eq!(digest(&again), digest(&stopped));
    // The control: the digest is of the state, not of any state of that size.
    assert_ne!(digest(&again), digest(&fresh));
    assert_eq!(again["state-bytes"], fresh["state-bytes"]);
}

#[test]
fn files_of_one_state_have_one_digest() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name);
    let idle = Server::calm(dir.path(), "a.sock");
    let saves: Vec<Value> =
        ["first", "second", "third"].map(|name| idle.save(&file(name), &["--stop-copy-only"])).into();
    let digests: Vec<&str> = saves.iter().map(digest).collect();
    assert!(digests.iter().all(|other| *other == digests[0]), "{digests:?}");
    // Of the state: each file tells of its own session, too.
    assert_ne!(saves[0]["file-digest"], saves[1]["file-digest"], "{saves:?}");
    // So it is of another device that was never used, and of one that was only loaded.
    let other = Server::calm(dir.path(), "b.sock");
    assert_eq!(digest(&other.save(&file("other"), &["--stop-copy-only"])), digests[0]);
    other.restore(&file("first"), &[]);
    assert_eq!(digest(&other.save(&file("loaded"), &["--stop-copy-only"])), digests[0]);
}

#[test]
fn what_does_not_fit_is_refused_before_the_device_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let (one, larger) = (
        Server::calm(dir.path(), "a.sock"),
        Server::start(dir.path(), "b.sock", &["--state-size", "8M", "--state-dirty-rate", "0"]),
    );
    one.save(&file, &[]);
    fails(&["save", "--device", &one.name, "-o", text(&file)], 1, "exists already; --force replaces it");
    // It stands: whoever resumes it for loading, or resets it, moves it.
    larger.save(&dir.path().join("larger"), &[]);
    larger.restore(&dir.path().join("larger"), &["--leave-stopped"]);
    larger.refuses(&file, 3, "parameter \"state_size\"");
    let name = format!("{},id=net0", one.name);
    fails(&["restore", "--device", &name, text(&file)], 3, "is called dev0, not net0");
    assert_eq!(larger.save(&dir.path().join("after"), &[])["left-in"], "STOP");
}

#[test]
fn a_damaged_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (file, bad) = (dir.path().join("file"), dir.path().join("bad"));
    let server = Server::calm(dir.path(), "a.sock");
    server.save(&file, &[]);
    let sound = std::fs::read(&file).unwrap();
    for at in [0, 7, 20, 400, sound.len() / 2, sound.len() - 45, sound.len() - 1] {
        let mut bytes = sound.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&bad, &bytes).unwrap();
        server.refuses(&bad, 1, "snapshot");
    }
    for (len, says) in [(0, "no snapshot"), (sound.len() / 2, "cut short"), (sound.len() - 1, "cut short")] {
        std::fs::write(&bad, &sound[..len]).unwrap();
        server.refuses(&bad, 1, says);
    }
    // The control: the same bytes without damage.
    std::fs::write(&bad, &sound).unwrap();
    server.restore(&bad, &[]);
}

#[test]
fn ctrl_c_leaves_a_running_device_and_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let files = tempfile::tempdir().unwrap();
    let names = || -> Vec<PathBuf> {
        std::fs::read_dir(files.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    // Many thousand reads: it is interrupted long before the last.
    let slow = ["--state-size", "16M", "--fault", "short-read:256"];
    let server = Server::start(dir.path(), "a.sock", &slow);
    for more in [&[][..], &["--stop-copy-only"]] {
        let file = files.path().join("file");
        let saving = command(&[&["save", "--device", &server.name, "-o", text(&file)], more].concat())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until("the file that is being written", || writes_in(saving.id(), files.path()));
        let pid = rustix::process::Pid::from_child(&saving);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let output = saving.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains("interrupted; device dev0 is in RUNNING"), "{stderr}");
        assert_eq!(names(), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_failure_leaves_no_file_and_says_how_the_device_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    let failing = |name: &str, fault: &str| {
        Server::start(dir.path(), name, &["--state-size", "1M", "--state-dirty-rate", "0", "--fault", fault])
    };
    let stuck = failing("a.sock", "fail-arc:STOP:STOP_COPY:EIO");
    fails(
        &["save", "--device", &stuck.name, "-o", text(&file), "--stop-copy-only"],
        1,
        "device dev0 is in RUNNING",
    );
    assert!(!file.exists());
    let sound = Server::start(dir.path(), "b.sock", &["--state-size", "1M"]);
    sound.save(&file, &[]);
    let refusing = failing("c.sock", "error-arc:RESUMING:STOP");
    refusing.refuses(&file, 1, "device dev0 was reset, and is in RUNNING");
    let gone = failing("d.sock", "die-in-read:65536");
    let unanswered = dir.path().join("unanswered");
    fails(&["save", "--device", &gone.name, "-o", text(&unanswered)], 1, "does not say which state");
    assert!(!unanswered.exists());
}

#[test]
fn files_of_a_guest_and_of_a_device_are_not_mistaken() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, device) = (dir.path().join("guest"), dir.path().join("device"));
    let vm = Setup::new(dir.path(), "a").start();
    let server = Server::calm(dir.path(), "b.sock");
    let control = text(&vm.control);
    assert!(run(&["save", "--control", control, "-o", text(&guest)]).status.success());
    server.save(&device, &[]);
    server.refuses(&guest, 3, "`vfio-migrate vm --restore");
    fails(&["vm", "--memory", "64M", "--restore", text(&device)], 3, "`vfio-migrate restore --device");
}

#[test]
fn nonsense_is_a_usage_error() {
    let usage = |arguments: &[&str], says: &str| fails(arguments, 2, says);
    usage(&["save", "-o", "/x"], "--device");
    usage(&["save", "--control", "/x", "--device", "vfio-user:/x", "-o", "/x"], "cannot be used with");
    usage(&["save", "--control", "/x", "--stop-copy-only", "-o", "/x"], "cannot be used with");
    usage(&["save", "--device", "vfio-user:/x", "--stop", "-o", "/x"], "cannot be used with");
    usage(&["save", "--device", "floppy:/x", "-o", "/x"], "the kind is unknown");
    usage(&["restore", "--device", "vfio-user:/x,name=a", "/x"], "there is no option name");
    fails(&["restore", "--device", "vfio-user:/x", "/nonexistent/file"], 1, "/nonexistent/file");
    let output = run(&["restore", "--device", "vfio-user:/x", "/nonexistent/file", "--json"]);
    let failure: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(failure["exit"], 1);
}

/// Whatever it waits for of the device, a signal ends it, and nothing is left of the file.
#[test]
fn a_device_that_does_not_answer_is_not_waited_for_after_a_signal() {
    use rustix::process::{Pid, Signal, kill_process};
    let dir = tempfile::tempdir().unwrap();
    let calm = Server::calm(dir.path(), "calm");
    let whole = dir.path().join("whole");
    calm.save(&whole, &[]);
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let file = out.join("file");
    let saves =
        ["RUNNING:PRE_COPY", "PRE_COPY:PRE_COPY_P2P", "PRE_COPY_P2P:STOP_COPY"].map(|arc| (arc, true));
    for (signal, (arc, saving)) in [Signal::INT, Signal::TERM]
        .into_iter()
        .cycle()
        .zip(saves.into_iter().chain([("STOP:RESUMING", false)]))
    {
        let fault = format!("hang-arc:{arc}");
        let socket = dir.path().join(format!("hangs-{arc}"));
        let path = socket.to_str().unwrap();
        let mut server = command(&["device", "--socket", path, "--state-size", "4M", "--fault", &fault])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        until("the socket", || socket.exists().then_some(()));
        let name = format!("vfio-user:{path}");
        let words = if saving {
            ["save", "--device", &name, "-o", text(&file)]
        } else {
            ["restore", "--device", &name, text(&whole), "--json"]
        };
        let child = command(&words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = std::io::BufReader::new(server.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("the arc hangs") {
            line.clear();
            assert_ne!(std::io::BufRead::read_line(&mut said, &mut line).unwrap(), 0, "{arc} was not taken");
        }
        let begun = std::time::Instant::now();
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(begun.elapsed() < std::time::Duration::from_secs(5), "{arc}: {:?}: {told}", begun.elapsed());
        assert_eq!(output.status.code(), Some(1), "{arc}: {told}");
        assert!(told.contains("interrupted"), "{arc}: {told}");
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0, "{arc}: a file was left");
        kill_process(Pid::from_child(&server), Signal::TERM).unwrap();
        server.wait().unwrap();
    }
}
