//! What is lost while a migration is under way, by real processes: a device server that is killed in each phase, at either side, and
//! descriptors that a process may not have. What is said of it is what is.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use serde_json::{Value, json};

use crate::support::{PATIENCE, Process, Setup, Vm, run, until};

const UUID: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0004";

/// How a migration is made to stand in a phase, and what comes of it if the device's server of the source, or of the
/// destination, is killed then: the status of the migration and of both VMs.
struct Stand {
    phase: &'static str,
    here: &'static str,
    there: &'static str,
    source_dies: Ends,
    destination_dies: Ends,
}

/// Status of the migration, of the source's VM, of the destination's.
type Ends = (&'static str, &'static [&'static str], &'static str);

const BEFORE: Ends = ("failed", &["running"], "inmigrate");
/// Nobody resumes a guest beside a device that lost its state.
const PAUSED: Ends = ("failed", &["paused"], "inmigrate");
/// By whether it was killed before the guest was paused.
const EITHER: Ends = ("failed", &["running", "paused"], "inmigrate");
const MOVED: Ends = ("completed", &["postmigrate"], "running");
const NOT_STARTED: Ends = ("not-started", &["postmigrate"], "paused");

const fn stand(
    phase: &'static str,
    here: &'static str,
    there: &'static str,
    source_dies: Ends,
    destination_dies: Ends,
) -> Stand {
    Stand { phase, here, there, source_dies, destination_dies }
}

const STANDS: [Stand; 8] = [
    stand("P2", "hang-arc:RUNNING:PRE_COPY:TIME", "", BEFORE, BEFORE),
    stand("P2", "", "hang-arc:STOP:RESUMING:TIME", BEFORE, BEFORE),
    stand("P3", "", "", BEFORE, BEFORE),
    stand("P4", "hang-arc:PRE_COPY_P2P:STOP_COPY:TIME", "", EITHER, BEFORE),
    stand("P5", "hang-read:TIME", "", PAUSED, BEFORE),
    stand("P6", "", "hang-arc:RESUMING:STOP:TIME", PAUSED, BEFORE),
    stand("P8", "", "hang-arc:RUNNING_P2P:RUNNING:TIME", MOVED, NOT_STARTED),
    stand("P9", "hang-arc:STOP_COPY:STOP:TIME", "", MOVED, MOVED),
];

/// Two sides, whose devices change so much of their state each second.
fn pair(dir: &std::path::Path, faults: [&str; 2], dirty_rate: &str) -> (Vm, Vm) {
    let arguments = faults.map(|fault| {
        let state = ["--state-size", "1M", "--state-dirty-rate", dirty_rate];
        if fault.is_empty() { state.to_vec() } else { [&state[..], &["--fault", fault]].concat() }
    });
    let [here, there] = &arguments;
    let source = Setup { device_arguments: here, vm_arguments: &["--uuid", UUID], ..Setup::new(dir, "a") };
    let destination = Setup {
        device_arguments: there,
        vm_arguments: &["--uuid", UUID, "--incoming", "tcp:127.0.0.1:0"],
        ..Setup::new(dir, "b")
    };
    let (source, destination) = (source.start(), destination.start());
    source.warm();
    (source, destination)
}

/// What was said at the end, as `migrate --json` has it, and on stderr.
fn migrate_until(
    source: &Vm,
    to: &str,
    more: &[&str],
    standing: impl FnOnce(),
) -> (Option<i32>, Value, String) {
    let words =
        ["migrate", "--json", "--control", source.control.to_str().unwrap(), "--downtime-limit", "60s"];
    let child = crate::support::command(&[&words, more, &[to]].concat())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    standing();
    let output = child.wait_with_output().unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    (output.status.code(), report, String::from_utf8(output.stderr).unwrap())
}

fn killed_in(stand: &Stand, at_source: bool) {
    let Stand { phase, here, there, source_dies, destination_dies } = stand;
    let (status, source_is, destination_is) = if at_source { source_dies } else { destination_dies };
    let dir = tempfile::tempdir().unwrap();
    // What hangs is killed, or else answers before long.
    let time = |own: bool| if own { "20000" } else { "1500" };
    let faults = [here.replace("TIME", time(at_source)), there.replace("TIME", time(!at_source))];
    // In pre-copy there is nothing left to be written to a destination's device that waits for the switchover.
    let more: &[&str] = if *phase == "P3" { &["--pause-before-switchover"] } else { &[] };
    let (mut source, mut destination) = pair(dir.path(), faults.each_ref().map(String::as_str), "0");
    let to = destination.incoming();
    let control = source.control.clone();
    let devices = if at_source { &mut source.devices } else { &mut destination.devices };
    let mut server = devices.remove(0);
    let (code, report, said) = migrate_until(&source, &to, more, || {
        until("the phase", || (source.migration()["phase"] == *phase).then_some(()));
        if *phase == "P3" {
            until("the wait", || (source.migration()["status"] == "pre-switchover").then_some(()));
        }
        server.kill();
    });
    let told = &report["migration"];
    let case = format!("{phase} {here}{there}, the server at the source: {at_source}: {report}\n{said}");
    let exit = match *status {
        "completed" => 0,
        "not-started" => 5,
        _ => 1,
    };
    assert_eq!((told["status"].as_str(), code), (Some(*status), Some(exit)), "{case}");
    let there = until("the destination's end", || {
        let report = destination.query("query");
        (report["migration"].is_null() && !report["last"].is_null()).then_some(report)
    });
    assert_eq!(there["last"]["status"], *status, "{case}\n{there}");
    let here = source.query("query");
    assert_eq!(here["last"], *told, "{case}\n{here}");
    let is = source.status();
    assert!(source_is.contains(&is.as_str()), "{case}\n{here}");
    assert_eq!(destination.status(), *destination_is, "{case}\n{there}");
    // Who is to blame is said, by name, and that it is gone.
    if *status != "completed" {
        assert!(said.contains("dev0"), "{case}");
        let why = told["error"].as_str().unwrap();
        assert!(said.contains(why), "{case}");
        assert!(!why.contains("protocol"), "{case}");
        assert_eq!(told["failure"]["device"], "dev0", "{case}");
    }
    let text = String::from_utf8(run(&["status", "--control", control.to_str().unwrap()]).stdout).unwrap();
    let lost = here["vm"]["lost-devices"].as_array().unwrap();
    if at_source && *status == "failed" {
        assert_eq!(lost, &[json!("dev0")], "{case}\n{here}");
        assert!(text.contains("lost: dev0"), "{text}");
    }
    match is.as_str() {
        "running" if at_source => assert!(said.contains("the guest is here, without device dev0"), "{case}"),
        "running" => {
            assert!(said.contains("the guest is here as it was before"), "{case}");
            source.assert_runs();
        }
        "paused" => assert!(said.contains("the guest is not resumed here"), "{case}"),
        _ => {}
    }
}

#[test]
fn a_source_s_device_server_is_killed_in_each_phase() {
    STANDS.iter().for_each(|stand| killed_in(stand, true));
}

#[test]
fn a_destination_s_device_server_is_killed_in_each_phase() {
    STANDS.iter().for_each(|stand| killed_in(stand, false));
}

/// Before the other side is talked to, and while it reserves.
#[test]
fn a_device_server_is_killed_before_anything_is_set_up() {
    for at_source in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (mut source, mut destination) = pair(dir.path(), ["", ""], "0");
        let to = destination.incoming();
        let devices = if at_source { &mut source.devices } else { &mut destination.devices };
        let mut server = devices.remove(0);
        let pid = Pid::from_raw(server.pid().try_into().unwrap()).unwrap();
        kill_process(pid, Signal::STOP).unwrap();
        let phase = if at_source { "P0" } else { "P1" };
        let (code, report, said) = migrate_until(&source, &to, &[], || {
            until("the phase", || (source.migration()["phase"] == phase).then_some(()));
            server.kill();
        });
        let case = format!("{phase}: {report}\n{said}");
        // A receiver that finds out first has no machine: it refuses.
        let refused = report["migration"]["incompatible"] == true;
        assert!(!(refused && at_source), "{case}");
        assert_eq!(report["migration"]["status"], "failed", "{case}");
        assert_eq!(code, Some(if refused { 3 } else { 1 }), "{case}");
        assert!(said.contains("dev0"), "{case}");
        assert_eq!((source.status(), destination.status()), ("running".into(), "inmigrate".into()), "{case}");
    }
}

