//! What a device's server does with clients that it cannot serve, and what it says of it.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, Stdio};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::support::{Process, run, until};

/// A `device` whose stderr is read.
struct Server {
    process: Process,
    socket: PathBuf,
    stderr: BufReader<ChildStderr>,
    /// The sockets that it has without a client.
    sockets: usize,
}

impl Server {
    fn start(dir: &Path) -> Self {
        let socket = dir.join("device.sock");
        let mut child = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
            .args(["device", "--state-size", "1M", "--exit-with-stdin", "--socket"])
            .arg(&socket)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        until("the socket", || socket.exists().then_some(()));
        let sockets = sockets(child.id());
        let server = Self { process: Process::of(child), socket, stderr, sockets };
        until("the device", || server.is_described().then_some(()));
        server
    }

    fn path(&self) -> &str {
        self.socket.to_str().unwrap()
    }

    fn is_described(&self) -> bool {
        run(&["describe", self.path(), "--timeout", "60s"]).status.success()
    }

    /// The next line of stderr.
    fn says(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.stderr.read_line(&mut line).unwrap(), 0, "it has ended");
        line
    }

    /// Limits the number of its descriptors; returns the limit before.
    fn limit(&self, descriptors: u64) -> Rlimit {
        self.set_limit(Rlimit { current: Some(descriptors), ..getrlimit(Resource::Nofile) })
    }

    fn set_limit(&self, limit: Rlimit) -> Rlimit {
        let pid = Pid::from_raw(self.process.pid().try_into().unwrap());
        prlimit(pid, Resource::Nofile, limit).unwrap()
    }

    /// Ends it, and returns what it has said and nobody has read.
    fn ended(mut self) -> String {
        drop(self.process);
        let mut rest = String::new();
        std::io::Read::read_to_string(&mut self.stderr, &mut rest).unwrap();
        rest
    }
}

#[test]
fn a_server_accepts_again_once_descriptors_are_to_be_had() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    // It has those, and gets no other.
    let before = server.limit(3);
    let stranger = UnixStream::connect(&server.socket).unwrap();
    let line = server.says();
    assert!(line.contains("WARN a client could not be accepted; trying again: "), "{line}");
    assert!(line.contains("RLIMIT_NOFILE"), "{line}");
    server.set_limit(before);
    drop(stranger);
    assert!(server.is_described());
    assert_eq!(server.ended(), "");
}

fn sockets(pid: u32) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let targets = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).count()
}

/// The lowest number that a new descriptor can have, once no client is left.
fn lowest_free(server: &Server) -> u64 {
    let pid = server.process.pid();
    until("the client to be gone", || (sockets(pid) == server.sockets).then_some(()));
    let fds = PathBuf::from(format!("/proc/{pid}/fd"));
    (0..).find(|number| std::fs::symlink_metadata(fds.join(number.to_string())).is_err()).unwrap()
}

#[test]
fn a_client_that_a_shortage_drops_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let mut said = Vec::new();
    for room in 1.. {
        let before = server.limit(lowest_free(&server) + room);
        let described = run(&["describe", server.path(), "--timeout", "60s"]);
        server.set_limit(before);
        if described.status.success() {
            break;
        }
        said.push(server.says());
    }
    // There may be more than one line each.
    said.extend(server.ended().lines().map(str::to_owned));
    // `describe` then asks whether this is a control socket, and waits to be greeted.
    said.retain(|line| !line.contains("it did not say its version"));
    for line in &said {
        assert!(line.contains("WARN a client "), "{line}");
        assert_eq!(line.matches("RLIMIT_NOFILE").count(), 1, "{line}");
        assert!(!line.contains("protocol"), "it did nothing wrong: {line}");
    }
    let dropped = said.iter().filter(|line| line.contains("a client was dropped: ")).count();
    assert!(dropped > 1, "{said:?}");
}

#[test]
fn a_silent_client_keeps_nobody_waiting_and_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Server::start(dir.path());
    let silent: Vec<UnixStream> = (0..3).map(|_| UnixStream::connect(&server.socket).unwrap()).collect();
    std::io::Write::write_all(&mut &silent[1], &[0, 0, 1, 0]).unwrap();
    // Its patience is the default, 2 s, and theirs 5 s.
    assert!(run(&["describe", server.path(), "--timeout", "4s"]).status.success());
    for mut one in silent {
        assert_eq!(std::io::Read::read(&mut one, &mut [0]).unwrap(), 0);
        let line = server.says();
        assert!(line.contains("WARN a client was dropped: it did not say its version within 5s"), "{line}");
    }
    // The controls: those that leave by themselves are not told of, and those that break the protocol are.
    drop(UnixStream::connect(&server.socket).unwrap());
    assert!(server.is_described());
    let mut wrong = UnixStream::connect(&server.socket).unwrap();
    std::io::Write::write_all(&mut wrong, b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let line = server.says();
    assert!(line.contains("WARN a client was dropped: the peer broke the protocol: "), "{line}");
    assert!(server.is_described());
    assert_eq!(server.ended(), "");
}

/// The limits that a `device` meets as it starts are named, whatever met them.
#[test]
fn a_limit_that_keeps_a_device_from_starting_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("device.sock");
    let starts = |limit: &str| {
        let child = Command::new("prlimit")
            .args([limit, env!("CARGO_BIN_EXE_vfio-migrate"), "device", "--state-size", "1M"])
            .args(["--exit-with-stdin", "--socket"])
            .arg(&socket)
            .stdin(Stdio::null())
            .output();
        let output = child.unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (_, told) = starts("--fsize=4096");
    assert_eq!(told.matches("RLIMIT_FSIZE").count(), 1, "{told}");
    let mut failed = 0;
    for descriptors in 5.. {
        let (started, told) = starts(&format!("--nofile={descriptors}"));
        if started {
            break;
        }
        assert_eq!(told.matches("RLIMIT_NOFILE").count(), 1, "{descriptors}: {told}");
        failed += 1;
    }
    assert!(failed > 2, "{failed}");
}
