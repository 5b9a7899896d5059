//! One kernel device into a file and back, by the command.

use std::fs;

use serde_json::Value;

use crate::check::{Outcome, holds, same};
use crate::command;
use crate::instance::Instance;
use crate::mtty::{drain_of, fill_of, one_port};
use crate::{edu, migdev};

const TEXT: &[u8] = b"kept in a file";

fn done(arguments: &[&str]) -> Outcome<Value> {
    let run = command::run(arguments)?;
    same(&format!("{arguments:?}: {}", run.stderr), run.exit, Some(0))?;
    Ok(run.report)
}

fn refused(arguments: &[&str], says: &str) -> Outcome {
    let run = command::run(arguments)?;
    same(&format!("{arguments:?}: {}", run.stderr), run.exit, Some(3))?;
    holds(run.stderr.contains(says), &format!("{arguments:?} says {says}: {}", run.stderr))
}

/// The value of the command's option for a device.
fn device(instance: &Instance) -> String {
    format!("mdev:{}", instance.uuid())
}

/// A file of this test.
struct File(&'static str);

impl Drop for File {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

/// mtty keeps what it holds when it is closed, so what was written into one port is read from another.
pub(crate) fn contents_move() -> Outcome {
    let (from, to) = (one_port()?, one_port()?);
    let (file, again, live) = (File("/tmp/mtty"), File("/tmp/mtty-again"), File("/tmp/mtty-live"));
    fill_of(&from, TEXT)?;
    let saved = done(&["save", "--device", &device(&from), "-o", file.0, "--stop-copy-only"])?;
    same("driver", &saved["driver"], &"mtty".into())?;
    same("left in", &saved["left-in"], &"RUNNING".into())?;
    same("pre-copy", &saved["precopy-bytes"], &0.into())?;
    let running = done(&["save", "--device", &device(&from), "-o", live.0])?;
    holds(running["precopy-bytes"].as_u64() > Some(0), &format!("pre-copy data: {running}"))?;
    let loaded = done(&["restore", "--device", &device(&to), file.0, "--leave-stopped"])?;
    same("left in", &loaded["left-in"], &"STOP".into())?;
    // A device that was found standing is saved as it stands.
    let standing = done(&["save", "--device", &device(&to), "-o", again.0])?;
    same("left in", &standing["left-in"], &"STOP".into())?;
    same("state", &standing["state-digest"], &saved["state-digest"])?;
    done(&["restore", "--device", &device(&to), live.0])?;
    same("contents", drain_of(&to)?, TEXT.to_vec())?;
    // The control: without its contents the state is another one.
    let empty = File("/tmp/mtty-empty");
    let drained = done(&["save", "--device", &device(&to), "-o", empty.0, "--stop-copy-only"])?;
    holds(drained["state-digest"] != saved["state-digest"], "an empty port has another state")
}

/// A file of two ports is nothing for one.
pub(crate) fn another_type() -> Outcome {
    let (two, one) = (Instance::new("mtty", "mtty-2")?, one_port()?);
    let file = File("/tmp/mtty-2");
    fill_of(&one, TEXT)?;
    done(&["save", "--device", &device(&two), "-o", file.0])?;
    refused(&["restore", "--device", &device(&one), file.0], "mediated device's type")?;
    same("contents", drain_of(&one)?, TEXT.to_vec())
}

/// migdev checks all that it is given. It is reset whenever it is opened, so its contents are read again at once.
pub(crate) fn migdev() -> Outcome {
    let (from, to) = (Instance::new("migdev", "migdev-1M")?, Instance::new("migdev", "migdev-1M")?);
    let (file, late) = (File("/tmp/migdev"), File("/tmp/migdev-late"));
    let (stopped, twice) = (File("/tmp/migdev-stopped"), File("/tmp/migdev-twice"));
    let saved = done(&["save", "--device", &device(&from), "-o", file.0])?;
    holds(saved["precopy-bytes"].as_u64() >= Some(1 << 20), &format!("pre-copy data: {saved}"))?;
    let loaded = done(&["restore", "--device", &device(&to), file.0])?;
    same("state", &loaded["state-digest"], &saved["state-digest"])?;
    same("left in", &loaded["left-in"], &"RUNNING".into())?;
    same("not compared", loaded.get("same-state"), None)?;
    done(&["save", "--device", &device(&from), "-o", stopped.0, "--stop-copy-only"])?;
    let again = done(&["restore", "--device", &device(&to), stopped.0, "--save-again", twice.0])?;
    same("the state that it loaded", &again["same-state"], &true.into())?;
    holds(!again["again"]["arcs"].to_string().contains("RUNNING"), &format!("it stood: {again}"))?;
    // A driver that stops answering half way: the device is reset, and no file is left.
    migdev::set(&from, "enodev_after", 4096)?;
    let run = command::run(&["save", "--device", &device(&from), "-o", late.0])?;
    same(&run.stderr, run.exit, Some(1))?;
    holds(run.stderr.contains("RUNNING"), &format!("it says how the device is: {}", run.stderr))?;
    holds(!fs::exists(late.0)?, "no file is left")
}

/// A device of plain vfio-pci is refused, with the reason, and nothing is written.
pub(crate) fn edu_is_refused() -> Outcome {
    let place = edu::place().ok_or("there is no edu")?;
    let address = place.file_name().and_then(|name| name.to_str()).ok_or("a device without an address")?;
    fs::write(place.join("driver_override"), "vfio-pci")?;
    fs::write("/sys/bus/pci/drivers_probe", address)?;
    let device = format!("vfio:{address}");
    refused(&["save", "--device", &device, "-o", "/tmp/edu"], "plain vfio-pci never has")?;
    let run = command::run(&["restore", "--device", &device, "/tmp/edu"])?;
    same(&run.stderr, run.exit, Some(1))?;
    holds(run.stderr.contains("/tmp/edu"), &format!("there is no such file: {}", run.stderr))
}

/// A device that is open elsewhere.
pub(crate) fn in_use() -> Outcome {
    let instance = one_port()?;
    let opened = instance.open()?;
    opened.device()?;
    let run = command::run(&["save", "--device", &device(&instance), "-o", "/tmp/none"])?;
    same(&run.stderr, run.exit, Some(1))?;
    holds(run.stderr.contains("holds it"), &run.stderr)
}
