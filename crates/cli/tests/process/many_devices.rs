//! Guests with many devices: as many as a machine takes, on the functions of all its slots.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::proxy::{self, Act};
use crate::support::{Process, Setup, creds, fails, software, until};

const UUID: &[&str] = &["--uuid", "d0a3a9f8-2f0e-4b5e-9a43-0f6c1d1b7a64"];

/// A guest of so many devices starts, uses each of them, moves, and uses each of them there.
fn moves_with(devices: usize, more: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    // One vCPU checks what all devices do: together they keep the pace of one.
    let pace = format!("{}us", 1000 * devices);
    let device_arguments = ["--state-size", "64K", "--state-dirty-rate", "0", "--dma-interval", &pace];
    let side = |name, arguments: &[&str]| {
        let vm_arguments = &[UUID, more, arguments].concat();
        let setup = Setup {
            devices,
            memory: "192M",
            device_arguments: &device_arguments,
            ..Setup::new(dir.path(), name)
        };
        Setup { vm_arguments, ..setup }.start()
    };
    let source = side("a", &[]);
    let destination = side("b", &["--incoming", "tcp:127.0.0.1:0"]);
    source.warm();
    // More than the 16 of its ring that are in flight from the start.
    until("all devices to work", || (source.counter("least-posted") > 20).then_some(()));
    let info = source.migrate(&destination.incoming(), json!({"verify": true, "downtime-limit": 60_000}));
    assert_eq!(info["status"], "completed", "{info}");
    let arrived = destination.counter("least-posted");
    // Those that were in flight when it arrived, and others.
    until("all devices to work", || (destination.counter("least-posted") > arrived + 20).then_some(()));
    // Each block was looked at when it came. A walk over the old ones of more devices takes longer than a test may.
    if devices <= 16 {
        destination.assert_whole();
    }
    let guest = destination.guest();
    for lost in ["pages-lost", "blocks-lost", "interrupts-lost", "integrity-failures", "failure"] {
        assert_eq!(guest[lost], 0, "{lost}: {guest}");
    }
    assert!(devices == 1 || destination.counter("p2p-blocks") > 0);
}

#[test]
fn one_device_moves() {
    moves_with(1, &[]);
}

#[test]
fn eight_devices_move() {
    moves_with(8, &[]);
}

#[test]
fn sixteen_devices_move() {
    moves_with(16, &[]);
}

#[test]
fn sixteen_devices_of_the_software_guest_move() {
    moves_with(16, &["--software"]);
}

#[test]
fn sixty_four_devices_move() {
    moves_with(64, &[]);
}

/// Each device maps the BARs of all others as a guest arrives: all devices at once, and nothing else is asked so often.
#[test]
fn eight_devices_map_each_others_bars_side_by_side() {
    const DEVICES: usize = 8;
    const EACH: Duration = Duration::from_millis(100);
    let dir = tempfile::tempdir().unwrap();
    let arrives = Arc::new(AtomicBool::new(false));
    let counts: Vec<_> = (0..DEVICES).map(|_| Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)])).collect();
    let mut words = vec!["--incoming".to_owned(), "tcp:127.0.0.1:0".into()];
    let mut servers = Vec::new();
    for (n, count) in counts.iter().enumerate() {
        let (server, path) = (dir.path().join(format!("server{n}")), dir.path().join(format!("proxy{n}")));
        servers.push(Process::start(&[
            "device",
            "--state-size",
            "64K",
            "--socket",
            server.to_str().unwrap(),
        ]));
        until("the server", || server.exists().then_some(()));
        let (arrives, count) = (arrives.clone(), count.clone());
        proxy::start(&path, &server, move |command, _| {
            if !arrives.load(Ordering::Acquire) {
                return Act::Pass;
            }
            let is_map = command == proxy::DMA_MAP;
            count[usize::from(!is_map)].fetch_add(1, Ordering::AcqRel);
            if is_map { Act::Late(EACH) } else { Act::Pass }
        });
        words.extend(["--device".into(), format!("vfio-user:{},id=dev{n}", path.display())]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let there = Setup { devices: 0, vm_arguments: &words, ..Setup::new(dir.path(), "b") }.start();
    let pace = &["--state-size", "64K", "--state-dirty-rate", "0", "--dma-interval", "8ms"];
    let vm = Setup { devices: DEVICES, device_arguments: pace, ..Setup::new(dir.path(), "a") }.start();
    vm.warm();
    let at = there.incoming();
    arrives.store(true, Ordering::Release);
    let info = vm.migrate(&at, json!({"downtime-limit": 60_000}));
    arrives.store(false, Ordering::Release);
    assert_eq!(info["status"], "completed", "{info}");
    let maps: Vec<usize> = counts.iter().map(|count| count[0].load(Ordering::Acquire)).collect();
    assert_eq!(maps, [DEVICES - 1; DEVICES], "one of each of the others");
    let rest: Vec<usize> = counts.iter().map(|count| count[1].load(Ordering::Acquire)).collect();
    assert!(rest.iter().all(|rest| *rest < 100), "{rest:?}");
    let stood = Duration::from_millis(info["downtime-ms"].as_u64().unwrap());
    // In a row they would take as long as all of them together.
    let in_a_row = EACH * u32::try_from(DEVICES * (DEVICES - 1)).unwrap();
    assert!(stood < in_a_row / 2, "{stood:?}");
    drop(servers);
}

#[test]
fn more_devices_than_a_machine_takes_are_refused_in_words_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nobody.sock");
    let devices: Vec<String> =
        (0..65).map(|n| format!("--device=vfio-user:{},id=dev{n}", socket.display())).collect();
    for more in [&[][..], &["--incoming", "tcp:127.0.0.1:0", "--tls-creds", creds()]] {
        let mut arguments = vec!["vm", "--memory", "192M"];
        arguments.extend_from_slice(more);
        arguments.extend(devices.iter().map(String::as_str));
        fails(&arguments, 2, "65 devices are too many: a machine takes up to 64");
    }
}

#[test]
fn the_demo_takes_as_many_devices_as_a_machine() {
    fails(&["demo", "--devices", "65"], 2, "65 is not in 1..=64");
}

#[test]
fn ram_that_is_too_small_for_the_devices_is_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let setup = Setup { devices: 16, memory: "16M", ..software(dir.path(), "a", &[]) };
    let (_devices, arguments) = setup.prepare();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    fails(&words, 1, "16 MiB of memory are too few for 16 devices");
}
