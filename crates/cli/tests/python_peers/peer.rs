//! The Python programs as processes, and the command beside them.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(120);

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

/// Waits until `done` gives something.
pub(crate) fn until<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A process of the command, ended by its stdin.
#[derive(Debug)]
pub(crate) struct Own(Child);

impl Own {
    /// Starts it, and waits until `socket` is there.
    pub(crate) fn start(arguments: &[&str], socket: &Path) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
            .args(arguments)
            .arg("--exit-with-stdin")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the command starts");
        until("the socket", || socket.exists().then_some(()));
        Self(child)
    }

    /// A sample device's server, whose state does not change by itself.
    pub(crate) fn device(socket: &Path, arguments: &[&str]) -> Self {
        let path = socket.to_str().expect("a text");
        let device = ["device", "--state-dirty-rate", "0", "--socket", path];
        Self::start(&[&device[..], arguments].concat(), socket)
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// What a `vm` answers over its control socket.
pub(crate) fn ask(control: &Path, verb: &str) -> Value {
    let mut stream = UnixStream::connect(control).expect("a control socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time");
    writeln!(stream, r#"{{"execute": "{verb}", "id": 1}}"#).expect("it is sent");
    for line in BufReader::new(stream).lines() {
        let mut line: Value = serde_json::from_str(&line.expect("an answer")).expect("JSON");
        assert_eq!(line.get("error"), None, "{verb}");
        if line.get("return").is_some() {
            return line["return"].take();
        }
    }
    panic!("no answer to {verb}");
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
