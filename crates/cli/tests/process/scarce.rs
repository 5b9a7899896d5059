//! Descriptors, threads and disk that run out: at every limit in a range, what cannot be done is refused by the limit's name, and
//! a guest runs on.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::support::{PATIENCE, Process, Setup, Vm, creds, software, until};

/// What suffices for anything here.
const ENOUGH: &str = "1000";

/// A limit on what a process may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Descriptors,
    /// Of a user, who has none but the process's. It holds for nobody who is root.
    Threads,
}

impl Limit {
    fn option(self) -> &'static str {
        if self == Self::Descriptors { "-n" } else { "-u" }
    }

    /// The option of prlimit(1).
    fn name(self) -> &'static str {
        if self == Self::Descriptors { "nofile" } else { "nproc" }
    }

    /// Whether `text` names it.
    fn is_named(self, text: &str) -> bool {
        match self {
            Self::Descriptors => text.contains("RLIMIT_NOFILE"),
            Self::Threads => text.contains("ulimit -u"),
        }
    }

    /// What `process` has of it now.
    fn used(self, process: &Process) -> u64 {
        let (descriptors, threads) = process.holdings();
        (if self == Self::Descriptors { descriptors } else { threads }) as u64
    }
}

/// The command as a user of its own, whom `RLIMIT_NPROC` counts apart; as root, that is.
struct Starter {
    binary: PathBuf,
    user: Option<u32>,
    /// Certificates that this user may read.
    creds: String,
}

impl Starter {
    /// `name` keeps tests that run at the same time apart.
    fn new(dir: &Path, name: u32) -> Self {
        let binary = PathBuf::from(env!("CARGO_BIN_EXE_vfio-migrate"));
        if !rustix::process::geteuid().is_root() {
            return Self { binary, user: None, creds: creds().to_owned() };
        }
        // The folder of the build may be closed to others.
        let copy = dir.join("vfio-migrate");
        std::fs::hard_link(&binary, &copy).or_else(|_| std::fs::copy(&binary, &copy).map(drop)).unwrap();
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o1777)).unwrap();
        let user = 1_000_000 + 10 * std::process::id() + name;
        // A private key is its owner's.
        let own = dir.join("creds");
        std::fs::create_dir(&own).unwrap();
        let files = std::fs::read_dir(creds()).unwrap().map(|entry| entry.unwrap());
        for file in files {
            let copy = own.join(file.file_name());
            std::fs::copy(file.path(), &copy).unwrap();
            std::os::unix::fs::chown(&copy, Some(user), None).unwrap();
        }
        Self { binary: copy, user: Some(user), creds: own.display().to_string() }
    }

    fn limits(&self) -> &'static [Limit] {
        if self.user.is_some() { &[Limit::Descriptors, Limit::Threads] } else { &[Limit::Descriptors] }
    }

    /// Limits what a process of this user may have from now on.
    fn set(&self, limit: Limit, process: &Process, most: &str) {
        let words = [format!("--pid={}", process.pid()), format!("--{}={most}:", limit.name())];
        assert!(self.as_user("prlimit").args(words).status().unwrap().success());
    }

    /// Another program as this user.
    fn as_user(&self, program: &str) -> Command {
        let Some(user) = self.user else { return Command::new(program) };
        let mut command = Command::new("setpriv");
        command.arg(format!("--reuid={user}")).args(["--clear-groups", "--", program]);
        command
    }

    /// The command with these words, with at most `most` of what `limit` limits.
    fn command(&self, limit: Option<(Limit, u64)>, words: &[&str]) -> Command {
        let limited =
            limit.map_or(String::new(), |(limit, most)| format!("ulimit {} {most}; ", limit.option()));
        let mut command = self.as_user("bash");
        command.args(["-c", &format!("{limited}exec \"$@\""), "bash"]).arg(&self.binary).args(words);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }
}

/// A server that says nothing when it has started.
const LISTENS: &str = "listens";

