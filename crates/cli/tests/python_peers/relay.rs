//! A guest that uses our sample device moves from our server to the Python server, and on to another of ours. At the Python
//! server, which serves the layout of our device and none of its work, it is paused; it goes on at the end, and judges.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::peer::{Own, Server, ask, run, succeeds, until};

/// The guest on its way: each `vm` with its device's server, the first of them with the guest.
struct Relay {
    // In the order in which they leave.
    _vms: Vec<Own>,
    python: Server,
    _devices: [Own; 2],
    dir: tempfile::TempDir,
}

impl Relay {
    /// Sets up our server, the Python server with these deviations, and ours again, each with a `vm`; pauses the guest once
    /// it has worked.
    fn start(size: &str, deviations: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        // As foreign servers: neither says a model, and there are no peer-to-peer states.
        let plain = ["--no-extension", "--state-size", size];
        let devices = ["first", "last"].map(|name| Own::device(&at(name), &plain));
        let mut vms = Vec::new();
        let like = at("first").display().to_string();
        let layout = ["--like", &like, "--any-state", "--max-msg-fds", "8"];
        let python = Server::start(dir.path(), "python", &[&layout[..], deviations].concat());
        for name in ["first", "python", "last"] {
            let device = format!("vfio-user:{},id=dev0", at(name).display());
            let control = control(dir.path(), name);
            let uri = incoming(dir.path(), name);
            let mut words =
                vec!["vm", "--memory", "64M", "--dirty-rate", "1M", "--device", &device, "--control"];
            words.push(control.to_str().unwrap());
            if name != "first" {
                words.extend(["--incoming", &uri]);
            }
            vms.push(Own::start(&words, &control));
        }
        let relay = Self { _vms: vms, python, _devices: devices, dir };
        let worked = || (relay.guest("first")["dma-blocks"].as_u64()? > 100).then_some(());
        until("the guest to work", worked);
        for name in ["python", "last"] {
            let ready = || {
                let vm = relay.ask(name, "query")["vm"].take();
                (vm["incoming"].is_string() && vm["not-ready"].is_null()).then_some(())
            };
            until("a receiver", ready);
        }
        relay.ask("first", "stop");
        relay
    }

    fn ask(&self, vm: &str, verb: &str) -> Value {
        ask(&control(self.dir.path(), vm), verb)
    }

    fn guest(&self, vm: &str) -> Value {
        self.ask(vm, "query-guest")
    }

    /// The words that move the guest from one to the next.
    fn migrate(&self, from: &str, to: &str) -> [String; 7] {
        let control = control(self.dir.path(), from).display().to_string();
        let words = ["migrate", "--control", &control, &incoming(self.dir.path(), to), "--verify"];
        let [a, b, c, d, e] = words.map(str::to_owned);
        [a, b, c, d, e, "--downtime-limit".into(), "60s".into()]
    }

    fn moves(&self, from: &str, to: &str) {
        let words = self.migrate(from, to);
        succeeds(&words.each_ref().map(String::as_str));
    }
}

fn control(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.control"))
}

fn incoming(dir: &Path, name: &str) -> String {
    format!("unix:{}", dir.join(format!("{name}.incoming")).display())
}

/// To the Python server and back to ours, where the guest goes on and has lost nothing.
fn relayed(size: &str, deviations: &[&str]) {
    let mut relay = Relay::start(size, deviations);
    let before = relay.guest("first");
    relay.moves("first", "python");
    assert!(!relay.python.loaded().is_empty());
    relay.moves("python", "last");
    let paused = relay.guest("last");
    assert_eq!(paused["dma-blocks"], before["dma-blocks"], "it was paused all the way");
    relay.ask("last", "cont");
    let count = |guest: &Value, word: &str| guest[word].as_u64().unwrap();
    let guest = until("the guest to look at everything twice", || {
        let now = relay.guest("last");
        let walked =
            ["page-passes", "block-passes"].iter().all(|word| count(&now, word) >= count(&paused, word) + 2);
        (walked && count(&now, "dma-blocks") > count(&paused, "dma-blocks") + 100).then_some(now)
    });
    for lost in ["pages-lost", "blocks-lost", "interrupts-lost", "integrity-failures", "failure"] {
        assert_eq!(guest[lost], 0, "{lost}: {guest}");
    }
}

#[test]
fn a_guest_goes_from_our_server_to_the_python_server_and_back() {
    relayed("64K", &[]);
}

#[test]
fn a_guest_goes_there_and_back_with_4_mib_and_every_deviation_that_a_server_can_have_at_once() {
    let all = [
        "--pad-reads",
        "--ioeventfds-48",
        "--no-region-in-stop-copy",
        "--refuses-when-stopped",
        "--reset-keeps-state",
    ];
    relayed("4M", &all);
}

#[test]
fn a_guest_goes_there_and_back_with_100_mib() {
    relayed("100M", &["--one-recv"]);
}

#[test]
fn a_state_that_the_python_server_altered_is_refused() {
    let relay = Relay::start("4M", &["--spoils"]);
    relay.moves("first", "python");
    let words = relay.migrate("python", "last");
    let refused = run(&words.each_ref().map(String::as_str));
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert_eq!(relay.ask("python", "query")["vm"]["status"], "paused");
}
