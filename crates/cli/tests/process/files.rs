//! Files that a user names: only regular ones are opened, and a limit on their size is an error and no signal.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Process, Vm, control, fails, run, software, until};

/// A FIFO, to whose open nobody would ever come.
fn fifo(dir: &Path) -> String {
    let path = dir.join("fifo");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path.display().to_string()
}

#[test]
fn a_fifo_is_refused_wherever_a_file_can_be_named() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = fifo(dir.path());
    let socket = dir.path().join("device").display().to_string();
    let _device = Process::start(&["device", "--state-size", "1M", "--socket", &socket]);
    let device = format!("vfio-user:{socket}");
    let manifest = dir.path().join("manifest").display().to_string();
    until("the device", || Path::new(&socket).exists().then_some(()));
    let described = run(&["describe", &device, "-o", &manifest]);
    assert!(described.status.success(), "{described:?}");
    for arguments in [
        &["vm", "--software", "--policy", &fifo][..],
        &["vm", "--software", "--restore", &fifo],
        &["check", "--policy", &fifo, &manifest, &manifest],
        &["check", &manifest, &fifo],
        &["check", &fifo, &manifest],
        &["check", "--matrix", &fifo, &manifest],
        &["describe", "--host", "--site", &fifo],
        &["describe", "--host", "-o", &fifo],
        &["restore", "--device", &device, &fifo],
        &["save", "--device", &device, "-o", &fifo, "--force"],
    ] {
        fails(arguments, 1, "is a FIFO");
    }
}

/// Whatever a state directory has, a FIFO or a directory at one of its names keeps nobody waiting and is left alone.
#[test]
fn a_state_directory_has_regular_files_alone() {
    const VM: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let state_word = state.to_str().unwrap();
    let put = |name: &str| {
        let path = state.join(name);
        let _ = std::fs::remove_file(&path);
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        path
    };
    let (journal, lock) = (format!("{VM}.json"), format!("{VM}.vm.lock"));
    for name in [&journal, &lock] {
        let fifo = put(name);
        fails(
            &["vm", "--software", "--memory", "32M", "--uuid", VM, "--state-dir", state_word],
            1,
            "is a FIFO",
        );
        if *name == journal {
            let output = run(&["status", "--state-dir", state_word]);
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert!(String::from_utf8_lossy(&output.stdout).contains("is a FIFO"), "{output:?}");
        }
        std::fs::remove_file(fifo).unwrap();
    }
    let words = ["--software", "--uuid", VM, "--state-dir", state_word];
    let vm = software(dir.path(), "a", &words).start();
    let receiver = software(dir.path(), "b", &["--software", "--incoming", "tcp:127.0.0.1:0"]).start();
    let to = receiver.incoming();
    let history = put("history.jsonl");
    for name in [format!("{VM}.source.lock"), format!("{VM}.lock"), journal] {
        let fifo = put(&name);
        let info = vm.migrate(&to, json!({}));
        assert_eq!(info["status"], "failed", "{name}: {info}");
        assert!(info["error"].as_str().unwrap().contains("is a FIFO"), "{name}: {info}");
        vm.assert_runs();
        std::fs::remove_file(fifo).unwrap();
    }
    std::fs::remove_file(history).unwrap();
    // A record that was not written whole; nobody but the journal's owner has anything there.
    put(&format!("{VM}.json.tmp"));
    let lock = state.join("history.jsonl.lock");
    std::fs::remove_file(&lock).unwrap();
    std::fs::create_dir(lock).unwrap();
    let info = vm.migrate(&to, json!({}));
    assert_eq!(info["status"], "completed", "{info}");
    receiver.assert_runs();
    let pages = dir.path().join("man");
    std::fs::create_dir(&pages).unwrap();
    assert!(Command::new("mkfifo").arg(pages.join("vfio-migrate.1")).status().unwrap().success());
    fails(&["man", pages.to_str().unwrap()], 1, "is a FIFO");
}

#[test]
fn a_name_that_leads_to_a_descriptor_is_no_target() {
    let dir = tempfile::tempdir().unwrap();
    let vm = software(dir.path(), "a", &["--software"]).start();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("/dev/stdout", &link).unwrap();
    for target in ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/2", link.to_str().unwrap()] {
        let says = "by a descriptor of the process that opens it";
        fails(&["save", "--control", control(&vm), "-o", target, "--force"], 1, says);
        fails(&["describe", "--host", "-o", target], 1, says);
    }
    vm.assert_runs();
}

/// A `vm` that may write files of so many KiB, as a service manager's limit has it.
fn limited(dir: &Path, kib: u64) -> Vm {
    let path = dir.join("limited.control");
    let script = format!("ulimit -f {kib}; exec \"$@\" --exit-with-stdin");
    let words = ["vm", "--software", "--memory", "32M", "--dirty-rate", "1M", "--control"];
    let child = Command::new("bash")
        .args(["-c", &script, "bash", env!("CARGO_BIN_EXE_vfio-migrate")])
        .args(words)
        .arg(&path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let vm = Vm { process: Process::of(child), devices: Vec::new(), control: path };
    until("the control socket", || vm.try_call("query", Value::Null)).unwrap();
    vm
}

#[test]
fn a_limit_on_a_files_size_fails_a_save_and_the_guest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    // Just what the RAM takes: whether it suffices is known in advance, or by the write that meets it.
    let vm = limited(dir.path(), 32 << 10);
    vm.call("save", json!({"path": out.to_str().unwrap()})).unwrap();
    let info = vm.ended();
    let met = info["error"].as_str().unwrap_or_default().contains("RLIMIT_FSIZE");
    assert!(info["status"] == "completed" || (info["status"] == "failed" && met), "{info}");
    assert_eq!(out.exists(), info["status"] == "completed");
    vm.assert_runs();
    // The guest's RAM is a file too.
    let output = Command::new("bash")
        .args(["-c", "ulimit -f 1024; exec \"$@\"", "bash", env!("CARGO_BIN_EXE_vfio-migrate")])
        .args(["vm", "--software", "--memory", "32M"])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("RLIMIT_FSIZE"), "{told}");
}
