//! What each signal does to each kind of process that the command becomes.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{PATIENCE, Process, Setup, Vm, control, software, until};

/// The signals that ask a process to end, by number and name.
const ENDING: [(u32, &str); 5] =
    [(2, "SIGINT"), (15, "SIGTERM"), (1, "SIGHUP"), (30, "SIGPWR"), (24, "SIGXCPU")];
/// Those of the C library, which it sets while it uses them.
const OF_THE_C_LIBRARY: [u32; 2] = [32, 33];

/// For whoever wants a process dead and its core.
const FAULTS_AND_QUIT: [u32; 8] = [3, 4, 5, 6, 7, 8, 11, 31];

/// How a process may come into the world, as options of env(1).
const INHERITED: [&str; 3] = ["--default-signal", "--block-signal", "--ignore-signal"];

/// The signals whose default is fatal: all of signal(7) but those that are ignored, stop, or let go on, and those that leave a core
/// here too.
fn fatal() -> impl Iterator<Item = u32> {
    let not_fatal = [17, 18, 19, 20, 21, 22, 23, 28];
    (1..=64).filter(move |n| {
        *n != 9 && !FAULTS_AND_QUIT.contains(n) && !not_fatal.contains(n) && !OF_THE_C_LIBRARY.contains(n)
    })
}

fn kill(pid: u32, signal: u32) {
    let words = [signal.to_string(), pid.to_string()];
    assert!(Command::new("sh").args(["-c", "kill -$1 $2", "sh"]).args(words).status().unwrap().success());
}

/// The signals that the process catches or ignores.
fn answered(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim(), 16).unwrap()
    };
    mask("SigCgt:") | mask("SigIgn:")
}

fn answers(mask: u64, signal: u32) -> bool {
    mask >> (signal - 1) & 1 == 1
}

/// Starts a verb with every signal as it is by default, even where this test runs under nohup. Its stderr is kept.
fn started(arguments: &[&str]) -> Child {
    started_as("--default-signal", arguments)
}

/// Starts a verb with its signals as this option of env(1) says, and without cores.
fn started_as(signals: &str, arguments: &[&str]) -> Child {
    let mut env = Command::new("prlimit");
    // Whoever runs the tests may have left a signal ignored, as nohup(1) does.
    env.args(["--core=0", "env", "--default-signal", signals, env!("CARGO_BIN_EXE_vfio-migrate")])
        .args(arguments);
    env.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn vm(dir: &Path) -> (Child, std::path::PathBuf) {
    vm_as("--default-signal", dir)
}

fn vm_as(signals: &str, dir: &Path) -> (Child, std::path::PathBuf) {
    let socket = dir.join("control");
    let words = ["vm", "--software", "--memory", "32M", "--dirty-rate", "1M", "--control"];
    let child = started_as(signals, &[&words[..], &[socket.to_str().unwrap()]].concat());
    until("the guest", || greets(&socket));
    (child, socket)
}

/// Whether a control socket answers.
fn greets(socket: &Path) -> Option<()> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.read_exact(&mut [0]).ok()
}

fn device(dir: &Path) -> Child {
    device_as("--default-signal", dir)
}

fn device_as(signals: &str, dir: &Path) -> Child {
    let socket = dir.join("device");
    let child = started_as(signals, &["device", "--state-size", "1M", "--socket", socket.to_str().unwrap()]);
    until("the device", || UnixStream::connect(&socket).ok());
    child
}

/// A verb that cleans nothing up, while it waits for somebody who says nothing.
fn asking_as(signals: &str, dir: &Path) -> (Child, UnixStream) {
    let socket = dir.join("silent");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    let child = started_as(signals, &["cancel", "--control", socket.to_str().unwrap()]);
    let (connection, _) = listener.accept().unwrap();
    (child, connection)
}

