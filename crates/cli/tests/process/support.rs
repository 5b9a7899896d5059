//! Running the command as its users do: as processes. None of these tests has the machine to itself, so none may lean on how
//! fast a guest gets on: they wait for what has happened, by count.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest wait for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Certificates as the library's tests make them.
#[path = "../../../migration/tests/migration/toy/pki.rs"]
#[expect(unreachable_pub, reason = "the library's tests have it in a module of theirs")]
pub(crate) mod pki;

/// The folder for --tls-creds that whoever speaks over TCP here is given: all trust each other.
pub(crate) fn creds() -> &'static str {
    pki::own_host().to_str().unwrap()
}

/// The command, with arguments.
pub(crate) fn command(arguments: &[&str]) -> Command {
    let mut command = with_default_signals();
    command.args(arguments).stdin(Stdio::null());
    command
}

/// The command, which ends by the signals that end processes: whoever runs the tests may have left some ignored (nohup does).
fn with_default_signals() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_vfio-migrate")]);
    command
}

/// Runs the command to its end.
pub(crate) fn run(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the command starts")
}

/// Runs `demo --json` and returns exit code and report. Stdout must be exactly one JSON object.
pub(crate) fn demo(arguments: &[&str]) -> (i32, Value) {
    // What is tested is what arrives, not how fast this machine is just now: the limit has tests of its own.
    let limit: &[&str] =
        if arguments.contains(&"--downtime-limit") { &[] } else { &["--downtime-limit", "10s"] };
    let output = run(&[&["demo", "--json"], arguments, limit].concat());
    let stdout = String::from_utf8(output.stdout).expect("JSON is UTF-8");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report = serde_json::from_str(stdout.trim()).unwrap_or_else(|error| {
        panic!("demo {arguments:?} printed no JSON object ({error}):\n{stdout}\nstderr:\n{stderr}")
    });
    eprintln!("demo {arguments:?}: {stdout}{stderr}");
    (output.status.code().expect("no signal"), report)
}

/// A background process of the command, ended by pid when dropped.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) child: Child,
    stdin: Option<ChildStdin>,
}

impl Process {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let child = with_default_signals()
            .args(arguments)
            .arg("--exit-with-stdin")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("the command starts");
        Self::of(child)
    }

    /// One that was started otherwise, and ends with its stdin.
    pub(crate) fn of(mut child: Child) -> Self {
        let stdin = child.stdin.take();
        Self { child, stdin }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it is ours");
    }

    /// Open descriptors and threads.
    pub(crate) fn holdings(&self) -> (usize, usize) {
        let count = |what: &str| {
            std::fs::read_dir(format!("/proc/{}/{what}", self.pid())).map(Iterator::count).unwrap_or_default()
        };
        (count("fd"), count("task"))
    }

    /// A line for each thread: its name, whether it runs, and the kernel function that it waits in.
    fn threads(&self) -> String {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten();
        tasks
            .flatten()
            .map(|task| {
                let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
                let status = read("status");
                let state = status.lines().find(|line| line.starts_with("State:")).unwrap_or_default();
                format!("  {} {state} {} {}\n", read("comm").trim(), read("wchan"), read("schedstat").trim())
            })
            .collect()
    }

    /// Memory of its own, in KiB. A guest's RAM is not among it: how much of that is resident depends on how long the guest
    /// ran.
    pub(crate) fn own_memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("it has memory");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
    }

    /// Memory files that it has mapped: guests' RAM, devices' BARs.
    pub(crate) fn memory_files(&self) -> usize {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("it runs");
        let files = maps.lines().filter(|line| line.contains("/memfd:"));
        let inodes: std::collections::BTreeSet<_> =
            files.filter_map(|line| line.split_whitespace().nth(4)).collect();
        inodes.len()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(5);
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.child.kill();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Waits until `done` gives something.
pub(crate) fn until<T>(what: &str, done: impl FnMut() -> Option<T>) -> T {
    until_or(what, done, String::new)
}

/// Waits until `done` gives something; what `state` says is told where the wait is in vain.
fn until_or<T>(what: &str, mut done: impl FnMut() -> Option<T>, state: impl Fn() -> String) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = done() {
            return value;
        }
        if Instant::now() >= deadline {
            panic!("waited in vain for {what}\n{}", state());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A `vm` with its device servers.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) process: Process,
    pub(crate) devices: Vec<Process>,
    pub(crate) control: PathBuf,
}

