//! Guests with many devices: as many as a machine takes, on the functions of all its slots.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use serde_json::json;

use crate::late::connects_msix;
use crate::proxy::{self, Act};
use crate::support::{Process, Setup, Vm, creds, fails, software, until};

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

/// A receiver whose devices are each behind a proxy: `act` says what becomes of a request to the n-th. With their servers.
fn receiver_behind_proxies(
    dir: &Path,
    devices: usize,
    act: impl Fn(usize, u16, &[u8]) -> Act + Send + Sync + 'static,
) -> (Vm, Vec<Process>) {
    let (act, mut words, mut servers) =
        (Arc::new(act), vec!["--incoming".to_owned(), "tcp:127.0.0.1:0".into()], vec![]);
    for n in 0..devices {
        let (server, path) = (dir.join(format!("server{n}")), dir.join(format!("proxy{n}")));
        let socket = server.to_str().unwrap();
        servers.push(Process::start(&["device", "--state-size", "64K", "--socket", socket]));
        until("the server", || server.exists().then_some(()));
        let act = act.clone();
        proxy::start(&path, &server, move |command, body| act(n, command, body));
        words.extend(["--device".into(), format!("vfio-user:{},id=dev{n}", path.display())]);
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    (Setup { devices: 0, vm_arguments: &words, ..Setup::new(dir, "b") }.start(), servers)
}

/// Has each of so many wait until all of them do: those that go one after another never meet.
#[derive(Clone)]
struct Meeting(Arc<(Mutex<usize>, Condvar)>, usize);

impl Meeting {
    /// Less than what a device has for an answer.
    const PATIENCE: Duration = Duration::from_secs(7);

    fn of(many: usize) -> Self {
        Self(Arc::default(), many)
    }

    fn wait(&self) {
        let (met, changed) = &*self.0;
        let mut met = met.lock().unwrap();
        *met += 1;
        changed.notify_all();
        drop(changed.wait_timeout_while(met, Self::PATIENCE, |met| *met < self.1).unwrap());
        // Who did not meet the others is not counted for those that come later.
        if !self.was_full() {
            *self.0.0.lock().unwrap() -= 1;
        }
    }

    fn was_full(&self) -> bool {
        *self.0.0.lock().unwrap() == self.1
    }
}

/// A guest with so many devices goes to `there`.
fn arrive(dir: &Path, devices: usize, there: &Vm, arrives: &AtomicBool) {
    let pace = &["--state-size", "64K", "--state-dirty-rate", "0", "--dma-interval", "8ms"];
    let vm = Setup { devices, device_arguments: pace, ..Setup::new(dir, "a") }.start();
    vm.warm();
    let at = there.incoming();
    arrives.store(true, Ordering::Release);
    let info = vm.migrate(&at, json!({"downtime-limit": 60_000}));
    arrives.store(false, Ordering::Release);
    assert_eq!(info["status"], "completed", "{info}");
}

/// Each device maps the BARs of all others as a guest arrives: all devices at once, and nothing else is asked so often.
#[test]
fn eight_devices_map_each_others_bars_side_by_side() {
    const DEVICES: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    let meeting = Meeting::of(DEVICES);
    let arrives = Arc::new(AtomicBool::new(false));
    let counts: [[AtomicUsize; 2]; DEVICES] = Default::default();
    let counts = Arc::new(counts);
    let (now, count, met) = (arrives.clone(), counts.clone(), meeting.clone());
    let (there, _servers) = receiver_behind_proxies(dir.path(), DEVICES, move |n, command, _| {
        if !now.load(Ordering::Acquire) {
            return Act::Pass;
        }
        let is_map = command == proxy::DMA_MAP;
        let first = count[n][usize::from(!is_map)].fetch_add(1, Ordering::AcqRel) == 0;
        if is_map && first {
            met.wait();
        }
        Act::Pass
    });
    arrive(dir.path(), DEVICES, &there, &arrives);
    let maps: Vec<usize> = counts.iter().map(|count| count[0].load(Ordering::Acquire)).collect();
    assert_eq!(maps, [DEVICES - 1; DEVICES], "one of each of the others");
    let rest: Vec<usize> = counts.iter().map(|count| count[1].load(Ordering::Acquire)).collect();
    assert!(rest.iter().all(|rest| *rest < 100), "{rest:?}");
    assert!(meeting.was_full(), "each waited for the one before");
}

/// Each device is given its guest's interrupts by its own server: all at once.
#[test]
fn devices_are_given_their_interrupts_side_by_side() {
    const DEVICES: usize = 4;
    let meeting = Meeting::of(DEVICES);
    let dir = tempfile::tempdir().unwrap();
    let arrives = Arc::new(AtomicBool::new(false));
    let (now, met, given): (_, _, [AtomicBool; DEVICES]) =
        (arrives.clone(), meeting.clone(), Default::default());
    let (there, _servers) = receiver_behind_proxies(dir.path(), DEVICES, move |n, command, body| {
        let first = now.load(Ordering::Acquire)
            && connects_msix(command, body)
            && !given[n].swap(true, Ordering::AcqRel);
        if first {
            met.wait();
        }
        Act::Pass
    });
    arrive(dir.path(), DEVICES, &there, &arrives);
    assert!(meeting.was_full(), "each waited for the one before");
    there.assert_runs();
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
