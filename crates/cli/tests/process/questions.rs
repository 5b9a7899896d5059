//! One question, one answer: what `check`, `rehearse` and `migrate` say of the same guest and the same receiver.

use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Setup, Vm, run};

const UUID: &str = "6f1c7c5e-0d5e-4a39-9a10-5a0b8a3c2d47";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A `vm` whose state is kept in `state`.
fn vm(dir: &Path, name: &str, state: &Path, more: &[&str]) -> Vm {
    let arguments = [&["--uuid", UUID, "--state-dir", text(state)], more].concat();
    Setup { vm_arguments: &arguments, ..Setup::new(dir, name) }.start()
}

/// Exit code and stdout of a verb, which a message must be able to show.
fn asked(arguments: &[&str]) -> (Option<i32>, String) {
    let output = run(arguments);
    eprintln!("{arguments:?}: {output:?}");
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_guest_that_returns_is_told_the_same_by_check_rehearse_and_migrate() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let first = vm(dir.path(), "a", &here, &[]);
    let other = vm(dir.path(), "b", &there, &["--incoming", "tcp:127.0.0.1:0"]);
    first.warm();
    let gone = first.migrate(&other.incoming(), json!({"downtime-limit": 10_000}));
    assert_eq!(gone["status"], "completed", "{gone}");

    // To where it came from, and once more from there.
    let (mut left, mut source) = (first, other);
    for (name, state) in [("c", &here), ("d", &there)] {
        left.call("quit", Value::Null).unwrap();
        drop(left);
        let receiver = vm(dir.path(), name, state, &["--incoming", "tcp:127.0.0.1:0"]);
        let (control, to) = (text(&source.control).to_owned(), receiver.incoming());
        let named = format!("vm:{control}");
        let (checked, said) = asked(&["check", "--live", "--timeout", "60s", &named, &to]);
        let (rehearsed, _) =
            asked(&["rehearse", "--control", &control, "--downtime-limit", "10s", "--to", &to]);
        let (moved, _) = asked(&["migrate", "--control", &control, "--downtime-limit", "10s", &to]);
        assert_eq!([checked, rehearsed, moved], [Some(0); 3], "{said}");
        receiver.assert_runs();
        (left, source) = (source, receiver);
    }
    source.assert_whole();
}