/// Whether a server started, and what it said if it did not.
fn listens(mut child: Child, socket: &Path) -> (bool, String) {
    let connected = until("the server or its end", || match child.try_wait().unwrap() {
        Some(_) => Some(false),
        None => UnixStream::connect(socket).is_ok().then_some(true),
    });
    if connected {
        child.kill().unwrap();
    }
    let output = child.wait_with_output().unwrap();
    let _ = std::fs::remove_file(socket);
    (connected, format!("{}[{}]", String::from_utf8_lossy(&output.stderr), output.status))
}

/// Reads what a process says until it says `started`, or ends: whether it started, and all that it said.
fn starts(mut child: Child, started: &str) -> (bool, String) {
    let mut told = String::new();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    while stderr.read_line(&mut told).unwrap() > 0 {
        if told.contains(started) {
            child.kill().unwrap();
            child.wait().unwrap();
            return (true, told);
        }
    }
    let status = child.wait().unwrap();
    (false, format!("{told}[{status}]"))
}

#[test]
fn whatever_starts_with_little_does_so_or_names_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let starter = Starter::new(dir.path(), 1);
    let server = path("server");
    let _device = Process::start(&["device", "--state-size", "1M", "--socket", &server]);
    until("the device", || Path::new(&server).exists().then_some(()));
    std::fs::set_permissions(&server, PermissionsExt::from_mode(0o777)).unwrap();
    let device = format!("vfio-user:{server},id=dev0");
    let (control, socket, out, state) = (path("control"), path("device"), path("out"), path("state"));
    let vm = ["vm", "--software", "--memory", "32M", "--control", &control, "--state-dir", &state];
    let verbs: &[(Vec<&str>, &str)] = &[
        ([&vm[..], &["--device", &device]].concat(), " runs"),
        (
            [&vm[..], &["--incoming", "tcp:127.0.0.1:0", "--tls-creds", &starter.creds]].concat(),
            "waits for a guest",
        ),
        (vec!["device", "--state-size", "1M", "--socket", &socket], LISTENS),
        (vec!["save", "--device", &device, "--force", "-o", &out], ""),
        (vec!["describe", &server], ""),
        (vec!["status", "--state-dir", &state], ""),
    ];
    for limit in starter.limits() {
        for (words, started) in verbs {
            let mut enough = 0;
            // With fewer descriptors the loader starts nothing.
            let first = if *limit == Limit::Descriptors { 5 } else { 1 };
            for most in first..60 {
                let child = starter.command(Some((*limit, most)), words).spawn().unwrap();
                let (did, told) = if *started == LISTENS {
                    listens(child, Path::new(&socket))
                } else if started.is_empty() {
                    let output = child.wait_with_output().unwrap();
                    (
                        output.status.success(),
                        format!("{}[{}]", String::from_utf8_lossy(&output.stderr), output.status),
                    )
                } else {
                    starts(child, started)
                };
                assert!(!told.contains("panicked"), "{limit:?} {most}: {words:?}: {told}");
                // The shell and the loader need some to start anything.
                let loader = told.contains("error while loading") || told.contains("[exit status: 12");
                let refused = limit.is_named(&told) && told.contains("[exit status: 1]");
                assert!(did || loader || refused, "{limit:?} {most}: {words:?}: {told}");
                enough += u32::from(did);
                if enough == 2 {
                    break;
                }
            }
            assert_eq!(enough, 2, "{limit:?}: {words:?}");
        }
    }
}

/// A client that has its place, and its thread, before there is little.
struct Client {
    stream: UnixStream,
    lines: std::io::Lines<BufReader<UnixStream>>,
}

