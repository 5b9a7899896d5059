//! Plain text over TCP: refused to who has not asked for it, and told as what it is to who has.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::getfd::getfd;
use crate::support::{Process, Setup, Vm, command, control, creds, fails, run, until};

/// What a side is told that has neither certificates nor asked for plain text.
const ASK: &str = "give --tls-creds DIR (`vfio-migrate tls` makes the folder), or ask for plain text with \
                   --insecure-plaintext";

/// The pin of some key.
const PIN: &str = "sha256:00000000000000000000000000000000000000000000000000000000000000ff";

/// Starts a `vm` with these words alone, whose stderr goes to a file; and the file's text, whenever it is asked for.
fn logged(dir: &Path, name: &str, words: &[&str]) -> (Vm, impl Fn() -> String + use<>) {
    let path = dir.join(format!("{name}.control"));
    let log = dir.join(format!("{name}.log"));
    let child = command(&["vm", "--software", "--memory", "32M", "--dirty-rate", "1M", "--exit-with-stdin"])
        .arg("--control")
        .arg(&path)
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap())
        .spawn();
    let vm = Vm { process: Process::of(child.unwrap()), devices: Vec::new(), control: path };
    until("the control socket", || vm.try_call("query", Value::Null)).unwrap();
    (vm, move || std::fs::read_to_string(&log).unwrap())
}

#[test]
fn nothing_goes_over_tcp_for_who_has_not_said_how() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    // A receiver is not started.
    let (state, socket) = (path("state-b"), path("b.control"));
    let receives = ["vm", "--software", "--memory", "32M", "--state-dir", &state, "--control", &socket];
    for at in ["tcp:127.0.0.1:0", "tcp:[::1]:0", "tcp:localhost:0"] {
        fails(&[&receives[..], &["--incoming", at]].concat(), 2, ASK);
    }
    assert!(!Path::new(&state).exists() && !Path::new(&socket).exists(), "something was begun");

    // A guest runs without, and goes nowhere; nobody even hears of it.
    let state = path("state-a");
    let (vm, log) = logged(dir.path(), "a", &["--state-dir", &state]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let to = format!("tcp:{}", listener.local_addr().unwrap());
    let asked = ["--control", control(&vm)];
    let source = format!("vm:{}", control(&vm));
    fails(&["migrate", asked[0], asked[1], &to], 2, ASK);
    fails(&["rehearse", asked[0], asked[1], "--to", &to], 2, ASK);
    fails(&["check", &source, &to], 2, ASK);
    // A program is told so by the class.
    let output = run(&["migrate", asked[0], asked[1], &to, "--json"]);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&document["exit"], &document["error"]["class"]), (&json!(2), &json!("TlsRequired")));
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "somebody connected");
    // A socket that was passed is looked at as what it is, and stays for another session.
    listener.set_nonblocking(false).unwrap();
    let passed = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let _accepted = listener.accept().unwrap();
    getfd(&vm, "mig", &[passed.as_fd()]).unwrap();
    for verb in ["migrate", "rehearse"] {
        let refused = vm.call(verb, json!({"uri": "fd:mig"})).unwrap_err();
        assert!(refused.contains(ASK), "{verb}: {refused}");
    }
    vm.call("closefd", json!({"fdname": "mig"})).unwrap();
    vm.assert_runs();
    assert_eq!(vm.query("query")["last"], Value::Null);
    let history = run(&["history", "--json", "--state-dir", &state]);
    assert!(!String::from_utf8_lossy(&history.stdout).contains("\"attempt\""), "{history:?}");
    assert!(!log().contains("begins"), "{}", log());

    // One that has waited elsewhere waits there no more, and not over TCP.
    let (idle, _) = logged(dir.path(), "c", &["--incoming", &format!("unix:{}", path("c.socket"))]);
    idle.incoming();
    idle.query("migrate-cancel");
    until("the end of the wait", || (idle.status() == "idle").then_some(()));
    fails(&["incoming", "--control", control(&idle), "tcp:127.0.0.1:0"], 2, ASK);
    getfd(&idle, "mig", &[passed.as_fd()]).unwrap();
    fails(&["incoming", "--control", control(&idle), "fd:mig"], 2, ASK);
    assert_eq!(idle.status(), "idle");
    // Over a unix socket it does.
    idle.call("migrate-incoming", json!({"uri": format!("unix:{}", path("c.socket"))})).unwrap();
    let moved = vm.migrate(&idle.incoming(), json!({}));
    assert_eq!(moved["status"], "completed", "{moved}");
}

