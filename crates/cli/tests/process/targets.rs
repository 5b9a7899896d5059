//! Files that an operator names, judged before a guest is paused or a device opened: every kind of thing that can be at a path.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::{Process, Setup, Vm, command, run, until};

/// Longest run of a command that is to end at once.
const AT_ONCE: Duration = Duration::from_secs(60);

/// Something at a path, and what comes of writing there.
struct Target {
    name: &'static str,
    /// Makes it in an empty folder, and returns the path that is written to.
    make: fn(&Path) -> PathBuf,
    /// What the refusal says, without and with `--force`; `None`: it is written.
    says: [Option<&'static str>; 2],
}

fn node(path: &Path, kind: FileType) {
    rustix::fs::mknodat(CWD, path, kind, Mode::RUSR | Mode::WUSR, rustix::fs::makedev(1, 3)).unwrap();
}

fn link_to(dir: &Path, end: &Path) -> PathBuf {
    symlink(end, dir.join("out")).unwrap();
    dir.join("out")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

const BOTH_DIRECTORY: [Option<&str>; 2] = [Some("is a directory and no regular file"); 2];

const TARGETS: &[Target] = &[
    Target { name: "absent", make: |dir| dir.join("out"), says: [None, None] },
    Target { name: "a name of 255 bytes", make: |dir| dir.join("n".repeat(255)), says: [None, None] },
    Target {
        name: "a name of 256 bytes",
        make: |dir| dir.join("n".repeat(256)),
        says: [Some("File name too long"); 2],
    },
    Target {
        name: "a regular file",
        make: |dir| {
            std::fs::write(dir.join("out"), "precious").unwrap();
            dir.join("out")
        },
        says: [Some("exists already; --force replaces it"), None],
    },
    Target {
        name: "a directory",
        make: |dir| {
            std::fs::create_dir(dir.join("out")).unwrap();
            dir.join("out")
        },
        says: BOTH_DIRECTORY,
    },
    Target {
        name: "a directory by its name",
        make: |dir| dir.join("out/"),
        says: [Some("is the name of a directory"); 2],
    },
    Target {
        name: "a FIFO",
        make: |dir| {
            node(&dir.join("out"), FileType::Fifo);
            dir.join("out")
        },
        says: [Some("is a FIFO and no regular file"); 2],
    },
    Target {
        name: "a socket",
        make: |dir| {
            drop(UnixListener::bind(dir.join("out")).unwrap());
            dir.join("out")
        },
        says: [Some("is a socket and no regular file"); 2],
    },
    Target {
        name: "a character device",
        // Only root makes one of its own; everybody has this one.
        make: |dir| {
            if !is_root() {
                return "/dev/null".into();
            }
            node(&dir.join("out"), FileType::CharacterDevice);
            dir.join("out")
        },
        says: [Some("is a character device and no regular file"); 2],
    },
    Target {
        name: "a link to a character device",
        make: |dir| link_to(dir, Path::new("/dev/null")),
        says: [Some("is a character device and no regular file"); 2],
    },
    Target {
        name: "a link to a regular file",
        make: |dir| {
            std::fs::write(dir.join("end"), "precious").unwrap();
            link_to(dir, Path::new("end"))
        },
        says: [Some("exists already; --force replaces it"), None],
    },
    Target {
        name: "a link to nothing",
        make: |dir| link_to(dir, Path::new("end")),
        says: [Some("is a symbolic link to a file that does not exist"); 2],
    },
    Target {
        name: "a link to a directory",
        make: |dir| {
            std::fs::create_dir(dir.join("end")).unwrap();
            link_to(dir, Path::new("end"))
        },
        says: BOTH_DIRECTORY,
    },
    Target {
        name: "a link to itself",
        make: |dir| link_to(dir, Path::new("out")),
        says: [Some("Too many levels of symbolic links"); 2],
    },
    Target {
        name: "a folder that is missing",
        make: |dir| dir.join("missing/out"),
        says: [Some("No such file or directory"); 2],
    },
    Target {
        name: "a folder that is a file",
        make: |dir| {
            std::fs::write(dir.join("file"), "precious").unwrap();
            dir.join("file/out")
        },
        says: [Some("Not a directory"); 2],
    },
    Target {
        name: "a folder that cannot be written to",
        // Root may write to any; but not to what the kernel shows of itself.
        make: |dir| {
            if is_root() {
                return "/proc/self/fdinfo/out".into();
            }
            std::fs::create_dir(dir.join("read-only")).unwrap();
            std::fs::set_permissions(dir.join("read-only"), PermissionsExt::from_mode(0o555)).unwrap();
            dir.join("read-only/out")
        },
        says: [Some("creating a file in"); 2],
    },
];

/// What is in a folder: each name, its inode, kind, size and last change, and where it leads to.
fn contents(dir: &Path) -> Vec<String> {
    let mut all: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let found = path.symlink_metadata().unwrap();
            let leads = path.read_link().ok();
            format!(
                "{path:?} {} {:o} {} {}.{} {leads:?}",
                found.ino(),
                found.mode(),
                found.size(),
                found.mtime(),
                found.mtime_nsec()
            )
        })
        .collect();
    all.sort();
    all
}

