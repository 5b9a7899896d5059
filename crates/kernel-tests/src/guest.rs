//! A real guest with a real VFIO device: nested KVM runs the reference VMM's guest, twice, as source and destination, and
//! the guest itself says whether anything was lost.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::check::{Outcome, holds, same};
use crate::instance::Instance;

/// The command, in the image.
const PROGRAM: &str = "/vfio-migrate";
/// Everything here runs in emulation. A guard against a hang, and no claim.
const PATIENCE: Duration = Duration::from_secs(100);
/// The guest stands for as long as an emulated processor needs.
const DOWNTIME_LIMIT_MS: u64 = 20_000;

/// A VM in a process of its own.
struct Vm {
    child: Child,
    control: String,
    /// The device outlives the process that has it.
    _device: Instance,
}

impl Vm {
    fn start(name: &str, more: &[&str]) -> Outcome<Self> {
        let device = Instance::new("migdev", "migdev-1M")?;
        let control = format!("/tmp/{name}.ctl");
        let kernel_device = format!("mdev:{},id=net0", device.uuid());
        let child = Command::new(PROGRAM)
            .args(["vm", "--require-kvm", "--memory", "32M", "--dirty-rate", "1M", "--control", &control])
            .args(["--uuid", "5e1f5a52-8c2d-4f0e-9f6b-0d6a5c1d7e11", "--device", &kernel_device])
            .args(more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { child, control, _device: device })
    }

    fn call(&self, verb: &str, arguments: &Value) -> Outcome<Value> {
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
    fn until(&mut self, what: &str, verb: &str, done: impl Fn(&Value) -> bool) -> Outcome<Value> {
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
        Err(format!("waiting for {what}: {last}").into())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn count(report: &Value, what: &str) -> u64 {
    report.get(what).and_then(Value::as_u64).unwrap_or(0)
}

/// Moves a guest at work from one instance of migdev to another; its report from where it arrived.
fn moved(sabotage: &[&str]) -> Outcome<Value> {
    let mut destination = Vm::start("b", &["--incoming", "unix:/tmp/b.sock"])?;
    let mut source = Vm::start("a", sabotage)?;
    let before = source.until("the guest to work", "query-guest", |report| {
        count(report, "dma-blocks") >= 64
            && count(report, "interrupts") >= 16
            && count(report, "page-passes") >= 1
    })?;
    holds(lost(&before) == [0, 0, 0], &format!("nothing is lost before the move: {before}"))?;
    destination.until("the destination to wait", "query-status", |_| true)?;
    let arguments = json!({
        "uri": "unix:/tmp/b.sock", "downtime-limit": DOWNTIME_LIMIT_MS, "verify": sabotage.is_empty(),
        "pause-before-switchover": true,
    });
    source.call("migrate", &arguments)?;
    source.until("the switchover", "query-migrate", |info| info["status"] != "active")?;
    // More is written after the first copy of everything.
    source.until("the guest to go on", "query-guest", |report| {
        count(report, "dma-blocks") >= count(&before, "dma-blocks") + 64
            && count(report, "pages-written") >= count(&before, "pages-written") + 64
    })?;
    source.until("the switchover to be asked for", "query-migrate", |info| {
        info["status"] == "pre-switchover"
    })?;
    source.call("migrate-continue", &Value::Null)?;
    let ended = source.until("the end of the migration", "query-migrate", |info| {
        !matches!(info["status"].as_str(), Some("active" | "pre-switchover"))
    })?;
    holds(ended["status"] == "completed", &format!("the migration completed: {ended}"))?;
    let arrived =
        destination.until("the guest to arrive", "query-guest", |report| count(report, "loops") > 0)?;
    destination.until("the guest to check everything", "query-guest", |report| {
        lost(report) != [0, 0, 0]
            || count(report, "page-passes") >= count(&arrived, "page-passes") + 2
                && count(report, "block-passes") >= count(&arrived, "block-passes") + 2
                && count(report, "dma-blocks") >= count(&arrived, "dma-blocks") + 64
                && count(report, "interrupts") >= count(&arrived, "interrupts") + 16
    })
}

fn lost(report: &Value) -> [u64; 3] {
    ["pages-lost", "blocks-lost", "interrupts-lost"].map(|what| count(report, what))
}

/// Memory, DMA and interrupts of a guest with a kernel device, on the other side of a move.
pub(crate) fn moves_whole() -> Outcome {
    let report = moved(&[])?;
    same("pages, blocks and interrupts lost", lost(&report), [0, 0, 0])?;
    same("why the guest gave up", count(&report, "failure"), 0)
}

/// The same with bits of the dirty log dropped: the guest that judges is awake here too.
pub(crate) fn notices_what_is_lost() -> Outcome {
    let report = moved(&["--sabotage", "dirty-log"])?;
    holds(lost(&report)[0] > 0, &format!("lost pages are noticed: {report}"))
}
