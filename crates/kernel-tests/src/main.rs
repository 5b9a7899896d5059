//! Tests of the real VFIO uAPI, inside a kernel that `cargo xtask kernel-test` boots.
//!
//! The program is the machine's first process: it loads the modules, runs each test in a process of its own, says on the
//! console how each ended, and switches the machine off. On any other machine it only lists its tests.
#![forbid(unsafe_code)]

mod check;
mod command;
mod described;
mod device_file;
mod edu;
mod engine;
mod guest;
mod host_report;
mod init;
mod instance;
mod iommufd_mock;
mod kernel_device;
mod migdev;
mod mtty;
mod network;
mod pair;
mod pci;
mod pin;
mod refused;
mod shared_space;
mod table;
mod vm;
mod xhci;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if std::process::id() == 1 {
        return init::run();
    }
    match words.as_slice() {
        ["run", name] => table::run(name),
        ["list"] => {
            for test in table::TESTS {
                println!("{}", test.name);
            }
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: vfio-migration-kernel-tests list (all else is for `cargo xtask kernel-test`)");
            ExitCode::from(2)
        }
    }
}
