//! A `vm` that waits is told by a file whom to expect, and with what: `--expect`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{Vm, control, fails, run, software, until};

pub(crate) const UUID: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0003";
const OTHER: &str = "0d5c8a92-7c1e-4b0b-9a55-0f2f6f6f0004";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A directory with certificates for two sources and a receiver.
pub(crate) struct Hosts {
    dir: tempfile::TempDir,
    pub(crate) a: PathBuf,
    pub(crate) x: PathBuf,
    b: PathBuf,
}

impl Hosts {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca = dir.path().join("ca");
        let made = |words: &[&str]| assert!(run(words).status.success(), "{words:?}");
        made(&["tls", "init", text(&ca)]);
        let host = |name: &str| {
            let path = dir.path().join(name);
            made(&["tls", "host", name, "--also", "127.0.0.1", "--ca", text(&ca), "--output", text(&path)]);
            path
        };
        let (a, x, b) = (host("host-a"), host("host-x"), host("host-b"));
        Self { dir, a, x, b }
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("expect")
    }

    /// Has the receiver expect this, as an orchestrator writes it: whole, or not at all.
    pub(crate) fn expect(&self, what: &str) {
        let new = self.dir.path().join("expect.new");
        std::fs::write(&new, what).unwrap();
        std::fs::rename(&new, self.file()).unwrap();
    }

    pub(crate) fn source(&self, name: &str, creds: &Path) -> Vm {
        software(self.dir.path(), name, &["--software", "--uuid", UUID, "--tls-creds", text(creds)]).start()
    }

    pub(crate) fn receiver(&self, more: &[&str]) -> Vm {
        let file = self.file();
        let words = [
            "--software",
            "--incoming",
            "tcp:127.0.0.1:0",
            "--tls-creds",
            text(&self.b),
            "--expect",
            text(&file),
        ];
        software(self.dir.path(), "b", &[&words, more].concat()).start()
    }
}

/// Has a migration refused, and returns the code; what the receiver says of it is the same, and it waits on.
fn refused(source: &Vm, receiver: &Vm, at: &str) -> (String, Value) {
    let before = receiver.info()["refused"]["count"].as_u64().unwrap();
    let info = source.migrate(at, json!({}));
    assert_eq!((&info["status"], &info["incompatible"]), (&json!("failed"), &json!(true)), "{info}");
    source.assert_runs();
    let told = until("the refusal to be counted", || {
        let refused = receiver.info()["refused"].take();
        (refused["count"].as_u64() == Some(before + 1)).then(|| refused["last"].clone())
    });
    assert_eq!(told["code"], info["reasons"][0]["code"], "{told}");
    assert_eq!((receiver.status().as_str(), receiver.incoming().as_str()), ("inmigrate", at));
    (told["code"].as_str().unwrap().to_owned(), told)
}

