//! The guest of a VMM that shares nothing with this project moves back and forth, whole; and what is forgotten on the way is noticed.

use std::path::Path;
use std::process::{Command, Output};

use vfio_migration_sim::{Options, StopHandle, serve};

/// Runs the VMM with a sample device on each side.
fn run(arguments: &[&str]) -> Option<Output> {
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("skipped: /dev/kvm cannot be opened ({error})");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let sockets = [dir.path().join("a.sock"), dir.path().join("b.sock")];
    let stop = StopHandle::new().unwrap();
    Some(std::thread::scope(|scope| {
        for socket in &sockets {
            let stop = &stop;
            scope.spawn(move || serve(socket, Options::default(), stop).unwrap());
        }
        let output = vmm(arguments, &sockets);
        stop.stop();
        output
    }))
}

fn vmm(arguments: &[&str], sockets: &[impl AsRef<Path>]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_foreign-vmm"));
    command.args(arguments).args(sockets.iter().map(AsRef::as_ref)).output().unwrap()
}

#[test]
fn a_guest_moves_back_and_forth_ten_times() {
    let Some(output) = run(&[]) else { return };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.lines().any(|line| line.starts_with("move 10:") && line.ends_with(" 0 lost")), "{said}");
}

#[test]
fn a_dirty_bit_that_is_dropped_is_noticed() {
    let Some(output) = run(&["--forget-anonymous", "--moves", "1"]) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    // What it missed may be what it counts by, and it cannot go on then.
    assert!(said.contains("the guest lost") || said.contains("the guest program gave up"), "{said}");
}
