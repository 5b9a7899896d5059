//! What strangers write reaches the operator's terminal as text, never as a command: every way in, by real processes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Output};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vfio_migration_types::{AttemptId, Epoch, VmId, is_control};
use vfio_migration_wire::{Hello, Message, Offer, PREAMBLE, VERSIONS, encode};
use vfio_user_peer::{
    Backend, DeviceInfo, DmaMapping, Errno, Extension, IrqInfo, IrqRequest, MigrationFlags, MigrationState,
    RegionInfo, Server, StopHandle, irq_index, region_index,
};

use crate::support::{Setup, command, run, until};

/// Sets the title of the terminal, clears it, changes colours by an 8-bit CSI, begins a line of its own, turns the order round.
const HOSTILE: &str =
    "\u{1b}]0;OWNED\u{7}\u{1b}[2J\u{9b}31m\u{7f}\nforged: line\r\u{202e}\u{2066}PWNED\u{2028}";

/// What comes out has nothing in it that a terminal takes as a command, and no line that a stranger began.
fn shown(what: &str, bytes: &[u8]) -> String {
    let text = String::from_utf8(bytes.to_vec()).unwrap_or_else(|error| panic!("{what}: {error}"));
    let hostile = |character: char| is_control(character) && !matches!(character, '\n' | '\t');
    assert!(!text.contains(hostile), "{what}: {text:?}");
    assert!(!text.lines().any(|line| line.starts_with("forged")), "{what}: {text}");
    text
}

/// Both streams of a run.
fn said(arguments: &[&str], output: &Output) -> String {
    let what = format!("{arguments:?}");
    shown(&what, &output.stdout) + &shown(&what, &output.stderr)
}

/// Runs the command, all of whose words must be printable whatever its arguments make it say, and returns them.
fn runs(arguments: &[&str]) -> String {
    let text = said(arguments, &run(arguments));
    assert!(text.contains("PWNED"), "{arguments:?} says nothing of what it was given: {text}");
    text
}

