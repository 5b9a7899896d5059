//! The script of docs/drain.md drains a host, and the histories of both sides tell what became of each guest.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{PATIENCE, Setup, Vm, creds, run};

const PAGE: &str = include_str!("../../../../docs/drain.md");

/// The one script of the page.
fn script() -> &'static str {
    let mut blocks = PAGE.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let script = blocks.next().expect("a script");
    assert_eq!(blocks.next(), None, "one script");
    script
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A guest that is to go, and the receiver that waits for it.
struct Pair {
    uuid: String,
    source: Vm,
    receiver: Vm,
}

impl Pair {
    fn start(dir: &Path, number: usize, here: &[&str], there: &[&str]) -> Self {
        let uuid = format!("7d3a1c52-0000-4a39-9a10-00000000000{number}");
        let state = |side: &str| text(&dir.join(side)).to_owned();
        let (from, to) = (state("here"), state("there"));
        let (source, receiver) = (format!("a{number}"), format!("b{number}"));
        let vm = |name: &str, device: &[&str], words: &[&str]| {
            let device_arguments = &[&["--state-size", "4M"], device].concat();
            Setup { device_arguments, vm_arguments: words, ..Setup::new(dir, name) }.start()
        };
        let source = vm(&source, here, &["--uuid", &uuid, "--state-dir", &from]);
        let receiver =
            vm(&receiver, there, &["--uuid", &uuid, "--state-dir", &to, "--incoming", "tcp:127.0.0.1:0"]);
        source.warm();
        Self { uuid, source, receiver }
    }

    fn control(&self) -> &str {
        text(&self.source.control)
    }

    /// The sessions in the history of a side, in short, and the last of them.
    fn history(&self, state: &Path) -> (Vec<String>, Value) {
        let output = run(&["history", "--state-dir", text(state), "--vm", &self.uuid, "--json"]);
        assert!(output.status.success(), "{output:?}");
        let history: Value = serde_json::from_slice(&output.stdout).unwrap();
        let records = history["records"].as_array().unwrap();
        let short = |record: &Value| {
            let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            let status = match &record["migration"]["incompatible"] {
                Value::Bool(true) => "refused".to_owned(),
                _ => word(&record["migration"]["status"]),
            };
            format!("{} {status}", word(&record["kind"]))
        };
        (records.iter().map(short).collect(), records.last().expect("a session")["migration"].clone())
    }
}

