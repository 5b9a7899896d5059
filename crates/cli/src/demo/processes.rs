//! The processes of a demo: device servers and VMs, each ended when the demo ends, however it ends.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::control::client::ControlClient;
use crate::exit::{CliError, Exit};
use crate::output::eprintln_line;

/// Longest wait for a child to come up.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Longest time in which a child that is leaving does nothing for it, before it is killed.
const STANDSTILL: Duration = Duration::from_secs(3);
/// Longest time that a child may take to leave in all.
const LEAVING: Duration = Duration::from_secs(60);

/// A child process of this same program. It leaves when its stdin ends, so that none outlives the demo even if
/// the demo is killed.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    /// Passes its messages on; returns the last line.
    messages: Option<JoinHandle<String>>,
}

impl Process {
    /// Starts `vfio-migrate ARGUMENTS`, whose messages go to our stderr.
    pub(crate) fn start(name: &str, arguments: &[String]) -> Result<Self, CliError> {
        let program =
            std::env::current_exe().map_err(|error| CliError::caused("cannot find this program", &error))?;
        let mut command = Command::new(program);
        if std::env::var_os("RUST_LOG").is_none() {
            // The demo itself tells what its sessions come to.
            command.env("RUST_LOG", "warn");
        }
        let mut child = command
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A signal for the terminal's foreground, Ctrl-C, is the demo's alone: which ends them in order.
            .process_group(0)
            .spawn()
            .map_err(|error| CliError::caused(&format!("cannot start the {name}"), &error))?;
        let stdin = child.stdin.take();
        let mut process = Self { name: name.into(), child, stdin, messages: None };
        if let Some(stderr) = process.child.stderr.take() {
            let thread = std::thread::Builder::new().name("messages".into());
            let spawned = thread.spawn(move || pass_on(stderr));
            process.messages =
                Some(spawned.map_err(|error| CliError::caused("cannot make a thread", &error))?);
        }
        Ok(process)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the process listens at `socket` and answers, up to `patience`, and connects to its control socket.
    pub(crate) fn control(&mut self, socket: &Path, patience: Duration) -> Result<ControlClient, CliError> {
        self.until(socket, patience, || ControlClient::connect(socket, PATIENCE, None).ok())
    }

    /// Waits until a socket file is there.
    pub(crate) fn listening(&mut self, socket: &Path) -> Result<(), CliError> {
        self.until(socket, PATIENCE, || socket.exists().then_some(()))
    }

    fn until<T>(
        &mut self,
        socket: &Path,
        patience: Duration,
        mut ready: impl FnMut() -> Option<T>,
    ) -> Result<T, CliError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(value) = ready() {
                return Ok(value);
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(self.ended(status));
            }
            if Instant::now() > deadline {
                return Err(CliError::failed(format!(
                    "the {} does not listen at {}",
                    self.name,
                    socket.display()
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The error of a process that ended before it was ready: in its own words, and with its own exit code.
    fn ended(&mut self, status: ExitStatus) -> CliError {
        let last = self.messages.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        let reason = match last.strip_prefix("vfio-migrate: ").unwrap_or(&last) {
            "" => status.to_string(),
            reason => reason.to_owned(),
        };
        let exit = match status.code() {
            Some(2) => Exit::Usage,
            Some(3) => Exit::Incompatible,
            Some(4) => Exit::Unresolved,
            _ => Exit::Failed,
        };
        CliError::new(exit, format!("the {} ended at once: {reason}", self.name))
    }

    /// Whether it still runs.
    pub(crate) fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Process {
    /// Tells it to leave, and does not wait for that.
    pub(crate) fn leave(&mut self) {
        drop(self.stdin.take());
    }

    /// Processor time that it has used so far, user and system, as proc(5) has it; nothing once it is gone.
    fn used(&self) -> Option<String> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).ok()?;
        // Behind the name, which may hold anything.
        let mut fields = stat.rsplit(')').next()?.split_whitespace().skip(11);
        Some(format!("{} {}", fields.next()?, fields.next()?))
    }

    /// Waits until it has left, for as long as it gets on with that: how long it takes depends on the machine, and on what it has
    /// to give back.
    pub(crate) fn end(&mut self) {
        self.leave();
        let began = Instant::now();
        let mut last = (began, self.used());
        while self.alive() {
            let used = self.used();
            if used != last.1 {
                last = (Instant::now(), used);
            }
            if last.0.elapsed() > STANDSTILL || began.elapsed() > LEAVING {
                tracing::warn!(process = self.name, "does not leave by itself, killed");
                // It may have left in between; the wait below reaps it in either case.
                let _ = self.child.kill();
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.child.wait();
        if let Some(messages) = self.messages.take() {
            let _ = messages.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

fn pass_on(stderr: ChildStderr) -> String {
    let mut last = String::new();
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    // What is no text is shown as well as it can be; an error is an end.
    while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        last = String::from_utf8_lossy(&line).trim_end().to_owned();
        eprintln_line(&last);
        line.clear();
    }
    last
}
