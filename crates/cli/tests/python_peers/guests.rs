//! A guest with a device of the Python server moves between two `vm` processes: the device's state, and what it wrote into RAM.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::peer::{Server, succeeds};

/// A page of RAM that the guest's program leaves alone.
const DMA: &str = "0x90000";

/// A `vm`, ended by its stdin.
struct Vm(Child);

impl Vm {
    /// Starts it, and waits until `socket` is there.
    fn start(device: &str, socket: &Path, arguments: &[&str]) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_vfio-migrate"))
            .args(["vm", "--memory", "64M", "--dirty-rate", "1M", "--exit-with-stdin", "--device", device])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
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

impl Drop for Vm {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Moves a guest. Returns what the device at the source wrote last, and what the one at the destination found.
fn moved(source: &[&str]) -> (u64, u64) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let common = ["--state", "4194304", "--dma", DMA];
    let mut from = Server::start(dir.path(), "from", &[&common[..], &["--seed", "1"], source].concat());
    let mut to = Server::start(dir.path(), "to", &[&common[..], &["--seed", "2"]].concat());
    let (control, uri) = (at("control"), format!("unix:{}", at("incoming")));
    let devices = [&from, &to].map(|server| format!("{},id=dev0", server.device()));
    let _source = Vm::start(&devices[0], Path::new(&control), &["--control", &control]);
    let _destination = Vm::start(&devices[1], Path::new(&at("incoming")), &["--incoming", &uri]);
    succeeds(&["migrate", "--control", &control, &uri, "--downtime-limit", "10s"]);
    let wrote = from.number("wrote");
    assert_eq!(to.loaded(), from.state, "the device's state");
    (wrote, to.number("found"))
}

#[test]
fn a_guest_moves_with_the_devices_state_and_its_dma() {
    let (wrote, found) = moved(&[]);
    assert!(wrote > 0, "the device never wrote");
    assert_eq!(found, wrote);
}

#[test]
fn a_server_that_does_not_log_what_it_writes_is_caught() {
    let (wrote, found) = moved(&["--hides-dirty"]);
    assert!(found < wrote, "it found {found} of {wrote}");
}
