//! Who may use the control socket of a `vm`: callers of other users and groups, as processes of theirs.
//!
//! Only root can start these. Without it the tests say so, and see what they can: what is refused to nobody.

use std::fs::{File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::{PATIENCE, Process, Vm, control, run, software, until};

/// Groups that nobody on this host has.
const OPERATORS: &str = "54321";
const MONITORS: &str = "54322";

/// A user of the host: uid, gid, and supplementary groups.
#[derive(Clone, Copy, Debug)]
struct User(&'static str, &'static str, Option<&'static str>);

/// One who is in neither group.
const STRANGER: User = User("54001", "54001", None);
const OPERATOR: User = User("54002", OPERATORS, None);
const ALSO_OPERATOR: User = User("54003", "54003", Some(OPERATORS));
const MONITOR: User = User("54004", MONITORS, None);
const ALSO_MONITOR: User = User("54005", "54005", Some("54009,54322"));

/// A folder that others may look into, with the command in it where they cannot reach it where it is.
struct Place {
    dir: tempfile::TempDir,
    command: PathBuf,
}

impl Place {
    /// `None` where nobody can be another user.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!(
                "NOT TESTED: callers of other users. Only root can start them; this is user {:?}",
                rustix::process::geteuid()
            );
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let own = PathBuf::from(env!("CARGO_BIN_EXE_vfio-migrate"));
        let mut place = Self { dir, command: own.clone() };
        let reachable =
            place.as_user(STRANGER).arg("--version").output().is_ok_and(|output| output.status.success());
        if !reachable {
            place.command = place.dir.path().join("vfio-migrate");
            std::fs::copy(own, &place.command).unwrap();
        }
        Some(place)
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The command as that user.
    fn as_user(&self, User(uid, gid, groups): User) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", uid, "--regid", gid]);
        match groups {
            Some(groups) => command.args(["--groups", groups]),
            None => command.arg("--clear-groups"),
        };
        command.arg(&self.command).stdin(Stdio::null());
        command
    }

    fn run(&self, user: User, arguments: &[&str]) -> Output {
        self.as_user(user).args(arguments).output().expect("setpriv of util-linux")
    }

    /// Starts a `vm`, whose stderr goes into the file that is returned, by a shell that sets this umask.
    fn vm(&self, umask: &str, more: &[&str]) -> (Vm, PathBuf) {
        let setup = software(self.path(), "a", more);
        let (devices, arguments) = setup.prepare();
        let log = self.path().join("log");
        let child = Command::new("sh")
            .args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_vfio-migrate")])
            .args(&arguments)
            .args(["--software", "--exit-with-stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .expect("the command starts");
        let vm = Vm { process: Process::of(child), devices, control: self.path().join("a.control") };
        until("the control socket", || vm.try_call("query", Value::Null)).expect("query");
        (vm, log)
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// The refusal that a verb with `--json` printed, which has exit code 1 and this class.
fn denied(output: &Output) -> String {
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert_eq!(
        (&printed["error"]["class"], &printed["exit"]),
        (&"PermissionDenied".into(), &1.into()),
        "{printed}"
    );
    printed["error"]["desc"].as_str().expect("a sentence").to_owned()
}

/// What the `vm` said of a caller.
fn said(log: &Path, words: &[&str]) {
    let text = std::fs::read_to_string(log).unwrap();
    let found = text.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(found, "{words:?} in\n{text}");
}

/// A socket that others may use is one whose mode says so; a loose umask makes none of it, and a tight one none less.
#[test]
fn only_its_own_user_reaches_a_socket_that_nobody_else_was_given() {
    let Some(place) = Place::new() else { return };
    for umask in ["000", "022", "277"] {
        let (vm, _) = place.vm(umask, &[]);
        assert_eq!(mode(&vm.control), 0o600, "umask {umask}");
        for arguments in [vec!["status"], vec!["quit", "--force"], vec!["stop"]] {
            let output =
                place.run(STRANGER, &[&arguments[..], &["--json", "--control", control(&vm)]].concat());
            let why = denied(&output);
            assert!(
                why.contains("user 54001 may not use the control socket") && why.contains("--control-group"),
                "{why}"
            );
        }
        let text = place.run(OPERATOR, &["status", "--control", control(&vm)]);
        assert!(String::from_utf8_lossy(&text.stderr).contains("may not use"), "{text:?}");
        assert_eq!(vm.status(), "running");
        assert!(run(&["status", "--control", control(&vm)]).status.success());
    }
}

#[test]
fn members_of_a_group_do_all_of_another_only_ask_and_others_nothing() {
    let Some(place) = Place::new() else { return };
    let (vm, log) = place.vm("077", &["--control-group", OPERATORS, "--control-read-group", MONITORS]);
    let at = control(&vm);
    assert_eq!(mode(&vm.control), 0o666);
    let verbs: [&[&str]; 10] = [
        &["stop"],
        &["cont"],
        &["cancel"],
        &["continue"],
        &["set", "--downtime-limit", "1s"],
        &["migrate", "--detach", "unix:/nowhere"],
        &["rehearse", "--to", "unix:/nowhere"],
        &["save", "-o", "/nowhere/file"],
        &["incoming", "unix:/nowhere"],
        &["quit", "--force"],
    ];
    for user in [MONITOR, ALSO_MONITOR] {
        let status = place.run(user, &["status", "--json", "--control", at]);
        assert!(status.status.success(), "{status:?}");
        let manifest = place.run(user, &["describe", &format!("vm:{at}")]);
        assert!(manifest.status.success(), "{manifest:?}");
        for verb in verbs {
            let why = denied(&place.run(user, &[verb, &["--json", "--control", at]].concat()));
            assert!(why.contains("may only ask here") && why.contains("--control-group"), "{verb:?}: {why}");
        }
        said(&log, &["may only ask", &format!("uid={}", user.0), "pid=", "quit"]);
    }
    for verb in [&["status"][..], &["quit", "--force"], &["stop"]] {
        let why = denied(&place.run(STRANGER, &[verb, &["--json", "--control", at]].concat()));
        assert!(why.contains("user 54001 may not use this control socket"), "{why}");
    }
    said(&log, &["not allowed", "uid=54001", "gid=54001", "pid="]);
    assert_eq!(vm.status(), "running", "nothing of it was done");
    // The controls: whoever may, does.
    for user in [OPERATOR, ALSO_OPERATOR] {
        for (verb, status) in [("stop", "paused"), ("cont", "running")] {
            let output = place.run(user, &[verb, "--json", "--control", at]);
            assert!(output.status.success(), "{user:?} {verb}: {output:?}");
            assert_eq!(vm.status(), status);
        }
    }
    let output = place.run(ALSO_OPERATOR, &["quit", "--force", "--control", at]);
    assert!(output.status.success(), "{output:?}");
}

/// As a program of its own finds it, which knows the protocol and not the command.
#[test]
fn who_may_do_nothing_is_told_in_place_of_the_greeting_and_costs_no_place() {
    let Some(place) = Place::new() else { return };
    let (vm, _) = place.vm("022", &["--control-read-group", MONITORS]);
    let mut own = BufReader::new(UnixStream::connect(&vm.control).unwrap());
    own.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = String::new();
    own.read_line(&mut line).unwrap();
    assert!(line.contains("vfio-migrate"), "{line}");
    for _ in 0..40 {
        denied(&place.run(STRANGER, &["status", "--json", "--control", control(&vm)]));
    }
    // The one client that was there before is there still.
    own.get_mut().write_all(b"{\"execute\":\"query\",\"id\":1}\n").unwrap();
    line.clear();
    own.read_line(&mut line).unwrap();
    assert!(line.contains("\"return\""), "{line}");
}

#[test]
fn a_group_that_is_not_there_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("control");
    for (option, value) in [("--control-group", "no-such-group"), ("--control-read-group", "4294967295")] {
        let output = run(&["vm", "--software", "--control", at.to_str().unwrap(), option, value]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(&format!("{option}: ")) && told.contains(value), "{told}");
        assert!(!at.exists());
    }
    let output = run(&["vm", "--software", "--control-group", "0"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}