/// Writes to every target by `write`, which says whether it was done and what it said.
fn sweep(forces: &[bool], mut write: impl FnMut(&Path, bool) -> (bool, String)) {
    for Target { name, make, says } in TARGETS {
        for force in forces {
            let dir = tempfile::tempdir().unwrap();
            let path = make(dir.path());
            let before = contents(dir.path());
            let (done, said) = write(&path, *force);
            let case = format!("{name}, force {force}: done {done}: {said}");
            assert!(!said.contains("panicked"), "{case}");
            let after = contents(dir.path());
            match says[usize::from(*force)] {
                Some(reason) => {
                    assert!(!done && said.contains(reason), "{case}");
                    assert_eq!(before, after, "{case}");
                }
                None => {
                    assert!(done, "{case}");
                    assert_eq!(after.len(), before.len().max(1), "{case}: {after:?}");
                    assert!(
                        path.metadata().unwrap().is_file() && path.metadata().unwrap().size() > 8,
                        "{case}"
                    );
                    assert_eq!(path.is_symlink(), name.contains("link"), "{case}");
                }
            }
        }
    }
    assert!(Path::new("/dev/null").metadata().unwrap().mode() & 0o170_000 == 0o020_000);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn with_force<'a>(arguments: &[&'a str], force: bool) -> Vec<&'a str> {
    let force: &[&str] = if force { &["--force"] } else { &[] };
    [arguments, force].concat()
}

fn said(output: &Output) -> (bool, String) {
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn device(dir: &Path, name: &str, arguments: &[&str]) -> (Process, String) {
    let socket = dir.join(name);
    let process = Process::start(&[&["device", "--socket", text(&socket)], arguments].concat());
    until("the socket", || socket.exists().then_some(()));
    (process, format!("vfio-user:{}", text(&socket)))
}

#[test]
fn a_guest_is_saved_into_a_regular_file_or_not_paused_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { device_arguments: &["--state-size", "64K"], ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    sweep(&[false, true], |path, force| {
        let loops = vm.counter("loops");
        let output =
            run(&with_force(&["save", "--control", text(&vm.control), "-o", text(path), "--json"], force));
        let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
        let migration = &report["migration"];
        let error = migration["error"].as_str().unwrap_or_default().to_owned();
        assert_eq!(report["vm"]["status"], "running", "{report}");
        until("the guest to go on", || (vm.counter("loops") > loops).then_some(()));
        if !output.status.success() {
            // It did not come to where RAM is read, so neither to where the guest is paused.
            let phases: Vec<&Value> =
                migration["phases"].as_array().unwrap().iter().map(|phase| &phase["phase"]).collect();
            assert_eq!(migration["iterations"], 0, "{report}");
            assert!(phases.iter().all(|phase| *phase == "P0"), "{report}");
            assert_eq!(
                (&migration["transferred"]["ram"], &migration["downtime-ms"]),
                (&0.into(), &Value::Null),
                "{report}"
            );
        }
        (output.status.success(), error)
    });
    vm.assert_whole();
}

#[test]
fn a_device_is_saved_into_a_regular_file_or_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, name) = device(dir.path(), "a.sock", &["--state-size", "64K"]);
    sweep(&[false, true], |path, force| {
        said(&run(&with_force(&["save", "--device", &name, "-o", text(path)], force)))
    });
    // Judged first: nobody was asked for the device.
    sweep_refusals(|path, force| {
        let output =
            run(&with_force(&["save", "--device", "vfio-user:/nonexistent", "-o", text(path)], force));
        said(&output)
    });
}