#[test]
fn an_orchestrator_tells_a_receiver_whom_to_take_while_it_waits() {
    let hosts = Hosts::new();
    let a = hosts.source("a", &hosts.a);
    // Whoever is refused ends no wait, not even one that is for one session.
    let b = hosts.receiver(&["--once"]);
    let (at, events) = (b.incoming(), b.events());
    let vm = format!("vm:{}", control(&a));
    let asks = || run(&["check", &vm, &at, "--tls-creds", text(&hosts.a)]).status.code();

    // No file yet.
    let expected = b.info()["expected"].take();
    assert!(expected["error"].as_str().unwrap().contains("expect"), "{expected}");
    assert_eq!((&expected["expectation"], &expected["file"]), (&Value::Null, &json!(hosts.file())));
    assert_eq!(refused(&a, &b, &at).0, "no-expectation");
    let explained = run(&["explain", "no-expectation"]);
    assert!(explained.status.success(), "{explained:?}");

    let source = "[[sources]]\nname = \"host-a\"\n";
    for (what, code) in [
        ("".to_owned(), "no-expectation"),
        ("# nobody yet\n# [[sources]]\n# name = \"host-a\"\n".to_owned(), "no-expectation"),
        ("{}".to_owned(), "no-expectation"),
        ("vm = ".to_owned(), "no-expectation"),
        ("min_epoch = 0".to_owned(), "no-expectation"),
        (format!("max_memory = {}\nmin_epoch = 0", i64::MAX), "no-expectation"),
        ("frm = \"host-a\"".to_owned(), "no-expectation"),
        ("[[sources]]\nname = \"host-c\"".to_owned(), "other-source"),
        (format!("[[sources]]\npin = \"sha256:{}\"", "0".repeat(64)), "other-source"),
        ("sources = []".to_owned(), "other-source"),
        (format!("vm = \"{UUID}\"\n{}", "# as large as no such file is\n".repeat(10_000)), "no-expectation"),
        (format!("{{\"vm\": \"{OTHER}\"}}"), "other-vm"),
        (format!("min_epoch = 1\n{source}"), "old-epoch"),
        (format!("max_memory = 67108863\n{source}"), "too-large"),
        (format!("max_attempts = 0\n{source}"), "too-many-attempts"),
        (format!("max_arrivals = 0\n{source}"), "too-many-arrivals"),
        ("may = [\"ask\"]".to_owned(), "may-not-move"),
        (format!("{source}may = [\"ask\"]"), "may-not-move"),
    ] {
        hosts.expect(&what);
        let (found, told) = refused(&a, &b, &at);
        assert_eq!(found, code, "{what}: {told}");
        // Who it was, and with what.
        assert_eq!((&told["wanted"], &told["vm"]), (&json!("move"), &json!(UUID)), "{told}");
        assert_eq!(told["security"]["peer"]["names"], json!(["host-a", "127.0.0.1"]), "{told}");
        let refusal = std::iter::from_fn(|| events.recv_timeout(crate::support::PATIENCE).ok())
            .find(|event| event["event"] == "MIGRATION_REFUSED" && event["data"] == told);
        assert!(refusal.is_some(), "no event tells of it");
    }
    // Nor what anybody could have written.
    hosts.expect(source);
    std::fs::set_permissions(hosts.file(), std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    let (code, told) = refused(&a, &b, &at);
    assert_eq!(code, "no-expectation");
    assert!(told["why"].as_str().unwrap().contains("may be changed by anybody (mode 0666)"), "{told}");
    // What is no file of its own lets nobody in, and holds nobody up.
    std::fs::remove_file(hosts.file()).unwrap();
    std::fs::create_dir(hosts.file()).unwrap();
    assert_eq!(refused(&a, &b, &at).0, "no-expectation");
    std::fs::remove_dir(hosts.file()).unwrap();
    hosts.expect(&format!("{source}may = [\"ask\"]"));

    // It may still ask.
    assert_eq!(asks(), Some(0));
    hosts.expect(&format!("{source}may = [\"move\"]"));
    assert_eq!(asks(), Some(3));
    assert_eq!(b.info()["refused"]["last"]["code"], "may-not-ask");
    let shown = run(&["status", "--control", control(&b)]);
    let shown = String::from_utf8(shown.stdout).unwrap();
    for says in [
        "expects any VM from \"host-a\" (may move)",
        "22 connections refused, the last at ",
        "\"host-a\"",
        "it may not ask",
    ] {
        assert!(shown.contains(says), "{says}: {shown}");
    }
    // Nothing of it was a session.
    assert_eq!(b.query("query")["last"]["status"], "rehearsed");

    // What is expected comes, to the last byte.
    let rightful = json!({
        "vm": UUID, "min_epoch": 0, "max_memory": 64 << 20, "max_attempts": 1, "max_arrivals": 1,
        "sources": [{"name": "host-c"}, {"name": "host-a", "may": ["move"]}],
    });
    hosts.expect(&rightful.to_string());
    assert_eq!(b.info()["expected"]["expectation"]["max_memory"], 64 << 20);
    let moved = a.migrate(&at, json!({}));
    assert_eq!(moved["status"], "completed", "{moved}");
    b.assert_runs();
    // It is no longer waited for anybody.
    assert_eq!(b.info()["expected"], Value::Null);

    // And back, from epoch 1 on: a question about a VM that runs knows its epoch.
    drop(a);
    let c = software(
        hosts.dir.path(),
        "c",
        &[
            "--software",
            "--incoming",
            "tcp:127.0.0.1:0",
            "--tls-creds",
            text(&hosts.a),
            "--expect",
            text(&hosts.file()),
        ],
    )
    .start();
    hosts.expect("min_epoch = 1");
    let vm = format!("vm:{}", control(&b));
    let asked = run(&["check", &vm, &c.incoming(), "--tls-creds", text(&hosts.b)]);
    assert_eq!(asked.status.code(), Some(0), "{asked:?}");
    assert_eq!(b.migrate(&c.incoming(), json!({}))["status"], "completed");
    c.assert_runs();

    // What is expected holds for each wait, and for each address.
    hosts.expect("[[sources]]\nname = \"host-x\"");
    let socket = format!("unix:{}", text(&hosts.dir.path().join("socket")));
    let why = b.call("migrate-incoming", json!({"uri": socket})).unwrap_err();
    assert!(why.contains("connections over a unix socket prove neither"), "{why}");
    b.call("migrate-incoming", json!({"uri": "tcp:127.0.0.1:0"})).unwrap();
    assert_eq!(refused(&c, &b, &b.incoming()).0, "other-source");
    assert_eq!(b.info()["refused"]["count"], 1, "of this wait");
}

#[test]
fn a_second_source_is_refused_and_the_first_goes_on() {
    let hosts = Hosts::new();
    hosts.expect("[[sources]]\nname = \"host-a\"");
    let (a, x) = (hosts.source("a", &hosts.a), hosts.source("x", &hosts.x));
    let second = hosts.source("second", &hosts.a);
    let b = hosts.receiver(&[]);
    let at = b.incoming();
    // A stranger comes before the rightful one, and while it is on its way.
    assert_eq!(refused(&x, &b, &at).0, "other-source");
    a.begin(&at, json!({"pause-before-switchover": true}));
    until("the switchover to wait", || (a.migration()["status"] == "pre-switchover").then_some(()));
    let info = x.migrate(&at, json!({}));
    assert_eq!(info["reasons"][0]["code"], "other-source", "{info}");
    let info = second.migrate(&at, json!({}));
    assert!(info["error"].as_str().unwrap().contains("no migration is taken in here now"), "{info}");
    until("both to be counted", || (b.info()["refused"]["count"] == 3).then_some(()));
    let last = b.info()["refused"]["last"].take();
    assert_eq!(last["security"]["peer"]["names"][0], "host-a", "{last}");
    x.assert_runs();
    second.assert_runs();
    a.call("migrate-continue", Value::Null).unwrap();
    assert_eq!(a.ended()["status"], "completed");
    b.assert_runs();
}

#[test]
fn what_nobody_can_prove_is_refused_at_start_by_name() {
    let hosts = Hosts::new();
    let file = hosts.file();
    let expect = ["--expect", text(&file)];
    let socket = format!("unix:{}", text(&hosts.dir.path().join("socket")));
    let plain = ["vm", "--software", "--insecure-plaintext", "--incoming", "tcp:127.0.0.1:0"];
    hosts.expect("[[sources]]\nname = \"host-a\"");
    fails(&[&plain[..], &expect].concat(), 2, "connections in plain text prove neither");
    fails(
        &[&["vm", "--software", "--incoming", &socket][..], &expect].concat(),
        2,
        "connections over a unix socket prove neither",
    );
    let pin = format!("sha256:{}", "0".repeat(64));
    let pinned = [
        "vm",
        "--software",
        "--incoming",
        "tcp:127.0.0.1:0",
        "--tls-creds",
        text(&hosts.b),
        "--tls-pin",
        &pin,
    ];
    fails(&[&pinned[..], &expect].concat(), 2, "\"host-a\" is expected by name");
    // The older options are part of what is expected.
    let words =
        ["--software", "--incoming", "tcp:127.0.0.1:0", "--tls-creds", text(&hosts.b), "--tls-pin", &pin];
    let older = software(hosts.dir.path(), "older", &words).start();
    assert_eq!(older.info()["expected"]["tls-pins"], json!([pin]));
    drop(older);

    // Two words that contradict each other let nobody in.
    hosts.expect(&format!("vm = \"{OTHER}\""));
    let b = hosts.receiver(&["--uuid", UUID]);
    let expected = b.info()["expected"].take();
    let error = expected["error"].as_str().unwrap();
    assert!(error.contains(&format!("expects VM {OTHER}, and --uuid says VM {UUID}")), "{error}");
    let a = hosts.source("a", &hosts.a);
    assert_eq!(refused(&a, &b, &b.incoming()).0, "no-expectation");
    hosts.expect(&format!("vm = \"{UUID}\""));
    assert_eq!(a.migrate(&b.incoming(), json!({}))["status"], "completed");
}
