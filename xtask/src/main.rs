//! House keeping. `cargo xtask test` installs what the tests need and passes every one of them.
#![forbid(unsafe_code)]

mod api;
mod bounded;
mod change;
mod command;
mod kernel_test;
mod package;
mod pictures;
mod programs;
mod qemu_peer;
mod rings;
mod rules;
mod run;
mod tools;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::run::Outcome;

const HELP: &str = "\
cargo xtask test [RING…]   run the rings of tests (all when none is named); ends with the longest tests and a table
cargo xtask test --quick   run what is over in minutes: rules, lint, and of the tests those of the pure crates, of the
                           crates that differ from upstream's main branch, and the short ones of those built on them
cargo xtask kernel-test [PART OF A NAME…]
                           run the kernel ring alone, tests in a booted kernel with real VFIO: all of them, or those
                           that are named so
cargo xtask kernel-test --iommufd-mock [PART OF A NAME…]
                           the same in a kernel that is built for it (minutes, once), whose mock IOMMU tracks dirty
                           pages; no part of the kernel ring
cargo xtask soak [N]       run the demo N times in a row (20 when not given); every run must verify
cargo xtask generate       write man pages, completions and schemas again
cargo xtask api [--check]  write the listings of public interfaces (api.txt) again, or compare them with the code
cargo xtask pictures [NAME…]
                           record the pictures in docs/pictures again, all or those that are named so, with the command
                           that VFIO_MIGRATE names, or with a release build
cargo xtask rules          check the house rules alone (length and names of files, floors, circles, unsafe, links)

Rings: rules, lint, test, qemu-peer, python-peers, kernel, docs, package
A ring that this machine cannot run is skipped with a loud line; with CI set that is a failure.";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let top = top();
    if words.first() == Some(&"help") || words.iter().any(|word| matches!(*word, "--help" | "-h")) {
        println!("{HELP}");
        return ExitCode::SUCCESS;
    }
    let outcome = match words.as_slice() {
        ["test", "--quick"] => rings::run_quick(&top),
        ["test", wanted @ ..] => rings::run(&top, wanted),
        ["kernel-test"] => rings::run(&top, &["kernel"]),
        ["kernel-test", "--iommufd-mock", named @ ..] => kernel_test::run_mock(&top, named).and_then(ran),
        ["kernel-test", named @ ..] => kernel_test::run(&top, named).and_then(ran),
        ["soak"] => rings::soak(&top, 20),
        ["soak", runs] => match runs.parse() {
            Ok(runs) => rings::soak(&top, runs),
            Err(_) => Err(format!("'{runs}' is no number of runs")),
        },
        ["api"] => api::write(&top),
        ["api", "--check"] => api::check(&top).and_then(ran),
        ["generate"] => rings::generate(&top),
        ["pictures", named @ ..] => pictures::make(&top, named),
        ["rules"] => rules::check(&top),
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("xtask: {text}");
            ExitCode::FAILURE
        }
    }
}

/// What was asked for by itself has to run.
fn ran(outcome: Outcome) -> Result<(), String> {
    match outcome {
        Outcome::Skipped(why) => Err(format!("it cannot run here: {why}")),
        Outcome::Passed(_) => Ok(()),
    }
}

/// The top of the tree.
fn top() -> PathBuf {
    let here =
        std::env::var_os("CARGO_MANIFEST_DIR").map_or(env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.parent().map_or(here.clone(), PathBuf::from)
}
