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
        let server = Self { process: Process::of(child), socket, stderr };
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
