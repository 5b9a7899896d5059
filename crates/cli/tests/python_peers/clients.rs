//! The Python client at our server: what it saved of one sample device it loads into another.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::peer::python;

/// A sample device's server, ended by its stdin.
struct Device(Child);

impl Device {
    fn start(socket: &Path, arguments: &[&str]) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
            .args(["device", "--exit-with-stdin", "--state-dirty-rate", "0", "--socket"])
            .arg(socket)
            .args(arguments)
            .stdin(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !socket.exists() {
            assert!(Instant::now() < deadline, "no socket");
            std::thread::sleep(Duration::from_millis(2));
        }
        Self(child)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

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
    let _servers = [Device::start(&at("from"), &state), Device::start(&at("to"), &state)];
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
