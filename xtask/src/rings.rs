//! The rings of tests, in order, and the table at their end.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::change::Change;
use crate::run::{Outcome, cargo, finish};
use crate::{api, kernel_test, package, programs, qemu_peer, rules, tools};

/// One ring.
struct Ring {
    name: &'static str,
    what: &'static str,
    run: fn(&mut Session) -> Result<Outcome, String>,
    /// It is over in minutes whatever changed: part of a quick run.
    quick: bool,
}

/// One run of rings.
struct Session<'a> {
    top: &'a Path,
    /// What is tested of all, in a quick run.
    change: Option<Change>,
    /// How long each test took.
    took: Vec<(Duration, String)>,
}

/// How many of the longest tests are named at the end.
const LONGEST: usize = 10;

const RINGS: [Ring; 8] = [
    Ring { name: "rules", what: "house rules", run: rules_ring, quick: true },
    Ring { name: "lint", what: "formatting and lints", run: lint, quick: true },
    Ring {
        name: "test",
        what: "pure tests, sockets, KVM, device servers, and the command's processes",
        run: test,
        quick: true,
    },
    Ring {
        name: "qemu-peer",
        what: "the sample device's server under QEMU's vfio-user client",
        run: |session| match qemu_peer::fetch(session.top) {
            Ok(unpacked) => own_ring(session, "qemu-peer", Some(("VFIO_MIGRATE_QEMU", &unpacked))),
            Err(why) => Ok(Outcome::Skipped(format!("QEMU cannot be had: {why}"))),
        },
        quick: false,
    },
    Ring {
        name: "python-peers",
        what: "our vfio-user client and server at a server and a client in Python",
        run: |session| {
            if tools::python() {
                own_ring(session, "python-peers", None)
            } else {
                Ok(Outcome::Skipped("python3 is not there and cannot be installed".into()))
            }
        },
        quick: false,
    },
    Ring {
        name: "kernel",
        what: "a booted kernel with real VFIO, in software emulation",
        run: |session| kernel_test::run(session.top, &[]),
        quick: false,
    },
    Ring {
        name: "docs",
        what: "documentation and its examples, and the listings of public interfaces",
        run: docs,
        quick: false,
    },
    Ring {
        name: "package",
        what: "what would be published, compiled out of its packages, and the guide on top of it",
        run: |session| package::check(session.top),
        quick: false,
    },
];

/// Runs the wanted rings, all when none is named, and prints a table.
pub(crate) fn run(top: &Path, wanted: &[&str]) -> Result<(), String> {
    if let Some(unknown) = wanted.iter().find(|name| RINGS.iter().all(|ring| ring.name != **name)) {
        return Err(format!("there is no ring '{unknown}'"));
    }
    let wanted = RINGS.iter().filter(|ring| wanted.is_empty() || wanted.contains(&ring.name));
    run_all(Session { top, change: None, took: Vec::new() }, wanted)
}

/// Runs what is over in minutes: the quick rings, and of the tests those of the pure crates and what the change touches.
pub(crate) fn run_quick(top: &Path) -> Result<(), String> {
    let change = Change::find(top)?;
    eprintln!("{}", change.text());
    let session = Session { top, change: Some(change), took: Vec::new() };
    run_all(session, RINGS.iter().filter(|ring| ring.quick))?;
    eprintln!("This was a quick run; `cargo xtask test` runs the rest.");
    Ok(())
}