#[test]
fn every_signal_that_is_fatal_by_default_is_answered_by_every_verb() {
    for signals in INHERITED {
        let dir = tempfile::tempdir().unwrap();
        let (vm, _) = vm_as(signals, dir.path());
        let device = device_as(signals, dir.path());
        let (asking, _connection) = asking_as(signals, dir.path());
        for (mut child, hears) in [(vm, true), (device, true), (asking, false)] {
            let mask = answered(child.id());
            for signal in fatal() {
                let ends = ENDING.iter().any(|(ending, _)| *ending == signal);
                // A hangup stays ignored.
                let ignored = signal == 1 && signals == "--ignore-signal";
                assert_eq!(
                    answers(mask, signal),
                    hears || !ends || ignored,
                    "{signals}: {signal} of {}",
                    child.id()
                );
            }
            for task in std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap() {
                let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
                let blocked = status.lines().find(|line| line.starts_with("SigBlk:")).unwrap();
                assert_eq!(blocked, "SigBlk:\t0000000000000000", "{signals}");
            }
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}

/// What the processes of a host ignore, of all that is not without effect: a broken pipe, and a hangup that was ignored before.
#[test]
fn nothing_that_was_ignored_stays_so_but_a_hangup() {
    let dir = tempfile::tempdir().unwrap();
    let mut device = device_as("--ignore-signal", dir.path());
    let status = std::fs::read_to_string(format!("/proc/{}/status", device.id())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    let ignored = u64::from_str_radix(ignored.trim(), 16).unwrap();
    let of_the_c_library = OF_THE_C_LIBRARY.iter().fold(0, |mask, signal| mask | 1 << (signal - 1));
    assert_eq!(ignored & !of_the_c_library, 1 << (1 - 1) | 1 << (13 - 1), "{ignored:#x}");
    kill(device.id(), 15);
    assert!(device.wait().unwrap().success());
}

#[test]
fn every_signal_of_a_fault_ends_the_process_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for signals in INHERITED {
        for signal in FAULTS_AND_QUIT {
            let mut device = device_as(signals, dir.path());
            kill(device.id(), signal);
            let status = device.wait().unwrap();
            assert_eq!(status.signal().map(i32::unsigned_abs), Some(signal), "{signals}: {status}");
        }
    }
    let (mut vm, _) = vm(dir.path());
    kill(vm.id(), 11);
    assert_eq!(vm.wait().unwrap().signal(), Some(11));
}

#[test]
fn no_stray_signal_ends_a_guest_a_device_or_a_question() {
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, socket) = vm(dir.path());
    let mut device = device(dir.path());
    for signal in fatal().filter(|signal| ENDING.iter().all(|(ending, _)| ending != signal)) {
        kill(vm.id(), signal);
        kill(device.id(), signal);
    }
    greets(&socket).unwrap();
    for child in [&mut vm, &mut device] {
        assert!(child.try_wait().unwrap().is_none());
        kill(child.id(), 15);
        assert!(child.wait().unwrap().success());
    }
}

#[test]
fn every_signal_that_asks_for_an_end_gets_a_clean_one() {
    let dir = tempfile::tempdir().unwrap();
    let blocked = ENDING.map(|ending| ("--block-signal", ending));
    for (signals, (signal, name)) in
        ENDING.map(|ending| ("--default-signal", ending)).into_iter().chain(blocked)
    {
        let (vm, socket) = vm_as(signals, dir.path());
        kill(vm.id(), signal);
        let output = vm.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {told}");
        assert!(told.contains(&format!("the VM's process has ended by {name}")), "{told}");
        assert!(!socket.exists(), "{name} left the control socket");
        let mut device = device_as(signals, dir.path());
        kill(device.id(), signal);
        assert!(device.wait().unwrap().success(), "{name}");
        assert!(!dir.path().join("device").exists(), "{name} left the device's socket");
    }
}

/// As nohup(1) starts it.
#[test]
fn a_hangup_that_was_ignored_from_the_start_stays_so() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("device");
    let binary = env!("CARGO_BIN_EXE_vfio-migrate");
    let script = format!("trap '' HUP; exec {binary} device --state-size 1M --socket {}", socket.display());
    let mut device = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    until("the device", || UnixStream::connect(&socket).ok());
    kill(device.id(), 1);
    kill(device.id(), 15);
    assert!(device.wait().unwrap().success());
}

#[test]
fn a_device_whose_arc_hangs_hears_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    for fault in ["hang-arc:RUNNING:PRE_COPY", "hang-arc:RUNNING:PRE_COPY:600000"] {
        let socket = dir.path().join("device");
        let mut device = started(&[
            "device",
            "--state-size",
            "1M",
            "--fault",
            fault,
            "--socket",
            socket.to_str().unwrap(),
        ]);
        until("the device", || UnixStream::connect(&socket).ok());
        let name = format!("vfio-user:{}", socket.display());
        let out = dir.path().join("out");
        let mut saving = started(&["save", "--device", &name, "-o", out.to_str().unwrap()]);
        let mut said = String::new();
        let mut stderr = std::io::BufReader::new(device.stderr.take().unwrap());
        while !said.contains("the arc hangs") {
            assert_ne!(std::io::BufRead::read_line(&mut stderr, &mut said).unwrap(), 0, "{said}");
        }
        kill(device.id(), 15);
        assert!(device.wait().unwrap().success());
        saving.wait().unwrap();
    }
}

