//! The Python programs as processes, and the command beside them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

/// A program of `peers`, to be given its arguments.
pub(crate) fn python(program: &str) -> Command {
    let at = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python_peers/peers").join(program);
    let mut command = Command::new("python3");
    // No compiled files beside the sources.
    command.arg("-B").arg(at).stdin(Stdio::null());
    command
}

/// Runs the command to its end.
pub(crate) fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"));
    command.args(arguments).stdin(Stdio::null()).output().expect("the command starts")
}

/// Runs the command, which has to succeed.
pub(crate) fn succeeds(arguments: &[&str]) {
    let output = run(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {}\n{said}", output.status);
}

/// The Python server, killed when dropped.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    said: BufReader<ChildStdout>,
    socket: PathBuf,
    /// Digest of the state that it began with.
    pub(crate) state: String,
}

impl Server {
    pub(crate) fn start(dir: &Path, name: &str, arguments: &[&str]) -> Self {
        let socket = dir.join(name);
        let mut command = python("server.py");
        let mut child = command.arg(&socket).args(arguments).stdout(Stdio::piped()).spawn().expect("python3");
        let said = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut server = Self { child, said, socket, state: String::new() };
        server.state = server.digest("state");
        server
    }

    /// The device as the command is told of it.
    pub(crate) fn device(&self) -> String {
        format!("vfio-user:{}", self.socket.display())
    }

    pub(crate) fn socket(&self) -> &str {
        self.socket.to_str().expect("a text")
    }

    /// Digest of the state that it loaded next.
    pub(crate) fn loaded(&mut self) -> String {
        self.digest("loaded")
    }

    /// The number that it says next after `word`.
    pub(crate) fn number(&mut self, word: &str) -> u64 {
        self.digest(word).parse().expect("a number")
    }

    fn digest(&mut self, word: &str) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).expect("it says something");
        line.strip_prefix(word).unwrap_or_else(|| panic!("no {word}: {line:?}")).trim().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
