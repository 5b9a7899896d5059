//! The list of what a session waits for (`docs/cancel.md`) is whole: each wait of the code has a row, and each row its tests.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

/// The beginnings of calls that wait.
const WAITS: [&str; 8] = [
    "recv_timeout(",
    ".recv()",
    "wait_timeout(",
    ".wait(inner)",
    "thread::sleep(",
    "event::poll(",
    "answer_unless(",
    "answers.wait(",
];

/// Each file of this crate that has such a call, and the row of the list that tells what it waits for. Empty: it waits for nothing
/// but threads of its own, which end by an interrupt.
const ROWS: [(&str, &str); 24] = [
    ("channel/connect.rs", "the connection"),
    ("channel/credit.rs", "credit for a device"),
    ("channel/limiter.rs", "the bandwidth cap"),
    ("channel/listener.rs", "somebody to come, or to say something"),
    ("channel/liveness.rs", "HELLO_REPLY, ACCEPT, BEGUN"),
    ("channel/transport.rs", "a connection that takes nothing more"),
    ("control.rs", "a vfio-user server, as a `vm` opens its device"),
    ("destination/commit.rs", "the destination's journal"),
    ("destination/hello.rs", "a device of the destination"),
    ("destination/mod.rs", "a receiver that is not ready"),
    ("destination/ready.rs", "what comes next (destination)"),
    ("destination/rollback.rs", "a late device of the destination"),
    ("destination/session.rs", "what comes next (destination)"),
    ("device_state/receive.rs", "a device of the destination"),
    ("device_state/tracked.rs", "a device to change its state"),
    ("session/abandon.rs", ""),
    ("snapshot/play.rs", ""),
    ("snapshot/save.rs", "the target of `save` to be created"),
    ("source/commit.rs", "the journal to say SENDING"),
    ("source/mod.rs", "the connection"),
    ("source/plan.rs", "the journal to be opened and read"),
    ("source/quiesce.rs", "the machine's manifest"),
    ("source/rollback.rs", "the storage locks"),
    ("source/session.rs", "a connection that was handed over"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The Rust files under `dir`.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .flat_map(|path| match path {
            path if path.is_dir() => sources(&path),
            path if path.extension().is_some_and(|extension| extension == "rs") => vec![path],
            _ => vec![],
        })
        .collect()
}

/// The rows of the list: what is waited for, and the names of the tests.
fn rows() -> Vec<(String, Vec<String>)> {
    let page = read_to_string(root().join("docs/cancel.md")).unwrap();
    let list = page.lines().filter(|line| line.starts_with("| ")).skip(1);
    let cells = list.map(|line| line.trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>());
    cells
        .map(|cells| {
            assert_eq!(cells.len(), 5, "{cells:?}");
            let tests = cells[4].split(", ").map(|name| name.trim_matches('`').to_owned());
            (cells[0].to_owned(), tests.filter(|name| !name.is_empty()).collect())
        })
        .collect()
}

#[test]
fn each_row_of_the_list_has_tests_that_exist() {
    let tests: String =
        sources(&root().join("crates")).iter().map(|path| read_to_string(path).unwrap()).collect();
    let rows = rows();
    assert!(rows.len() > 20, "{rows:?}");
    for (what, names) in rows {
        assert!(!names.is_empty(), "no test: {what}");
        for name in names {
            assert!(tests.contains(&format!("fn {name}()")), "there is no test {name}: {what}");
        }
    }
}

#[test]
fn each_wait_of_the_code_has_a_row() {
    let known: BTreeSet<_> = rows().into_iter().map(|(what, _)| what).collect();
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&src) {
        let text = read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let name = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
        let waits = WAITS.iter().any(|call| code.contains(call));
        let row = ROWS.iter().find(|(file, _)| *file == name);
        assert_eq!(waits, row.is_some(), "{name}: see whether docs/cancel.md has what it waits for");
        if let Some((_, row)) = row {
            assert!(known.iter().any(|what| what.contains(row)), "{name}: no row '{row}'");
        }
    }
}