#[test]
fn a_host_is_drained_by_the_script_of_the_page() {
    let dir = tempfile::tempdir().unwrap();
    let moves = Pair::start(dir.path(), 1, &[], &[]);
    let refused = Pair::start(dir.path(), 2, &["--param", "queues=8"], &["--param", "queues=4"]);
    // An arc that a rehearsal without --pause does not come to.
    let failing = Pair::start(dir.path(), 3, &[], &["--fault", "fail-arc:RESUMING:STOP:EIO"]);
    let cancelled = Pair::start(dir.path(), 4, &[], &[]);
    let pairs = [&refused, &failing, &cancelled, &moves];

    let list: String =
        pairs.map(|pair| format!("{} {}\n", pair.control(), pair.receiver.incoming())).concat();
    let addresses = pairs.map(|pair| pair.receiver.incoming());
    let file = dir.path().join("drain.sh");
    std::fs::write(&file, script()).unwrap();
    let here = Path::new(env!("CARGO_BIN_EXE_vfio-migrate")).parent().unwrap();
    let events = cancelled.source.events();
    // Slow enough that the cancel comes before the switchover.
    let mut drain = Command::new("sh")
        .args([text(&file), "--bandwidth", "32M", "--downtime-limit", "10s"])
        .env("PATH", format!("{}:{}", here.display(), std::env::var("PATH").unwrap()))
        .env("ATTEMPTS", "2")
        .env("CREDS", creds())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("sh starts");
    drain.stdin.take().unwrap().write_all(list.as_bytes()).unwrap();

    // After the rehearsal comes the migration; with its first pass both sides have begun.
    let mut session = std::iter::from_fn(|| events.recv_timeout(PATIENCE).ok());
    session.find(|event| event["data"]["status"] == "rehearsed").expect("a rehearsal");
    session.find(|event| event["event"] == "MIGRATION_PASS").expect("a migration");
    cancelled.source.call("migrate-cancel", Value::Null).expect("the cancel is in time");
    let output = drain.wait_with_output().unwrap();
    let (said, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr));
    eprintln!("{said}{stderr}");

    // What the script says.
    assert_eq!((output.status.code(), &*stderr), (Some(1), ""), "{said}");
    let (tried, told) = said.split_once("moved:\n").expect("what moved");
    let (gone, stayed) = told.split_once("not moved, or not running:\n").expect("what stayed");
    let again =
        |pair: &Pair| format!("{}: migrate failed or was cancelled, attempt 1 of 2\n", pair.control());
    assert_eq!(tried, again(&failing) + &again(&cancelled), "{said}");
    let line = |pair: &Pair, at: &str| format!("  {}: {at}\n", pair.control());
    assert_eq!(gone, line(&cancelled, &addresses[2]) + &line(&moves, &addresses[3]), "{said}");
    for part in [
        line(&refused, "not moved: refused by check"),
        line(&failing, "not moved, after 2 attempts: migrate failed"),
        "[device-parameter]".into(),
        "RESUMING to STOP".into(),
    ] {
        assert!(stayed.contains(&part), "{part}: {said}");
    }

    // Where the guests are, and that receivers of those that stayed wait on at the same address.
    for (pair, stays, address) in [
        (&refused, true, &addresses[0]),
        (&failing, true, &addresses[1]),
        (&cancelled, false, &addresses[2]),
        (&moves, false, &addresses[3]),
    ] {
        let (guest, other) =
            if stays { (&pair.source, &pair.receiver) } else { (&pair.receiver, &pair.source) };
        assert_eq!(guest.status(), "running");
        guest.assert_runs();
        guest.assert_whole();
        if stays {
            assert_eq!((&other.status()[..], &other.incoming()), ("inmigrate", address));
        } else {
            assert_eq!(other.status(), "postmigrate");
        }
    }

    // What is found afterwards, without a vm.
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let rehearsed = "rehearsal rehearsed";
    let failed = [rehearsed, "migration failed"];
    let arc = json!({"from": "RESUMING", "to": "STOP"});
    let refusal = ("/reasons/0/code", json!("device-parameter"));
    let asked = ["check rehearsed"];
    let completed = [rehearsed, "migration completed"];
    let cancelled_first = [rehearsed, "migration cancelled"];
    for (pair, at_source, at_destination, why) in [
        (&refused, vec!["rehearsal refused"], vec!["check refused", "rehearsal refused"], Some(refusal)),
        (
            &failing,
            [failed, failed].concat(),
            [&asked[..], &failed, &asked, &failed].concat(),
            Some(("/failure/arc", arc)),
        ),
        (
            &cancelled,
            [cancelled_first, completed].concat(),
            [&asked[..], &cancelled_first, &asked, &completed].concat(),
            None,
        ),
        (&moves, completed.to_vec(), [&asked[..], &completed].concat(), None),
    ] {
        let (sessions, ours) = pair.history(&here);
        assert_eq!(sessions, at_source);
        // There each attempt began with a question.
        let (sessions, theirs) = pair.history(&there);
        assert_eq!(sessions, at_destination, "{theirs}");
        if let Some((at, value)) = why {
            assert_eq!(
                (ours.pointer(at), theirs.pointer(at)),
                (Some(&value), Some(&value)),
                "{ours} {theirs}"
            );
        }
    }
    let told = run(&["history", "--state-dir", text(&there), "--vm", &refused.uuid]);
    let told = String::from_utf8(told.stdout).unwrap();
    assert_eq!(told.matches(": refused after").count(), 2, "{told}");
}
