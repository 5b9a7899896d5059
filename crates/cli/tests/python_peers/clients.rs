//! The Python client at our server: what it saved of one sample device it loads into another.

use std::path::Path;

use crate::peer::{Own, python};

fn client(socket: &Path, verb: &str, file: &Path, arguments: &[&str]) {
    let output =
        python("client.py").arg(socket).arg(verb).arg(file).args(arguments).output().expect("python3");
    assert!(output.status.success(), "{verb} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Moves a device's state from one server to another and back out, which has to give the same bytes.
fn moves(size: &str, arguments: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let state = ["--state-size", size];
    let _servers = [Own::device(&at("from"), &state), Own::device(&at("to"), &state)];
    client(&at("from"), "save", &at("once"), arguments);
    client(&at("to"), "load", &at("once"), arguments);
    client(&at("to"), "save", &at("twice"), arguments);
    let (once, twice) = (std::fs::read(at("once")).unwrap(), std::fs::read(at("twice")).unwrap());
    assert!(once.len() as u64 >= 65536, "{} bytes", once.len());
    assert!(once == twice, "{size}, {arguments:?}: {} and {} bytes differ", once.len(), twice.len());
}

#[test]
fn state_of_64_kib_moves_between_our_servers() {
    moves("64K", &[]);
    moves("64K", &["--precopy"]);
}

#[test]
fn state_of_4_mib_moves_between_our_servers() {
    moves("4M", &["--max-msg-fds", "8"]);
    moves("4M", &["--precopy", "--max-msg-fds", "16"]);
}

#[test]
fn state_of_100_mib_moves_between_our_servers() {
    moves("100M", &["--piece", "1000000"]);
}