/// A connection to a control socket that stays: a process without a descriptor left takes no new one.
struct Client {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Client {
    fn of(vm: &Vm) -> Self {
        let stream = UnixStream::connect(&vm.control).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        reader.read_line(&mut String::new()).unwrap();
        let mut client = Self { stream, reader };
        // It has all that it needs there.
        client.call("query", &json!({})).unwrap();
        client
    }

    fn call(&mut self, verb: &str, arguments: &Value) -> Result<Value, String> {
        writeln!(self.stream, "{}", json!({"execute": verb, "arguments": arguments, "id": 1})).unwrap();
        loop {
            let mut line = String::new();
            assert!(self.reader.read_line(&mut line).unwrap() > 0, "the control socket was closed");
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            if !answer["return"].is_null() {
                return Ok(answer["return"].take());
            }
            if let Some(error) = answer["error"]["desc"].as_str() {
                return Err(error.to_owned());
            }
        }
    }
}

/// Lets a process have `more` descriptors than it has, and as many as before when this is dropped.
struct Few(Option<Pid>, Rlimit);

impl Few {
    fn more(process: &Process, more: u64) -> Self {
        let pid = Pid::from_raw(process.pid().try_into().unwrap());
        let open = std::fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
        let name =
            |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let open: BTreeSet<u64> = open.map(|entry| name(entry).parse().unwrap()).collect();
        // A new one gets the lowest number that is free; those above the limit stay.
        let limit = (0..).filter(|number| !open.contains(number)).nth(more.try_into().unwrap()).unwrap();
        let few = Rlimit { current: Some(limit), ..getrlimit(Resource::Nofile) };
        Self(pid, prlimit(pid, Resource::Nofile, few).unwrap())
    }
}

impl Drop for Few {
    fn drop(&mut self) {
        prlimit(self.0, Resource::Nofile, self.1).unwrap();
    }
}

/// With one descriptor more each time, until there are enough: each shortage is told as what it is, at the side that has it.
#[test]
fn descriptors_that_cannot_be_had_are_told_as_that() {
    for at_source in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (source, destination) = pair(dir.path(), ["", ""], "0");
        let mut short = 0;
        for more in 0.. {
            let to = destination.incoming();
            let mut client = Client::of(&source);
            let side = if at_source { &source } else { &destination };
            // One for the connection, without which a destination hears of nobody.
            let few = Few::more(&side.process, more + u64::from(!at_source));
            let begun = client.call("migrate", &json!({"uri": to, "downtime-limit": 20_000}));
            let last = match begun {
                Err(refused) => json!({"status": "failed", "error": refused}),
                Ok(_) => until("the end", || {
                    let report = client.call("query", &json!({})).unwrap();
                    report["migration"].is_null().then(|| report["last"].clone())
                }),
            };
            drop(few);
            if last["status"] == "completed" {
                until("the guest there", || (destination.status() == "running").then_some(()));
                destination.assert_whole();
                break;
            }
            short += 1;
            let case = format!("{more} more at the source: {at_source}: {last}");
            let why = last["error"].as_str().unwrap();
            assert!(why.contains("open files") && why.contains("RLIMIT_NOFILE"), "{case}");
            let failure = &last["failure"];
            assert!(failure.is_null() || failure["errno"] == 24, "{case}");
            assert!(!why.contains("protocol") && !why.contains("gone"), "{case}");
            assert_eq!(source.status(), "running", "{case}");
            source.assert_runs();
        }
        assert!(short > 0, "there were always enough");
    }
}