#[test]
fn what_is_saved_again_is_judged_before_the_device_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    let (_server, name) = device(dir.path(), "a.sock", &["--state-size", "64K"]);
    let file = dir.path().join("file");
    assert!(run(&["save", "--device", &name, "-o", text(&file)]).status.success());
    sweep(&[false], |path, _| {
        said(&run(&["restore", "--device", &name, text(&file), "--save-again", text(path)]))
    });
    sweep_refusals(|path, force| match force {
        true => (false, String::new()),
        false => said(&run(&[
            "restore",
            "--device",
            "vfio-user:/nonexistent",
            "/nonexistent",
            "--save-again",
            text(path),
        ])),
    });
}

#[test]
fn a_manifest_replaces_a_regular_file_alone() {
    sweep(&[true], |path, _| said(&run(&["describe", "--host", "-o", text(path)])));
    sweep_refusals(|path, force| match force {
        false => (false, String::new()),
        true => said(&run(&["describe", "/nonexistent", "-o", text(path)])),
    });
}

/// The targets that are refused, written to by something that fails anyway, but later.
fn sweep_refusals(mut write: impl FnMut(&Path, bool) -> (bool, String)) {
    for Target { name, make, says } in TARGETS {
        for force in [false, true] {
            let Some(reason) = says[usize::from(force)] else { continue };
            let dir = tempfile::tempdir().unwrap();
            let (done, said) = write(&make(dir.path()), force);
            assert!(!done && (said.is_empty() || said.contains(reason)), "{name}, force {force}: {said}");
        }
    }
}

/// A command that has a small filesystem of its own at `mount`; `None` where this user cannot have one.
fn beside_little_room(mount: &Path, arguments: &[&str]) -> Option<Command> {
    let script = r#"mount -t tmpfs -o size=1m none "$0" && exec "$@""#;
    let in_namespace = |words: &[&str]| {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", script, text(mount)]).args(words).stdin(Stdio::null());
        command
    };
    if !in_namespace(&["true"]).output().is_ok_and(|output| output.status.success()) {
        eprintln!("no filesystem can be mounted here: what happens without room is not tested");
        return None;
    }
    Some(in_namespace(&[&[env!("CARGO_BIN_EXE_vfio-migrate")], arguments].concat()))
}

#[test]
fn without_room_nothing_is_begun_and_both_numbers_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    let file = mount.join("out");
    let (_server, name) = device(dir.path(), "a.sock", &["--state-size", "4M"]);
    let Some(mut save) = beside_little_room(&mount, &["save", "--device", &name, "-o", text(&file)]) else {
        return;
    };
    let (done, told) = said(&save.output().unwrap());
    assert!(!done && told.contains("bytes free, and the file needs about 4"), "{told}");

    let control = dir.path().join("control");
    let arguments = ["vm", "--memory", "64M", "--control", text(&control), "--exit-with-stdin"];
    let mut running = beside_little_room(&mount, &arguments).unwrap();
    let running = running.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let vm = Vm { process: Process::of(running), devices: vec![], control };
    until("the control socket", || vm.try_call("query", Value::Null)).expect("query");
    until("the guest to use RAM", || (vm.counter("pages-written") > 1000).then_some(()));
    let output = run(&["save", "--control", text(&vm.control), "-o", text(&file), "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let error = report["migration"]["error"].as_str().unwrap();
    assert!(error.contains("bytes free, and the file needs about"), "{error}");
    assert_eq!((&report["migration"]["iterations"], output.status.code()), (&0.into(), Some(1)), "{report}");
    vm.assert_runs();
}

/// A file in `dir` that `process` has written to, whether it has a name yet or not.
pub(crate) fn writes_in(process: u32, dir: &Path) -> Option<()> {
    let dir = dir.canonicalize().unwrap();
    let mut open = std::fs::read_dir(format!("/proc/{process}/fd")).ok()?.flatten();
    let there = |file: &Path| std::fs::read_link(file).is_ok_and(|file| file.parent() == Some(&dir));
    open.any(|fd| there(&fd.path()) && fd.path().metadata().is_ok_and(|found| found.size() > 0)).then_some(())
}

fn save_without_end(device: &str, files: &Path, more: &[&str]) -> Child {
    let file = files.join("out");
    let saving = command(&[&["save", "--device", device, "-o", text(&file)], more].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("the file that is being written", || writes_in(saving.id(), files));
    saving
}

#[test]
fn a_state_without_end_is_given_up_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("out");
    let (_server, name) = device(dir.path(), "a.sock", &["--state-size", "1M", "--fault", "endless-state"]);
    for more in [&[][..], &["--stop-copy-only"]] {
        let arguments = ["save", "--device", &name, "-o", text(&file), "--state-limit", "16M"];
        let (done, told) = said(&run(&[&arguments, more].concat()));
        assert!(!done && told.contains("device dev0 gave more than 16777216 bytes of state"), "{told}");
        assert!(told.contains("--state-limit"), "{told}");
        assert_eq!(contents(files.path()), Vec::<String>::new());
        for signal in [Signal::INT, Signal::TERM] {
            let saving = save_without_end(&name, files.path(), &[&["--state-limit", "1T"], more].concat());
            kill_process(Pid::from_child(&saving), signal).unwrap();
            let output = saving.wait_with_output().unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{told}");
            assert!(told.contains("interrupted; device dev0 is in RUNNING"), "{told}");
            assert_eq!(contents(files.path()), Vec::<String>::new());
        }
    }
    // Nor when there is no time to clean up, where files without a name can be.
    let unnamed = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::WRONLY;
    if rustix::fs::open(files.path(), unnamed, Mode::RUSR).is_ok() {
        let mut saving = save_without_end(&name, files.path(), &["--state-limit", "1T"]);
        saving.kill().unwrap();
        saving.wait().unwrap();
        assert_eq!(contents(files.path()), Vec::<String>::new());
    }
}

#[test]
fn a_vm_that_is_ended_while_it_saves_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let files = tempfile::tempdir().unwrap();
    let faulty = ["--state-size", "1M", "--fault", "endless-state"];
    let vm = Setup { device_arguments: &faulty, ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let file = files.path().join("out");
    let limited = ["save", "--control", text(&vm.control), "-o", text(&file), "--state-limit", "16M"];
    let output = run(&limited);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("device dev0 gave more than"), "{output:?}");
    assert_eq!(contents(files.path()), Vec::<String>::new());
    vm.assert_runs();

    let begun = vm.call("save", serde_json::json!({"path": text(&file), "state-limit": 1u64 << 40}));
    begun.expect("it begins");
    until("the file that is being written", || writes_in(vm.process.pid(), files.path()));
    let Vm { mut process, .. } = vm;
    kill_process(Pid::from_child(&process.child), Signal::TERM).unwrap();
    let status = process.child.wait().unwrap();
    assert!(status.success(), "{status}");
    assert_eq!(contents(files.path()), Vec::<String>::new());
}