/// Signals interrupt system calls: nothing of a migration may take that for an error.
#[test]
fn a_migration_under_a_rain_of_signals_completes() {
    let dir = tempfile::tempdir().unwrap();
    let source = Setup { vm_arguments: &["--software"], ..Setup::new(dir.path(), "a") }.start();
    let target = Setup {
        vm_arguments: &["--software", "--incoming", "tcp:127.0.0.1:0"],
        ..Setup::new(dir.path(), "b")
    }
    .start();
    source.warm();
    let uri = target.incoming();
    let pids: Vec<String> = [&source, &target]
        .iter()
        .flat_map(|vm| std::iter::once(&vm.process).chain(&vm.devices))
        .map(|process| process.pid().to_string())
        .collect();
    let script = "while kill -USR1 $* && kill -40 $*; do :; done";
    let mut rain = Command::new("sh").args(["-c", script, "sh"]).args(&pids).spawn().unwrap();
    let info = source.migrate(&uri, Value::Null);
    rain.kill().unwrap();
    rain.wait().unwrap();
    assert_eq!(info["status"], "completed", "{info}");
    target.assert_whole();
}

/// Each verb that asks a `vm`, at one that takes the connection and says nothing, or greets and answers nothing.
#[test]
fn whoever_waits_for_a_silent_vm_ends_when_a_signal_comes() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("silent");
    let listener = UnixListener::bind(&socket).unwrap();
    let socket = socket.to_str().unwrap();
    let out = dir.path().join("out").display().to_string();
    let verbs: &[(&[&str], bool)] = &[
        (&["migrate", "tcp:127.0.0.1:1", "--control", socket], true),
        (&["rehearse", "--to", "tcp:127.0.0.1:1", "--control", socket], true),
        (&["save", "-o", &out, "--control", socket], true),
        (&["status", "--timeout", "60s", "--control", socket], true),
        (&["status", "--watch", "--timeout", "60s", "--control", socket], true),
        (&["set", "--bandwidth", "1M", "--control", socket], false),
        (&["incoming", "tcp:127.0.0.1:0", "--control", socket], false),
        (&["cancel", "--control", socket], false),
        (&["quit", "--control", socket], false),
    ];
    for greeting in ["", "{\"vfio-migrate\": {\"version\": \"0\"}}\n"] {
        let mut waiting = Vec::new();
        for (words, hears) in verbs {
            let child = started(words);
            let (mut connection, _) = listener.accept().unwrap();
            connection.set_read_timeout(Some(PATIENCE)).unwrap();
            connection.write_all(greeting.as_bytes()).unwrap();
            if !greeting.is_empty() {
                connection.read_exact(&mut [0]).unwrap();
            }
            kill(child.id(), 2);
            waiting.push((child, connection, words, hears));
        }
        let begun = Instant::now();
        for (child, _connection, words, hears) in waiting {
            let output = child.wait_with_output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            let ended =
                if *hears { output.status.code() == Some(1) } else { output.status.signal() == Some(2) };
            assert!(ended, "{words:?}: {}: {told}", output.status);
            assert!(!hears || told.contains("interrupted by SIGINT"), "{words:?}: {told}");
        }
        // Half a second each, all at the same time; they would wait for 30 s.
        assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    }
}

/// A receiver opens a device anew that it has lost, and the server that is there now says nothing.
#[test]
fn a_receiver_whose_device_says_nothing_hears_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let words = ["--software", "--incoming", "tcp:127.0.0.1:0"];
    let setup = Setup { vm_arguments: &words, ..Setup::new(dir.path(), "a") };
    let (mut devices, mut words) = setup.prepare();
    words
        .iter_mut()
        .filter(|word| word.starts_with("vfio-user:"))
        .for_each(|word| word.push_str(",timeout=100s"));
    let control = dir.path().join("a.control");
    let process = Process::start(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let mut vm = Vm { process, devices: Vec::new(), control };
    until("the control socket", || vm.try_call("query", Value::Null)).unwrap();
    devices[0].kill();
    let path = dir.path().join("a-dev0.sock");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let (_connection, _) = listener.accept().unwrap();
    let begun = Instant::now();
    kill(vm.process.pid(), 15);
    assert!(vm.process.child.wait().unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

/// The first asks for a cancel, which takes as long as the devices do; the second leaves it to the `vm`, and says so.
#[test]
fn a_second_signal_ends_a_follower_with_a_word() {
    let dir = tempfile::tempdir().unwrap();
    let vm: Vm = software(dir.path(), "a", &["--software"]).start();
    // It takes the connection, and never says anything.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let following = started(&["migrate", "--json", "--control", control(&vm), &uri]);
    until("the session", || (vm.migration()["status"] == "active").then_some(()));
    // One that cannot answer the request for a cancel.
    kill(vm.process.pid(), 19);
    kill(following.id(), 2);
    kill(following.id(), 15);
    let output = following.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    kill(vm.process.pid(), 18);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("ended at once by a second signal, SIGTERM; whether it is cancelled"), "{told}");
    let document: Value = serde_json::from_slice(&output.stdout).expect("its document");
    assert_eq!(document["exit"], 1, "{document}");
    assert!(document["error"]["desc"].as_str().unwrap().starts_with("ended at once"), "{document}");
}