fn run_all<'a>(mut session: Session, rings: impl Iterator<Item = &'a Ring>) -> Result<(), String> {
    let strict = std::env::var_os("CI").is_some();
    let (mut rows, mut bad, mut passed, mut failed, mut skipped) = (Vec::new(), false, 0, 0, 0);
    for ring in rings {
        eprintln!("== {}: {}", ring.name, ring.what);
        let began = Instant::now();
        let result = (ring.run)(&mut session);
        let took = began.elapsed();
        let row = match result {
            Ok(Outcome::Passed(tests)) => {
                passed += tests.unwrap_or(1);
                tests.map_or("passed".into(), |tests| format!("passed, {tests} tests"))
            }
            Ok(Outcome::Skipped(why)) => {
                eprintln!("SKIPPED RING {}: {why}", ring.name);
                bad |= strict;
                skipped += 1;
                format!("SKIPPED: {why}")
            }
            Err(why) => {
                eprintln!("FAILED RING {}: {why}", ring.name);
                bad = true;
                failed += 1;
                format!("FAILED: {why}")
            }
        };
        rows.push((ring.name, took, row));
    }
    session.took.sort_by(|one, other| other.cmp(one));
    if !session.took.is_empty() {
        println!("\nThe longest tests:");
    }
    for (took, title) in session.took.iter().take(LONGEST) {
        println!("{:>8.1} s  {title}", took.as_secs_f64());
    }
    println!();
    for (name, took, row) in rows {
        println!("{name:<10}{:>7.1} s  {row}", took.as_secs_f64());
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if bad { Err("not everything passed".into()) } else { Ok(()) }
}

/// Writes the generated files again.
pub(crate) fn generate(top: &Path) -> Result<(), String> {
    cargo(top, &["run", "--release", "--quiet", "--package", "vfio-migrate", "--", "generate", "."])
        .map(|_| ())
}

fn rules_ring(session: &mut Session) -> Result<Outcome, String> {
    rules::check(session.top)?;
    Ok(Outcome::Passed(None))
}

fn lint(session: &mut Session) -> Result<Outcome, String> {
    let there =
        || ["fmt", "clippy"].iter().all(|tool| quiet(Command::new(env!("CARGO")).args([*tool, "--version"])));
    let add = || quiet(Command::new("rustup").args(["component", "add", "rustfmt", "clippy"]));
    let ready = there() || (add() && there());
    if !ready {
        return Ok(Outcome::Skipped(
            "rustfmt and clippy are not there, and rustup could not add them".into(),
        ));
    }
    cargo(session.top, &["fmt", "--all", "--check"])?;
    let all = ["--release", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    cargo(session.top, &[&["clippy"], &all[..]].concat())?;
    Ok(Outcome::Passed(None))
}

fn test(session: &mut Session) -> Result<Outcome, String> {
    tools::ready();
    let began = Instant::now();
    let all = programs::build(session.top)?;
    eprintln!("built in {:.1} s", began.elapsed().as_secs_f64());
    let all: Vec<_> = all.into_iter().filter(|test| test.ring().is_none()).collect();
    let found = all.len();
    let tests: Vec<_> = match &session.change {
        Some(change) => all.into_iter().filter(|test| change.wants(&test.home, test.last)).collect(),
        None => all,
    };
    let left_out = found - tests.len();
    let passed = run_programs(session, tests, left_out, None)?;
    if !kvm_answers() {
        let why = "/dev/kvm does not answer, so the KVM tests in it did nothing; the others passed";
        return Ok(Outcome::Skipped(why.into()));
    }
    Ok(Outcome::Passed(Some(passed)))
}

/// Runs the tests of a ring that has a test program of its own, each with `variable` in its environment.
fn own_ring(session: &mut Session, ring: &str, variable: Option<(&str, &Path)>) -> Result<Outcome, String> {
    let tests: Vec<_> =
        programs::build(session.top)?.into_iter().filter(|test| test.ring() == Some(ring)).collect();
    if tests.is_empty() {
        return Err("its test program was not found".into());
    }
    Ok(Outcome::Passed(Some(run_programs(session, tests, 0, variable)?)))
}

/// Runs tests and returns how many passed.
fn run_programs(
    session: &mut Session,
    tests: Vec<programs::Test>,
    left_out: usize,
    variable: Option<(&str, &Path)>,
) -> Result<u64, String> {
    let ended = programs::run(session.top, tests, variable)?;
    session.took.extend(ended.took);
    println!(
        "{} passed, {} failed, {} ignored, {left_out} left out",
        ended.passed,
        ended.failed.len(),
        ended.ignored
    );
    if !ended.failed.is_empty() {
        eprintln!("These tests failed:\n  {}", ended.failed.join("\n  "));
        return Err(format!("{} tests", ended.failed.len()));
    }
    Ok(ended.passed)
}

fn docs(session: &mut Session) -> Result<Outcome, String> {
    let text = cargo(session.top, &["test", "--release", "--workspace", "--doc"])?;
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(session.top).args(["doc", "--release", "--quiet", "--workspace", "--no-deps"]);
    command.env("RUSTDOCFLAGS", "--deny warnings");
    finish(command, "cargo doc")?;
    if let Outcome::Skipped(why) = api::check(session.top)? {
        eprintln!("SKIPPED: {why}");
    }
    Ok(Outcome::Passed(Some(count(&text))))
}

/// Runs the demo `runs` times in a row; every run must verify.
pub(crate) fn soak(top: &Path, runs: u32) -> Result<(), String> {
    cargo(top, &["build", "--release", "--package", "vfio-migrate"])?;
    for run in 1..=runs {
        let began = Instant::now();
        cargo(top, &["run", "--quiet", "--release", "--package", "vfio-migrate", "--", "demo", "--json"])
            .map_err(|error| format!("run {run} of {runs}: {error}"))?;
        eprintln!("run {run} of {runs} verified in {:.1} s", began.elapsed().as_secs_f64());
    }
    Ok(())
}

/// Whether a command succeeds, whatever it prints.
fn quiet(command: &mut Command) -> bool {
    use std::process::Stdio;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn kvm_answers() -> bool {
    std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

/// Sums cargo's `test result: ok. N passed` lines.
fn count(text: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.strip_prefix("test result: ok. "))
        .filter_map(|rest| rest.split(' ').next()?.parse::<u64>().ok())
        .sum()
}
