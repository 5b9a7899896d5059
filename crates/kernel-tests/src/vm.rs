//! The command's `vm` as a process, and what its control socket says.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::check::{Outcome, holds};
use crate::command::PROGRAM;
use crate::instance::Instance;

/// Everything here runs in emulation. A guard against a hang, and no claim.
pub(crate) const PATIENCE: Duration = Duration::from_secs(100);
/// The guest stands for as long as an emulated processor needs.
pub(crate) const DOWNTIME_LIMIT_MS: u64 = 20_000;

/// A VM in a process of its own.
#[derive(Debug)]
pub(crate) struct VmProcess {
    child: Child,
    control: String,
    /// A device that was made for it outlives the process that has it.
    device: Option<Instance>,
}

impl VmProcess {
    /// A VM with a device of the host's kernel.
    pub(crate) fn start(name: &str, device: &str, more: &[&str]) -> Outcome<Self> {
        let control = format!("/tmp/{name}.ctl");
        let child = Command::new(PROGRAM)
            .args(["vm", "--require-kvm", "--memory", "32M", "--dirty-rate", "1M", "--control", &control])
            .args(["--uuid", "5e1f5a52-8c2d-4f0e-9f6b-0d6a5c1d7e11", "--device", device])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { child, control, device: None })
    }

    /// A VM with an instance of migdev of its own.
    pub(crate) fn with_migdev(name: &str, more: &[&str]) -> Outcome<Self> {
        let device = Instance::new("migdev", "migdev-1M")?;
        let mut vm = Self::start(name, &format!("mdev:{},id=net0", device.uuid()), more)?;
        vm.device = Some(device);
        Ok(vm)
    }

    /// Asks for one thing; what was answered.
    pub(crate) fn call(&self, verb: &str, arguments: &Value) -> Outcome<Value> {
        let mut socket = UnixStream::connect(&self.control)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let request = if arguments.is_null() {
            json!({"execute": verb, "id": 1})
        } else {
            json!({"execute": verb, "arguments": arguments, "id": 1})
        };
        writeln!(socket, "{request}")?;
        for line in BufReader::new(socket).lines() {
            let answer: Value = serde_json::from_str(&line?)?;
            if answer.get("id").is_none() {
                continue;
            }
            return match answer.get("return") {
                Some(value) => Ok(value.clone()),
                None => Err(format!("{verb} was refused: {answer}").into()),
            };
        }
        Err(format!("{verb}: the VM left").into())
    }

    /// Asks until `done` says so.
    pub(crate) fn until(&mut self, what: &str, verb: &str, done: impl Fn(&Value) -> bool) -> Outcome<Value> {
        let began = Instant::now();
        let mut last = String::new();
        while began.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                return Err(format!("waiting for {what}: the VM ended with {status}").into());
            }
            match self.call(verb, &Value::Null) {
                Ok(answer) if done(&answer) => return Ok(answer),
                Ok(answer) => last = answer.to_string(),
                Err(error) => last = error.to_string(),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Err(format!("waiting for {what}: {last}; its threads wait in {}", self.threads()).into())
    }

    /// Where in the kernel each of its threads is: `0` is none, it runs.
    fn threads(&self) -> String {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten().flatten();
        let word = |task: &fs::DirEntry, what| {
            fs::read_to_string(task.path().join(what)).unwrap_or_else(|error| error.to_string())
        };
        tasks
            .map(|task| format!("{}: {}", word(&task, "comm").trim(), word(&task, "wchan").trim()))
            .collect::<Vec<_>>()
            .join(", ")
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        drop(self.device.take());
    }
}

/// Where the destination of every migration here listens.
pub(crate) const TARGET: &str = "unix:/tmp/b.sock";

/// The migration under way, or else the last, of what `query` returns.
pub(crate) fn latest(report: &Value) -> &Value {
    if report["migration"].is_null() { &report["last"] } else { &report["migration"] }
}

/// Lets a migration that was to wait before its switchover go on to its end.
pub(crate) fn switch_over(source: &mut VmProcess) -> Outcome {
    let waiting =
        source.until("the switchover to be asked for", "query", |info| latest(info)["status"] != "active")?;
    let waiting = latest(&waiting);
    holds(waiting["status"] == "pre-switchover", &format!("the migration waits: {waiting}"))?;
    source.call("migrate-continue", &Value::Null)?;
    let ended = source.until("the end of the migration", "query", |info| {
        !matches!(latest(info)["status"].as_str(), Some("active" | "pre-switchover"))
    })?;
    let ended = latest(&ended);
    holds(ended["status"] == "completed", &format!("the migration completed: {ended}"))
}

/// A number of a guest's report.
pub(crate) fn count(report: &Value, what: &str) -> u64 {
    report.get(what).and_then(Value::as_u64).unwrap_or(0)
}
