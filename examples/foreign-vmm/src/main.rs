//! A VMM that shares nothing with vfio-migrate, and embeds it: the proof that the library fits one that nobody here wrote.
//!
//! Its RAM is vm-memory's, of two kinds; its device is open, mapped and driven before the library sees it; config space, interrupts and
//! ports are its own; and its machine is made of what has arrived. `migrate.rs` is all that knows of the library.
//!
//! `foreign-vmm A.sock B.sock` boots the guest program with the vfio-user device at `A.sock`, moves it to the device at `B.sock` and
//! back, ten times in all, and says what the guest found missing.

mod error;
mod hardware;
mod irq;
mod memory;
mod migrate;
mod pci;
mod platform;
mod vcpu;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use vfio_migration_guest_image::{Report, Stage};

use crate::error::Error;
use crate::migrate::{Shared, move_guest};
use crate::vm::Parts;

const USAGE: &str = "usage: foreign-vmm [--huge] [--forget-anonymous] [--moves N] A.sock B.sock";
/// What the guest writes.
const BYTES_PER_SECOND: u64 = 16 << 20;
/// Longest wait for the guest to do what it does all the time.
const PATIENCE: Duration = Duration::from_secs(60);

struct Arguments {
    sockets: [PathBuf; 2],
    moves: u32,
    huge: bool,
    forget_anonymous: bool,
}

fn main() -> ExitCode {
    let Some(arguments) = arguments() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&arguments) {
        Ok(report) if report.lost() == 0 => ExitCode::SUCCESS,
        Ok(report) => {
            eprintln!("the guest lost {}: {report:?}", report.lost());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("foreign-vmm: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Option<Arguments> {
    let mut arguments =
        Arguments { sockets: Default::default(), moves: 10, huge: false, forget_anonymous: false };
    let (mut given, mut sockets) = (std::env::args_os().skip(1), Vec::new());
    while let Some(argument) = given.next() {
        match argument.to_str() {
            Some("--huge") => arguments.huge = true,
            Some("--forget-anonymous") => arguments.forget_anonymous = true,
            Some("--moves") => arguments.moves = given.next()?.to_str()?.parse().ok()?,
            _ => sockets.push(PathBuf::from(argument)),
        }
    }
    arguments.sockets = sockets.try_into().ok()?;
    Some(arguments)
}

/// Boots the guest, moves it back and forth, and gives its last report.
fn run(arguments: &Arguments) -> Result<Report, Error> {
    let [here, there] = &arguments.sockets;
    let mut machine = Shared::new(Parts::open(here, arguments.huge)?, arguments.forget_anonymous)?;
    machine.0.vm.boot(BYTES_PER_SECOND)?;
    machine.0.vm.vcpu.resume()?;
    let mut report = works(&machine)?;
    println!("the guest runs");
    for (number, socket) in (1..=arguments.moves).zip([there, here].into_iter().cycle()) {
        let (moved, downtime) = move_guest(&machine, Parts::open(socket, arguments.huge)?)?;
        machine = moved;
        report = works(&machine)?;
        println!("move {number}: stood for {} ms, {} lost", downtime.as_millis(), report.lost());
        if report.lost() > 0 {
            break;
        }
    }
    Ok(report)
}

/// An error and all that it came of.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Waits until the guest has gone once more over all of its pages and blocks, with new blocks and interrupts.
fn works(machine: &Shared) -> Result<Report, Error> {
    let begun = Instant::now();
    let mut first = None;
    loop {
        let now = machine.0.vm.report()?;
        if now.lost() > 0 {
            return Ok(now);
        }
        if let Some(failed) = machine.0.vm.vcpu.failed() {
            return Err(Error::Failed("running the guest", format!("{failed}: {now:?}").into()));
        }
        let first = *first.get_or_insert(now);
        let more = |of: fn(&Report) -> u64, than: u64| of(&now) >= of(&first) + than;
        let works = now.stage == Stage::Running
            && more(|report| report.page_passes, 2)
            && more(|report| report.block_passes, 2)
            && more(|report| report.dma_blocks, 50)
            && more(|report| report.interrupts, 10);
        if works {
            return Ok(now);
        }
        if begun.elapsed() > PATIENCE {
            return Err(Error::Failed("waiting for the guest", format!("{now:?}").into()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