impl Client {
    fn of(control: &Path) -> Self {
        let stream = until("the control socket", || UnixStream::connect(control).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut client = Self { stream, lines };
        client.call("query", Value::Null).unwrap();
        client
    }

    fn call(&mut self, verb: &str, arguments: Value) -> Result<Value, String> {
        let request = json!({"execute": verb, "arguments": arguments});
        self.stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        loop {
            let line = self.lines.next().expect("an answer").expect("an answer in time");
            let mut line: Value = serde_json::from_str(&line).unwrap();
            if line.get("return").is_some() {
                return Ok(line["return"].take());
            }
            if let Some(why) = line["error"]["desc"].as_str() {
                return Err(why.to_owned());
            }
        }
    }

    /// How a session ends that is asked for: its status, and why it did not do what it should.
    fn session(&mut self, verb: &str, arguments: &Value) -> (String, String) {
        if let Err(why) = self.call(verb, arguments.clone()) {
            return ("refused".into(), why);
        }
        let ended = until("the end of the session", || {
            let mut report = self.call("query", Value::Null).unwrap();
            report["migration"].is_null().then(|| report["last"].take())
        });
        let text = |name: &str| ended[name].as_str().unwrap_or_default().to_owned();
        (text("status"), text("error"))
    }

    fn runs(&mut self) {
        let mut loops = || self.call("query-guest", Value::Null).unwrap()["loops"].as_u64().unwrap();
        let before = loops();
        until("the guest to go on", || (loops() > before + 5).then_some(()));
    }
}

/// A `vm` of the starter's, with its client.
fn vm(starter: &Starter, setup: &Setup<'_>) -> (Vm, Client) {
    let (devices, mut words) = setup.prepare();
    words.push("--exit-with-stdin".into());
    for word in words.iter().filter_map(|word| word.strip_prefix("vfio-user:")) {
        let socket = Path::new(word.split(',').next().unwrap());
        until("the device", || socket.exists().then_some(()));
        std::fs::set_permissions(socket, PermissionsExt::from_mode(0o777)).unwrap();
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let child = starter.command(None, &words).stderr(Stdio::inherit()).spawn().unwrap();
    let control = setup.dir.join(format!("{}.control", setup.name));
    let client = Client::of(&control);
    (Vm { process: Process::of(child), devices, control }, client)
}

#[test]
fn a_guest_runs_on_where_a_session_lacks_something() {
    let dir = tempfile::tempdir().unwrap();
    let starter = Starter::new(dir.path(), 2);
    let out = dir.path().join("out").display().to_string();
    for limit in starter.limits() {
        let words = ["--software", "--incoming", "tcp:127.0.0.1:0"];
        let receiver =
            Setup { vm_arguments: &words, ..Setup::new(dir.path(), &format!("{limit:?}-b")) }.start();
        let to = json!({"uri": receiver.incoming(), "downtime-limit": 10_000});
        let name = format!("{limit:?}-a");
        let (source, mut client) = vm(
            &starter,
            &Setup {
                vm_arguments: &["--software", "--tls-creds", &starter.creds],
                ..Setup::new(dir.path(), &name)
            },
        );
        // Its vectors take their descriptors when the guest first unmasks them.
        source.warm();
        until("interrupts", || (source.counter("interrupts") > 0).then_some(()));
        for (verb, arguments, done) in [
            ("save", json!({"path": out, "force": true}), "completed"),
            ("rehearse", to.clone(), "rehearsed"),
            ("migrate", to, "completed"),
        ] {
            let mut tried = 0;
            loop {
                // Less than it has: some of that is about to be closed.
                let most = (limit.used(&source.process) + tried).saturating_sub(4);
                starter.set(*limit, &source.process, &most.to_string());
                let (status, error) = client.session(verb, &arguments);
                if status == done {
                    break;
                }
                let refused = status == "failed" || status == "refused";
                assert!(refused && limit.is_named(&error), "{limit:?} {verb} {tried}: {status}: {error}");
                client.runs();
                tried += 1;
                assert!(tried < 60, "{limit:?} {verb}: {error}");
            }
            assert!(tried > 0, "{limit:?} {verb}: the limit did not hold");
        }
        receiver.assert_whole();
        // The other side: what came to the first is a source now.
        let words = ["--software", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", &starter.creds];
        let name = format!("{limit:?}-c");
        let (last, mut client) =
            vm(&starter, &Setup { vm_arguments: &words, ..Setup::new(dir.path(), &name) });
        for tried in 1.. {
            let to = last.incoming();
            starter.set(*limit, &last.process, &(limit.used(&last.process) + tried).to_string());
            let info = receiver.migrate(&to, Value::Null);
            starter.set(*limit, &last.process, ENOUGH);
            if info["status"] == "completed" {
                break;
            }
            let there = client.call("query", Value::Null).unwrap();
            let told = format!("{info} {}", there["last"]);
            assert!(info["status"] == "failed" && limit.is_named(&told), "{limit:?} {tried}: {told}");
            receiver.assert_runs();
            assert!(tried < 60, "{limit:?}: {told}");
        }
        last.assert_runs();
    }
}

#[test]
fn a_full_disk_fails_what_is_written_and_the_guest_runs_on() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let (state, out) = (disk.join("state"), disk.join("out"));
    let receiver = software(dir.path(), "b", &["--software", "--incoming", "tcp:127.0.0.1:0"]).start();
    let to = receiver.incoming();
    let unshare = if rustix::process::geteuid().is_root() { "-m" } else { "-Urm" };
    let script = "mount -t tmpfs -o size=1m tmpfs $1 && mkdir $1/state && head -c $2 /dev/zero > $1/fill; shift 2; exec \"$@\"";
    let mut moved = false;
    // Of 256 pages, one is the directory's to come.
    for left in [0, 1, 2, 3, 4, 8] {
        let control = dir.path().join(format!("{left}.control"));
        let fill = ((256 - left) << 12).to_string();
        let child = Command::new("unshare")
            .args([unshare, "sh", "-c", script, "sh"])
            .arg(&disk)
            .arg(&fill)
            .arg(env!("CARGO_BIN_EXE_vfio-migrate"))
            .args([
                "vm",
                "--software",
                "--memory",
                "64M",
                "--dirty-rate",
                "1M",
                "--tls-creds",
                creds(),
                "--exit-with-stdin",
                "--state-dir",
            ])
            .arg(&state)
            .arg("--control")
            .arg(&control)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let vm = Vm { process: Process::of(child), devices: Vec::new(), control };
        let mut client = Client::of(&vm.control);
        let (status, error) = client.session("save", &json!({"path": out}));
        assert_eq!(status, "failed", "{left}: {error}");
        assert!(error.contains("No space left") || error.contains("bytes free"), "{left}: {error}");
        client.runs();
        let (status, error) = client.session("migrate", &json!({"uri": to, "downtime-limit": 10_000}));
        if status == "completed" {
            moved = true;
            break;
        }
        assert!(status == "failed" && error.contains("No space left"), "{left}: {status}: {error}");
        client.runs();
    }
    assert!(moved);
    receiver.assert_runs();
}

/// A `vm` that has no descriptor for a client says so once, however often it tries, and once more when it comes to that again.
#[test]
fn a_shortage_of_descriptors_is_told_once_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("stderr");
    let control = dir.path().join("control");
    let child = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
        .args([
            "vm",
            "--software",
            "--memory",
            "64M",
            "--exit-with-stdin",
            "--control",
            control.to_str().unwrap(),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let process = Process::of(child);
    let greeted = |stream: &UnixStream| {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        assert!(line.contains("vfio-migrate"), "{line}");
    };
    greeted(&until("the control socket", || UnixStream::connect(&control).ok()));
    let set = |most: &str| {
        let words = [format!("--pid={}", process.pid()), format!("--nofile={most}:")];
        assert!(Command::new("prlimit").args(words).status().unwrap().success());
    };
    let told = || std::fs::read_to_string(&log).unwrap().matches("can be taken in; it is tried").count();
    // How often the thread that accepts has waited.
    let tries = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap().flatten();
        let status =
            tasks.map(|task| std::fs::read_to_string(task.path().join("status")).unwrap_or_default());
        let status = status.filter(|status| status.starts_with("Name:\tcontrol\n"));
        let line = |status: String| {
            let line = status.lines().find(|line| line.starts_with("voluntary_ctxt_switches:"));
            line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0)
        };
        status.map(line).sum::<u64>()
    };
    for episode in 1..=2 {
        set("3");
        // A place may have been set aside before for the first of them, who cannot be served; the next ones wait.
        let mut waiting = Vec::new();
        until("the shortage to be told", || {
            if waiting.len() < 4 {
                waiting.push(UnixStream::connect(&control).unwrap());
            }
            (told() >= episode).then_some(())
        });
        let before = tries();
        until("five tries", || (tries() >= before + 5).then_some(()));
        assert_eq!(told(), episode, "{}", std::fs::read_to_string(&log).unwrap());
        set(ENOUGH);
        greeted(&UnixStream::connect(&control).unwrap());
    }
}