/// Runs a command that must not wait for anything.
fn at_once(arguments: &[&str]) -> Output {
    let mut child = command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begun.elapsed() > AT_ONCE {
            child.kill().unwrap();
            panic!("{arguments:?} hangs");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn only_a_regular_file_is_restored() {
    for Target { name, make, .. } in TARGETS {
        let dir = tempfile::tempdir().unwrap();
        let path = make(dir.path());
        let before = contents(dir.path());
        let kinds = ["a directory", "a FIFO", "a socket", "a character device"];
        let kind = kinds.iter().find(|kind| name.strip_prefix("a link to ").unwrap_or(name) == **kind);
        for verb in
            [&["restore", "--device", "vfio-user:/nonexistent"][..], &["vm", "--software", "--restore"]]
        {
            let output = at_once(&[verb, &[text(&path)]].concat());
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{name}: {told}");
            assert!(!told.contains("panicked"), "{name}: {told}");
            if let Some(kind) = kind {
                assert!(told.contains(&format!("is {kind} and no regular file")), "{name}: {told}");
            }
        }
        assert_eq!(contents(dir.path()), before, "{name}");
    }
}

/// A file that takes long to read: its length is a snapshot's, and its digest is of all of it.
#[test]
fn reading_a_long_file_is_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let len: u64 = 4 << 40;
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(len).unwrap();
    let write = |at, bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
    write(0, b"VFIOSNP\x01");
    write(len - 48, &[b"VFIOSEND".as_slice(), &len.to_le_bytes()].concat());
    for verb in [&["restore", "--device", "vfio-user:/nonexistent"][..], &["vm", "--software", "--restore"]] {
        let arguments = [verb, &[text(&path)]].concat();
        let reading = command(&arguments).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let opened = || {
            let open = std::fs::read_dir(format!("/proc/{}/fd", reading.id())).ok()?;
            let mut open = open.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
            open.any(|file| file.ends_with("file")).then_some(())
        };
        until("the file to be read", opened);
        kill_process(Pid::from_child(&reading), Signal::TERM).unwrap();
        let output = reading.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(
            (output.status.code(), told.trim()),
            (Some(1), "vfio-migrate: interrupted by SIGTERM"),
            "{verb:?}"
        );
    }
}