/// A `vm` that runs says how it waits when it is told to wait, and need not have been started with it.
#[test]
fn a_wait_may_have_certificates_and_expectations_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (idle, log) = logged(dir.path(), "b", &["--incoming", &format!("unix:{}", path("b.socket"))]);
    let to = control(&idle);
    let ends = || {
        idle.incoming();
        idle.call("migrate-cancel", Value::Null).unwrap();
        until("the end of the wait", || (idle.status() == "idle").then_some(()));
    };
    ends();
    let waits = |more: &[&str]| {
        let output = run(&[&["incoming", "--control", to, "tcp:127.0.0.1:0"], more].concat());
        assert_eq!(output.status.code(), Some(0), "{more:?}: {output:?}");
    };
    // In plain text, and said so.
    waits(&["--insecure-plaintext"]);
    assert_eq!(idle.info()["incoming-plaintext"], true);
    ends();
    assert!(log().contains("is in plain text"), "{}", log());
    // The next is as the `vm` was started again.
    fails(&["incoming", "--control", to, "tcp:127.0.0.1:0"], 2, ASK);
    std::fs::write(path("named"), "[[sources]]\nname = \"host-a\"\n").unwrap();
    for (words, exit, says) in [
        (&["--insecure-plaintext", "--tls-creds", creds()][..], 2, "cannot be used with"),
        (&["--insecure-plaintext", "--expect", &path("named")], 1, "in plain text prove neither"),
        (&["--tls-pin", PIN], 1, "needs TLS"),
    ] {
        fails(&[&["incoming", "--control", to, "tcp:127.0.0.1:0"], words].concat(), exit, says);
    }
    for relative in ["tls-creds", "expect"] {
        let refused = idle.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0", relative: "a/b"}));
        assert!(refused.unwrap_err().contains("is no absolute path"), "{relative}");
    }
    assert_eq!(idle.status(), "idle");
    // Over TLS, where nobody is expected; the wait ends with the first session that does.
    std::fs::write(path("nobody"), "sources = []\n").unwrap();
    let (source, _) = logged(dir.path(), "a", &["--tls-creds", creds()]);
    waits(&["--tls-creds", creds(), "--expect", &path("nobody")]);
    assert_eq!(idle.info()["incoming-plaintext"], false);
    assert_eq!(idle.info()["expected"]["file"], path("nobody"));
    let refused = source.migrate(&idle.incoming(), json!({}));
    assert_eq!(refused["reasons"][0]["code"], "other-source", "{refused}");
    ends();
    // Nothing of it is left for the next.
    waits(&["--tls-creds", creds(), "--paused", "--once"]);
    assert_eq!(idle.info()["expected"], Value::Null);
    let moved = source.migrate(&idle.incoming(), json!({}));
    assert_eq!(moved["status"], "completed", "{moved}");
    until("the guest to be there", || (idle.status() == "paused").then_some(()));
}

/// Whoever reaches the port comes as often as he likes.
#[test]
fn strangers_do_not_fill_the_log() {
    const MANY: usize = 100;
    let dir = tempfile::tempdir().unwrap();
    let (vm, log) = logged(dir.path(), "b", &["--incoming", "tcp:127.0.0.1:0", "--insecure-plaintext"]);
    let at = vm.incoming();
    let events = vm.events();
    for _ in 0..MANY {
        let mut stranger = TcpStream::connect(at.strip_prefix("tcp:").unwrap()).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        // Until it is hung up on.
        let _ = stranger.read(&mut [0; 16]);
    }
    until("all of them to be counted", || (vm.info()["refused"]["count"] == MANY).then_some(()));
    vm.call("migrate-cancel", Value::Null).unwrap();
    until("the end of the wait", || (vm.status() == "idle").then_some(()));
    // The last of them is told when the wait has ended, if not before.
    let last = until("the last to be told", || {
        log().lines().rfind(|line| line.contains("more before it)")).map(str::to_owned)
    });
    assert!(last.contains("a connection was refused: tcp:127.0.0.1:"), "{last}");
    let lines = log().lines().filter(|line| line.contains("a connection was refused")).count();
    assert!(lines < MANY / 2, "{lines} lines of {MANY} strangers");
    let told: Vec<_> = events.try_iter().filter(|event| event["event"] == "MIGRATION_REFUSED").collect();
    assert!(told.len() < MANY / 2, "{} events of {MANY} strangers", told.len());
}

#[test]
fn a_tcp_socket_that_was_inherited_is_no_way_around() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let script = "exec \"$@\" 5>&1 1>/dev/null";
    let output = Command::new("sh")
        .args(["-c", script, "sh", env!("CARGO_BIN_EXE_vfio-migrate")])
        .args(["vm", "--software", "--memory", "32M", "--incoming", "fd:5"])
        .stdin(Stdio::null())
        .stdout(OwnedFd::from(socket))
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && told.contains(ASK), "{}: {told}", output.status);
}

