//! The machine's first process.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

use crate::check::Outcome;
use crate::network;
use crate::pair::Role;
use crate::table::{Need, TESTS};
use vfio_migration_types::error_chain;

/// Where the image keeps the modules, and in which order they are loaded.
const MODULES: &str = "/modules";
/// Word of the kernel's command line by which the last test is made to fail: the negative control of the whole ring.
const SABOTAGE: &str = "ktest.sabotage";
/// Word of the kernel's command line that says what this machine has: no test is left out for want of what it should.
const PROMISED: &str = "ktest.has=";
/// Word of the kernel's command line that names tests by parts of their names, with commas: no other runs.
const ONLY: &str = "ktest.only=";
/// Few tests take a second, those with a guest ten. One that takes this long hangs.
const PATIENCE: Duration = Duration::from_secs(180);

pub(crate) fn run() -> ExitCode {
    if let Err(error) = set_up() {
        println!("KTEST-BROKEN {}", error_chain(&*error));
    } else {
        run_all();
    }
    // What was printed is on the console before the machine is off.
    rustix::fs::sync();
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}

fn set_up() -> Outcome {
    for (what, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        fs::create_dir_all(at)?;
        mount(what, at, what, MountFlags::empty(), None)?;
    }
    for name in fs::read_to_string(format!("{MODULES}/order"))?.lines() {
        let file = fs::File::open(format!("{MODULES}/{name}.ko"))?;
        rustix::system::finit_module(&file, c"", 0)
            .map_err(|error| format!("loading the module {name}: {error}"))?;
    }
    if let Some(role) = Role::here()? {
        network::up(role.address())?;
    }
    let line = fs::read_to_string("/proc/cmdline")?;
    let promised = line.split_whitespace().find_map(|word| word.strip_prefix(PROMISED));
    for word in promised.ok_or("nobody says what this machine has")?.split(',') {
        let need = Need::named(word).ok_or_else(|| format!("'{word}' is nothing that a test needs"))?;
        if !there(need) {
            return Err(format!("this machine should have '{word}', and has not").into());
        }
    }
    Ok(())
}

/// Whether this kernel and its modules have a need of tests.
fn there(need: Need) -> bool {
    let path = match need {
        Need::Mtty => "/sys/class/mdev_bus/mtty",
        Need::Migdev => "/sys/class/mdev_bus/migdev",
        Need::Cdev => "/dev/iommu",
        Need::Devlink => "/sys/bus/netdevsim",
        Need::Kvm => "/dev/kvm",
        Need::IommufdMock => "/sys/bus/iommufd_mock",
        Need::Edu => return crate::edu::place().is_some(),
        Need::Peer => return with_peer() && network::card().is_some(),
        Need::NoRemapping => return crate::xhci::without_remapping(),
        Need::NoCdev => return !Path::new("/dev/iommu").exists(),
    };
    Path::new(path).exists()
}

/// Whether a second machine was promised.
fn with_peer() -> bool {
    matches!(Role::here(), Ok(Some(_)))
}

fn run_all() {
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let only = line.split_whitespace().find_map(|word| word.strip_prefix(ONLY));
    let named = |name: &str| only.is_none_or(|only| only.split(',').any(|part| name.contains(part)));
    let with_peer = with_peer();
    let tests: Vec<_> = TESTS
        .iter()
        .filter(|test| test.needs.contains(&Need::Peer) == with_peer)
        .filter(|test| test.needs.contains(&Need::NoRemapping) == crate::xhci::without_remapping())
        .filter(|test| named(test.name) && test.needs.iter().all(|need| there(*need)))
        .collect();
    // Announced first: one that takes the machine down with it is missed then.
    for test in &tests {
        println!("KTEST-PLAN {}", test.name);
    }
    let sabotage = line.split_whitespace().any(|word| word == SABOTAGE);
    for (index, test) in tests.iter().enumerate() {
        let began = Instant::now();
        let mut outcome = run_apart(test.name);
        if sabotage && index + 1 == tests.len() {
            outcome = Err("sabotaged on purpose".into());
        }
        let took = began.elapsed().as_millis();
        match outcome {
            Ok(()) => println!("KTEST-OK {} {took}", test.name),
            Err(error) => {
                println!("KTEST-FAILED {} {took} {}", test.name, error_chain(&*error).replace('\n', " | "))
            }
        }
    }
    println!("KTEST-END {}", tests.len());
}

/// Runs a test in a process of its own: one that crashes or hangs is its own failure alone.
fn run_apart(name: &str) -> Outcome {
    let mut child = Command::new("/proc/self/exe")
        .args(["run", name])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            return Err("it hangs".into());
        }
        // A guard against a hang, not a way to wait for something to be true.
        std::thread::sleep(Duration::from_millis(5));
    };
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        std::io::Read::read_to_string(&mut stderr, &mut text)?;
    }
    Err(format!("{status}: {}", text.trim()).into())
}