fn device() -> Value {
    json!({
        "schema": "vfio-migrate.org/manifest/1", "kind": "device", "id": "dev0", "model": "example.org/nic",
        "model_version": "1.0.0", "flags": {"p2p": true, "pre_copy": true}, "dirty": {"device_log": true},
    })
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> String {
    std::fs::write(path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A process that is ended also where a test fails.
struct Receiver(Child);

impl Receiver {
    fn stop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

#[test]
fn a_strangers_offer_does_not_steer_the_terminal_of_who_looks_at_the_receiver() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control");
    let log = dir.path().join("log");
    // Whoever is let in by nothing says most.
    let words = ["vm", "--memory", "64M", "--software", "--incoming", "tcp:127.0.0.1:0"];
    let words = [&words[..], &["--insecure-plaintext", "--control"]].concat();
    let receiver = command(&words)
        .arg(&control)
        .env("RUST_LOG", "debug")
        .stdout(File::create(dir.path().join("out")).unwrap())
        .stderr(File::create(&log).unwrap())
        .spawn();
    let mut receiver = Receiver(receiver.unwrap());
    let control = control.display().to_string();
    let status = |json: &[&str]| run(&[&["status", "--control", &control], json].concat());
    let address = until("the address", || {
        let report: Value = serde_json::from_slice(&status(&["--json"]).stdout).ok()?;
        report["vm"]["incoming"].as_str()?.strip_prefix("tcp:").map(str::to_owned)
    });

    let manifest = json!({
        "machine": HOSTILE, "accelerator": HOSTILE, "vcpus": 1, "ram": [], "sections": {HOSTILE: HOSTILE}, "devices": [],
    });
    let hello = Hello {
        versions: VERSIONS,
        features: 0,
        vm: VmId([7; 16]),
        attempt: AttemptId([8; 16]),
        epoch: Epoch(0),
    };
    let offer = Offer { manifest: manifest.to_string().into_bytes(), ..Offer::default() };
    let said_by_stranger = [
        &PREAMBLE[..],
        &encode(&Message::Hello(hello), 0).unwrap(),
        &encode(&Message::Offer(offer), 1).unwrap(),
    ]
    .concat();

    // The refusal is told by `status`, or by the receiver itself; nothing else that is said is hostile either.
    until("the refusal to be told", || {
        // Again and again: on a busy machine a stranger may be let go as one who was silent for too long.
        if let Ok(mut stranger) = TcpStream::connect(&address) {
            let _ = stranger.write_all(&said_by_stranger);
            let _ = stranger.read_to_end(&mut Vec::new());
        }
        let told = said(&["status"], &status(&[])) + &said(&["status --json"], &status(&["--json"]));
        let log = shown("the receiver", &std::fs::read(&log).unwrap());
        (told + &log).contains("PWNED").then_some(())
    });
    receiver.stop();
    shown("the receiver's log", &std::fs::read(&log).unwrap());
    shown("the receiver's stdout", &std::fs::read(dir.path().join("out")).unwrap());
}

/// A device that has nothing but its manifest.
struct Hostile(Vec<u8>);

impl Backend for Hostile {
    fn device_info(&self) -> DeviceInfo {
        let (num_regions, num_irqs) = (region_index::COUNT, irq_index::COUNT);
        DeviceInfo { resettable: true, pci: true, num_regions, num_irqs }
    }

    fn region_info(&self, _index: u32) -> Result<RegionInfo, Errno> {
        Ok(RegionInfo::default())
    }

    fn irq_info(&self, _index: u32) -> Result<IrqInfo, Errno> {
        Ok(IrqInfo::default())
    }

    fn region_read(&self, _index: u32, _offset: u64, _into: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn region_write(&self, _index: u32, _offset: u64, _from: &[u8]) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn set_irqs(&self, _request: IrqRequest) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn dma_map(&self, _mapping: DmaMapping) -> Result<(), Errno> {
        Ok(())
    }

    fn dma_unmap(&self, _iova: u64, _len: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn extension(&self) -> Extension {
        Extension { manifest: true, ..Extension::NONE }
    }

    fn migration_flags(&self) -> Result<MigrationFlags, Errno> {
        Ok(MigrationFlags::default())
    }

    fn mig_state(&self) -> Result<MigrationState, Errno> {
        Ok(MigrationState::Running)
    }

    fn manifest(&self) -> Result<Vec<u8>, Errno> {
        Ok(self.0.clone())
    }
}

/// Stops a server when it is dropped.
struct Stopped<'s>(&'s StopHandle);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

#[test]
fn a_hostile_device_server_does_not_steer_the_terminal_of_who_asks_it() {
    let dir = tempfile::tempdir().unwrap();
    let plain = write(&dir.path().join("plain.json"), device().to_string());
    let legal = json!({"model": HOSTILE, "parameters": {HOSTILE: {"value": HOSTILE}}, HOSTILE: HOSTILE});
    for (name, manifest) in [
        ("illegal", json!({"parameters": {HOSTILE: {"value": []}}}).to_string()),
        ("legal", legal.to_string()),
        ("no-json", HOSTILE.to_owned()),
        ("version", json!({"model_version": HOSTILE}).to_string()),
    ] {
        let socket = dir.path().join(name);
        let server = Server::bind(&socket).unwrap();
        let (backend, stop) = (Hostile(manifest.into_bytes()), StopHandle::new().unwrap());
        let socket = format!("vfio-user:{}", socket.display());
        std::thread::scope(|scope| {
            scope.spawn(|| server.serve(&backend, &stop).unwrap());
            // Also where a test fails: the scope waits for the server.
            let _stopped = Stopped(&stop);
            for arguments in [
                &["describe", &socket][..],
                &["describe", &socket, "--json"],
                &["describe", &socket, "--format", "list"],
                &["check", &socket, &plain],
                &["check", &socket, &plain, "--json"],
            ] {
                let text = said(arguments, &run(arguments));
                assert!(text.contains("PWNED") || name == "no-json", "{arguments:?}: {text}");
            }
        });
    }
}

#[test]
fn hostile_files_do_not_steer_the_terminal_of_who_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let plain = write(&path("plain.json"), device().to_string());
    let mut hostile = device();
    hostile["parameters"] = json!({HOSTILE: {"value": []}});
    let illegal = write(&path("illegal.json"), hostile.to_string());
    runs(&["check", &illegal, &plain]);
    runs(&["check", &illegal, &plain, "--json"]);
    hostile["parameters"] = json!({HOSTILE: {"value": HOSTILE}});
    hostile["firmware"] = HOSTILE.into();
    hostile[HOSTILE] = HOSTILE.into();
    let legal = write(&path("legal.json"), hostile.to_string());
    for arguments in [
        &["check", &legal, &plain][..],
        &["check", &plain, &legal],
        &["check", &plain, &legal, "--json"],
        &["describe", &legal],
        &["describe", &legal, "--format", "list"],
    ] {
        runs(arguments);
    }
    let described = run(&["describe", &legal]);
    assert_eq!(
        serde_json::from_slice::<Value>(&described.stdout).unwrap()[HOSTILE],
        HOSTILE,
        "it says the same"
    );
    let written = path("written.json");
    assert!(run(&["describe", &legal, "-o", written.to_str().unwrap()]).status.success());
    shown("the file", &std::fs::read(&written).unwrap());

    let host = json!({
        "schema": "vfio-migrate.org/manifest/1", "kind": "host", "name": "h", "devices": [{
            "id": "dev0", "model": HOSTILE, "model_version": "1.0.0", "parameters": {HOSTILE: {"value": HOSTILE}},
        }],
    });
    let host = write(&path("host.json"), host.to_string());
    runs(&["check", "--baseline", &host]);
    runs(&["check", "--baseline", "--json", &host]);
    let named = json!({"schema": "vfio-migrate.org/manifest/1", "kind": "host", "name": HOSTILE});
    let named = write(&path("named.json"), named.to_string());
    said(&["check --matrix"], &run(&["check", "--matrix", &named]));

    let quoted = json!(HOSTILE).to_string();
    for (n, policy) in [
        format!("{quoted} = 1"),
        format!("[map]\n{quoted} = \"dev0\""),
        format!("max_state_size = {HOSTILE}"),
        format!("[[allow]]\ncode = {quoted}"),
        json!({HOSTILE: 1}).to_string(),
    ]
    .iter()
    .enumerate()
    {
        let policy = write(&path(&format!("policy{n}")), policy);
        said(&["check --policy"], &run(&["check", "--policy", &policy, &plain, &plain]));
        said(&["vm --policy"], &run(&["vm", "--policy", &policy, "--memory", "64M", "--software"]));
        said(&["describe --site"], &run(&["describe", &plain, "--site", &policy]));
    }
}

#[test]
fn hostile_names_of_files_are_shown_and_not_obeyed() {
    let dir = tempfile::tempdir().unwrap();
    // As the shell's `*` gives it; bytes that are no UTF-8 have a test of their own.
    let folder = dir.path().join("pool");
    std::fs::create_dir(&folder).unwrap();
    let mut unknown = device();
    unknown["later"] = 1.into();
    let name = write(&folder.join(format!("{}.json", HOSTILE.replace('/', ""))), unknown.to_string());
    runs(&["check", &name, &name]);
    runs(&["check", "--matrix", folder.to_str().unwrap()]);
    for arguments in [
        &["describe", &format!("{name}.not")][..],
        &["status", "--control", &name],
        &["migrate", "--control", &name, "--json", "tcp:127.0.0.1:1"],
        &["check", "--policy", &name, &name, &name],
        &["device", "--socket", &name],
        &["vm", "--restore", &name, "--memory", "64M", "--software"],
        &["restore", "--device", "vfio-user:/nonexistent", &format!("{name}.not")],
        &["explain", HOSTILE],
        &["explain", HOSTILE, "--json"],
        &["incoming", "--control", &name, HOSTILE],
        &["check", "--map", &format!("a={HOSTILE}"), &name, &name],
        // What clap itself says.
        &[HOSTILE],
        &["check", &format!("--{HOSTILE}")],
        &["check", &format!("--{HOSTILE}"), "--json"],
        &["demo", "--memory", HOSTILE],
    ] {
        runs(arguments);
    }
}

#[test]
fn bytes_that_are_no_text_are_not_written() {
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(std::ffi::OsStr::from_bytes(b"\xff\x9b2JPWNED"));
    std::fs::write(&path, "{").unwrap();
    for verb in ["describe", "check", "explain"] {
        let mut command = command(&[verb]);
        command.arg(&path);
        said(&[verb], &command.output().unwrap());
    }
    let control = command(&["status", "--control"]).arg(&path).output().unwrap();
    assert!(said(&["status"], &control).contains("PWNED"));
}

/// A `vm` that lies: whatever it is asked, `report` is the answer.
fn serve(listener: &UnixListener, report: &Mutex<Value>) {
    for client in listener.incoming() {
        let Ok(mut client) = client else { return };
        let _ = writeln!(client, "{}", json!({"vfio-migrate": {"version": "1"}}));
        for line in BufReader::new(client.try_clone().unwrap()).lines().map_while(Result::ok) {
            let answer = match serde_json::from_str::<Value>(&line).unwrap()["execute"].as_str() {
                Some("query") => json!({"return": *report.lock().unwrap()}),
                Some("migrate-cancel") => json!({"error": {"class": HOSTILE, "desc": HOSTILE}}),
                _ => json!({HOSTILE: HOSTILE}),
            };
            let _ = writeln!(client, "{answer}");
        }
    }
}

/// `value` in every form that has one text or one absent value of it in hostile words.
fn poisoned(value: &Value) -> Vec<Value> {
    match value {
        Value::String(_) | Value::Null => vec![HOSTILE.into()],
        Value::Array(items) if items.is_empty() => vec![json!([HOSTILE])],
        Value::Array(items) => {
            let with = |(n, form)| {
                let mut items = items.clone();
                items[n] = form;
                items.into()
            };
            let forms = items.iter().enumerate();
            forms
                .flat_map(|(n, item)| poisoned(item).into_iter().map(move |form| (n, form)))
                .map(with)
                .collect()
        }
        Value::Object(fields) => {
            let with = |(name, form): (&String, Value)| {
                let mut fields = fields.clone();
                fields.insert(name.clone(), form);
                fields.into()
            };
            let forms = fields.iter();
            forms
                .flat_map(|(name, value)| poisoned(value).into_iter().map(move |form| (name, form)))
                .map(with)
                .collect()
        }
        Value::Bool(_) | Value::Number(_) => Vec::new(),
    }
}

#[test]
fn a_hostile_control_socket_does_not_steer_the_terminal_of_who_asks_it() {
    let dir = tempfile::tempdir().unwrap();
    let vm = Setup { vm_arguments: &["--software"], devices: 0, ..Setup::new(dir.path(), "a") }.start();
    // One that has something to tell.
    vm.migrate(&format!("unix:{}", dir.path().join("nobody").display()), json!({}));
    let reports = poisoned(&vm.query("query"));
    let told = Arc::new(Mutex::new(Value::Null));
    let listener = UnixListener::bind(dir.path().join("liar")).unwrap();
    let control = dir.path().join("liar").display().to_string();
    let report = told.clone();
    // It is served until the test's process ends.
    std::thread::spawn(move || serve(&listener, &report));
    let mut shown = 0;
    for report in reports {
        *told.lock().unwrap() = report;
        for arguments in
            [&["status", "--control", &control][..], &["status", "--control", &control, "--json"]]
        {
            shown += usize::from(said(arguments, &run(arguments)).contains("PWNED"));
        }
    }
    assert!(shown > 10, "{shown} answers were looked at");
    for verb in ["cancel", "stop", "continue"] {
        runs(&[verb, "--control", &control]);
        runs(&[verb, "--control", &control, "--json"]);
    }
    runs(&["describe", &format!("vm:{control}")]);
}