#[test]
fn plain_text_is_told_as_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state").display().to_string();
    // Said by the process at one side, by the session at the other.
    let (a, log_a) = logged(dir.path(), "a", &["--state-dir", &state]);
    let (b, log_b) = logged(dir.path(), "b", &["--incoming", "tcp:127.0.0.1:0", "--insecure-plaintext"]);
    let at = b.incoming();
    // Before anybody comes.
    assert_eq!(b.info()["incoming-plaintext"], true);
    let status = run(&["status", "--control", control(&b)]);
    let text = String::from_utf8_lossy(&status.stdout);
    assert!(text.contains(&format!("waits for a guest at {at}, in plain text\n")), "{text}");
    let warning = format!("{at} is in plain text: whoever is on the way reads and changes the guest");
    assert!(log_b().contains("is in plain text: whoever is on the way"), "{}", log_b());
    let source = format!("vm:{}", control(&a));
    let checked = run(&["check", &source, &at, "--insecure-plaintext"]);
    assert_eq!(checked.status.code(), Some(0), "{checked:?}");
    assert!(String::from_utf8_lossy(&checked.stderr).contains(&warning), "{checked:?}");

    let words = ["migrate", "--control", control(&a), "--insecure-plaintext", "--downtime-limit", "10s"];
    let output = run(&[&words[..], &[&at]].concat());
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("connection: in plain text\n"), "{output:?}");
    assert!(log_a().contains(&warning), "{}", log_a());
    for log in [log_a(), log_b()] {
        assert!(log.contains(" is connected in plain text"), "{log}");
    }
    for vm in [&a, &b] {
        let security = &vm.migration()["security"];
        assert_eq!((&security["kind"], &security["peer"]), (&json!("plain-text"), &Value::Null));
        let status = run(&["status", "--control", control(vm)]);
        let text = String::from_utf8_lossy(&status.stdout);
        assert!(text.contains("connection: in plain text"), "{text}");
    }
    let history = run(&["history", "--state-dir", &state]);
    assert!(String::from_utf8_lossy(&history.stdout).contains(", in plain text: completed"), "{history:?}");
    let history = run(&["history", "--state-dir", &state, "--json"]);
    let history: Value = serde_json::from_slice(&history.stdout).unwrap();
    assert_eq!(history["records"][0]["migration"]["security"]["kind"], "plain-text", "{history}");
    b.assert_runs();

    // A unix socket is none of it.
    let back = format!("unix:{}", dir.path().join("back").display());
    a.call("migrate-incoming", json!({"uri": back})).unwrap();
    assert_eq!(a.info()["incoming-plaintext"], false);
    assert_eq!(b.migrate(&back, json!({}))["security"]["kind"], "unix");
    let status = run(&["status", "--control", control(&a)]);
    assert!(!String::from_utf8_lossy(&status.stdout).contains("plain text"), "{status:?}");
}

/// Neither gives way to the other, and each says what is to be done.
#[test]
fn plain_text_and_tls_do_not_meet() {
    let dir = tempfile::tempdir().unwrap();
    for (name, here, there, says_here, says_there) in [
        (
            "plain",
            &["--insecure-plaintext"][..],
            &["--tls-creds", creds()][..],
            "TLS, on a connection that is not set up for it: --tls-creds DIR does that, on both sides",
            "the peer speaks in plain text, and this side takes TLS alone: it needs --tls-creds DIR there too",
        ),
        (
            "tls",
            &["--tls-creds", creds()],
            &["--insecure-plaintext"],
            "is it plain text there?; start the destination with --tls-creds DIR as well",
            "TLS, on a connection that is not set up for it: --tls-creds DIR does that, on both sides",
        ),
    ] {
        let (a, _) = logged(dir.path(), &format!("{name}-a"), here);
        let incoming = [&["--incoming", "tcp:127.0.0.1:0"], there].concat();
        let (b, log_b) = logged(dir.path(), &format!("{name}-b"), &incoming);
        let info = a.migrate(&b.incoming(), json!({}));
        assert_eq!(info["status"], "failed", "{info}");
        let error = info["error"].as_str().unwrap();
        assert!(error.contains(says_here), "{name}: {error}");
        until("the receiver's word", || log_b().contains(says_there).then_some(()));
        let asked = run(&[&["check", &format!("vm:{}", control(&a)), &b.incoming()], here].concat());
        let told = String::from_utf8_lossy(&asked.stderr);
        assert!(asked.status.code() == Some(1) && told.contains(says_here), "{name}: {told}");
        a.assert_runs();
        assert_eq!(b.status(), "inmigrate");
    }
}

/// A sample of what passes over TLS elsewhere: a whole guest there and back, and a cancel.
#[test]
fn a_guest_moves_there_and_back_in_plain_text() {
    let dir = tempfile::tempdir().unwrap();
    let plain = ["--insecure-plaintext"];
    let waits = ["--insecure-plaintext", "--incoming", "tcp:127.0.0.1:0"];
    let a = Setup { vm_arguments: &plain, ..Setup::new(dir.path(), "a") }.start();
    let b = Setup { vm_arguments: &waits, ..Setup::new(dir.path(), "b") }.start();
    a.warm();
    a.begin(&b.incoming(), json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (a.migration()["status"] == "pre-switchover").then_some(()));
    a.query("migrate-cancel");
    assert_eq!(a.ended()["status"], "cancelled");
    a.assert_runs();
    let info = a.migrate(&b.incoming(), json!({"verify": true}));
    assert_eq!((&info["status"], &info["security"]["kind"]), (&json!("completed"), &json!("plain-text")));
    b.assert_whole();
    a.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    let info = b.migrate(&a.incoming(), json!({"verify": true}));
    assert_eq!((&info["status"], &info["security"]["kind"]), (&json!("completed"), &json!("plain-text")));
    a.assert_whole();
}