/// How a test's VM is made. Over TCP it speaks TLS, unless its arguments say otherwise.
#[derive(Clone, Debug)]
pub(crate) struct Setup<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) name: &'a str,
    pub(crate) devices: usize,
    pub(crate) memory: &'a str,
    pub(crate) device_arguments: &'a [&'a str],
    /// What follows in each device's word of the `vm`: `,timeout=2s`.
    pub(crate) device_options: &'a str,
    pub(crate) vm_arguments: &'a [&'a str],
}

impl<'a> Setup<'a> {
    pub(crate) fn new(dir: &'a Path, name: &'a str) -> Self {
        Self {
            dir,
            name,
            devices: 1,
            memory: "64M",
            device_arguments: &["--state-size", "4M"],
            device_options: "",
            vm_arguments: &[],
        }
    }

    pub(crate) fn start(&self) -> Vm {
        let (devices, arguments) = self.prepare();
        let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let process = Process::start(&words);
        let vm = Vm { process, devices, control: self.control() };
        until("the control socket", || vm.try_call("query", Value::Null)).expect("query");
        vm
    }

    fn control(&self) -> PathBuf {
        self.dir.join(format!("{}.control", self.name))
    }

    /// Starts the device servers; and the words of the command that makes the VM.
    pub(crate) fn prepare(&self) -> (Vec<Process>, Vec<String>) {
        // Without a size, that of the guest that comes.
        let memory: &[&str] = if self.memory.is_empty() { &[] } else { &["--memory", self.memory] };
        let mut arguments: Vec<String> = [&["vm"], memory, &["--dirty-rate", "4M", "--control"]]
            .concat()
            .iter()
            .map(ToString::to_string)
            .collect();
        arguments.push(self.control().display().to_string());
        let mut devices = Vec::new();
        for n in 0..self.devices {
            let socket = self.dir.join(format!("{}-dev{n}.sock", self.name));
            let path = socket.display().to_string();
            devices.push(Process::start(&[&["device", "--socket", &path], self.device_arguments].concat()));
            arguments
                .extend(["--device".into(), format!("vfio-user:{path},id=dev{n}{}", self.device_options)]);
        }
        arguments.extend(self.vm_arguments.iter().map(ToString::to_string));
        let security = ["--tls-creds", "--insecure-plaintext"];
        if !self.vm_arguments.iter().any(|word| security.contains(word)) {
            arguments.extend(["--tls-creds".into(), creds().into()]);
        }
        (devices, arguments)
    }
}

impl Vm {
    /// Asks over the control socket; `None` when nobody listens (yet).
    pub(crate) fn try_call(&self, verb: &str, arguments: Value) -> Option<Result<Value, String>> {
        use std::io::{BufRead, BufReader};
        let mut stream = std::os::unix::net::UnixStream::connect(&self.control).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut request = json!({"execute": verb, "id": 1});
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        stream.write_all(format!("{request}\n").as_bytes()).ok()?;
        for line in BufReader::new(stream).lines() {
            let line: Value = serde_json::from_str(&line.ok()?).ok()?;
            if let Some(value) = line.get("return") {
                return Some(Ok(value.clone()));
            }
            if let Some(error) = line.get("error") {
                return Some(Err(error["desc"].as_str().unwrap_or_default().to_string()));
            }
        }
        None
    }

    pub(crate) fn call(&self, verb: &str, arguments: Value) -> Result<Value, String> {
        self.try_call(verb, arguments).unwrap_or_else(|| panic!("{} does not answer", self.control.display()))
    }

    pub(crate) fn query(&self, verb: &str) -> Value {
        self.call(verb, Value::Null).expect(verb)
    }

