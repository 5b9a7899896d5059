//! A guest with a device of the Python server moves between two `vm` processes: the device's state, and what it wrote into RAM.

use std::path::Path;

use crate::peer::{Own, Server, succeeds};

/// A page of RAM that the guest's program leaves alone.
const DMA: &str = "0x90000";

/// Starts a `vm` with this device, and waits until `socket` is there.
fn vm(device: &str, socket: &Path, arguments: &[&str]) -> Own {
    let vm = ["vm", "--memory", "64M", "--dirty-rate", "1M", "--device", device];
    Own::start(&[&vm[..], arguments].concat(), socket)
}

/// Moves a guest. Returns what the device at the source wrote last, and what the one at the destination found.
fn moved(size: &str, source: &[&str], both: &[&str]) -> (u64, u64) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let common = [&["--state", size, "--dma", DMA], both].concat();
    let mut from = Server::start(dir.path(), "from", &[&common[..], &["--seed", "1"], source].concat());
    let mut to = Server::start(dir.path(), "to", &[&common[..], &["--seed", "2"]].concat());
    let (control, uri) = (at("control"), format!("unix:{}", at("incoming")));
    let devices = [&from, &to].map(|server| format!("{},id=dev0", server.device()));
    let _source = vm(&devices[0], Path::new(&control), &["--control", &control]);
    let _destination = vm(&devices[1], Path::new(&at("incoming")), &["--incoming", &uri]);
    succeeds(&["migrate", "--control", &control, &uri, "--downtime-limit", "60s"]);
    let wrote = from.number("wrote");
    assert_eq!(to.loaded(), from.state, "the device's state");
    (wrote, to.number("found"))
}

/// It moves with its state and its DMA.
fn moves(size: &str, both: &[&str]) {
    let (wrote, found) = moved(size, &[], both);
    assert!(wrote > 0, "the device never wrote: {both:?}");
    assert_eq!(found, wrote, "{both:?}");
}

#[test]
fn a_guest_moves_with_the_devices_state_and_its_dma() {
    moves("4194304", &[]);
}

#[test]
fn a_guest_moves_with_100_mib_of_state_that_are_read_by_one_recv() {
    moves("104857600", &["--one-recv"]);
}

#[test]
fn a_guest_moves_with_each_deviation_of_its_devices_servers() {
    for deviation in [
        &["--pad-reads"][..],
        &["--max-msg-fds", "8"],
        &["--max-msg-fds", "16"],
        &["--ioeventfds-48"],
        &["--no-region-in-stop-copy"],
        &["--refuses-when-stopped"],
        &["--reset-keeps-state"],
    ] {
        moves("100001", deviation);
    }
}

#[test]
fn a_server_that_does_not_log_what_it_writes_is_caught() {
    let (wrote, found) = moved("4194304", &["--hides-dirty"], &[]);
    assert!(found < wrote, "it found {found} of {wrote}");
}
