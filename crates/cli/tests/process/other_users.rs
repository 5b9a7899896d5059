//! Processes of other users and groups of the host. Only root can start them: without it the tests that need them say so.

use std::fs::{File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::support::{Process, Vm, software, until};

/// Groups that nobody on this host has.
pub(crate) const OPERATORS: &str = "54321";
pub(crate) const MONITORS: &str = "54322";

/// A user of the host: uid, gid, and supplementary groups.
#[derive(Clone, Copy, Debug)]
pub(crate) struct User(pub(crate) &'static str, &'static str, Option<&'static str>);

/// One who is in neither group.
pub(crate) const STRANGER: User = User("54001", "54001", None);
pub(crate) const OPERATOR: User = User("54002", OPERATORS, None);
pub(crate) const ALSO_OPERATOR: User = User("54003", "54003", Some(OPERATORS));
pub(crate) const MONITOR: User = User("54004", MONITORS, None);
pub(crate) const ALSO_MONITOR: User = User("54005", "54005", Some("54009,54322"));

/// A folder that others may look into, with the command in it where they cannot reach it where it is.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    command: PathBuf,
}

impl Place {
    /// `None` where nobody can be another user.
    pub(crate) fn of_others() -> Option<Self> {
        let own_user = rustix::process::geteuid();
        if !own_user.is_root() {
            eprintln!(
                "NOT TESTED: processes of other users. Only root can start them; this is user {own_user:?}"
            );
            return None;
        }
        Some(Self::new())
    }

    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let own = PathBuf::from(env!("CARGO_BIN_EXE_vfio-migrate"));
        let mut place = Self { dir, command: own.clone() };
        let version = || place.as_user(STRANGER).arg("--version").output();
        let reachable = || version().is_ok_and(|output| output.status.success());
        if rustix::process::geteuid().is_root() && !reachable() {
            place.command = place.path().join("vfio-migrate");
            std::fs::copy(own, &place.command).unwrap();
        }
        place
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A folder of that user's own.
    pub(crate) fn folder(&self, User(uid, gid, _): User) -> PathBuf {
        let path = self.path().join(uid);
        if !path.exists() {
            std::fs::create_dir(&path).unwrap();
            std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
            std::os::unix::fs::chown(&path, uid.parse().ok(), gid.parse().ok()).unwrap();
        }
        path
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

    pub(crate) fn run(&self, user: User, arguments: &[&str]) -> Output {
        self.as_user(user).args(arguments).output().expect("setpriv of util-linux")
    }

    /// Starts a `vm` of that user, or of our own, under this umask; also returns the file that its stderr goes into.
    pub(crate) fn vm(&self, user: Option<User>, name: &str, umask: &str, more: &[&str]) -> (Vm, PathBuf) {
        let dir = user.map_or_else(|| self.path().to_owned(), |user| self.folder(user));
        let more = [&["--software"], more].concat();
        let (devices, mut arguments) = software(&dir, name, &more).prepare();
        // Our own private key is nobody else's, and none of them speaks over TCP.
        if user.is_some()
            && let Some(at) = arguments.iter().position(|argument| argument == "--tls-creds")
        {
            arguments.drain(at..=at + 1);
        }
        let command = user.map_or_else(|| Command::new(&self.command), |user| self.as_user(user));
        let log = self.path().join(format!("{name}.log"));
        let child = Command::new("sh")
            .args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"])
            .arg(command.get_program())
            .args(command.get_args())
            .args(&arguments)
            .arg("--exit-with-stdin")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .expect("the command starts");
        let vm = Vm { process: Process::of(child), devices, control: dir.join(format!("{name}.control")) };
        until("the control socket", || vm.try_call("query", Value::Null)).expect("query");
        (vm, log)
    }
}

/// Finds the line that a `vm` has said with all these words.
pub(crate) fn said(log: &Path, words: &[&str]) {
    let text = std::fs::read_to_string(log).unwrap();
    let found = text.lines().any(|line| words.iter().all(|word| line.contains(word)));
    assert!(found, "{words:?} in\n{text}");
}