    /// What is published from now on, but for the greeting.
    pub(crate) fn events(&self) -> std::sync::mpsc::Receiver<Value> {
        use std::io::{BufRead, BufReader};
        let stream = std::os::unix::net::UnixStream::connect(&self.control).expect("the control socket");
        let mut lines = BufReader::new(stream).lines();
        lines.next().expect("a greeting").expect("a greeting");
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // Until the VM ends, or the test does.
            for line in lines.map_while(Result::ok) {
                let Ok(event) = serde_json::from_str(&line) else { return };
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        receiver
    }

    pub(crate) fn guest(&self) -> Value {
        self.query("query-guest")
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.guest()[name].as_u64().unwrap_or_else(|| panic!("no counter {name}"))
    }

    /// The VM as `query` has it.
    pub(crate) fn info(&self) -> Value {
        self.query("query")["vm"].take()
    }

    /// Its migration as `query` has it: the one under way, or else the last.
    pub(crate) fn migration(&self) -> Value {
        let mut report = self.query("query");
        let under_way = report["migration"].take();
        if under_way.is_null() { report["last"].take() } else { under_way }
    }

    pub(crate) fn status(&self) -> String {
        self.info()["status"].as_str().expect("a word").to_string()
    }

    /// The address it waits at, once its machine is ready.
    pub(crate) fn incoming(&self) -> String {
        until("the address it waits at", || {
            let info = self.info();
            info["incoming"].as_str().filter(|_| info["not-ready"].is_null()).map(ToString::to_string)
        })
    }

    /// Waits until the guest works.
    pub(crate) fn warm(&self) {
        let works = || {
            let guest = self.guest();
            (guest["stage"] == 3
                && guest["pages-written"].as_u64()? > 500
                && guest["dma-blocks"].as_u64()? > 50)
                .then_some(())
        };
        until_or("the guest to work", works, || self.state());
    }

    /// What there is to say of a VM that does not do what it should: twice, so that it is seen what still moves.
    fn state(&self) -> String {
        let look = || {
            let mut text = format!("{}\n{}\n", self.info(), self.guest());
            for process in std::iter::once(&self.process).chain(&self.devices) {
                text += &process.threads();
            }
            text
        };
        let first = look();
        std::thread::sleep(Duration::from_secs(1));
        format!("{first}a second later:\n{}", look())
    }

    /// Asks for a migration and waits for its end.
    pub(crate) fn migrate(&self, uri: &str, more: Value) -> Value {
        self.begin(uri, more);
        self.ended()
    }

    /// Asks for a migration.
    pub(crate) fn begin(&self, uri: &str, more: Value) {
        let mut arguments = json!({"uri": uri, "downtime-limit": 10_000});
        if let Some(map) = more.as_object() {
            map.iter().for_each(|(key, value)| arguments[key] = value.clone());
        }
        self.call("migrate", arguments).expect("migrate");
    }

    /// Waits for the end of the migration.
    pub(crate) fn ended(&self) -> Value {
        until("the migration to end", || {
            let info = self.migration();
            let under_way = ["active", "pre-switchover", "cancelling", "failing"]
                .iter()
                .any(|word| info["status"] == *word);
            (!under_way).then_some(info)
        })
    }

    /// The guest goes on here, and has lost nothing, after two more full walks over everything.
    pub(crate) fn assert_whole(&self) {
        let (pages, blocks) = (self.counter("page-passes"), self.counter("block-passes"));
        let walked = || {
            (self.counter("page-passes") >= pages + 2 && self.counter("block-passes") >= blocks + 2)
                .then_some(())
        };
        until_or("two more walks", walked, || self.state());
        let guest = self.guest();
        for lost in ["pages-lost", "blocks-lost", "interrupts-lost", "integrity-failures", "failure"] {
            assert_eq!(guest[lost], 0, "{lost}: {guest}");
        }
    }

    /// The guest goes on here.
    pub(crate) fn assert_runs(&self) {
        let before = self.counter("loops");
        let goes_on = || (self.counter("loops") > before + 5).then_some(());
        until_or("the guest to go on", goes_on, || self.state());
    }
}

/// A `vm` without devices, of these arguments.
pub(crate) fn software<'a>(dir: &'a Path, name: &'a str, more: &'a [&'a str]) -> Setup<'a> {
    Setup { devices: 0, vm_arguments: more, ..Setup::new(dir, name) }
}

/// The control socket of a `vm`, as a word of the command line.
pub(crate) fn control(vm: &Vm) -> &str {
    vm.control.to_str().unwrap()
}

/// Runs the command, which ends with this exit code and says this on stderr.
pub(crate) fn fails(arguments: &[&str], exit: i32, says: &str) {
    let output = run(arguments);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(exit), "{arguments:?}: {told}");
    assert!(told.contains(says), "{arguments:?} says: {told}");
}
