//! Our client at the Python server: its state goes into a file by `save`, and into another server by `restore`.

use crate::peer::{Server, run, succeeds};

/// Moves the state of one server with `deviations` to another, and compares what both say of it.
fn moves(size: &str, deviations: &[&str], save: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state");
    let file = file.to_str().unwrap();
    let arguments = [&["--state", size], deviations].concat();
    let from = Server::start(dir.path(), "from", &[&arguments[..], &["--seed", "1"]].concat());
    let mut to = Server::start(dir.path(), "to", &[&arguments[..], &["--seed", "2"]].concat());
    assert_ne!(from.state, to.state, "two seeds, one state");
    succeeds(&[&["save", "--device", &from.device(), "-o", file], save].concat());
    succeeds(&["restore", "--device", &to.device(), file]);
    assert_eq!(to.loaded(), from.state, "{size} bytes, {deviations:?}, {save:?}");
}

#[test]
fn state_of_64_kib_moves() {
    moves("65536", &[], &[]);
    moves("65536", &[], &["--stop-copy-only"]);
}

#[test]
fn state_of_4_mib_moves() {
    moves("4194304", &[], &[]);
    moves("4194304", &[], &["--stop-copy-only"]);
}

#[test]
fn state_of_100_mib_moves() {
    moves("104857600", &[], &[]);
}

#[test]
fn a_server_that_reads_a_body_by_one_recv_loads_100_mib() {
    moves("104857600", &["--one-recv"], &[]);
}

#[test]
fn a_server_that_pads_its_replies_moves() {
    // No multiple of what is asked for: the last reply is padded.
    moves("100001", &["--pad-reads"], &[]);
}

#[test]
fn servers_that_take_8_and_16_descriptors_a_message_move() {
    moves("65536", &["--max-msg-fds", "8"], &[]);
    moves("65536", &["--max-msg-fds", "16"], &[]);
}

#[test]
fn a_server_that_refuses_region_access_in_stop_copy_moves() {
    moves("65536", &["--no-region-in-stop-copy"], &[]);
}

#[test]
fn a_server_whose_reset_keeps_the_migration_state_moves() {
    moves("65536", &["--reset-keeps-state"], &[]);
}

#[test]
fn a_server_that_loses_step_has_no_migration_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), "server", &["--loses-step"]);
    let file = dir.path().join("state");
    let saved = run(&["save", "--device", &server.device(), "-o", file.to_str().unwrap()]);
    assert_eq!(saved.status.code(), Some(3), "{saved:?}");
    assert!(!file.exists(), "a file of nothing");
    succeeds(&["describe", server.socket()]);
}

#[test]
fn an_altered_state_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state");
    let from = Server::start(dir.path(), "from", &["--seed", "1"]);
    let to = Server::start(dir.path(), "to", &["--seed", "2"]);
    succeeds(&["save", "--device", &from.device(), "-o", file.to_str().unwrap()]);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let restored = run(&["restore", "--device", &to.device(), file.to_str().unwrap()]);
    assert!(!restored.status.success(), "{restored:?}");
}
